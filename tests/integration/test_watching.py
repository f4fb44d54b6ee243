"""Watched folders: each source for itself, and what somebody did by hand stands."""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from tests.integration.images import random_pixels, write_image
from tests.integration.processes import wait_until
from tests.unit.tabular import write_typed

from ome_tensor_client import Client, connect
from ome_tensor_server.testing import running_server

SHAPE = (1, 1, 1, 8, 9)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files, ``a`` and ``b``."""
    made = tmp_path / "data"
    made.mkdir()
    for seed, name in enumerate("ab"):
        write_image(made / f"{name}.parquet", random_pixels(SHAPE, seed=seed))
    return made


@pytest.fixture
def client(folder: Path) -> Iterator[Client]:
    """Of a server that watches the folder."""
    with running_server([folder], preload=False, watch_seconds=0.02) as server, connect(server.target) as connected:
        yield connected


def names(client: Client) -> list[str]:
    """What is served but for what was only put there to be waited for."""
    return [dataset.name for dataset in client.datasets() if not dataset.name.startswith("later")]


def formats(client: Client) -> dict[str, str]:
    return {dataset.name: dataset.format for dataset in client.datasets()}


_numbers = itertools.count()


def look_again(client: Client, folder: Path) -> None:
    """Wait for a few looks: a file that comes now is served at the second of those that begin from now on."""
    for _ in range(2):
        name = f"later{next(_numbers)}"
        write_image(folder / f"{name}.parquet", random_pixels(SHAPE))
        wait_until(lambda name=name: name in [dataset.name for dataset in client.datasets()], "what comes later is served")


def change(path: Path, seed: int) -> np.ndarray:
    """Put another image in a file's place; its pixels."""
    pixels = random_pixels((1, 1, 1, 5, 6), seed=seed)
    write_image(path.with_name(".new"), pixels).replace(path)
    return pixels[0, 0]


def shows(client: Client, name: str, pixels: np.ndarray) -> bool:
    found = client.tensor_view(name).to_numpy()
    return found.shape == pixels.shape and bool((found == pixels).all())


def warnings(log: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in log.records if record.name == "ome_tensor_server.watching"]


def test_two_sources_of_one_name(client: Client, folder: Path, server_log: pytest.LogCaptureFixture) -> None:
    """The first has it, and that is said once. All others come, change and go as before, and when the first has gone the second has its turn."""
    other = random_pixels(SHAPE, seed=7)[0, 0, 0]
    np.save(folder / "a.npy", other)
    look_again(client, folder)
    assert names(client) == ["a", "b"]
    assert shows(client, "a", random_pixels(SHAPE)[0, 0])
    changed = change(folder / "b.parquet", 3)
    wait_until(lambda: shows(client, "b", changed), "another one changes")
    (folder / "b.parquet").unlink()
    wait_until(lambda: names(client) == ["a"], "another one goes")
    changed = change(folder / "a.parquet", 4)
    wait_until(lambda: shows(client, "a", changed), "the first one changes")
    assert [line for line in warnings(server_log) if "a.npy" in line] == [
        f"{folder / 'a.npy'} is not served: dataset 'a' is {folder / 'a.parquet'}; rename one"
    ]
    (folder / "a.parquet").unlink()
    wait_until(lambda: formats(client).get("a") == "npy", "the second has its turn")
    assert shows(client, "a", other[None])


def test_a_name_that_an_upload_has(tmp_path: Path, folder: Path, server_log: pytest.LogCaptureFixture) -> None:
    with (
        running_server([folder], preload=False, watch_seconds=0.02, uploads=str(tmp_path / "uploads")) as server,
        connect(server.target) as client,
    ):
        client.upload("c", random_pixels(SHAPE))
        write_image(folder / "c.parquet", random_pixels(SHAPE, seed=5))
        look_again(client, folder)
        assert names(client) == ["a", "b", "c"]
        assert sum("c.parquet is not served" in line for line in warnings(server_log)) == 1
        client.admin.remove("c")
        wait_until(lambda: formats(client).get("c") == "parquet", "the file has its turn")


def test_what_goes_before_it_was_looked_at(folder: Path) -> None:
    """It was found when the server started, or registered by hand."""
    write_image(folder / ".hidden.parquet", random_pixels(SHAPE))
    with running_server([folder], preload=False, watch_seconds=0.5) as server, connect(server.target) as client:
        client.admin.register(str(folder / ".hidden.parquet"), "hidden")
        client.admin.register(str(folder / "b.parquet"), "again")
        for name in (".hidden", "b"):
            (folder / f"{name}.parquet").unlink()
        wait_until(lambda: names(client) == ["a"], "what has gone is not served")


def test_what_lies_elsewhere_or_hidden_is_left_alone(tmp_path: Path, folder: Path) -> None:
    """The watch does not find it, and yet it is there."""
    hidden = write_image(folder / ".hidden.parquet", random_pixels(SHAPE))
    elsewhere = write_image(tmp_path / "elsewhere.parquet", random_pixels(SHAPE))
    with (
        running_server([folder], preload=False, watch_seconds=0.02, roots=str(tmp_path)) as server,
        connect(server.target) as client,
    ):
        client.admin.register(str(hidden), "hidden")
        client.admin.register(str(elsewhere))
        look_again(client, folder)
        assert names(client) == ["a", "b", "elsewhere", "hidden"]


