"""Who may do what: the one place that every door asks."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from urllib.parse import unquote

from .settings import Settings, is_loopback

__all__ = ["Action", "Caller", "Policy"]


class Action(StrEnum):
    """What a caller may want with a dataset."""

    READ = "read"
    MAP = "map"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks.

    Attributes:
        peer: The address, as gRPC gives it.
    """

    peer: str

    @property
    def is_local(self) -> bool:
        """Whether the caller is on this host, as far as its address tells."""
        kind, _, address = unquote(self.peer).partition(":")
        if kind == "unix":
            return True
        host = address.rpartition(":")[0].removeprefix("[").removesuffix("]")
        return kind in ("ipv4", "ipv6") and is_loopback(host)


class Policy:
    """Decides for every door: the gRPC methods, and the mapped store.

    Args:
        settings: The server's; ``mapping`` is what it says of the store, ``admin`` of who may change what it serves.
        authenticates: Whether callers must say who they are.
    """

    def __init__(self, settings: Settings, *, authenticates: bool = False) -> None:
        self._mapping = settings.mapping
        self._admin = settings.admin
        self._authenticates = authenticates

    def permits(self, caller: Caller, action: Action, dataset: str) -> bool:
        """Whether a caller may do something with a dataset.

        Reading is open to everybody as long as nobody has to say who they are. Mapping goes past this server: whoever can open a file
        reads all of it, and goes on reading when a permission has been withdrawn. So a server that wants to know its callers allows it
        only where it is told to. Changing what is served is for callers on this host, unless it is allowed to all or to none.
        """
        if action is Action.READ:
            return True
        if action is Action.ADMIN:
            if self._admin == "auto":
                return not self._authenticates and caller.is_local
            return self._admin == "on"
        if self._mapping == "auto":
            return not self._authenticates
        return self._mapping == "on"
