"""The librarian when things meet: loads, refreshes, removals, full memory. With real files and readers, some of which wait when told to."""

from __future__ import annotations

import http.server
import os
import resource
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ome_tensor.errors import Cancelled, DatasetNotFound, InvalidArgument, LimitExceeded, Overloaded, Unavailable
from ome_tensor.listing import DatasetState
from ome_tensor.selection import Selection
from ome_tensor.tables import ImageTable, LoadedTable
from ome_tensor_server import room
from ome_tensor_server.entries import Entry
from ome_tensor_server.finding import SourceFile, find_sources
from ome_tensor_server.in_place import shared_readers
from ome_tensor_server.levels import LevelFiles, level_name, open_level
from ome_tensor_server.librarian import Librarian
from ome_tensor_server.loading import Loaded, Loader, shared_loader
from ome_tensor_server.store import Store
from ome_tensor_server.usage import Usage

#: Bytes of an image of :func:`save`.
IMAGE = 600 * 700


class HeldLoader(Loader):
    """A loader that says when it has read a source, and then waits to be let go on."""

    def __init__(self) -> None:
        super().__init__()
        self.holds = False
        self.has_read = threading.Semaphore(0)
        self.go_on = threading.Semaphore(0)

    def load(self, *args: Any, **options: Any) -> Loaded:
        loaded = super().load(*args, **options)
        if self.holds:
            self.has_read.release()
            assert self.go_on.acquire(timeout=20)
        return loaded

    def wait_until_read(self) -> None:
        assert self.has_read.acquire(timeout=20)


@pytest.fixture(scope="module")
def held() -> Iterator[HeldLoader]:
    loader = HeldLoader()
    yield loader
    loader.close()


class Desk:
    """A librarian, and what it has published."""

    def __init__(self, store: Store | None, budget: int = 64 << 20, loader: Loader | None = None) -> None:
        self.published: list[Entry] = []
        self.usage = Usage()
        self.levels = LevelFiles(None if store is None else store.levels_folder)
        self.librarian = Librarian(
            loader or shared_loader(), shared_readers(), store, budget, self.publish, self.usage, self.levels
        )

    def publish(self, entries: Sequence[Entry], _: Mapping[str, LoadedTable]) -> None:
        self.published[:] = entries

    def pixels(self, name: str, row: int = 0) -> np.ndarray:
        """What is read of a dataset that is loaded: YX."""
        entry = self.librarian.load(name)
        table = self.librarian.tables[name] if entry.manifest is None else entry.manifest.table()
        pixels = ImageTable(name, table).image(None, row).pixels
        out = np.empty(tuple(pixels.meta.extent), pixels.meta.dtype)
        t, z, c, y, x = pixels.meta.extent
        pixels.gather(Selection(range(t), range(z), range(c), 0, 0, x, y), out)
        return out[0, 0, 0]


