"""Scopes, and the file of tokens."""

from __future__ import annotations

import json
import os
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ome_tensor.errors import InvalidArgument, NotAuthenticated
from ome_tensor_server.scopes import Action, Scope, parse_scopes, permit, permit_every, permit_some
from ome_tensor_server.tokens import TokenFile, create, find, parse_expiry, revoke

READ = parse_scopes(["read:*"])


@pytest.mark.parametrize(
    "scope,action,name,allowed",
    [
        ("read:plate*", Action.READ, "plate7", True),
        ("read:plate*", Action.READ, "plate", True),
        ("read:plate*", Action.READ, "my plate", False),
        ("read:plate*", Action.WRITE, "plate7", False),
        ("write:plate*", Action.READ, "plate7", True),
        ("admin:plate*", Action.WRITE, "plate7", True),
        ("write:plate*", Action.ADMIN, "plate7", False),
        ("read:a.c", Action.READ, "abc", False),
        ("read:[ab]", Action.READ, "a", False),
        ("read:*x*y", Action.READ, "1x\n2y", True),
        ("read:Plate", Action.READ, "plate", False),
    ],
)
def test_scopes(scope: str, action: Action, name: str, allowed: bool) -> None:
    assert permit([Scope.parse(scope)], action, name) is allowed
    assert str(Scope.parse(scope)) == scope


@given(st.text(min_size=1), st.text())
def test_a_pattern_without_stars_is_one_name(pattern: str, name: str) -> None:
    if "*" not in pattern:
        assert Scope(Action.READ, pattern).permits(Action.READ, name) is (name == pattern)
    assert Scope(Action.READ, "*").permits(Action.READ, name)


@pytest.mark.parametrize("text", ["", "read", "read:", ":x", "own:x", "READ:x", "read: x", "read:x\n", "map:x"])
def test_what_is_no_scope(text: str) -> None:
    with pytest.raises(InvalidArgument, match="scope"):
        Scope.parse(text)


def test_some_and_every() -> None:
    some = parse_scopes(["read:*", "write:a*"])
    assert permit_some(some, Action.WRITE)
    assert not permit_some(some, Action.ADMIN)
    assert permit_every(some, Action.READ)
    assert not permit_every(some, Action.WRITE)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tokens.json"


def test_a_token_is_known_until_it_is_revoked(path: Path) -> None:
    made, text = create(path, parse_scopes(["read:a*", "write:b"]), name="ci")
    file = TokenFile(path)
    principal = file.authenticate(text)
    assert principal.name == f"token {made.id} (ci)"
    assert list(map(str, principal.scopes)) == ["read:a*", "write:b"]
    assert principal.is_valid
    other, other_text = create(path, READ)
    assert file.authenticate(other_text).is_valid
    revoke(path, made.id)
    with pytest.raises(NotAuthenticated):
        file.authenticate(text)
    assert not principal.is_valid
    assert file.authenticate(other_text).is_valid
    assert [token.id for token in find(path)] == [other.id]


def test_the_file_holds_no_secret_and_is_its_owners_alone(path: Path) -> None:
    _, text = create(path, READ)
    assert text.split("_", 2)[2] not in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o640)
    create(path, READ)
    assert path.stat().st_mode & 0o777 == 0o640, "as somebody has set it"


def test_expiry(path: Path) -> None:
    created, text = create(path, READ, expires=datetime.now(UTC) + timedelta(seconds=0.05))
    file = TokenFile(path)
    principal = file.authenticate(text)
    assert principal.expires == created.expires.timestamp() if created.expires else False
    while principal.is_valid:
        pass
    with pytest.raises(NotAuthenticated, match="expired"):
        file.authenticate(text)


@pytest.mark.parametrize("text,seconds", [("90s", 90), ("5m", 300), ("12h", 43200), ("30d", 2592000), ("2w", 1209600)])
def test_expiries_from_now(text: str, seconds: int) -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    assert parse_expiry(text, now) == now + timedelta(seconds=seconds)


