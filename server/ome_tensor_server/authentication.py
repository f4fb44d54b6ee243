"""Finding out who calls: from a bearer token, an identity provider's token, or a client certificate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from ome_tensor.errors import NotAuthenticated

from .oidc import OidcVerifier
from .principals import ANYBODY, Principal
from .scopes import parse_scopes
from .settings import Settings
from .tokens import PREFIX, TokenFile

__all__ = ["Authenticator"]

_SCHEME = "bearer"


class _Verifier(Protocol):
    def authenticate(self, text: str) -> Principal: ...


class Authenticator:
    """Says who calls.

    Args:
        settings: The server's: ``tokens``, ``oidc_*``, ``tls_client_ca``, and what is open to ``anonymous`` callers.

    Raises:
        InvalidArgument: a file of tokens or keys that cannot be used.
        MissingDependency: an optional package is needed.
    """

    def __init__(self, settings: Settings) -> None:
        self._is_needed = settings.authenticates
        self._tokens = TokenFile(settings.tokens) if settings.tokens else None
        self._oidc = OidcVerifier(settings) if settings.oidc_issuer else None
        self._certificates = bool(settings.tls_client_ca)
        self._certificate_scopes = parse_scopes(settings.certificate_scopes.split())
        self._anonymous = Principal("anonymous", parse_scopes(settings.anonymous.split()), is_known=False)

    def principal(
        self, metadata: Iterable[tuple[str, str | bytes]], identity: Callable[[], Mapping[str, Iterable[bytes]]]
    ) -> Principal:
        """Who calls.

        Args:
            metadata: The call's.
            identity: Gives what the connection's TLS says of its client (``ServicerContext.auth_context``).

        Raises:
            NotAuthenticated: nobody whom this server knows, where it wants to know.
            Unavailable: it cannot be found out now.
        """
        if not self._is_needed:
            return ANYBODY
        given = [value for name, value in metadata if name == "authorization"]
        if given:
            # A token that is wrong is not forgiven for a certificate's sake: somebody would look for the mistake for long.
            return self._bearer(given)
        if self._certificates and (principal := self._certificate(identity())) is not None:
            return principal
        if self._anonymous.scopes:
            return self._anonymous
        raise NotAuthenticated("this server wants to know who calls: send a token", field="authorization")

    def _bearer(self, given: list[str | bytes]) -> Principal:
        scheme, _, text = given[0].partition(" ") if isinstance(given[0], str) else ("", "", "")
        text = text.strip()
        if len(given) != 1 or scheme.lower() != _SCHEME or not text:
            raise NotAuthenticated("authorization must be `Bearer TOKEN`, once", field="authorization")
        verifier: _Verifier | None = self._tokens if text.startswith(PREFIX) else self._oidc
        if verifier is None:
            raise NotAuthenticated("this server does not know the token", field="authorization")
        return verifier.authenticate(text)

    def _certificate(self, identity: Mapping[str, Iterable[bytes]]) -> Principal | None:
        # gRPC has checked it against tls_client_ca before there was a call.
        name = next((found.decode("utf-8", "replace") for found in identity.get("x509_common_name", ())), None)
        if name is None:
            return None
        listed = self._tokens.of_certificate(name) if self._tokens is not None else None
        if listed is not None:
            return listed
        return Principal(f"certificate {name[:100]}", self._certificate_scopes)
