"""Who may do what, at every door: a table, each cell tried on a real server."""

from __future__ import annotations

import itertools
import json
import logging
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from tests.integration.images import random_pixels, write_image

from ome_tensor import DatasetNotFound, InvalidArgument, NotAllowed, NotAuthenticated, NotSupported, OmeTensorError, Unavailable
from ome_tensor_client import Client, connect
from ome_tensor_client.identity import Identity
from ome_tensor_client.options import Options
from ome_tensor_proto.methods import METHODS
from ome_tensor_server import tokens
from ome_tensor_server.calls import Call
from ome_tensor_server.logs import AUDIT
from ome_tensor_server.scopes import parse_scopes
from ome_tensor_server.testing import RunningServer, running_server

ISSUER, AUDIENCE = "https://id.example", "images"


@dataclass(frozen=True)
class Place:
    """A server, and what it takes to be let in."""

    server: RunningServer
    folder: Path

    def client(self, token: str = "", **options: Any) -> Client:
        return connect(self.server.target, token=token, timeout=10, retry_for=0, **options)

    def token(self, *scopes: str, expires: datetime | None = None) -> str:
        _, text = tokens.create(self.folder / "tokens.json", parse_scopes(scopes), expires=expires)
        return text


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("access")
    data = folder / "data"
    data.mkdir()
    for seed, name in enumerate(("apple", "avocado", "banana")):
        write_image(data / f"{name}.parquet", random_pixels((1, 1, 1, 60, 70), seed=seed))
    # Larger than all buffers between server and client.
    write_image(data / "zebra.parquet", random_pixels((1, 1, 1, 4096, 4096), seed=9))
    (folder / "more").mkdir()
    write_image(folder / "more" / "apricot.parquet", random_pixels((1, 1, 1, 6, 7)))
    write_image(folder / "more" / "blackberry.parquet", random_pixels((1, 1, 1, 6, 7)))
    tokens.create(folder / "tokens.json", parse_scopes(["read:nothing"]))
    with running_server(
        [data],
        tokens=str(folder / "tokens.json"),
        roots=str(folder / "more"),
        uploads=str(folder / "uploads"),
        store=str(folder / "store"),
        mapping="on",
    ) as server:
        yield Place(server, folder)


def list_all(client: Client) -> list[str]:
    return [dataset.name for dataset in client.datasets()]


READ: dict[str, Callable[[Client, str], Any]] = {
    "describe": lambda client, name: client.dataset(name),
    "images": lambda client, name: list(client.images(name)),
    "rows": lambda client, name: client.dataset(name).metadata(),
    "resolve": lambda client, name: client.tensor_view(name).shape,
    "read": lambda client, name: client.tensor_view(name).to_numpy(),
    "tiles": lambda client, name: list(client.tensor_view(name).iter_tiles(tile_size=(16, 16))),
}

CHANGE: dict[str, Callable[[Client, str], Any]] = {
    "refresh": lambda client, name: client.admin.refresh(name),
    "load": lambda client, name: client.admin.load(name),
    "cancel": lambda client, name: client.admin.cancel_load(name),
}

#: Who: the scopes, the datasets that they may read, and change; and whether they may see what the server counts.
ALL = {"apple", "avocado", "banana", "zebra"}
PRINCIPALS = {
    "reader of one": (("read:apple",), {"apple"}, set(), False),
    "reader of a*": (("read:a*",), {"apple", "avocado"}, set(), False),
    "reader of all": (("read:*",), ALL, set(), False),
    "writer of a*": (("write:a*",), {"apple", "avocado"}, {"apple", "avocado"}, False),
    "reader of all, writer of b*": (("read:*", "write:b*"), ALL, {"banana"}, False),
    "admin of a*": (("admin:a*",), {"apple", "avocado"}, {"apple", "avocado"}, True),
    "admin of all": (("admin:*",), ALL, ALL, True),
    "of another place": (("read:plate*", "write:*.tif"), set(), set(), False),
}


