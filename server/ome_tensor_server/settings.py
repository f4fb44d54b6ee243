"""The server's settings: built once from flags and ``OME_TENSOR_*`` variables, checked, and handed down. Nothing reads the environment later."""

from __future__ import annotations

import difflib
import ipaddress
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ome_tensor.errors import InvalidArgument

from .budget import machine_memory, parse_size
from .scopes import Scope

__all__ = ["PREFIX", "Settings"]

PREFIX = "OME_TENSOR_"

# Name, least, most. A message's upper bound is Arrow's and gRPC's comfort, not a size to recommend.
_BOUNDS: tuple[tuple[str, float, float], ...] = (
    ("workers", 1, 1024),
    ("batch_bytes", 1, 64 << 20),
    ("max_message_bytes", 1, 256 << 20),
    ("max_request_bytes", 1, 256 << 20),
    ("max_tile_bytes", 1, 1 << 50),
    ("max_chunk_bytes", 1, 1 << 50),
    ("max_tiles", 1, 1 << 40),
    ("max_indices", 1, 1 << 31),
    ("max_concurrent_reads", 1, 10_000),
    ("decode_cache_bytes", 0, 1 << 50),
    ("grace_seconds", 0, 86_400),
    ("stall_seconds", 1, 86_400),
    ("load_seconds", 0, 86_400),
    ("watch_seconds", 0, 86_400),
    ("max_upload_bytes", 1, 1 << 50),
    ("max_caller_reads", 0, 10_000),
    ("max_requests_per_second", 0, 1e9),
    ("max_caller_requests_per_second", 0, 1e9),
    ("max_bytes_in_flight", 1 << 20, 1 << 50),
    ("max_caller_bytes_in_flight", 0, 1 << 50),
    ("oidc_leeway_seconds", 0, 3600),
)

_TRUE, _FALSE = {"1", "true", "yes", "on"}, {"0", "false", "no", "off", ""}


