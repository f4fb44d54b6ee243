"""Bearer tokens: a file that knows their hashes, written by the command line and read by servers.

A token is ``ot_ID_SECRET``. The secret is 32 random bytes, so a plain SHA-256 of it cannot be turned round, and needs no salt and no slow hash (those
are for what people choose: https://cheatsheetseries.owasp.org/cheatsheets/Password_Storage_Cheat_Sheet.html). The file holds the hash alone: whoever
reads it can use none of its tokens.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from ome_tensor.errors import InvalidArgument, NotAuthenticated

from .file_system import file_state, replace_file
from .logs import Fields
from .principals import Principal
from .scopes import Scope, parse_scopes

__all__ = ["PREFIX", "Token", "TokenFile", "create", "find", "parse_expiry", "revoke"]

_log = logging.getLogger(__name__)

PREFIX = "ot_"

#: Seconds between two looks at the file while a call goes on; a call that begins looks at once.
_LOOK = 0.05

#: What a user may name a token, so that logs and lists stay readable.
_LONGEST_NAME = 100

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


@dataclass(frozen=True, slots=True)
class Token:
    """What is known of a token, or of a client certificate.

    Attributes:
        id: Names it; no secret.
        name: What it is for.
        sha256: Of its secret, in hexadecimal; empty for a certificate.
        scopes: What its bearer may do.
        created: When.
        expires: When it ends; ``None`` for never.
        certificate: The common name of the client certificates that these scopes are for; empty for a token.
    """

    id: str
    name: str
    sha256: str
    scopes: tuple[Scope, ...]
    created: datetime
    expires: datetime | None = None
    certificate: str = ""

    def to_json(self) -> dict[str, Any]:
        """As the file holds it."""
        return {
            "id": self.id,
            "name": self.name,
            "sha256": self.sha256,
            "scopes": list(map(str, self.scopes)),
            "created": self.created.isoformat(),
            "expires": None if self.expires is None else self.expires.isoformat(),
            "certificate": self.certificate,
        }

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> Token:
        """What the file holds. Raises ValueError, KeyError or TypeError where that is something else."""
        expires = entry["expires"]
        token = cls(
            str(entry["id"]),
            str(entry["name"]),
            str(entry["sha256"]),
            parse_scopes(entry["scopes"]),
            _time(entry["created"]),
            None if expires is None else _time(expires),
            str(entry.get("certificate", "")),
        )
        if not token.certificate and not re.fullmatch(r"[0-9a-f]{64}", token.sha256):
            raise ValueError(f"token {token.id} has no hash")
        return token


def _time(text: str) -> datetime:
    found = datetime.fromisoformat(text)
    # Written by hand without a zone it is UTC, as everything here.
    return found if found.tzinfo is not None else found.replace(tzinfo=UTC)


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


class TokenFile:
    """The tokens of a file, as they are now: it is looked at again whenever it may have changed.

    Args:
        path: The file.

    Raises:
        InvalidArgument: it cannot be read; later that is logged, and nobody is let in who was not before.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._lock = threading.Lock()
        self._looked = float("-inf")
        self._seen = file_state(self._path)
        self._tokens = {token.id: token for token in _read(self._path)}

    def authenticate(self, text: str) -> Principal:
        """The bearer of a token.

        Raises:
            NotAuthenticated: it is none of this file's, or has expired. What of it was wrong is not said.
        """
        self._look()
        _, _, rest = text.partition(PREFIX)
        token_id, _, secret = rest.partition("_")
        token = self._tokens.get(token_id)
        # As much work whether there is such a token or not.
        expected = token.sha256 if token is not None and not token.certificate else _digest("")
        if not hmac.compare_digest(_digest(secret), expected) or token is None or not secret:
            raise NotAuthenticated("this server does not know the token", field="authorization")
        return self._principal(token)

    def of_certificate(self, name: str) -> Principal | None:
        """The principal of a client certificate's common name, where the file has scopes for it."""
        self._look()
        token = next((token for token in self._tokens.values() if token.certificate and token.certificate == name), None)
        return None if token is None else self._principal(token)

    def _principal(self, token: Token) -> Principal:
        if token.expires is not None and token.expires <= datetime.now(UTC):
            raise NotAuthenticated("the token has expired", field="authorization", value=token.expires.isoformat())

        def stands() -> bool:
            self._look(_LOOK)
            return self._tokens.get(token.id) == token

        kind = "certificate" if token.certificate else "token"
        name = token.certificate or (f"{token.id} ({token.name})" if token.name else token.id)
        return Principal(f"{kind} {name}", token.scopes, None if token.expires is None else token.expires.timestamp(), stands)

    def _look(self, patience: float = 0.0) -> None:
        """Read the file again where it has changed, unless somebody has looked within so many seconds."""
        if patience and time.monotonic() - self._looked < patience:
            return
        self._looked = time.monotonic()
        seen = file_state(self._path)
        if seen == self._seen:
            return
        with self._lock:
            try:
                self._tokens = {token.id: token for token in _read(self._path)}
            except InvalidArgument as error:
                if seen is None:
                    # Whoever takes the file away wants nobody let in.
                    self._tokens = {}
                _log.error(Fields("tokens", error=str(error), known=len(self._tokens)))
            self._seen = seen