@pytest.mark.parametrize("transport", ["tcp", "mapped"])
@pytest.mark.parametrize("who", PRINCIPALS)
def test_reading(place: Place, who: str, transport: str) -> None:
    """What one may not read is not listed, and is not there in the same words as what is not there: by gRPC and by mapping."""
    scopes, readable, _, _ = PRINCIPALS[who]
    with place.client(place.token(*scopes), transport=transport) as client:
        assert set(list_all(client)) == readable
        for name in ("apple", "avocado", "banana"):
            for what, do in READ.items():
                if name in readable:
                    do(client, name)
                    continue
                with pytest.raises(DatasetNotFound) as hidden:
                    do(client, name)
                with pytest.raises(DatasetNotFound) as missing:
                    do(client, "absent")
                assert str(hidden.value) == str(missing.value).replace("absent", name), what
                for other in ALL - readable - {name}:
                    assert other not in str(hidden.value)


@pytest.mark.parametrize("who", PRINCIPALS)
def test_changing(place: Place, who: str, caplog: pytest.LogCaptureFixture) -> None:
    """Not allowed, in the same words whether the dataset is there or not; each refusal is written down."""
    scopes, _, writable, sees_counts = PRINCIPALS[who]
    caplog.set_level(logging.INFO, AUDIT)
    with place.client(place.token(*scopes)) as client:
        for name in ("apple", "avocado", "banana"):
            for what, do in CHANGE.items():
                if name in writable:
                    do(client, name)
                    continue
                caplog.clear()
                with pytest.raises(NotAllowed) as hidden:
                    do(client, name)
                (line,) = [record.getMessage() for record in caplog.records if record.name == AUDIT]
                assert "outcome=denied" in line
                assert f"request={hidden.value.request_id}" in line
                with pytest.raises(NotAllowed) as missing:
                    do(client, "something else")
                assert str(hidden.value) == str(missing.value), what
        if sees_counts:
            assert client.admin.metrics().total("calls_total") > 0
        else:
            with pytest.raises(NotAllowed):
                client.admin.metrics()


@pytest.mark.parametrize(
    "scopes,name,allowed",
    [
        (("write:new*",), "new", True),
        (("write:new*",), "banana2", False),
        (("read:new*",), "new", False),
        (("read:*", "write:other*"), "new", False),
        (("admin:new*",), "new", True),
    ],
)
def test_uploading_and_removing(place: Place, scopes: tuple[str, ...], name: str, allowed: bool) -> None:
    pixels = random_pixels((1, 1, 1, 8, 9))
    with place.client(place.token(*scopes)) as client:
        if allowed:
            client.upload(name, pixels)
            np.testing.assert_array_equal(client.tensor_view(name, layout="TZCYX").to_numpy(), pixels)
            client.admin.remove(name)
            assert name not in list_all(client)
        else:
            with pytest.raises(NotAllowed):
                client.upload(name, pixels)
            with place.client(place.token("read:*")) as reader:
                assert name not in list_all(reader)


@pytest.mark.parametrize(
    "scopes,name,allowed",
    [
        (("admin:a*",), "apricot", True),
        (("admin:a*",), "blackberry", False),
        (("write:*",), "apricot", False),
        (("admin:a*",), "", False),
        (("admin:*",), "", True),
    ],
)
def test_registering(place: Place, scopes: tuple[str, ...], name: str, allowed: bool) -> None:
    """Only by a name that one may administer; without a name whoever may administer all names."""
    path = place.folder / "more" / f"{name or 'apricot'}.parquet"
    with place.client(place.token(*scopes)) as client:
        if allowed:
            (made,) = client.admin.register(str(path), name)
            client.admin.remove(made.name)
        else:
            with pytest.raises(NotAllowed):
                client.admin.register(str(path), name)


def wrong_tokens(place: Place) -> dict[str, str]:
    good = place.token("read:*")
    head, secret = good.rsplit("_", 1)[0], good.rsplit("_", 1)[1]
    return {
        "none": "",
        "of another server": "ot_00000000_" + secret,
        "with another secret": f"{head}_{secret[:-1]}{'A' if secret[-1] != 'A' else 'B'}",
        "without its secret": f"{head}_",
        "cut": good[:-1],
        "longer": good + "A",
        "no token at all": "swordfish",
        "a JWT where none are taken": "eyJhbGciOiJub25lIn0.eyJzdWIiOiJhIn0.",
    }


@pytest.mark.parametrize("how", ["none", "of another server", "with another secret", "without its secret", "cut", "longer",
                                 "no token at all", "a JWT where none are taken"])  # fmt: skip
