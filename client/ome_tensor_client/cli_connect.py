"""How commands reach a server: what was said before the command's name of who calls, and whom to trust."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

if TYPE_CHECKING:
    from .client import Client

__all__ = [
    "PATIENCE",
    "Ca",
    "Cert",
    "Insecure",
    "Key",
    "Security",
    "ServerName",
    "Tls",
    "TokenFile",
    "reach",
    "security",
    "set_security",
]

#: Seconds for which a command asks again before it says that nothing answers: a person waits for it.
PATIENCE = 2.0

_VARIABLES = "OME_TENSOR_CLIENT_"

Tls: TypeAlias = Annotated[
    bool, typer.Option("--tls", envvar=f"{_VARIABLES}TLS", help="Talk TLS, trusting whom the system trusts.", show_envvar=False)
]
Ca: TypeAlias = Annotated[
    str,
    typer.Option(metavar="FILE", envvar=f"{_VARIABLES}CA", help="Talk TLS, trusting these authorities (PEM).", show_envvar=False),
]
Cert: TypeAlias = Annotated[
    str, typer.Option(metavar="FILE", envvar=f"{_VARIABLES}CERT", help="A client certificate (PEM).", show_envvar=False)
]
Key: TypeAlias = Annotated[str, typer.Option(metavar="FILE", envvar=f"{_VARIABLES}KEY", help="Its key (PEM).", show_envvar=False)]
ServerName: TypeAlias = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        envvar=f"{_VARIABLES}SERVER_NAME",
        help="The name that the server's certificate is for, where that is another.",
        show_envvar=False,
    ),
]
TokenFile: TypeAlias = Annotated[
    str,
    # No option for the token itself: whoever lists processes would see it.
    typer.Option(
        metavar="FILE", envvar=f"{_VARIABLES}TOKEN_FILE", help="File that holds the token to show the server.", show_envvar=False
    ),
]
Insecure: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--insecure", envvar=f"{_VARIABLES}INSECURE", help="Let a token travel in plain text beyond this host.", show_envvar=False
    ),
]


@dataclass(frozen=True, slots=True)
class Security:
    """Fields of :class:`ome_tensor_client.Options` of the same names."""

    tls: bool = False
    ca: str = ""
    cert: str = ""
    key: str = ""
    server_name: str = ""
    token_file: str = ""
    insecure: bool = False


_current = Security()


def set_security(chosen: Security) -> None:
    """Of this process's commands from now on."""
    global _current
    _current = chosen


def security() -> dict[str, Any]:
    """As options of :func:`ome_tensor_client.connect`."""
    return {field.name: getattr(_current, field.name) for field in fields(_current)}


def reach(target: str, *, timeout: float, retry_for: float = PATIENCE, **options: Any) -> Client:
    """:func:`ome_tensor_client.connect`, as the command line was told to."""
    from . import connect

    return connect(target, timeout=timeout, retry_for=retry_for, **security() | options)
