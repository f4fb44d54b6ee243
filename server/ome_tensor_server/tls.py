"""TLS of the server's port: certificates are read again when their files change, without a restart."""

from __future__ import annotations

import logging
import ssl
import threading
from pathlib import Path
from typing import Any, cast

import grpc

from ome_tensor.errors import InvalidArgument

from .file_system import FileState, file_state
from .logs import Fields
from .settings import Settings

__all__ = ["server_credentials"]

_log = logging.getLogger(__name__)


class _Certificates:
    """The certificate files, as they were when they last belonged together.

    Args:
        settings: ``tls_cert``, ``tls_key`` and ``tls_client_ca``.

    Raises:
        InvalidArgument: a file that cannot be read, or a key that is not the certificate's.
    """

    def __init__(self, settings: Settings) -> None:
        self._paths = {"tls_cert": settings.tls_cert, "tls_key": settings.tls_key}
        if settings.tls_client_ca:
            self._paths["tls_client_ca"] = settings.tls_client_ca
        self._lock = threading.Lock()
        self._seen = self._look()
        self.current = self._read()

    def newer(self) -> grpc.ServerCertificateConfiguration | None:
        """What new connections are to be met with, where that has changed. For gRPC, at each handshake."""
        with self._lock:
            seen = self._look()
            if seen == self._seen:
                return None
            self._seen = seen
            try:
                self.current = self._read()
            except InvalidArgument as error:
                # Certificate and key are two files, which change one behind the other: the next look finds both.
                _log.error(Fields("tls", error=str(error)))
                return None
            _log.info(Fields("tls", read="again"))
            return self.current

    def _look(self) -> tuple[FileState | None, ...]:
        return tuple(map(file_state, self._paths.values()))

    def _read(self) -> grpc.ServerCertificateConfiguration:
        contents = {}
        for name, path in self._paths.items():
            try:
                contents[name] = Path(path).read_bytes()
            except OSError as error:
                raise InvalidArgument(f"{name} {path!r} cannot be read: {error.strerror}", field=name, value=path) from None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            # A key with a password is refused instead of asked for on some terminal.
            context.load_cert_chain(self._paths["tls_cert"], self._paths["tls_key"], password=lambda: b"")
        except (OSError, ValueError) as error:  # An SSLError is an OSError.
            reason = getattr(error, "reason", None) or error
            raise InvalidArgument(
                f"tls_cert {self._paths['tls_cert']!r} and tls_key {self._paths['tls_key']!r} do not fit: {reason}",
                field="tls_cert",
                value=self._paths["tls_cert"],
            ) from None
        if "tls_client_ca" in contents:
            try:
                context.load_verify_locations(cadata=contents["tls_client_ca"].decode("ascii"))
            except (OSError, ValueError):
                raise InvalidArgument(
                    f"tls_client_ca {self._paths['tls_client_ca']!r} holds no certificates",
                    field="tls_client_ca",
                    value=self._paths["tls_client_ca"],
                ) from None
        return grpc.ssl_server_certificate_configuration(
            [(contents["tls_key"], contents["tls_cert"])], root_certificates=contents.get("tls_client_ca")
        )


def server_credentials(settings: Settings) -> grpc.ServerCredentials | None:
    """The credentials of the port; ``None`` for plain text. Raises InvalidArgument."""
    if not settings.tls_cert:
        return None
    certificates = _Certificates(settings)
    return grpc.dynamic_ssl_server_credentials(
        certificates.current,
        # grpcio's stub leaves out that None means "as before".
        cast(Any, certificates.newer),
        require_client_authentication=bool(settings.tls_client_ca),
    )
