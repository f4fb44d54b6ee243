"""Who may do what: the one place that every door asks."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from .settings import Settings

__all__ = ["Action", "Caller", "Policy"]


class Action(StrEnum):
    """What a caller may want with a dataset."""

    READ = "read"
    MAP = "map"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks.

    Attributes:
        peer: The address, as gRPC gives it.
    """

    peer: str


class Policy:
    """Decides for every door: the gRPC methods, and the mapped store.

    Args:
        settings: The server's; ``mapping`` is what it says of the store.
        authenticates: Whether callers must say who they are.
    """

    def __init__(self, settings: Settings, *, authenticates: bool = False) -> None:
        self._mapping = settings.mapping
        self._authenticates = authenticates

    def permits(self, caller: Caller, action: Action, dataset: str) -> bool:
        """Whether a caller may do something with a dataset.

        Reading is open to everybody as long as nobody has to say who they are. Mapping goes past this server: whoever can open a file
        reads all of it, and goes on reading when a permission has been withdrawn. So a server that wants to know its callers allows it
        only where it is told to.
        """
        if action is Action.READ:
            return True
        if self._mapping == "auto":
            return not self._authenticates
        return self._mapping == "on"
