"""An authority of one's own, and certificates that it signs: for servers that no public authority knows, as those of a laboratory.

Files are PEM, and each appears whole: a server that reads its certificate again never sees half of one.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from ome_tensor.errors import InvalidArgument, MissingDependency

from .file_system import replace_file

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

__all__ = ["AUTHORITY", "AUTHORITY_KEY", "issue"]

#: The authority's certificate, which clients are given, and its key, which nobody is.
AUTHORITY, AUTHORITY_KEY = "ca.pem", "ca.key"

#: How long the authority is good for: a new one has to reach every client.
_AUTHORITY_DAYS = 3650

#: https://www.rfc-editor.org/rfc/rfc1123#section-2.1, and a first label that stands for any. Container networks have names with underscores, too.
_HOST_NAME = re.compile(r"(?=.{1,253}$)(\*\.)?[A-Za-z0-9_]([A-Za-z0-9_-]{0,62})(\.[A-Za-z0-9_][A-Za-z0-9_-]{0,62})*")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")


def issue(folder: Path, name: str, hosts: Sequence[str], days: int) -> list[Path]:
    """A key and a certificate, signed by the folder's authority, which is made where there is none.

    Args:
        folder: Where the files lie; made where it is not there, for its owner alone.
        name: Of the files: ``NAME.pem``, ``NAME.key``. Without hosts also the common name, by which a server knows a client.
        hosts: Names and addresses that clients reach the server by; none: a client's certificate.
        days: How long it is good for.

    Returns:
        The files that were written.

    Raises:
        InvalidArgument: a name, host or number of days that cannot be; a folder that cannot be written to, or holds something else.
        MissingDependency: the package ``cryptography`` is needed.
    """
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.x509.oid import ExtendedKeyUsageOID
    except ImportError:
        raise MissingDependency(
            "certificates need the package cryptography; install it with: pip install 'ome-tensor[server,oidc]'"
        ) from None
    if not _FILE_NAME.fullmatch(name) or name == "ca":
        raise InvalidArgument(f"name must be letters, digits, '.', '_' or '-', and not ca: {name!r}", field="name", value=name)
    if not 1 <= days <= _AUTHORITY_DAYS:
        raise InvalidArgument(f"days must be from 1 to {_AUTHORITY_DAYS}: {days}", field="days", value=days)
    identities = [_identity(host) for host in hosts]
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        written = [] if (folder / AUTHORITY).exists() else _make_authority(folder)
        authority, authority_key = _read_authority(folder)
        key = ec.generate_private_key(ec.SECP256R1())
        builder = (
            _builder(hosts[0] if hosts else name, authority.subject, key, days)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False)
            .add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH if hosts else ExtendedKeyUsageOID.CLIENT_AUTH]),
                critical=False,
            )
        )
        if hosts:
            builder = builder.add_extension(x509.SubjectAlternativeName(identities), critical=False)
        # The key first: a server reads both when either changes, and passes over a pair that does not fit.
        replace_file(folder / f"{name}.key", _key_bytes(key), 0o600)
        replace_file(folder / f"{name}.pem", _signed(builder, authority_key), 0o644)
    except OSError as error:
        raise InvalidArgument(f"folder {str(folder)!r}: {error.strerror}", field="folder", value=str(folder)) from None
    return [*written, folder / f"{name}.pem", folder / f"{name}.key"]


def _identity(host: str) -> x509.GeneralName:
    from cryptography import x509

    with suppress(ValueError):
        return x509.IPAddress(ipaddress.ip_address(host))
    if not _HOST_NAME.fullmatch(host):
        raise InvalidArgument(
            f"host must be the name or the address of a host, without a port: {host!r}", field="host", value=host
        )
    return x509.DNSName(host)


def _builder(subject: str, issuer: x509.Name | None, key: EllipticCurvePrivateKey, days: int) -> x509.CertificateBuilder:
    """A certificate of a key; signed by itself where no issuer is said."""
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject[:64])])
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer or name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        # Clocks of a network differ by minutes at times.
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _make_authority(folder: Path) -> list[Path]:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    builder = _builder("ome-tensor authority", None, key, _AUTHORITY_DAYS)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    # What RFC 5280, 4.2.1.3 wants of an authority.
    uses = dict.fromkeys(
        ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement"), False
    )
    builder = builder.add_extension(
        x509.KeyUsage(**uses, key_cert_sign=True, crl_sign=True, encipher_only=False, decipher_only=False), critical=True
    )
    # The certificate last: a folder with a key alone is one that somebody was interrupted in.
    replace_file(folder / AUTHORITY_KEY, _key_bytes(key), 0o600)
    replace_file(folder / AUTHORITY, _signed(builder, key), 0o644)
    return [folder / AUTHORITY, folder / AUTHORITY_KEY]


def _read_authority(folder: Path) -> tuple[x509.Certificate, EllipticCurvePrivateKey]:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        certificate = x509.load_pem_x509_certificate((folder / AUTHORITY).read_bytes())
        key = load_pem_private_key((folder / AUTHORITY_KEY).read_bytes(), None)
    except (ValueError, TypeError):
        certificate, key = None, None
    if certificate is None or not isinstance(key, EllipticCurvePrivateKey) or certificate.public_key() != key.public_key():
        raise InvalidArgument(
            f"folder {str(folder)!r} has a {AUTHORITY} and a {AUTHORITY_KEY} that are not an authority made here",
            field="folder",
            value=str(folder),
        )
    return certificate, key


def _signed(builder: x509.CertificateBuilder, key: EllipticCurvePrivateKey) -> bytes:
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.serialization import Encoding

    signed: bytes = builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)
    return signed


def _key_bytes(key: EllipticCurvePrivateKey) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    encoded: bytes = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return encoded