@pytest.fixture(params=["memory", "store"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store | None:
    return None if request.param == "memory" else Store(tmp_path / "store")


def save(path: Path, value: int) -> Path:
    """An image of 600 x 700 bytes, all of one value; put in place whole, as files are that are served."""
    temporary = path.parent / f".{path.name}.tmp"
    with temporary.open("wb") as file:
        np.save(file, np.full((600, 700), value, np.uint8))
    temporary.replace(path)
    return path


def test_a_refresh_that_meets_a_load_is_not_lost(tmp_path: Path, store: Store | None, held: HeldLoader) -> None:
    """The load has read the old file and is not through yet: whoever is told that the dataset was looked at again gets the new one."""
    path = save(tmp_path / "a.npy", 1)
    desk = Desk(store, loader=held)
    desk.librarian.register(find_sources([path]))
    with ThreadPoolExecutor() as threads, holding(held):
        reading = threads.submit(desk.librarian.load, "a")
        held.wait_until_read()
        save(path, 2)
        refreshing = threads.submit(desk.librarian.refresh, "a")
        held.go_on.release(8)
        assert reading.result(20).is_ready
        assert refreshing.result(20)[1]
    assert (desk.pixels("a") == 2).all()
    assert desk.librarian.taken < 1.1 * IMAGE


@contextmanager
def holding(loader: HeldLoader) -> Iterator[None]:
    loader.holds = True
    try:
        yield
    finally:
        loader.holds = False
        while loader.go_on.acquire(blocking=False) or loader.has_read.acquire(blocking=False):
            pass


def test_removed_and_registered_again_while_it_is_loaded(tmp_path: Path, store: Store | None, held: HeldLoader) -> None:
    """The load of before is nobody's: it takes neither the new one's memory from the count nor its file from the store."""
    sources = find_sources([save(tmp_path / "a.npy", 1)])
    desk = Desk(store, loader=held)
    desk.librarian.register(sources)
    with ThreadPoolExecutor() as threads, holding(held):
        first = threads.submit(desk.librarian.load, "a")
        held.wait_until_read()
        desk.librarian.remove("a")
        desk.librarian.register(sources)
        second = threads.submit(desk.librarian.load, "a")
        held.go_on.release(8)
        # Cancelled too late, it finds the dataset that has its name by now, or none yet.
        assert first.exception(20) is None or isinstance(first.exception(), (Cancelled, DatasetNotFound))
        assert second.result(20).is_ready
    assert IMAGE <= desk.librarian.taken < 1.1 * IMAGE
    assert (desk.pixels("a") == 1).all()
    if store is not None:
        entry = desk.librarian.entry("a")
        assert entry.manifest is not None
        # Another server of the same store, whose datasets' sources have gone, takes away what nobody uses.
        (tmp_path / "a.npy").unlink()
        Store(store.folder).clean()
        assert Path(entry.manifest.file).exists()
    desk.librarian.remove("a")
    assert desk.librarian.taken == 0


def test_a_replacement_can_be_cancelled_and_holds_up_no_other(tmp_path: Path, store: Store | None, held: HeldLoader) -> None:
    paths = [save(tmp_path / f"{name}.npy", 1) for name in "ab"]
    desk = Desk(store, loader=held)
    desk.librarian.register(find_sources(paths))
    for name in "ab":
        desk.librarian.load(name)
    for path in paths:
        save(path, 2)
    with ThreadPoolExecutor() as threads, holding(held):
        replacing = threads.submit(desk.librarian.refresh, "a")
        held.wait_until_read()
        held.holds = False
        assert desk.librarian.refresh("b")[1]
        assert (desk.pixels("b") == 2).all()
        assert desk.librarian.cancel("a")
        held.go_on.release()
        # It had been read by then: cancelling came too late, or not.
        try:
            replacing.result(20)
        except Cancelled:
            assert (desk.pixels("a") == 1).all()
        else:
            assert (desk.pixels("a") == 2).all()
    assert not desk.librarian.cancel("a")


def test_a_dataset_removed_while_a_new_version_is_loaded(tmp_path: Path, store: Store | None, held: HeldLoader) -> None:
    path = save(tmp_path / "a.npy", 1)
    desk = Desk(store, loader=held)
    desk.librarian.register(find_sources([path]))
    desk.librarian.load("a")
    save(path, 2)
    with ThreadPoolExecutor() as threads, holding(held):
        replacing = threads.submit(desk.librarian.refresh, "a")
        held.wait_until_read()
        desk.librarian.remove("a")
        held.go_on.release()
        with pytest.raises((DatasetNotFound, Cancelled)):
            replacing.result(20)
    assert desk.librarian.taken == 0
    assert desk.published == desk.librarian.entries == []


def test_what_was_replaced_before_it_was_first_used(tmp_path: Path, store: Store | None) -> None:
    """What is listed of it then is what was loaded, and a look at it finds nothing new."""
    path = save(tmp_path / "a.npy", 1)
    desk = Desk(store)
    before = desk.librarian.register(find_sources([path]))[0]
    np.save(path, np.full((2, 30, 40), 7, np.uint16))
    after = desk.librarian.load("a")
    assert after.fingerprint != before.fingerprint
    assert desk.librarian.refresh("a") == (after, False)
    assert (desk.pixels("a") == 7).all()


def test_sources_are_registered_all_or_none(tmp_path: Path, store: Store | None) -> None:
    save(tmp_path / "b.npy", 1)
    desk = Desk(store)
    desk.librarian.register(find_sources([tmp_path / "b.npy"]))
    desk.librarian.load("b")
    taken, folder = desk.librarian.taken, tmp_path / "folder"
    folder.mkdir()
    for name in "abc":
        save(folder / f"{name}.npy", 2)
    if store is not None:
        # They would be loaded at once.
        for name in "ac":
            store.load(str(folder / f"{name}.npy"), shared_loader())
    with pytest.raises(InvalidArgument, match="there is a dataset 'b' already, of another source") as caught:
        desk.librarian.register(find_sources([folder]))
    assert (caught.value.field, caught.value.value) == ("name", "b")
    assert [entry.name for entry in desk.librarian.entries] == ["b"]
    assert desk.librarian.taken == taken


def test_what_the_system_refuses_for_now_is_no_fault_of_the_source(tmp_path: Path, store: Store | None) -> None:
    """No descriptor is to be had: the client may try again, and the dataset is not given up."""
    desk = Desk(store)
    desk.librarian.register(find_sources([save(tmp_path / "a.npy", 1)]))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        with pytest.raises(Unavailable, match=r"a\.npy cannot be loaded now: Too many open files") as caught:
            desk.librarian.load("a")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert caught.value.field == "path"
    assert desk.librarian.entry("a").state is DatasetState.NOT_LOADED
    assert (desk.pixels("a") == 1).all()


def test_a_file_that_comes_back_is_read_again(tmp_path: Path, store: Store | None) -> None:
    path = save(tmp_path / "a.npy", 1)
    desk = Desk(store)
    desk.librarian.register(find_sources([path]))
    path.rename(tmp_path / "away")
    with pytest.raises(InvalidArgument, match="No such file"):
        desk.librarian.load("a")
    assert "No such file" in desk.librarian.entry("a").problem
    (tmp_path / "away").rename(path)
    assert (desk.pixels("a") == 1).all()
    assert desk.librarian.entry("a").problem == ""


# -- links -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("named", [False, True], ids=["found", "registered"])
def test_a_link_that_leads_out_is_never_followed(tmp_path: Path, store: Store | None, named: bool) -> None:
    """A file that became one, since it was found in a folder or registered below a root."""
    secret, folder = save(tmp_path / "secret.npy", 9), tmp_path / "folder"
    folder.mkdir()
    for name in ("a", "b", "c"):
        save(folder / f"{name}.npy", 1)
    desk = Desk(store)
    sources = (
        [SourceFile(name, str(folder / f"{name}.npy"), named=True, root=os.path.realpath(folder)) for name in "abc"]
        if named
        else find_sources([folder])
    )
    desk.librarian.register(sources)
    assert (desk.pixels("a") == 1).all()
    for name in "abc":
        (folder / f"{name}.npy").unlink()
        (folder / f"{name}.npy").symlink_to(secret)
    with pytest.raises(InvalidArgument, match=r"a\.npy leads out of the folder that it is served from") as caught:
        desk.librarian.refresh("a")
    assert (caught.value.field, caught.value.value) == ("path", "a.npy")
    assert (desk.pixels("a") == 1).all()
    with pytest.raises(InvalidArgument, match=r"b\.npy leads out"):
        desk.librarian.load("b")
    assert desk.librarian.entry("b").state is DatasetState.FAILED
    with pytest.raises(InvalidArgument, match=r"c\.npy leads out"):
        desk.librarian.refresh("c")
    other = Desk(store)
    if named:
        with pytest.raises(InvalidArgument, match=r"a\.npy leads out"):
            other.librarian.register(sources)
    else:
        assert other.librarian.register(sources) == []
    # The folder itself made a link to another one is no better.
    shutil.rmtree(folder)
    folder.symlink_to(tmp_path)
    shutil.copy(secret, tmp_path / "b.npy")
    with pytest.raises(InvalidArgument, match=r"b\.npy leads out"):
        desk.librarian.refresh("b")


# -- levels ----------------------------------------------------------------------------------------------------------------------------


def three_images(folder: Path) -> None:
    for number, name in enumerate("abc"):
        save(folder / f"{name}.npy", 10 + number)


def test_levels_leave_for_others(tmp_path: Path, store: Store | None) -> None:
    """Room for the three images and two levels of a quarter of one."""
    three_images(tmp_path)
    desk = Desk(store, budget=int(3.7 * IMAGE))
    desk.librarian.register(find_sources([tmp_path / f"{name}.npy" for name in "abc"]))
    paths = {}
    for name in "abcab":
        entry = desk.librarian.load(name)
        desk.usage.begin(entry.slot)
        desk.usage.end(entry.slot)
        path = paths[name] = desk.librarian.make_level(name, "image", 0, 1, 20)
        key = f"{name}/image/0"
        image = ImageTable(name, desk.librarian.tables[name] if store is None else entry.manifest.table()).image("image", 0)  # type: ignore[union-attr]
        level = open_level(path, level_name(entry.location, entry.version, key, 1), image.pixels.meta, 1)
        assert (level._array == 10 + "abc".index(name)).all()
        assert level._array.shape == (1, 1, 1, 300, 350)
        del level, image
        assert desk.librarian.taken <= desk.librarian.budget
    assert [desk.librarian.entry(name).state for name in "abc"] == [DatasetState.LOADED] * 3
    if store is not None:
        # That of c, which was asked for before those of a and b were asked for again, has left.
        assert [Path(paths[name]).exists() for name in "abc"] == [True, True, False]
    desk.librarian.remove("a")
    desk.librarian.remove("b")
    desk.librarian.remove("c")
    assert desk.librarian.taken == 0


def test_a_level_that_is_read_does_not_leave(tmp_path: Path, store: Store | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_PATIENCE", 0.2)
    three_images(tmp_path)
    desk = Desk(store, budget=int(3.4 * IMAGE))
    desk.librarian.register(find_sources([tmp_path / f"{name}.npy" for name in "abc"]))
    entries = {name: desk.librarian.load(name) for name in "abc"}
    for entry in entries.values():
        desk.usage.begin(entry.slot)
    a = entries["a"]
    path = desk.librarian.make_level("a", "image", 0, 1, 20)
    meta = ImageTable("a", desk.librarian.tables["a"] if store is None else a.manifest.table()).image("image", 0).pixels.meta  # type: ignore[union-attr]
    level = open_level(path, level_name(a.location, a.version, "a/image/0", 1), meta, 1)
    with pytest.raises(Overloaded, match=r"level 1 of b/image/0 takes .* are in use"):
        desk.librarian.make_level("b", "image", 0, 1, 20)
    part = level._array[..., :10]
    del level
    # A part of it is enough.
    with pytest.raises(Overloaded):
        desk.librarian.make_level("b", "image", 0, 1, 20)
    assert (part == 10).all()
    del part
    desk.librarian.make_level("b", "image", 0, 1, 20)
    with pytest.raises(OSError, match=r"it has left memory|No such file"):
        open_level(path, level_name(a.location, a.version, "a/image/0", 1), meta, 1)


def test_a_level_larger_than_all_memory_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "a.npy", 1)
    # In place: the image itself takes nothing.
    desk = Desk(None, budget=IMAGE // 10)
    desk.librarian.register(find_sources([tmp_path / "a.npy"]))
    assert desk.librarian.load("a").state is DatasetState.IN_PLACE
    with pytest.raises(LimitExceeded, match=r"level 1 of a/image/0 takes 102\.5 KiB, and this server keeps at most 41\.02 KiB"):
        desk.librarian.make_level("a", "image", 0, 1, 20)
    assert desk.librarian.taken == 0


# -- addresses -------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def address(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder, and where a web server gives it."""
    folder = tmp_path / "web"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(folder))

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("restart", [False, True])
def test_what_changed_at_an_address_is_read_again(
    tmp_path: Path, store: Store | None, address: tuple[Path, str], restart: bool
) -> None:
    """Its metadata are the same: only who reads the pixels knows."""
    zarr = pytest.importorskip("zarr")
    folder, where = address
    array = zarr.create_array(folder / "a.zarr", shape=(60, 70), chunks=(32, 32), dtype="uint8", zarr_format=2)
    array[:] = 1
    source = find_sources([f"{where}/a.zarr"])
    desk = Desk(store)
    desk.librarian.register(source)
    assert (desk.pixels("a") == 1).all()
    before = desk.librarian.entry("a")
    assert desk.librarian.refresh("a") == (before, False)
    array[:] = 2
    if restart:
        desk = Desk(None if store is None else Store(store.folder))
        desk.librarian.register(source)
    after, changed = desk.librarian.refresh("a")
    assert changed or not after.is_ready
    assert (desk.pixels("a") == 2).all()
    assert desk.librarian.entry("a").version != before.version
    assert desk.librarian.refresh("a")[1] is False


def test_in_place_at_an_address_a_look_makes_another_version(tmp_path: Path, address: tuple[Path, str]) -> None:
    zarr = pytest.importorskip("zarr")
    folder, where = address
    zarr.create_array(folder / "a.zarr", shape=(600, 700), chunks=(64, 64), dtype="uint8", zarr_format=2)
    desk = Desk(None, budget=IMAGE // 10)
    desk.librarian.register(find_sources([f"{where}/a.zarr"]))
    before = desk.librarian.load("a")
    assert before.state is DatasetState.IN_PLACE
    after, changed = desk.librarian.refresh("a")
    assert changed
    assert after.state is DatasetState.IN_PLACE
    assert after.version != before.version
