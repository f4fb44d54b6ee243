"""Tokens of an identity provider: signed JWTs (RFC 7519) as OpenID Connect and OAuth 2.0 (RFC 9068) give them, checked by PyJWT."""

from __future__ import annotations

import http.client
import json
import logging
import threading
import time
import urllib.request
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ome_tensor.errors import InvalidArgument, MissingDependency, NotAuthenticated, OmeTensorError, Unavailable

from .file_system import FileState, file_state
from .logs import Fields
from .principals import Principal
from .scopes import Scope
from .settings import Settings, is_loopback

__all__ = ["OidcVerifier"]

_log = logging.getLogger(__name__)

#: Signatures by a key that only the provider has. With a shared secret (HS...) whoever can check a token can make one, and `none` is no signature.
_ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")

#: Seconds for which keys from an address are used before they are fetched again, and after which a token of an unknown key may have them fetched.
_KEYS_FOR, _KEYS_AGAIN = 300.0, 30.0

#: Seconds between two looks while streams run.
_LOOK = 0.05

_FETCH_SECONDS = 5.0
_MOST_KEY_BYTES = 1 << 20

#: Tokens whose signature has been checked, so that each call need not.
_KEPT = 1024

_LONGEST_TOKEN = 16 << 10


@dataclass(frozen=True, slots=True)
class _Checked:
    """Whose a token is, and by which key that was found."""

    principal: Principal
    key_id: str | None
    key: Any


class OidcVerifier:
    """Checks an identity provider's tokens.

    Args:
        settings: ``oidc_issuer``, ``oidc_audience``, ``oidc_jwks`` (a file or an address), ``oidc_claim``, ``oidc_leeway_seconds``.

    Raises:
        MissingDependency: PyJWT is not installed.
        InvalidArgument: a file of keys that is none, or an address that others could change on its way.
    """

    def __init__(self, settings: Settings) -> None:
        try:
            import jwt
        except ImportError:
            raise MissingDependency("oidc_issuer needs PyJWT; install it with: pip install 'ome-tensor[oidc]'") from None
        self._jwt: Any = jwt
        self._issuer, self._audience = settings.oidc_issuer, settings.oidc_audience
        self._claim, self._leeway = settings.oidc_claim, settings.oidc_leeway_seconds
        self._keys = _Keys(settings.oidc_jwks, jwt)
        self._lock = threading.Lock()
        self._checked: OrderedDict[str, _Checked] = OrderedDict()

    def authenticate(self, text: str) -> Principal:
        """The subject of a token.

        Raises:
            NotAuthenticated: it is not this provider's, not for this server, expired, not valid yet, or altered.
            Unavailable: the provider's keys cannot be had.
        """
        with self._lock:
            known = self._checked.get(text)
        # A key that its provider has taken back is good for nothing, also where it was good before.
        if known is None or not self._keys.has(known.key_id, known.key):
            known = self._verify(text)
            with self._lock:
                self._checked[text] = known
                if len(self._checked) > _KEPT:
                    self._checked.popitem(last=False)
        if not known.principal.is_valid:
            raise NotAuthenticated("the token has expired", field="authorization")
        return known.principal

    def _verify(self, text: str) -> _Checked:
        jwt = self._jwt
        if len(text) > _LONGEST_TOKEN:
            raise NotAuthenticated("the token is too long", field="authorization")
        try:
            head = jwt.get_unverified_header(text)
            # From a list of our own: what the token says of itself is what an attacker says.
            if head.get("alg") not in _ALGORITHMS:
                raise NotAuthenticated("the token is signed in a way that this server does not take", field="authorization")
            key_id = head.get("kid")
            key = self._keys.find(key_id)
            claims = jwt.decode(
                text,
                key,
                algorithms=list(_ALGORITHMS),
                issuer=self._issuer,
                audience=self._audience,
                leeway=self._leeway,
                options={"require": ["exp", "iss", "aud", "sub"]},
            )
        except OmeTensorError:
            raise
        except jwt.ExpiredSignatureError:
            raise NotAuthenticated("the token has expired", field="authorization") from None
        except jwt.ImmatureSignatureError:
            raise NotAuthenticated("the token is not valid yet (is a clock wrong?)", field="authorization") from None
        except jwt.InvalidAudienceError:
            raise NotAuthenticated("the token is not for this server (its audience)", field="authorization") from None
        except jwt.InvalidIssuerError:
            raise NotAuthenticated("the token is of another issuer than this server's", field="authorization") from None
        except (jwt.PyJWTError, ValueError, TypeError, RecursionError, OverflowError):
            # Whatever else: PyJWT's words may repeat parts of a token.
            raise NotAuthenticated("this server does not know the token", field="authorization") from None
        subject = str(claims["sub"])[:100]
        expires = float(claims["exp"]) + self._leeway
        stands = partial(self._keys.stands, key_id, key)
        return _Checked(Principal(f"subject {subject}", _scopes(claims.get(self._claim)), expires, stands), key_id, key)


def _scopes(claim: Any) -> tuple[Scope, ...]:
    """The scopes that are this server's, of all that a provider says; a text of words (RFC 8693) or a list."""
    words = claim.split() if isinstance(claim, str) else claim if isinstance(claim, list) else []
    found = []
    for word in words:
        try:
            found.append(Scope.parse(str(word)))
        except InvalidArgument:
            continue  # Another service's: openid, email ...
    return tuple(found)