def test_strangers(place: Place, how: str, caplog: pytest.LogCaptureFixture) -> None:
    """No call of any service is answered, and no secret is repeated, neither to the caller nor in the log."""
    text = wrong_tokens(place)[how]
    caplog.set_level(logging.DEBUG)
    calls = [list_all, *(lambda client, do=do: do(client, "apple") for do in (*READ.values(), *CHANGE.values()))]
    with place.client(text) as client:
        for call in calls:
            with pytest.raises(NotAuthenticated) as caught:
                call(client)
            assert not text or text not in str(caught.value)
        with pytest.raises(NotAuthenticated):
            client.upload("new", random_pixels((1, 1, 1, 4, 4)))
    secret = text.rsplit("_", 1)[-1]
    assert len(secret) < 8 or secret not in caplog.text
    assert "apple" not in str(caught.value)


def test_a_token_expires(place: Place) -> None:
    text = place.token("read:*", expires=datetime.now(UTC) + timedelta(seconds=1))
    with place.client(text) as client:
        assert list_all(client)
        time.sleep(1.05)
        with pytest.raises(NotAuthenticated, match="expired"):
            list_all(client)


@pytest.mark.parametrize("how", ["revoked", "expired", "given less"])
def test_a_read_ends_when_its_token_does(place: Place, how: str, tmp_path: Path) -> None:
    """In the middle, with an error: nobody takes what came for all there is."""
    path = place.folder / "tokens.json"
    expires = datetime.now(UTC) + timedelta(seconds=1.5) if how == "expired" else None
    text = place.token("read:*", expires=expires)
    with place.client(text, transport="tcp") as client:
        tiles = client.tensor_view("zebra").iter_batches(tile_size=(512, 512), batch_size=1)
        next(tiles)
        if how == "revoked":
            tokens.revoke(path, text.split("_")[1])
        elif how == "given less":
            entries = json.loads(path.read_text())
            for entry in entries["tokens"]:
                if entry["id"] == text.split("_")[1]:
                    entry["scopes"] = ["read:banana"]
            path.write_text(json.dumps(entries))
        else:
            time.sleep(1.6)
        time.sleep(0.1)
        with pytest.raises(NotAuthenticated, match="expired or was revoked"):
            for _ in tiles:
                pass


def test_a_revoked_token_is_of_no_use_again(place: Place) -> None:
    """Replayed, by any door."""
    text = place.token("admin:*")
    with place.client(text) as client:
        assert client.tensor_view("apple").to_numpy().size
    tokens.revoke(place.folder / "tokens.json", text.split("_")[1])
    for transport in ("tcp", "mapped"):
        with place.client(text, transport=transport) as client, pytest.raises(NotAuthenticated):
            client.tensor_view("apple").to_numpy()


def test_a_renewed_token_goes_on(place: Place, tmp_path: Path) -> None:
    """A token in a file that is replaced before the old one ends: the read that ran on the old one is resumed with the new one."""
    file = tmp_path / "token"
    old = place.token("read:*")
    file.write_text(old + "\n")
    with connect(place.server.target, token_file=str(file), timeout=10, transport="tcp") as client:
        batches = client.tensor_view("zebra").iter_batches(tile_size=(512, 512), batch_size=1)
        got = [next(batches)]
        file.write_text(place.token("read:*"))
        tokens.revoke(place.folder / "tokens.json", old.split("_")[1])
        time.sleep(0.1)
        got += list(batches)
    assert [batch.position for batch in got] == list(range(64))
    rows = [
        np.concatenate([batch.array.reshape(512, 512) for batch in got[first : first + 8]], axis=1) for first in range(0, 64, 8)
    ]
    np.testing.assert_array_equal(np.concatenate(rows), random_pixels((4096, 4096), seed=9))


def test_anonymous_callers_may_what_they_are_given(tmp_path: Path, image_path: Path, big_path: Path) -> None:
    tokens.create(tmp_path / "tokens.json", parse_scopes(["read:*"]))
    with (
        running_server([image_path, big_path], tokens=str(tmp_path / "tokens.json"), anonymous="read:im*") as server,
        connect(server.target) as client,
    ):
        assert list_all(client) == ["image"]
        with pytest.raises(DatasetNotFound):
            client.dataset("big")
        with pytest.raises(NotAllowed):
            client.admin.refresh("image")


