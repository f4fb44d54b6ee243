"""Settings: flags before variables before defaults, and every bad value is refused in the words of whoever set it."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from ome_tensor.errors import InvalidArgument
from ome_tensor_server.settings import PREFIX, Settings, is_loopback, split_address

NUMBERS = [field.name for field in dataclasses.fields(Settings) if field.type in ("int", "float")]
MAY_BE_ZERO = (
    "decode_cache_bytes",
    "grace_seconds",
    "load_seconds",
    "max_caller_bytes_in_flight",
    "max_caller_reads",
    "max_caller_requests_per_second",
    "max_requests_per_second",
    "oidc_leeway_seconds",
    "watch_seconds",
)
POSITIVE = [name for name in NUMBERS if name not in MAY_BE_ZERO]
WHOLE = [field.name for field in dataclasses.fields(Settings) if field.type == "int"]

#: Settings that mean something only beside others.
BESIDE = {
    "tls_cert": {"tls_key": "key.pem"},
    "tls_key": {"tls_cert": "cert.pem"},
    "tls_client_ca": {"tls_cert": "cert.pem", "tls_key": "key.pem"},
    "oidc_issuer": {"oidc_audience": "images", "oidc_jwks": "jwks.json"},
    "oidc_audience": {"oidc_issuer": "https://id.example", "oidc_jwks": "jwks.json"},
    "oidc_jwks": {"oidc_issuer": "https://id.example", "oidc_audience": "images"},
}


def variable(name: str) -> str:
    """The variable of a setting."""
    return PREFIX + name.upper()


def test_defaults() -> None:
    """Nothing given: loopback only."""
    assert Settings.load({}, {}) == Settings()
    assert Settings().listen == "127.0.0.1:50051"
    assert not Settings().insecure


@pytest.mark.parametrize(
    "name,text,value,other",
    [
        ("listen", "127.0.0.1:7", "127.0.0.1:7", "localhost:8"),
        ("insecure", "Yes", True, False),
        ("insecure", "off", False, True),
        ("insecure", " 1 ", True, False),
        ("tls_cert", "cert.pem", "cert.pem", "other.pem"),
        ("tls_key", "key.pem", "key.pem", "other.pem"),
        ("tls_client_ca", "ca.pem", "ca.pem", "other.pem"),
        ("certificate_scopes", "read:a write:b", "read:a write:b", ""),
        ("tokens", "tokens.json", "tokens.json", "other.json"),
        ("anonymous", "read:public*", "read:public*", ""),
        ("oidc_issuer", "https://id.example", "https://id.example", "https://other.example"),
        ("oidc_audience", "images", "images", "others"),
        ("oidc_jwks", "jwks.json", "jwks.json", "https://id.example/keys"),
        ("oidc_claim", "roles", "roles", "scp"),
        ("oidc_leeway_seconds", "0", 0, 5),
        ("workers", "4", 4, 2),
        ("store", "/var/lib/ome-tensor", "/var/lib/ome-tensor", "/tmp/store"),
        ("mapping", "off", "off", "on"),
        ("memory_limit", "2G", "2G", "60%"),
        ("preload", "true", True, False),
        ("load_seconds", "0", 0, 1.5),
        ("watch_seconds", "2.5", 2.5, 0),
        ("roots", "/data:/more", "/data:/more", "/other"),
        ("admin", "off", "off", "on"),
        ("uploads", "/var/lib/uploads", "/var/lib/uploads", ""),
        ("max_upload_bytes", "5", 5, 6),
        ("batch_bytes", "4096", 4096, 8192),
        ("max_request_bytes", "1_000", 1000, 1),
        ("max_tile_bytes", "1", 1, 2),
        ("max_message_bytes", "70000", 70000, 80000),
        ("max_chunk_bytes", "5", 5, 6),
        ("max_tiles", "5", 5, 6),
        ("max_indices", "5", 5, 6),
        ("max_concurrent_reads", " 3 ", 3, 4),
        ("max_caller_reads", "3", 3, 4),
        ("max_requests_per_second", "2.5", 2.5, 0),
        ("max_caller_requests_per_second", "2", 2, 0),
        ("max_bytes_in_flight", "2000000", 2000000, 3000000),
        ("max_caller_bytes_in_flight", "5", 5, 0),
        ("metrics", "127.0.0.1:9000", "127.0.0.1:9000", ""),
        ("tracing", "on", True, False),
        ("decode_cache_bytes", "0", 0, 1),
        ("grace_seconds", "0.5", 0.5, 2),
        ("stall_seconds", "1.5", 1.5, 2),
        ("log_format", "json", "json", "text"),
        ("log_level", "debug", "debug", "error"),
    ],
)
def test_flags_before_variables_before_defaults(name: str, text: str, value: Any, other: Any) -> None:
    """Each setting by each way; a flag that was not given says nothing."""
    environment = {variable(name): text, "PATH": "/bin"}
    beside = BESIDE.get(name, {})
    assert getattr(Settings.load(beside, environment), name) == value
    assert getattr(Settings.load(beside | {name: None}, environment), name) == value
    assert getattr(Settings.load(beside | {name: other}, environment), name) == other
    assert Settings.load(beside | {name: value}, {}) == Settings.load(beside, environment)


def test_every_setting_has_a_case_above() -> None:
    """So that a new one is not forgotten."""
    cases = {
        mark.args[1][i][0] for mark in test_flags_before_variables_before_defaults.pytestmark for i in range(len(mark.args[1]))
    }
    assert cases == {field.name for field in dataclasses.fields(Settings)}


@pytest.mark.parametrize(
    "name,text",
    [
        *((name, text) for name in NUMBERS for text in ("", "many", "1 MiB", "0x10", "-1")),
        *((name, "0") for name in POSITIVE),
        *((name, "1.5") for name in WHOLE),
        *(("grace_seconds", text) for text in ("nan", "inf", "-0.1")),
        ("batch_bytes", str((64 << 20) + 1)),
        ("insecure", "maybe"),
        ("log_format", "xml"),
        ("log_level", "loud"),
        ("metrics", "9000"),
        ("anonymous", "plate*"),
        ("anonymous", "read:"),
        ("anonymous", "own:plate*"),
        ("certificate_scopes", "read"),
        ("listen", ""),
        ("listen", "50051"),
        ("listen", ":50051"),
        ("listen", "localhost"),
        ("listen", "localhost:"),
        ("listen", "localhost:http"),
        ("listen", "localhost:65536"),
        ("listen", "localhost:-1"),
        ("listen", "localhost:" + "9" * 5000),
    ],
)
def test_bad_values_name_the_variable(name: str, text: str) -> None:
    """An operator who reads the message knows which line of the deployment to mend."""
    with pytest.raises(InvalidArgument) as caught:
        Settings.load({}, {variable(name): text})
    assert variable(name) in str(caught.value)


@pytest.mark.parametrize("name", POSITIVE)
def test_bad_flags_name_the_setting(name: str) -> None:
    """Values that come from flags or from code are checked too."""
    with pytest.raises(InvalidArgument, match=name) as caught:
        Settings(**{name: 0})
    assert caught.value.field == name


def test_a_misspelt_variable_is_an_error() -> None:
    """It would be obeyed silently by doing nothing; the message lists those there are."""
    with pytest.raises(InvalidArgument, match="OME_TENSOR_MAX_TILE_BYTES") as caught:
        Settings.load({}, {"OME_TENSOR_MAX_TILE_BYTE": "1"})
    assert caught.value.field == "OME_TENSOR_MAX_TILE_BYTE"


@pytest.mark.parametrize(
    "name", ["OME_TENSOR_CLIENT_TIMEOUT", "OME_TENSOR_TEST_X", "OME_TENSOR_DEMO_PORT", "OME_TENSORS", "OTHER"]
)
def test_others_variables_are_left_alone(name: str) -> None:
    """The client's, the tests' and everybody else's."""
    assert Settings.load({}, {name: "x"}) == Settings()


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]", "192.168.1.4", "example.org", "10.0.0.1"])
def test_plain_text_beyond_this_host_needs_a_word(host: str) -> None:
    """Anybody could read along, and could read at all."""
    with pytest.raises(InvalidArgument, match="--insecure"):
        Settings(listen=f"{host}:50051")
    assert Settings(listen=f"{host}:50051", insecure=True).listen == f"{host}:50051"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "localhost", "[::1]"])
def test_loopback_does_not(host: str) -> None:
    """Every way of writing this very host."""
    assert Settings(listen=f"{host}:0").listen == f"{host}:0"


def test_addresses() -> None:
    """IPv6 has brackets around it and loses them."""
    assert split_address("[::1]:0") == ("::1", 0)
    assert split_address("host.example:65535") == ("host.example", 65535)
    assert is_loopback("::1")
    assert not is_loopback("127.0.0.1.example.org")


def test_settings_cannot_be_changed() -> None:
    """They are handed down, not consulted."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().max_tiles = 1  # type: ignore[misc]


def test_the_readme_lists_every_setting() -> None:
    """And none that there is not."""
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    listed = re.findall(r"^\| `(OME_TENSOR_\w+)` \|", readme, re.MULTILINE)
    assert sorted(listed) == sorted(variable(field.name) for field in dataclasses.fields(Settings))