def _is_plain(address: str) -> bool:
    """Whether what comes from an address could be changed on its way."""
    parts = urlsplit(address)
    return parts.scheme == "http" and not is_loopback(parts.hostname or "")


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows where an address sends on to, but not out of https."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if _is_plain(newurl) or urlsplit(newurl).scheme not in ("http", "https"):
            raise OSError(f"it sends on to {newurl!r}, which is not https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class _Keys:
    """A provider's public keys (RFC 7517), from a file or an address, fetched again when that may help.

    Args:
        source: Where they are.
        jwt: PyJWT.
    """

    def __init__(self, source: str, jwt: Any) -> None:
        self._source, self._jwt = source, jwt
        self._lock = threading.Lock()
        self._keys: dict[str | None, Any] = {}
        self._entries: dict[str | None, Any] = {}
        self._read_at = self._looked = float("-inf")
        self._seen: FileState | None = None
        address = urlsplit(source)
        self._is_address = address.scheme in ("http", "https")
        if _is_plain(source):
            raise InvalidArgument(
                f"oidc_jwks must be https: whoever changes keys on their way makes tokens: {source!r}",
                field="oidc_jwks",
                value=source,
            )
        if not self._is_address:
            self._load(_read_file(source))

    def find(self, key_id: str | None) -> Any:
        """A key. Raises NotAuthenticated where there is none of that id; Unavailable where there are none at all."""
        with self._lock:
            self._refresh(_KEYS_FOR if key_id in self._keys else _KEYS_AGAIN)
            key = self._current(key_id)
        if key is None:
            raise NotAuthenticated("this server does not know the token (its key)", field="authorization")
        return key

    def has(self, key_id: str | None, key: Any) -> bool:
        """Whether a key that was found still is what would be found, as far as can be told without waiting for anybody."""
        if self._is_address:
            is_fresh = time.monotonic() - self._read_at < _KEYS_FOR
        else:
            is_fresh = (seen := file_state(self._source)) is not None and seen == self._seen
        return is_fresh and self._current(key_id) is key

    def stands(self, key_id: str | None, key: Any) -> bool:
        """Whether a key that was found has not been taken back meanwhile. One stream at a time looks, when that is due; others do not wait for it."""
        if time.monotonic() - self._looked > _LOOK and self._lock.acquire(blocking=False):
            try:
                self._looked = time.monotonic()
                self._refresh(_KEYS_FOR)
            finally:
                self._lock.release()
        return self._current(key_id) is key

    def _current(self, key_id: str | None) -> Any:
        keys = self._keys
        # A token that names no key can only be of the only one.
        return next(iter(keys.values())) if key_id is None and len(keys) == 1 else keys.get(key_id)

    def _refresh(self, after: float) -> None:
        if not self._is_address:
            seen = file_state(self._source)
            if seen is None or seen != self._seen:
                try:
                    self._load(_read_file(self._source))
                    self._seen = seen
                except InvalidArgument as error:
                    _log.error(Fields("oidc", error=str(error)))
            return
        if time.monotonic() - self._read_at < after:
            return
        self._read_at = time.monotonic()
        try:
            request = urllib.request.Request(self._source, headers={"Accept": "application/json"})
            with urllib.request.build_opener(_Redirects).open(request, timeout=_FETCH_SECONDS) as answer:
                self._load(json.loads(answer.read(_MOST_KEY_BYTES)))
        except (OSError, ValueError, http.client.HTTPException, InvalidArgument) as error:
            _log.error(Fields("oidc", error=f"keys of {self._source}: {error}"))
            if not self._keys:
                # At the next call again.
                self._read_at = float("-inf")
                raise Unavailable(
                    "the identity provider's keys cannot be had now; try again shortly",
                    field="oidc_jwks",
                    retry_after=_FETCH_SECONDS,
                ) from None

    def _load(self, document: Any) -> None:
        keys: dict[str | None, Any] = {}
        entries: dict[str | None, Any] = {}
        for entry in document.get("keys", ()) if isinstance(document, dict) else ():
            # A shared secret among public keys would let its readers make tokens.
            if not isinstance(entry, dict) or entry.get("kty") == "oct" or entry.get("use", "sig") != "sig":
                continue
            key_id = entry.get("kid")
            try:
                # One that is there still is the same: what was found by it stands.
                is_known = key_id in self._keys and self._entries.get(key_id) == entry
                keys[key_id] = self._keys[key_id] if is_known else self._jwt.PyJWK(entry).key
                entries[key_id] = entry
            except self._jwt.PyJWTError:
                continue  # Of a kind that PyJWT does not know.
        if not keys:
            raise InvalidArgument(
                f"oidc_jwks {self._source!r} holds no public key for signatures", field="oidc_jwks", value=self._source
            )
        self._keys, self._entries = keys, entries


def _read_file(source: str) -> Any:
    try:
        return json.loads(Path(source).read_bytes())
    except OSError as error:
        raise InvalidArgument(f"oidc_jwks {source!r} cannot be read: {error.strerror}", field="oidc_jwks", value=source) from None
    except ValueError:
        raise InvalidArgument(f"oidc_jwks {source!r} is not JSON", field="oidc_jwks", value=source) from None
