"""The lock files of the images: they say what `pyproject.toml` says, and the check tells where they do not."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "deploy"))  # the programs there are no package

import fetch_wheels  # noqa: E402
import licences  # noqa: E402
import lockfiles  # noqa: E402

PYPROJECT = (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("name", lockfiles.CONTENTS)
def test_a_lock_file_is_what_pyproject_asks_for(name: str) -> None:
    assert list(lockfiles.problems(name)) == []


@pytest.mark.parametrize("name", lockfiles.CONTENTS)
def test_a_lock_file_names_no_index_and_no_path(name: str) -> None:
    text = (lockfiles.LOCKS / f"{name}.txt").read_text()
    assert not re.search(r"://|^-|\s/|index-url", text, re.MULTILINE)


def test_the_images_hold_what_they_are_for() -> None:
    server = {pin.name for pin in lockfiles.pins("server")}
    client = {pin.name for pin in lockfiles.pins("client-torch")}
    assert {"grpcio-health-checking", "zarr", "imagecodecs", "pyjwt", "cryptography", "opentelemetry-sdk"} <= server
    assert {"pillow", "sympy", "networkx", "jinja2", "fsspec", "filelock"} <= client
    for name in server | client:
        assert not re.match(r"torch|triton|nvidia|cuda|jax|vortex", name), name


def test_where_locks_hold_is_said_once_for_uv_and_once_for_us() -> None:
    said = tomllib.loads(PYPROJECT)["tool"]["uv"]["required-environments"]
    assert [re.search(r"platform_machine == '(\w+)'", line)[1] for line in said] == list(lockfiles.MACHINES)  # type: ignore[index]
    classifiers = tomllib.loads(PYPROJECT)["project"]["classifiers"]
    assert [line.rpartition(" ")[2] for line in classifiers if re.search(r"Python :: 3\.", line)] == list(lockfiles.PYTHONS)


def unsealed(change: Callable[[str], str]) -> Callable[[str], str]:
    """A change of the pins that the digest at the top does not give away."""

    def changed(text: str) -> str:
        body = change(text.split("\n", 2)[2])
        return "\n".join([text.split("\n")[0], f"# sha256 of the rest: {hashlib.sha256(body.encode()).hexdigest()}", body])

    return changed


def without(name: str) -> Callable[[str], str]:
    return unsealed(lambda text: re.sub(rf"^{name}==.*\n(?: +.*\n)+", "", text, flags=re.MULTILINE))


def replaced(pattern: str, by: str) -> Callable[[str], str]:
    return unsealed(lambda text: re.sub(pattern, by, text, count=1, flags=re.MULTILINE))


STRAY = f"zzz==1.0 \\\n    --hash=sha256:{'0' * 64}\n    # via {{}}\n"


@pytest.mark.parametrize(
    "change, complaint",
    [
        (lambda text: re.sub(r"^mdurl==.*\n(?: +.*\n)+", "", text, flags=re.MULTILINE), "edited by hand"),
        (lambda text: text + "\n", "edited by hand"),
        (without("zarr"), "zarr>=3 is not pinned on Python 3.11"),
        (replaced(r"^xxhash==.*?( \\)$", r"xxhash==3.0.0\1"), "xxhash==3.0.0 is not xxhash>=3.4"),
        (replaced(r"^(xxhash==\S+)", r"\1 ; python_full_version < '3.13'"), "xxhash>=3.4 is not pinned on Python 3.13"),
        (replaced(r"^(numpy==\S+) ; \S+ < .*?( \\)$", r"\1\2"), "numpy has 2 versions on Python 3.12"),
        (replaced(r"^(xxhash==\S+ \\)\n(?:    --hash.*\n)+", r"\1\n"), "has no hash"),
        (replaced(r"^    --hash=sha256:[0-9a-f]{60}", "    --hash=sha256:"), "not a pin with its hashes"),
        (replaced(r"^xxhash==", "--index-url https://example.org\nxxhash=="), "not a pin with its hashes"),
        (unsealed(lambda text: text + STRAY.format("yyy")), "zzz==1.0 is pinned, but nothing needs it"),
        (unsealed(lambda text: text + STRAY.format("zzz")), "zzz==1.0 is pinned, but nothing needs it"),
        (unsealed(lambda text: text + STRAY.format("pyproject.toml")), "zzz==1.0 is pinned, but nothing needs it"),
        (replaced(r"^(xxhash==\S+)", r"\1 ; sys_platform == 'win32'"), "is pinned, but nothing needs it"),
        (without("aiohttp"), "aiohttp>=3.9 is not pinned"),
    ],
)
def test_a_lock_file_that_is_wrong_is_found(change: Callable[[str], str], complaint: str, tmp_path: Path) -> None:
    before = (lockfiles.LOCKS / "server.txt").read_text()
    after = change(before)
    assert after != before
    (tmp_path / "server.txt").write_text(after)
    found = list(lockfiles.problems("server", folder=tmp_path))
    assert any(complaint in problem for problem in found), found


@pytest.mark.parametrize(
    "old, new, complaint",
    [
        ('"xxhash>=3.4",', '"xxhash>=99",', "is not xxhash>=99"),
        ('"xxhash>=3.4",', '"xxhash>=3.4",\n    "leftpad>=1",', "leftpad>=1 is not pinned"),
        ('    "xxhash>=3.4",\n', "", "nothing needs it"),
        ('    "tifffile>=2025.5.21",\n', "", "tifffile==2026"),
        ('oidc = ["pyjwt[crypto]>=2.8"]', "oidc = []", "cryptography==50"),
    ],
)
def test_a_pyproject_that_has_gone_on_is_found(old: str, new: str, complaint: str, tmp_path: Path) -> None:
    assert old in PYPROJECT
    (tmp_path / "pyproject.toml").write_text(PYPROJECT.replace(old, new, 1))
    found = list(lockfiles.problems("server", pyproject=tmp_path / "pyproject.toml"))
    assert any(complaint in problem for problem in found), found


def test_a_python_is_given_the_versions_that_are_for_it() -> None:
    (older,) = (pin.version for pin in lockfiles.pins_for("server", "3.11") if pin.name == "numpy")
    (newer,) = (pin.version for pin in lockfiles.pins_for("server", "3.13") if pin.name == "numpy")
    assert older != newer
    assert {pin.version for pin in lockfiles.pins("server") if pin.name == "numpy"} == {older, newer}


def test_a_wheel_counts_as_there_only_with_a_locked_hash_and_for_the_right_python(tmp_path: Path) -> None:
    content = b"not a wheel, but these bytes"
    locked = (f"sha256:{hashlib.sha256(content).hexdigest()}",)
    pin = lockfiles.Pin("some-name", "1.2", "", locked, (), "")
    wheel = tmp_path / "Some_Name-1.2-cp312-cp312-manylinux_2_17_x86_64.manylinux_2_17_aarch64.whl"
    wheel.write_bytes(content)
    assert fetch_wheels.find(pin, "3.12", tmp_path) == wheel
    assert fetch_wheels.find(pin, "3.13", tmp_path) is None
    wheel.write_bytes(content + b"!")
    assert fetch_wheels.find(pin, "3.12", tmp_path) is None


def test_what_is_there_is_not_asked_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a-1-py3-none-any.whl").write_bytes(b"a")
    a, b = (
        lockfiles.Pin(name, "1", "", (f"sha256:{hashlib.sha256(name.encode()).hexdigest()}",), (), "")
        for name in ("a", "zz-not-there")
    )
    # Without an index nothing can be fetched: what is there needs none, what is missing is pip's to complain about.
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    fetch_wheels.fetch([a], "3.12", tmp_path)
    with pytest.raises(subprocess.CalledProcessError):
        fetch_wheels.fetch([a, b], "3.12", tmp_path)


def test_the_list_of_licences_is_that_of_the_locks() -> None:
    assert list(licences.problems()) == []


@pytest.mark.parametrize(
    "pattern, by, complaint",
    [
        (r"^\| zarr .*\n", "", "zarr==3.1.6 (server) is locked and not in the list"),
        (r"^(\| zarr \| \S+ \|) MIT", r"\1 AGPL-3.0-only", "'AGPL-3.0-only' is none of the licences that are allowed"),
        (r"^(\| zarr \| \S+ \|) MIT", r"\1 unknown", "'unknown' is none"),
        (r"^\| zarr \| \S+", r"| zarr | 0.1", "zarr==0.1 is in the list and not locked"),
    ],
)
def test_a_list_of_licences_that_is_wrong_is_found(pattern: str, by: str, complaint: str, tmp_path: Path) -> None:
    text = re.sub(pattern, by, licences.LIST.read_text(), count=1, flags=re.MULTILINE)
    (tmp_path / "list.md").write_text(text)
    found = list(licences.problems(tmp_path / "list.md"))
    assert any(complaint in problem for problem in found), found


@pytest.mark.parametrize(
    "expression, is_refused",
    [
        ("MIT", False),
        ("GPL-3.0-only OR MIT", False),
        ("MIT AND Zlib", False),
        ("MIT AND GPL-3.0-only", True),
        ("(LGPL-2.1-only OR MIT) AND BSD-3-Clause", False),
        ("GPL-3.0-only", True),
        ("BSD", True),
        ("", True),
    ],
)
def test_a_licence_is_refused_where_no_choice_of_it_is_allowed(expression: str, is_refused: bool) -> None:
    assert licences.refused(expression) is is_refused