def as_file(folder: Path, seed: int) -> Path:
    return write_image(folder / "c.parquet", random_pixels(SHAPE, seed=seed))


def as_folder(folder: Path, seed: int) -> Path:
    shutil.rmtree(folder / "c", ignore_errors=True)
    return write_typed(folder / "c", {"c": random_pixels(SHAPE, seed=seed)})


@pytest.mark.parametrize("make", [as_file, as_folder])
def test_what_was_removed_by_hand_stays_removed(client: Client, folder: Path, make: Callable[[Path, int], Path]) -> None:
    """Until its source changes."""
    make(folder, 5)
    wait_until(lambda: names(client) == ["a", "b", "c"], "it is found")
    client.admin.remove("c")
    client.admin.remove("a")
    look_again(client, folder)
    assert names(client) == ["b"]
    np.save(folder / "a.npy", random_pixels(SHAPE)[0, 0, 0])
    look_again(client, folder)
    assert names(client) == ["b"], "another source takes nobody's name"
    time.sleep(0.01)
    make(folder, 6)
    wait_until(lambda: names(client) == ["b", "c"], "it has changed")
    assert shows(client, "c", random_pixels(SHAPE, seed=6)[0, 0])
    client.admin.remove("c")
    look_again(client, folder)
    assert names(client) == ["b"]


def test_what_was_removed_can_be_registered(client: Client, folder: Path) -> None:
    """Under any name; then it is watched again, and can be removed again."""
    look_again(client, folder)
    for name in ("a", "mine"):
        client.admin.remove(names(client)[0] if name == "a" else "a")
        look_again(client, folder)
        assert names(client) == ["b"]
        client.admin.register(str(folder / "a.parquet"), name)
        look_again(client, folder)
        assert names(client) == sorted([name, "b"])
    changed = change(folder / "a.parquet", 8)
    look_again(client, folder)
    assert shows(client, "mine", changed), "it is watched"
    client.admin.remove("mine")
    look_again(client, folder)
    assert names(client) == ["b"]
    change(folder / "a.parquet", 9)
    wait_until(lambda: names(client) == ["a", "b"], "it has changed")


def test_one_source_under_two_names(client: Client, folder: Path) -> None:
    """Both change, and both go."""
    client.admin.register(str(folder / "a.parquet"), "mine")
    client.admin.remove("a")
    client.admin.register(str(folder / "b.parquet"), "other")
    changed = change(folder / "b.parquet", 8)
    wait_until(lambda: shows(client, "b", changed) and shows(client, "other", changed), "both have changed")
    look_again(client, folder)
    assert names(client) == ["b", "mine", "other"]
    (folder / "b.parquet").unlink()
    wait_until(lambda: names(client) == ["mine"], "both have gone")


def test_a_source_that_cannot_be_served_does_not_stop_others(
    client: Client, folder: Path, server_log: pytest.LogCaptureFixture
) -> None:
    """It is said once, and it is tried again when it has changed; one that is served goes on as it was."""
    np.save(folder / "0.npy", np.array(["no", "pixels"]))
    time.sleep(0.01)
    good = (folder / "a.parquet").read_bytes()
    (folder / "a.parquet").write_bytes(b"PAR1" + bytes(100) + b"PAR1")
    look_again(client, folder)
    look_again(client, folder)
    assert names(client) == ["a", "b"]
    for name in ("0.npy", "a.parquet"):
        assert sum(f"{name} cannot be served as it is now" in line for line in warnings(server_log)) == 1
    (folder / "a.parquet").write_bytes(good)
    np.save(folder / "0.npy", np.zeros((3, 4), np.uint8))
    wait_until(lambda: names(client) == ["0", "a", "b"], "both can be served")
    assert shows(client, "a", random_pixels(SHAPE)[0, 0])


def test_a_folder_that_is_away_for_a_while(tmp_path: Path, folder: Path, server_log: pytest.LogCaptureFixture) -> None:
    """As network folders are: nothing in it is taken off the air, what was removed stays so, and the other folder is watched."""
    second = tmp_path / "second"
    second.mkdir()
    for name in ("c", "d"):
        write_image(second / f"{name}.parquet", random_pixels(SHAPE))
    with running_server([second, folder], preload=False, watch_seconds=0.02) as server, connect(server.target) as client:
        look_again(client, folder)
        client.admin.remove("d")
        look_again(client, folder)
        second.rename(tmp_path / "away")
        (folder / "b.parquet").unlink()
        wait_until(lambda: names(client) == ["a", "c"], "the other folder is watched")
        look_again(client, folder)
        assert names(client) == ["a", "c"]
        (tmp_path / "away").rename(second)
        look_again(client, folder)
        assert names(client) == ["a", "c"]
        (second / "c.parquet").unlink()
        wait_until(lambda: names(client) == ["a"], "it is watched again")
        assert sum("not watching" in line for line in warnings(server_log)) == 1