def test_without_tokens_everybody_reads_and_this_host_changes(image_path: Path) -> None:
    with running_server([image_path]) as server, connect(server.target) as client:
        assert list_all(client) == ["image"]
        client.admin.refresh("image")
    with running_server([image_path], admin="off") as server, connect(server.target) as client:
        assert list_all(client) == ["image"]
        with pytest.raises(NotAllowed):
            client.admin.refresh("image")


def test_admin_off_takes_away_what_scopes_give(tmp_path: Path, image_path: Path) -> None:
    _, text = tokens.create(tmp_path / "tokens.json", parse_scopes(["admin:*"]))
    with (
        running_server([image_path], tokens=str(tmp_path / "tokens.json"), admin="off") as server,
        connect(server.target, token=text) as client,
    ):
        assert list_all(client) == ["image"]
        with pytest.raises(NotAllowed):
            client.admin.remove("image")


def test_mapping_is_off_where_callers_say_who_they_are(tmp_path: Path, image_path: Path) -> None:
    _, text = tokens.create(tmp_path / "tokens.json", parse_scopes(["read:*"]))
    with (
        running_server([image_path], tokens=str(tmp_path / "tokens.json"), store=str(tmp_path / "store")) as server,
        connect(server.target, token=text, transport="mapped", retry_for=0) as client,
        pytest.raises(NotSupported, match="does not allow"),
    ):
        client.tensor_view("image").to_numpy()


def test_a_token_does_not_travel_in_plain_text_beyond_this_host() -> None:
    with pytest.raises(InvalidArgument, match="plain text") as caught:
        connect("images.example:50051", token="ot_12_secret")
    assert "secret" not in str(caught.value)
    assert "secret" not in repr(connect("images.example:50051", token="ot_12_secret", insecure=True).options)
    # A host, whatever it is called, and no socket.
    with pytest.raises(InvalidArgument):
        connect("unixbox.example:50051", token="ot_12_secret")
    outgoing = Identity(Options(token="ot_12_secret"), ["unix:/run/images"]).outgoing("/a/b")
    assert "secret" in outgoing.token
    assert "secret" not in repr(outgoing)


# --- an identity provider ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Provider:
    """Signs tokens."""

    key: Any
    jwt: Any
    jwks: Path

    def token(self, key: Any = None, algorithm: str = "RS256", headers: dict[str, Any] | None = None, **claims: Any) -> str:
        now = time.time()
        usual = {"iss": ISSUER, "aud": AUDIENCE, "sub": "ada", "exp": now + 60, "scope": "openid read:im*"}
        told = {name: value for name, value in (usual | claims).items() if value is not None}
        return str(self.jwt.encode(told, key or self.key, algorithm=algorithm, headers={"kid": "one"} | (headers or {})))


@pytest.fixture(scope="module")
def provider(tmp_path_factory: pytest.TempPathFactory) -> Provider:
    jwt = pytest.importorskip("jwt")
    rsa = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.rsa")
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    path = tmp_path_factory.mktemp("oidc") / "jwks.json"
    public = json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(key.public_key()))
    path.write_text(json.dumps({"keys": [public | {"kid": "one", "use": "sig", "alg": "RS256"}]}))
    return Provider(key, jwt, path)


@pytest.fixture(scope="module")
def trusting(provider: Provider, image_path: Path, big_path: Path) -> Iterator[RunningServer]:
    with running_server(
        [image_path, big_path], oidc_issuer=ISSUER, oidc_audience=AUDIENCE, oidc_jwks=str(provider.jwks), oidc_leeway_seconds=5
    ) as server:
        yield server


@pytest.mark.parametrize(
    "claims",
    [
        {},
        {"aud": ["other", AUDIENCE]},
        {"scope": ["read:im*", "profile"]},
        {"exp": int(time.time()) + 3600},
        {"nbf": lambda: time.time() + 3},
        {"exp": lambda: time.time() - 3},
    ],
    ids=["usual", "several audiences", "a list of scopes", "longer", "a clock that is ahead", "a clock that is behind"],
)
def test_a_providers_token_lets_in(trusting: RunningServer, provider: Provider, claims: dict[str, Any]) -> None:
    told = {name: value() if callable(value) else value for name, value in claims.items()}
    with connect(trusting.target, token=provider.token(**told), retry_for=0) as client:
        assert list_all(client) == ["image"]
        with pytest.raises(DatasetNotFound):
            client.dataset("big")
        with pytest.raises(NotAllowed):
            client.admin.refresh("image")