_CHOICES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("mapping", ("auto", "on", "off")),
    ("admin", ("auto", "on", "off")),
    ("log_format", ("text", "json")),
    ("log_level", ("debug", "info", "warning", "error")),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a server runs and what it refuses. Each field is also the variable ``OME_TENSOR_<FIELD>``.

    Attributes:
        listen: ``HOST:PORT``; port 0 takes a free one.
        insecure: Allow an address beyond this host in plain text, or for anybody. Without it that wants TLS and a way to know callers.
        tls_cert, tls_key: PEM files of the server's certificate chain and its key; read again when they change.
        tls_client_ca: PEM file of the authorities whose client certificates are let in; then every client needs one.
        certificate_scopes: What a client certificate allows that the file of tokens does not name: scopes with spaces between them.
        tokens: File of tokens that ``ome-tensor token`` writes; looked at again when it changes.
        anonymous: What callers may do who do not say who they are, where others do: scopes with spaces between them.
        oidc_issuer, oidc_audience: What an identity provider's tokens must say (``iss``, ``aud``).
        oidc_jwks: The provider's public keys: a file, or an https address.
        oidc_claim: The claim of a token that holds its scopes.
        oidc_leeway_seconds: How far the provider's clock may be off.
        workers: Processes that share the port and one copy of the pixels.
        store: Folder for datasets as Arrow files, which workers share, a restart maps, and clients on this host may map; ``auto``: shared memory
            where they fit, else the user's cache folder; ``none``: this process's own memory, which only one worker can have.
        mapping: Whether clients on this host may map datasets from the store: ``auto`` (unless callers must say who they are), ``on``, ``off``.
            File permissions decide who can.
        memory_limit: What loaded datasets may take together, the cache of decompressed chunks included: a size (``16G``), or a part of the memory
            that the machine or the container has (``60%``). The least recently used ones leave for others; one in use does not. A dataset that is
            larger is served from its source piece by piece, or refused.
        preload: Load datasets at the start, as far as they fit, instead of when they are first used.
        load_seconds: How long a call waits for a dataset that is being loaded before it is told to come again.
        watch_seconds: How often the served folders are looked at for new, changed and removed files; 0: never.
        roots: Folders (and beginnings of addresses) below which datasets may be registered, joined with ``:`` (with spaces where addresses are among
            them); empty: the folders that are served.
        admin: Who may register, upload, refresh, load and remove datasets: ``auto`` (callers on this host, as long as callers need not say who they
            are), ``on`` (everybody), ``off`` (nobody).
        uploads: Folder where datasets that clients upload are kept for good; empty: none are taken.
        max_upload_bytes: Largest upload.
        batch_bytes: Aim of a message's size. About 1 MiB measured best: smaller pays per message, larger misses the cache (PERFORMANCE).
        max_request_bytes: Largest request message.
        max_tile_bytes: Largest tile that may be asked for; reading a whole view is not bounded by it, since that comes in slabs.
        max_tiles: Most tiles one read may enumerate. A shuffled read holds 8 bytes for each.
        max_indices: Most indices listed for one axis.
        max_message_bytes: Largest message; bounds ``tiles_per_batch`` and the size a client may ask for.
        max_chunk_bytes: Largest compressed chunk that is decompressed: a few bytes of a file can claim to be any size.
        max_concurrent_reads: Streams served at once, a thread each; one more is refused at once with RESOURCE_EXHAUSTED.
        max_caller_reads: Streams served at once for one caller; 0: three quarters of all, where callers say who they are, else all.
        max_requests_per_second: Calls begun each second, over all callers, a second's worth at once; 0: no limit.
        max_caller_requests_per_second: The same of one caller: a principal, or a host where callers need not say who they are.
        max_bytes_in_flight: Messages that have been made, or are being made, and that no client has taken yet, in bytes; more wait.
        max_caller_bytes_in_flight: The same of one caller; 0: half of it, where callers say who they are, else all.
        decode_cache_bytes: Decompressed chunks kept, over all datasets: half for those loaded, half for those served in place.
        grace_seconds: How long running streams may finish after SIGTERM.
        stall_seconds: How long a client may leave a message untaken before its stream is ended and its place freed; it can resume. How long an
            upload may send nothing, too: then it is ended, and what has come is forgotten. And how long the request of a call may take to come, up
            to 30 s.
        metrics: ``HOST:PORT`` of an HTTP port with ``/metrics`` (for Prometheus), ``/livez`` and ``/readyz``; empty: none. It shows counts, and no
            names.
        tracing: Take part in OpenTelemetry traces, exported as ``OTEL_*`` variables say.
        log_format: ``text`` or ``json``, one line a call on stderr.
        log_level: ``debug``, ``info``, ``warning`` or ``error``.
    """

    listen: str = "127.0.0.1:50051"
    insecure: bool = False
    tls_cert: str = ""
    tls_key: str = ""
    tls_client_ca: str = ""
    certificate_scopes: str = "read:*"
    tokens: str = ""
    anonymous: str = ""
    oidc_issuer: str = ""
    oidc_audience: str = ""
    oidc_jwks: str = ""
    oidc_claim: str = "scope"
    oidc_leeway_seconds: float = 30.0
    workers: int = 1
    store: str = "auto"
    mapping: str = "auto"
    memory_limit: str = "50%"
    preload: bool = False
    load_seconds: float = 20.0
    watch_seconds: float = 0.0
    roots: str = ""
    admin: str = "auto"
    uploads: str = ""
    max_upload_bytes: int = 64 << 30
    batch_bytes: int = 1 << 20
    max_request_bytes: int = 4 << 20
    max_tile_bytes: int = 2 << 30
    max_message_bytes: int = 32 << 20
    max_chunk_bytes: int = 256 << 20
    max_tiles: int = 2_000_000
    max_indices: int = 65_536
    max_concurrent_reads: int = 64
    max_caller_reads: int = 0
    max_requests_per_second: float = 0.0
    max_caller_requests_per_second: float = 0.0
    max_bytes_in_flight: int = 512 << 20
    max_caller_bytes_in_flight: int = 0
    decode_cache_bytes: int = 512 << 20
    grace_seconds: float = 30.0
    stall_seconds: float = 120.0
    metrics: str = ""
    tracing: bool = False
    log_format: str = "text"
    log_level: str = "info"

    def __post_init__(self) -> None:
        self._check_who()
        for name, least, most in _BOUNDS:
            value = getattr(self, name)
            if not least <= value <= most:  # also where it is not a number
                raise InvalidArgument(f"{name} must be between {least} and {most}: {value}", field=name, value=value)
        if not self.store or (self.store == "none" and self.workers > 1):
            raise InvalidArgument(
                f"store must be a folder, auto or none (and none is for one worker only, not {self.workers}): {self.store!r}",
                field="store",
                value=self.store,
            )
        parse_size(self.memory_limit, "memory_limit", machine_memory())
        for name, allowed in _CHOICES:
            if getattr(self, name) not in allowed:
                raise InvalidArgument(
                    f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}",
                    field=name,
                    value=getattr(self, name),
                )

    def _check_who(self) -> None:
        """Refuse what would let in others than those who are meant."""
        for name, needs in (
            ("tls_cert", ("tls_key",)),
            ("tls_key", ("tls_cert",)),
            ("tls_client_ca", ("tls_cert",)),
            ("oidc_issuer", ("oidc_audience", "oidc_jwks")),
            ("oidc_audience", ("oidc_issuer",)),
            ("oidc_jwks", ("oidc_issuer",)),
        ):
            missing = next((need for need in needs if getattr(self, name) and not getattr(self, need)), None)
            if missing is not None:
                raise InvalidArgument(f"{name} needs {missing}", field=missing, value="")
        for name in ("anonymous", "certificate_scopes"):
            for word in getattr(self, name).split():
                try:
                    Scope.parse(word)
                except InvalidArgument as error:
                    raise InvalidArgument(f"{name}: {error.message}", field=name, value=word) from None
        if self.metrics:
            split_address(self.metrics, "metrics")
        host, _ = split_address(self.listen)
        if self.insecure or is_loopback(host):
            return
        wrongs = []
        if not self.tls_cert:
            wrongs.append("in plain text")
        if not self.authenticates:
            wrongs.append("for anybody")
        if wrongs:
            raise InvalidArgument(
                f"listen {self.listen!r} reaches beyond this host {', '.join(wrongs)}: add --insecure to allow that, listen on 127.0.0.1, "
                "or set tls_cert, and tokens, oidc_issuer or tls_client_ca",
                field="listen",
                value=self.listen,
            )

    @property
    def authenticates(self) -> bool:
        """Whether callers can, and unless ``anonymous`` says otherwise must, say who they are."""
        return bool(self.tokens or self.oidc_issuer or self.tls_client_ca)

    @property
    def caller_reads(self) -> int:
        """``max_caller_reads``, or what that is by default."""
        share = max(1, self.max_concurrent_reads * 3 // 4) if self.authenticates else self.max_concurrent_reads
        return self.max_caller_reads or share

    @property
    def caller_bytes_in_flight(self) -> int:
        """``max_caller_bytes_in_flight``, or what that is by default."""
        share = self.max_bytes_in_flight // 2 if self.authenticates else self.max_bytes_in_flight
        return self.max_caller_bytes_in_flight or share

    @property
    def memory_bytes(self) -> int:
        """``memory_limit`` in bytes."""
        return parse_size(self.memory_limit, "memory_limit", machine_memory())

    @property
    def cache_bytes(self) -> int:
        """What one worker and its readers keep of decompressed chunks: a quarter of the memory limit at most, all workers together."""
        return min(self.decode_cache_bytes, self.memory_bytes // 4 // self.workers)

    @property
    def own_cache_bytes(self) -> int:
        """The part of :attr:`cache_bytes` for chunks of loaded datasets, which the worker itself decompresses."""
        return self.cache_bytes // 2

    @property
    def reader_cache_bytes(self) -> int:
        """The part of :attr:`cache_bytes` for blocks of what is served in place, all readers together."""
        return self.cache_bytes - self.own_cache_bytes

    @property
    def reader_bytes(self) -> int:
        """Memory that a process which reads sources may have: however little is left for datasets, as much as libraries want; but not so much that a
        small container's end comes first."""
        return max(self.memory_bytes // 2, min(1 << 30, machine_memory() // 2))

    @property
    def dataset_bytes(self) -> int:
        """What loaded datasets may take together: the memory limit less what the workers keep of decompressed chunks."""
        return self.memory_bytes - self.workers * self.cache_bytes

    @classmethod
    def load(cls, flags: Mapping[str, Any], environment: Mapping[str, str]) -> Settings:
        """Flags that are not ``None`` win over variables, and those over defaults.

        Raises:
            InvalidArgument: naming the flag or the variable, and the value; also for a variable that is a misspelt setting, which would
                otherwise do nothing in silence.
        """
        hints = typing.get_type_hints(cls)
        names = {field.name for field in fields(cls)}
        values: dict[str, Any] = {}
        for variable, text in environment.items():
            if not variable.startswith(PREFIX):
                continue
            name = variable.removeprefix(PREFIX).lower()
            if name not in names:
                # Others share the prefix: compose files, the client's and the tests' variables, and Kubernetes, which sets OME_TENSOR_PORT and more
                # for a service of that name. Only what looks like a slip of the pen is refused.
                meant = difflib.get_close_matches(name, names, n=1, cutoff=0.85)
                if meant:
                    raise InvalidArgument(
                        f"{variable} is not a setting; did you mean {PREFIX}{meant[0].upper()}?", field=variable, value=text
                    )
                continue
            values[name] = _parse(variable, text, hints[name])
        given = {name: value for name, value in flags.items() if value is not None}
        try:
            return cls(**values | given)
        except InvalidArgument as error:
            if error.field not in values or error.field in given:
                raise
            # The user wrote the variable's name, not the field's.
            variable = PREFIX + error.field.upper()
            message = error.message.replace(error.field, variable, 1)
            raise InvalidArgument(message, field=variable, value=error.value) from None


def _parse(variable: str, text: str, kind: type | types.UnionType) -> Any:
    word = text.strip()
    if kind is bool:
        if word.lower() not in _TRUE | _FALSE:
            raise InvalidArgument(f"{variable} must be true or false, not {text!r}", field=variable, value=text)
        return word.lower() in _TRUE
    if kind in (int, float):
        try:
            return kind(word)  # type: ignore[operator]
        except ValueError:
            noun = "a whole number" if kind is int else "a number"
            raise InvalidArgument(f"{variable} must be {noun}, not {text!r}", field=variable, value=text) from None
    return word


def split_address(address: str, name: str = "listen") -> tuple[str, int]:
    """``HOST:PORT`` (``[::1]:50051`` for IPv6) as its parts; raises InvalidArgument, naming the setting."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not (port.isascii() and port.isdecimal() and len(port) <= 5) or int(port) > 65535:
        raise InvalidArgument(f"{name} must be HOST:PORT, not {address!r}", field=name, value=address)
    return host.removeprefix("[").removesuffix("]"), int(port)


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this host only. A name other than ``localhost`` may resolve to anything."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