def _read(path: Path) -> list[Token]:
    try:
        entries = json.loads(path.read_text("utf-8"))["tokens"]
        return [Token.from_json(entry) for entry in entries]
    except OSError as error:
        raise InvalidArgument(f"tokens {str(path)!r} cannot be read: {error.strerror}", field="tokens", value=str(path)) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        # Never the content: somebody may have written a secret into it.
        raise InvalidArgument(
            f"tokens {str(path)!r} is not a file of tokens as `ome-tensor token create` writes it ({type(error).__name__})",
            field="tokens",
            value=str(path),
        ) from None


@contextmanager
def _changing(path: Path) -> Iterator[list[Token]]:
    """The tokens of a file, to be changed: written back whole or not at all, one process at a time."""
    # Of a link what it leads to: replaced, it would leave the server with the file as it was.
    path = path.resolve()
    lock = os.open(path.with_name(f".{path.name}.lock"), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        tokens = _read(path) if path.exists() else []
        yield tokens
        text = json.dumps({"tokens": [token.to_json() for token in tokens]}, indent=1) + "\n"
        replace_file(path, text.encode())
    finally:
        os.close(lock)


def create(
    path: Path, scopes: tuple[Scope, ...], *, name: str = "", expires: datetime | None = None, certificate: str = ""
) -> tuple[Token, str]:
    """A new token in a file, made where there is none, for its owner alone to read.

    Args:
        path: The file.
        scopes: What its bearer may do; at least one.
        name: What it is for.
        expires: When it ends.
        certificate: For client certificates of this common name instead of whoever has a secret.

    Returns:
        What was written, and the token's text, which is written nowhere; empty for a certificate.

    Raises:
        InvalidArgument: no scope, a name that is too long or not printable, a certificate that has scopes already, a file that is something else.
    """
    if not scopes:
        raise InvalidArgument("a token wants a scope, as read:plate*", field="scope")
    for field, text in (("name", name), ("certificate", certificate)):
        if len(text) > _LONGEST_NAME or not text.isprintable():
            raise InvalidArgument(
                f"{field} must be at most {_LONGEST_NAME} printable characters: {text!r}", field=field, value=text
            )
    secret = "" if certificate else secrets.token_urlsafe(32)
    with _changing(path) as tokens:
        taken = {token.id for token in tokens}
        token_id = next(found for found in iter(lambda: secrets.token_hex(4), "") if found not in taken)
        if certificate and any(token.certificate == certificate for token in tokens):
            raise InvalidArgument(
                f"certificate {certificate!r} has scopes already; revoke those first", field="certificate", value=certificate
            )
        token = Token(
            token_id,
            name,
            _digest(secret) if secret else "",
            scopes,
            datetime.now(UTC).replace(microsecond=0),
            expires,
            certificate,
        )
        tokens.append(token)
    return token, f"{PREFIX}{token_id}_{secret}" if secret else ""


def find(path: Path) -> list[Token]:
    """The tokens of a file. Raises InvalidArgument."""
    return _read(path)


def revoke(path: Path, token_id: str) -> Token:
    """Take a token out of a file: servers refuse it from the next call on, and end what it reads. Raises InvalidArgument where it is not there."""
    if not path.exists():
        raise InvalidArgument(f"tokens {str(path)!r} is not there", field="tokens", value=str(path))
    with _changing(path) as tokens:
        token = next((token for token in tokens if token.id == token_id), None)
        if token is None:
            # Somebody may have pasted the whole token: never repeated.
            raise InvalidArgument("there is no token of that id (see `ome-tensor token list`)", field="id")
        tokens.remove(token)
    return token


def parse_expiry(text: str, now: datetime | None = None) -> datetime | None:
    """``30d`` (s, m, h, d or w from now), a date or time in ISO form (UTC where it names no zone), or ``never``. Raises InvalidArgument."""
    now = now or datetime.now(UTC).replace(microsecond=0)
    if text == "never":
        return None
    span = re.fullmatch(r"([0-9]{1,9})([smhdw])", text)
    try:
        found = now + timedelta(seconds=int(span[1]) * _UNITS[span[2]]) if span else _time(text)
    except (ValueError, OverflowError):
        raise InvalidArgument(
            f"expires is a time from now (30d, 12h, 90m), a date (2027-01-31) or never, not {text!r}", field="expires", value=text
        ) from None
    if found <= now:
        raise InvalidArgument(f"expires {text!r} is not in the future", field="expires", value=text)
    return found