def test_expiries_by_date() -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    assert parse_expiry("never", now) is None
    assert parse_expiry("2026-02-01", now) == datetime(2026, 2, 1, tzinfo=UTC)
    assert parse_expiry("2026-02-01T12:00+02:00", now) == datetime(2026, 2, 1, 10, tzinfo=UTC)
    for wrong in ("", "soon", "0d", "30", "-1d", "2025-12-31", "999999999w", "2026-13-01"):
        with pytest.raises(InvalidArgument, match="expires"):
            parse_expiry(wrong, now)


def test_a_file_that_is_broken_lets_in_nobody_new_and_puts_out_nobody(path: Path) -> None:
    _, text = create(path, READ)
    file = TokenFile(path)
    good = path.read_text()
    path.write_text(good[:-20])
    assert file.authenticate(text)
    path.write_text(good)
    assert file.authenticate(text)
    path.unlink()
    with pytest.raises(NotAuthenticated):
        file.authenticate(text)


NO_HASH = {"id": "a", "name": "", "sha256": "short", "scopes": [], "created": "2026-01-01", "expires": None}


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"tokens": [{}]}', '{"tokens": 5}', json.dumps({"tokens": [NO_HASH]})])
def test_what_is_no_file_of_tokens(path: Path, content: str) -> None:
    path.write_text(content)
    with pytest.raises(InvalidArgument, match=r"tokens\.json"):
        TokenFile(path)
    with pytest.raises(InvalidArgument):
        create(path, READ)
    assert path.read_text() == content, "what is not ours is not overwritten"


def test_tokens_made_at_once_are_all_kept(path: Path) -> None:
    threads = [threading.Thread(target=create, args=(path, READ)) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({token.id for token in find(path)}) == 12
    assert sorted(os.listdir(path.parent)) == [".tokens.json.lock", "tokens.json"]


def test_wrong_arguments(path: Path) -> None:
    with pytest.raises(InvalidArgument, match="scope"):
        create(path, ())
    with pytest.raises(InvalidArgument, match="name"):
        create(path, READ, name="x" * 101)
    with pytest.raises(InvalidArgument, match="name"):
        create(path, READ, name="a\nb")
    with pytest.raises(InvalidArgument, match="not there"):
        revoke(path, "abc")
    _, text = create(path, READ)
    with pytest.raises(InvalidArgument) as caught:
        revoke(path, text)
    assert text not in str(caught.value)
    create(path, READ, certificate="worker")
    with pytest.raises(InvalidArgument, match="worker"):
        create(path, READ, certificate="worker")


def test_a_hand_written_time_is_utc(path: Path) -> None:
    create(path, READ)
    written = json.loads(path.read_text())
    written["tokens"][0]["expires"] = "2099-01-01"
    path.write_text(json.dumps(written))
    assert find(path)[0].expires == datetime(2099, 1, 1, tzinfo=UTC)


def test_a_pattern_of_many_stars_is_matched_in_one_pass() -> None:
    scope = Scope.parse("write:*a*a*a*a*b*c")
    began = time.monotonic()
    assert not scope.permits(Action.WRITE, "a" * 1_000_000)
    assert scope.permits(Action.WRITE, "a" * 1_000_000 + "b" + "c" * 1_000_000)
    assert time.monotonic() - began < 1
    assert not Scope.parse("read:ab*ba").permits(Action.READ, "aba")
    assert Scope.parse("read:a**b*").permits(Action.READ, "a\nb")


def test_a_token_is_revoked_through_a_link(path: Path) -> None:
    token, text = create(path, parse_scopes(["read:*"]))
    file = TokenFile(path)
    link = path.with_name("link.json")
    link.symlink_to(path)
    revoke(link, token.id)
    assert link.is_symlink()
    with pytest.raises(NotAuthenticated):
        file.authenticate(text)
