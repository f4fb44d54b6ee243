"""Who calls."""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import unquote

from .scopes import Scope
from .settings import is_loopback

__all__ = ["ANYBODY", "Caller", "Principal"]


@dataclass(frozen=True, slots=True, eq=False)
class Principal:
    """Somebody whom this server knows, or takes for anybody.

    Attributes:
        name: For logs and limits: of a token, a certificate or an identity provider's subject. Never a secret.
        scopes: What it may do.
        expires: Unix time at which that ends; ``None`` for never.
        stands: Whether that has not been withdrawn meanwhile.
        is_known: Whether it said, and showed, who it is.
    """

    name: str
    scopes: tuple[Scope, ...] = ()
    expires: float | None = None
    stands: Callable[[], bool] | None = None
    is_known: bool = True

    @property
    def is_valid(self) -> bool:
        """Whether what was found when the call began still holds: neither expired nor withdrawn."""
        if self.expires is not None and time.time() >= self.expires:
            return False
        return self.stands is None or self.stands()


#: Whoever calls a server that asks nobody who they are.
ANYBODY = Principal("anonymous", is_known=False)


@lru_cache(maxsize=4096)
def _network_of(host: str) -> str:
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if address.version == 4 or address.is_loopback or address.is_link_local:
        return host
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((address, 64), strict=False))


@lru_cache(maxsize=4096)
def _host_of(peer: str) -> str:
    kind, _, address = unquote(peer).partition(":")
    host = address.rpartition(":")[0].removeprefix("[").removesuffix("]")
    return host if kind in ("ipv4", "ipv6") else kind


@dataclass(frozen=True, slots=True)
class Caller:
    """Who makes a call, and from where.

    Attributes:
        peer: The address, as gRPC gives it.
        principal: Who.
    """

    peer: str
    principal: Principal = ANYBODY

    @property
    def host(self) -> str:
        """The address without its port; the kind of address where it has none."""
        return _host_of(self.peer)

    @property
    def network(self) -> str:
        """All addresses that one client may have: the host's; of IPv6, those that begin with the same 64 bits (RFC 4291, section 2.5.4).

        So may a whole laboratory, which is why shares go by hosts, and only what somebody who means harm would do goes by networks.
        """
        return _network_of(self.host)

    @property
    def is_local(self) -> bool:
        """Whether the caller is on this host, as far as its address tells."""
        return self.host == "unix" or is_loopback(self.host)

    @property
    def key(self) -> str:
        """Whose share of the server a call counts to: a known principal's, else the host's that it comes from."""
        return self.principal.name if self.principal.is_known else f"{self.principal.name}@{self.host}"
