"""Who may do what: the one place that every door asks."""

from __future__ import annotations

from .principals import Caller
from .scopes import Action, permit, permit_every, permit_some
from .settings import Settings

__all__ = ["Policy"]


class Policy:
    """Decides for every door: the gRPC methods, and the mapped store.

    Args:
        settings: The server's: whether callers must say who they are, ``mapping`` for the store, ``admin`` for changes.
    """

    def __init__(self, settings: Settings) -> None:
        self._mapping = settings.mapping
        self._admin = settings.admin
        self._authenticates = settings.authenticates

    def permits(self, caller: Caller, action: Action, dataset: str) -> bool:
        """Whether a caller may do something with a dataset.

        Where callers say who they are, their scopes decide, and the settings may only take away. Elsewhere reading is open to everybody, and changing
        what is served to callers on this host, unless that is allowed to all or to none.

        Mapping goes past this server: whoever can open a file reads all of it, and goes on reading when a permission has been withdrawn. So a server
        that wants to know its callers allows it only where it is told to.
        """
        if action is Action.MAP and self._mapping != "on" and (self._mapping == "off" or self._authenticates):
            return False
        if self._authenticates:
            return self._may_change(action) and permit(caller.principal.scopes, action, dataset)
        return action in (Action.READ, Action.MAP) or self._permits_change(caller)

    def permits_some(self, caller: Caller, action: Action) -> bool:
        """Whether a caller may change, as ``action`` says, some dataset, be there one or not: what a server tells of itself is for those as well."""
        if self._authenticates:
            return self._may_change(action) and permit_some(caller.principal.scopes, action)
        return self._permits_change(caller)

    def permits_every(self, caller: Caller, action: Action) -> bool:
        """Whether a caller may change, as ``action`` says, datasets of any name."""
        if self._authenticates:
            return self._may_change(action) and permit_every(caller.principal.scopes, action)
        return self._permits_change(caller)

    def _may_change(self, action: Action) -> bool:
        return self._admin != "off" or action in (Action.READ, Action.MAP)

    def _permits_change(self, caller: Caller) -> bool:
        """Where callers need not say who they are."""
        return self._admin == "on" or (self._admin == "auto" and caller.is_local)
