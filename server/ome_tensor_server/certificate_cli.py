"""``ome-tensor certificate``: an authority of one's own, and certificates for servers and clients."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ome_tensor.errors import InvalidArgument

from .certificates import AUTHORITY, AUTHORITY_KEY, issue

__all__ = ["certificate"]


def certificate(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where the files lie.", show_default=False)],
    hosts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="HOST", help="Names and addresses that clients reach the server by; none: a client's.", show_default=False
        ),
    ] = None,
    name: Annotated[
        str,
        typer.Option(metavar="NAME", help="Of the files (else server); whom a client's certificate is for.", show_default=False),
    ] = "",
    days: Annotated[int, typer.Option(help="How long it is good for.")] = 365,
) -> None:
    """Make a certificate and its key, signed by an authority of your own, which is made the first time.

    Clients get ca.pem; nobody gets ca.key.
    """
    if not name and not hosts:
        # Taken for a client's of the name "server" it would replace the server's.
        raise InvalidArgument("say the server's names and addresses, or --name for a client's certificate", field="host")
    for path in issue(folder, name or "server", hosts or (), days):
        typer.echo(path)
    typer.echo(f"clients need {folder / AUTHORITY}; keep {folder / AUTHORITY_KEY} to yourself", err=True)