WRONG: dict[str, Callable[[Provider], str]] = {
    "expired": lambda p: p.token(exp=time.time() - 10),
    "not valid yet": lambda p: p.token(nbf=time.time() + 60),
    "of another issuer": lambda p: p.token(iss="https://evil.example"),
    "for another audience": lambda p: p.token(aud="mail"),
    "without an audience": lambda p: p.token(aud=None),
    "without an end": lambda p: p.token(exp=None),
    "without a subject": lambda p: p.token(sub=None),
    "of a key that nobody knows": lambda p: p.token(headers={"kid": "two"}),
    "unsigned": lambda p: p.jwt.encode(_evil(), None, algorithm="none", headers={"kid": "one"}),
    "signed with the public key as a secret": lambda p: _confused(p),
    "altered": lambda p: _altered(p.token()),
    "signed by somebody else": lambda p: p.token(key=_other_key()),
    "three dots": lambda p: "a.b.c",
    "huge": lambda p: "a." + "b" * 20_000 + ".c",
}  # fmt: skip


def _evil() -> dict[str, Any]:
    return {"iss": ISSUER, "aud": AUDIENCE, "sub": "eve", "exp": time.time() + 60, "scope": "admin:*"}


def _confused(provider: Provider) -> str:
    """The classic: HS256 with the RSA key's public part, which everybody has, as its secret."""
    import base64
    import hashlib
    import hmac

    def part(value: Any) -> str:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()

    text = f"{part({'alg': 'HS256', 'typ': 'JWT', 'kid': 'one'})}.{part(_evil())}"
    public = json.loads(provider.jwks.read_text())["keys"][0]
    signature = hmac.new(json.dumps(public).encode(), text.encode(), hashlib.sha256).digest()
    return f"{text}.{base64.urlsafe_b64encode(signature).rstrip(b'=').decode()}"


def _altered(text: str) -> str:
    import base64

    head, body, signature = text.split(".")
    claims = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
    claims["scope"] = "admin:*"
    return f"{head}.{base64.urlsafe_b64encode(json.dumps(claims).encode()).rstrip(b'=').decode()}.{signature}"


def _other_key() -> Any:
    from cryptography.hazmat.primitives.asymmetric import rsa

    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


@pytest.mark.parametrize("how", WRONG)
def test_a_wrong_token_of_a_provider_does_not(trusting: RunningServer, provider: Provider, how: str) -> None:
    text = WRONG[how](provider)
    with connect(trusting.target, token=text, retry_for=0) as client, pytest.raises(OmeTensorError) as caught:
        list_all(client)
    # gRPC itself refuses metadata beyond 8 KiB.
    assert isinstance(caught.value, NotAuthenticated) or how == "huge"
    assert text[:40] not in str(caught.value) or how == "three dots"


def test_a_read_ends_when_a_providers_token_does(trusting: RunningServer, provider: Provider) -> None:
    text = provider.token(exp=time.time() - 4.0, scope="read:*")  # Five seconds are forgiven.
    with connect(trusting.target, token=text, retry_for=0) as client:
        tiles = client.tensor_view("big").iter_batches(tile_size=(512, 512), batch_size=1)
        next(tiles)
        time.sleep(1.2)
        with pytest.raises(NotAuthenticated):
            for _ in tiles:
                pass


def test_keys_at_an_address_are_fetched_and_renewed(provider: Provider, image_path: Path, tmp_path: Path) -> None:
    import http.server
    import threading

    answers = [provider.jwks.read_bytes()]
    asked = []

    class Keys(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answers[-1])

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Keys) as keys:
        threading.Thread(target=keys.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{keys.server_address[1]}/keys"
        with running_server([image_path], oidc_issuer=ISSUER, oidc_audience=AUDIENCE, oidc_jwks=address) as server:
            with connect(server.target, token=provider.token(), retry_for=0) as client:
                for _ in range(3):
                    assert list_all(client) == ["image"]
            for _ in range(3):
                stranger = provider.token(headers={"kid": "two"})
                with connect(server.target, token=stranger, retry_for=0) as client, pytest.raises(NotAuthenticated):
                    list_all(client)
        keys.shutdown()
    # However many strangers come with keys of their own, the provider is not asked for each.
    assert len(asked) == 1


def test_keys_must_not_come_in_plain_text(image_path: Path) -> None:
    pytest.importorskip("jwt")
    with (
        pytest.raises(InvalidArgument, match="https"),
        running_server([image_path], oidc_issuer=ISSUER, oidc_audience=AUDIENCE, oidc_jwks="http://id.example/keys"),
    ):
        pass


def keys_of(key: Any, jwt: Any, name: str) -> str:
    return json.dumps({"keys": [json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(key.public_key())) | {"kid": name}]})


