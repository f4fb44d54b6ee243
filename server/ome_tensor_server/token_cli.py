"""``ome-tensor token``: makes, lists and revokes the tokens that a server lets in."""

from __future__ import annotations

import json as json_module
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from .scopes import parse_scopes
from .tokens import Token, create, find, parse_expiry, revoke

__all__ = ["token_commands"]

token_commands = typer.Typer(
    help="Make, list and revoke the tokens that a server lets in (serve --tokens FILE).", no_args_is_help=True
)

File: TypeAlias = Annotated[
    Path,
    typer.Option("--tokens", metavar="FILE", envvar="OME_TENSOR_TOKENS", help="The server's file of tokens.", show_default=False),
]


@token_commands.command("create")
def create_token(
    tokens: File,
    scope: Annotated[
        list[str],
        typer.Option(
            metavar="SCOPE",
            help="What it allows: read:PATTERN, write:PATTERN or admin:PATTERN (each allows what the one before does); * stands for "
            "anything. Again for more.",
            show_default=False,
        ),
    ],
    expires: Annotated[str, typer.Option(metavar="WHEN", help="30d, 12h, 90m, a date, or never.")] = "90d",
    name: Annotated[str, typer.Option(metavar="TEXT", help="What it is for.", show_default=False)] = "",
    certificate: Annotated[
        str,
        typer.Option(metavar="NAME", help="For client certificates of this common name, instead of a token.", show_default=False),
    ] = "",
) -> None:
    """Make a token. It is printed once, and cannot be had again: the file holds its hash."""
    made, text = create(tokens, parse_scopes(scope), name=name, expires=parse_expiry(expires), certificate=certificate)
    if text:
        typer.echo(text)
    until = "never" if made.expires is None else f"{made.expires:%Y-%m-%d %H:%M} UTC"
    typer.echo(f"{made.id}: {' '.join(map(str, made.scopes))}, expires {until}", err=True)


@token_commands.command("list")
def list_tokens(tokens: File, json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List tokens: what they allow, and until when."""
    found = find(tokens)
    if json:
        # Hashes are of no use to anybody who may see this.
        shown = [{key: value for key, value in token.to_json().items() if key != "sha256"} for token in found]
        typer.echo(json_module.dumps(shown, indent=1))
        return
    if not found:
        typer.echo("no tokens")
    for token in found:
        typer.echo(_line(token))


def _line(token: Token) -> str:
    until = "never" if token.expires is None else f"{token.expires:%Y-%m-%d %H:%M}"
    ended = " (expired)" if token.expires is not None and token.expires <= datetime.now(UTC) else ""
    what = f"certificate {token.certificate}" if token.certificate else token.name or "-"
    return f"{token.id}  {until}{ended}  {' '.join(map(str, token.scopes))}  {what}"


@token_commands.command("revoke")
def revoke_token(
    tokens: File, id: Annotated[str, typer.Argument(metavar="ID", help="As `list` shows it.", show_default=False)]
) -> None:
    """Revoke a token: servers refuse it from now on, and end what it reads."""
    typer.echo(f"revoked {_line(revoke(tokens, id))}")
