"""What a caller may do: an action, on the datasets whose names fit a pattern."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from ome_tensor.errors import InvalidArgument

__all__ = ["Action", "Scope", "parse_scopes", "permit", "permit_every", "permit_some"]


class Action(StrEnum):
    """What a caller may want.

    ``READ``: list and read a dataset. ``MAP``: read its file, past this server. ``WRITE``: upload, refresh, load and remove it. ``ADMIN``: register
    what lies on the server's disks by that name.
    """

    READ = "read"
    MAP = "map"
    WRITE = "write"
    ADMIN = "admin"


#: Each includes those before it.
_GRANTS = (Action.READ, Action.WRITE, Action.ADMIN)

_EVERYTHING = "*"


@dataclass(frozen=True, slots=True)
class Scope:
    """A permission.

    Attributes:
        action: ``READ``, ``WRITE`` or ``ADMIN``; each includes those before it.
        pattern: Of dataset names; ``*`` stands for any characters, everything else for itself.
    """

    action: Action
    pattern: str

    def __str__(self) -> str:
        return f"{self.action}:{self.pattern}"

    @classmethod
    def parse(cls, text: str) -> Scope:
        """``read:plate*`` as a scope. Raises InvalidArgument."""
        action, colon, pattern = text.partition(":")
        if not colon or not pattern or action not in _GRANTS or not pattern.isprintable() or pattern != pattern.strip():
            raise InvalidArgument(
                f"a scope is read:PATTERN, write:PATTERN or admin:PATTERN (as read:plate*), not {text!r}",
                field="scope",
                value=text,
            )
        return cls(Action(action), pattern)

    def permits(self, action: Action, dataset: str) -> bool:
        """Whether it allows an action on a dataset."""
        return _GRANTS.index(self.action) >= _GRANTS.index(action) and _fits(self.pattern, dataset)


def _fits(pattern: str, name: str) -> bool:
    """Whether a name fits, in one pass: callers choose names, and a regular expression tries every place of every star."""
    first, *rest = pattern.split("*")
    if not rest:
        return name == first
    *middle, last = rest
    place, end = len(first), len(name) - len(last)
    if place > end or not name.startswith(first) or not name.endswith(last):
        return False
    for part in middle:
        place = name.find(part, place, end)
        if place < 0:
            return False
        place += len(part)
    return True


def parse_scopes(texts: Iterable[str]) -> tuple[Scope, ...]:
    """Several scopes. Raises InvalidArgument for the first that is none."""
    return tuple(map(Scope.parse, texts))


def permit(scopes: Iterable[Scope], action: Action, dataset: str) -> bool:
    """Whether any of several scopes allows an action on a dataset."""
    wanted = Action.READ if action is Action.MAP else action
    return any(scope.permits(wanted, dataset) for scope in scopes)


def permit_some(scopes: Iterable[Scope], action: Action) -> bool:
    """Whether any of several scopes allows an action on some dataset, be there one or not."""
    return any(_GRANTS.index(scope.action) >= _GRANTS.index(action) for scope in scopes)


def permit_every(scopes: Iterable[Scope], action: Action) -> bool:
    """Whether one of several scopes allows an action on every dataset."""
    return any(scope.pattern == _EVERYTHING and scope.permits(action, "") for scope in scopes)