def test_a_key_that_was_taken_back_is_good_for_nothing(provider: Provider, image_path: Path, tmp_path: Path) -> None:
    """Also for tokens that were found good before."""
    path = tmp_path / "jwks.json"
    path.write_text(keys_of(provider.key, provider.jwt, "one"))
    with (
        running_server([image_path], oidc_issuer=ISSUER, oidc_audience=AUDIENCE, oidc_jwks=str(path)) as server,
        connect(server.target, token=provider.token(exp=time.time() + 3600), retry_for=0) as client,
    ):
        assert list_all(client) == ["image"]
        path.write_text(keys_of(_other_key(), provider.jwt, "two"))
        with pytest.raises(NotAuthenticated):
            list_all(client)
        path.write_text(keys_of(provider.key, provider.jwt, "one"))
        assert list_all(client) == ["image"]


def test_a_read_ends_when_a_providers_key_does(
    provider: Provider, big_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And goes on where another key comes beside it."""
    path = tmp_path / "jwks.json"
    other = _other_key()
    both = [json.loads(keys_of(key, provider.jwt, name))["keys"][0] for key, name in ((provider.key, "one"), (other, "two"))]
    changed, check = threading.Event(), Call.check_access

    def read(client: Client, keys: str) -> int:
        """All of an image, whose first two messages are sent before the keys change, and all others behind that."""
        path.write_text(keys_of(provider.key, provider.jwt, "one"))
        sent = itertools.count()
        changed.clear()

        def check_access(call: Call) -> None:
            assert next(sent) < 2 or changed.wait(20)
            check(call)

        monkeypatch.setattr(Call, "check_access", check_access)
        tiles = client.tensor_view("big").iter_batches(tile_size=(512, 512), batch_size=1)
        next(tiles)
        path.write_text(keys)
        time.sleep(0.1)
        changed.set()
        return len(list(tiles))

    path.write_text(keys_of(provider.key, provider.jwt, "one"))
    text = provider.token(exp=time.time() + 3600, scope="read:*")
    with (
        running_server([big_path], oidc_issuer=ISSUER, oidc_audience=AUDIENCE, oidc_jwks=str(path)) as server,
        connect(server.target, token=text, retry_for=0, transport="tcp") as client,
    ):
        assert read(client, json.dumps({"keys": both})) > 3
        with pytest.raises(NotAuthenticated):
            read(client, keys_of(other, provider.jwt, "two"))


@pytest.mark.parametrize("answer", [b"garbage\r\n\r\n", b"HTTP/1.1 302 Found\r\nLocation: http://id.example/keys\r\n\r\n"])
def test_a_provider_that_answers_otherwise_is_away(answer: bytes, provider: Provider, image_path: Path) -> None:
    class Odd(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(4096)
            self.request.sendall(answer)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Odd) as keys:
        threading.Thread(target=keys.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{keys.server_address[1]}/keys"
        with (
            running_server([image_path], oidc_issuer=ISSUER, oidc_audience=AUDIENCE, oidc_jwks=address) as server,
            connect(server.target, token=provider.token(), retry_for=0) as client,
        ):
            for _ in range(2):
                with pytest.raises(Unavailable):
                    list_all(client)
        keys.shutdown()


def test_a_stranger_is_refused_before_the_request_comes(trusting: RunningServer) -> None:
    """Also where a provider has to be asked: it could be let wait for on a thread of the server."""
    done = threading.Event()

    def nothing() -> Iterator[bytes]:
        done.wait(30)
        yield from ()

    with grpc.insecure_channel(trusting.target) as channel:
        for name in ("GetDataset", "ReadTiles"):
            call = channel.stream_stream(METHODS[name].path)(
                nothing(), metadata=(("authorization", "Bearer nothing"),), timeout=10
            )
            assert call.code() is grpc.StatusCode.UNAUTHENTICATED
        done.set()
