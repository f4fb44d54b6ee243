"""What the librarian's helpers do when the machine, or somebody at the same moment, gets in their way. With real files, threads and readers."""

from __future__ import annotations

import gc
import os
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.integration.images import random_pixels
from tests.unit.tabular import column, pixels_of
from tests.unit.test_librarian import IMAGE, Desk, HeldLoader, holding, save

from ome_tensor.blocks import ChunkCache
from ome_tensor.errors import Cancelled, InvalidArgument, InvalidRecord, Unavailable
from ome_tensor.listing import DatasetState
from ome_tensor.tables import ImageTable
from ome_tensor_server.exchange import Asker, answer_requests
from ome_tensor_server.finding import find_sources
from ome_tensor_server.in_place import Readers
from ome_tensor_server.levels import LevelFiles, level_bytes, level_name
from ome_tensor_server.loading import Loaded, shared_loader
from ome_tensor_server.offices import OwnOffice
from ome_tensor_server.pyramid_office import PyramidOffice
from ome_tensor_server.readers import parquet
from ome_tensor_server.readers.detect import leads_up, open_source
from ome_tensor_server.room import Share
from ome_tensor_server.store import Store
from ome_tensor_server.uploads_check import check_upload
from ome_tensor_server.watching import FolderWatch


class GivenUpLoader(HeldLoader):
    """One that hears of a cancelled load before it lets go."""

    def load(self, *args: Any, **options: Any) -> Loaded:
        loaded = super().load(*args, **options)
        if options["cancelled"].is_set():
            raise Cancelled("the load was cancelled")
        return loaded


@contextmanager
def no_threads() -> Iterator[None]:
    """While no thread can be started: none has a stack of 128 TiB."""
    threading.stack_size(1 << 47)
    try:
        yield
    finally:
        threading.stack_size(0)


def test_where_there_is_no_thread_nothing_is_being_done(tmp_path: Path) -> None:
    desk = Desk(None)
    desk.librarian.register(find_sources([save(tmp_path / "a.npy", 1), save(tmp_path / "b.npy", 2)]))
    desk.librarian.load("b")
    with no_threads():
        with pytest.raises(Unavailable, match="no thread"):
            desk.librarian.load("a")
        with pytest.raises(Unavailable, match="no thread"):
            desk.librarian.make_level("b", "image", 0, 1, 5)
    assert desk.librarian.entry("a").state is DatasetState.NOT_LOADED
    assert desk.librarian.load("a", 20).is_ready
    assert desk.librarian.make_level("b", "image", 0, 1, 20)


def test_a_supervisor_without_a_thread_answers_the_next_request() -> None:
    here, there = socket.socketpair()
    threading.Thread(target=answer_requests, args=(there, lambda name: lambda: name), daemon=True).start()
    with here:
        asker = Asker(here)
        with no_threads(), pytest.raises(Unavailable, match="no thread"):
            asker.ask("one")
        assert asker.ask("two") == "two"
        here.shutdown(socket.SHUT_RDWR)


def test_who_asks_for_what_failed_is_not_kept(tmp_path: Path) -> None:
    """An error that is raised again has the frames of every call that it went through."""
    path = save(tmp_path / "a.npy", 1)
    desk = Desk(None)
    desk.librarian.register(find_sources([path]))
    path.write_bytes(b"\x93NUMPY nonsense")
    problems = []
    for _ in range(3):
        with pytest.raises(InvalidRecord) as raised:
            desk.librarian.load("a")
        problems.append(raised.value)
    assert len({id(problem) for problem in problems}) == 3
    assert len({problem.message for problem in problems}) == 1
    assert desk.librarian.entry("a").state is DatasetState.FAILED


def test_what_was_changed_while_it_was_loaded_has_not_failed(tmp_path: Path) -> None:
    """A moment later it is whole."""
    path = tmp_path / "a.npy"
    np.save(path, np.zeros((4096, 8192), np.uint8))
    desk = Desk(None)
    desk.librarian.register(find_sources([path]))
    through = threading.Event()

    def touch() -> None:
        while not through.wait(0.001):
            os.utime(path)

    with ThreadPoolExecutor() as threads:
        threads.submit(touch)
        with pytest.raises(InvalidRecord, match="being changed"):
            desk.librarian.load("a")
        through.set()
    assert desk.librarian.load("a").is_ready


@pytest.mark.parametrize("kind", ["memory", "store"])
def test_levels_that_need_the_same_level_at_once(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is there once, and counts once, though both have made it."""
    store = None if kind == "memory" else Store(tmp_path / "store")
    desk = Desk(store)
    desk.librarian.register(find_sources([save(tmp_path / "a.npy", 1)]))
    desk.librarian.load("a")
    both = threading.Barrier(2)
    make = LevelFiles.make

    def together(files: LevelFiles, name: str, *arguments: object) -> str:
        if name.endswith("-1.npy"):
            both.wait(20)
        return make(files, name, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(LevelFiles, "make", together)
    before = desk.librarian.taken
    with ThreadPoolExecutor() as threads:
        list(threads.map(lambda level: desk.librarian.make_level("a", "image", 0, level, 20), (1, 2)))
    entry = desk.librarian.entry("a")
    meta = desk.librarian._images(entry).image(None, 0).pixels.meta
    assert desk.librarian.taken - before == level_bytes(meta, 1) + level_bytes(meta, 2)
    gc.collect()
    name = level_name(entry.location, entry.version, "a/image/0", 1)
    opened = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    assert sum(name in path for path in opened) == (1 if store is None else 0)
    desk.librarian.remove("a")
    assert desk.librarian.taken == 0


def test_a_level_that_leaves_before_it_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever wanted the next one is told to come again, and not that the dataset has no file."""
    desk = Desk(None)
    desk.librarian.register(find_sources([save(tmp_path / "a.npy", 1)]))
    desk.librarian.load("a")
    make_one = PyramidOffice._make_one

    def leaving(office: PyramidOffice, *arguments: object) -> str:
        path = make_one(office, *arguments)  # type: ignore[arg-type]
        with ThreadPoolExecutor() as threads:
            assert threads.submit(desk.librarian._leave, Share("another dataset")).result(20)
        return path

    with monkeypatch.context() as patched:
        patched.setattr(PyramidOffice, "_make_one", leaving)
        with pytest.raises(Unavailable, match="left memory") as raised:
            desk.librarian.make_level("a", "image", 0, 2, 20)
    assert raised.value.field == "loading"
    assert desk.librarian.make_level("a", "image", 0, 2, 20)


def test_registered_while_its_other_dataset_leaves(tmp_path: Path) -> None:
    """The store's file goes between the look at the source and the registration: then it is not loaded, and is loaded again."""
    with TemporaryDirectory(dir="/dev/shm") as memory:
        desk = Desk(Store(Path(memory)))
        (source,) = find_sources([save(tmp_path / "a.npy", 7)])
        desk.librarian.register([source])
        desk.librarian.load("a")
        found = desk.librarian._described(replace(source, name="b"), False)
        desk.librarian.remove("a")
        desk.librarian._take_in([found])
        assert desk.librarian.entry("b").state is DatasetState.NOT_LOADED
        assert desk.librarian.taken == 0
        assert (desk.pixels("b") == 7).all()


def test_a_look_that_was_given_up_is_repeated(tmp_path: Path) -> None:
    """A client cancels what the watch loads: the new file is served all the same, at the next look."""
    folder = tmp_path / "data"
    folder.mkdir()
    path = save(folder / "a.npy", 1)
    loader = GivenUpLoader()
    desk = Desk(None, loader=loader)
    desk.librarian.register(find_sources([folder]))
    desk.librarian.load("a")
    watch = FolderWatch(desk.librarian, 0)
    watch.start([str(folder)])
    watch.look()
    save(path, 2)
    watch.look()
    try:
        with ThreadPoolExecutor() as threads, holding(loader):
            looking = threads.submit(watch.look)
            loader.wait_until_read()
            assert desk.librarian.cancel("a")
            loader.go_on.release()
            looking.result(20)
        assert (desk.pixels("a") == 1).all()
        watch.look()
        assert (desk.pixels("a") == 2).all()
    finally:
        loader.close()


def test_a_folder_that_became_a_link_while_it_was_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies outside of the roots is not served, though the path did not lead there when it was checked."""
    root, outside = tmp_path / "root", tmp_path / "outside"
    folder = root / "data"
    folder.mkdir(parents=True)
    outside.mkdir()
    save(outside / "secret.npy", 42)
    desk = Desk(None)
    office = OwnOffice(desk.librarian, shared_loader(), None, [str(root)])
    check = OwnOffice._check_root

    def swapped(one: OwnOffice, path: str) -> str:
        found = check(one, path)
        folder.rmdir()
        folder.symlink_to(outside)
        return found

    monkeypatch.setattr(OwnOffice, "_check_root", swapped)
    with pytest.raises(InvalidArgument, match="does not lie below"):
        office.register(str(folder), "")
    assert not desk.librarian.entries


@pytest.mark.parametrize("part", ["..", "%2e%2e", ".%2E", ".\t.", "%2E.\n", "a%2f..%2fb", "a\\..\\b"])
def test_what_leads_up_however_it_is_written(part: str) -> None:
    address = f"http://127.0.0.1:9/public/{part}/x.zarr"
    assert leads_up(address)
    office = OwnOffice(Desk(None).librarian, shared_loader(), None, ["http://127.0.0.1:9/public"])
    with pytest.raises(InvalidArgument, match="does not lie below"):
        office.register(address, "")
    assert not leads_up("http://127.0.0.1:9/public/..a/b../%2e/x.zarr")


def test_a_reader_begins_at_the_beginning(tmp_path: Path) -> None:
    """The one before died in the middle, and has left a part of its answer."""
    desk = Desk(None, budget=IMAGE // 2)
    desk.librarian.register(find_sources([save(tmp_path / "a.npy", 1)]))
    entry = desk.librarian.load("a")
    assert entry.state is DatasetState.IN_PLACE
    readers, descriptor = Readers(), os.memfd_create("answer")
    try:
        os.write(descriptor, b"ARR")
        readers.ask("outline", entry, descriptor, limit=1 << 30)
        size = os.fstat(descriptor).st_size
        assert pa.ipc.open_file(pa.py_buffer(os.pread(descriptor, size, 0))).read_all().num_rows == 1
    finally:
        os.close(descriptor)
        readers.close()


def test_the_rows_of_a_group_are_not_all_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each an index is made, which is larger than a small image, and which no cache counts."""
    monkeypatch.setattr(parquet, "_INDEXES_KEPT", 10)
    images = [random_pixels((1, 1, 1, 2, 3), "uint8", seed=row) for row in range(40)]
    pq.write_table(pa.table({"image": column(images)}), tmp_path / "a.parquet")
    with open_source(str(tmp_path / "a.parquet")) as source:
        served = source.in_place("v", ChunkCache(1 << 20))
        table = ImageTable("a", served.table, columns=served.columns)
        for row in (*range(40), 3, 39):
            np.testing.assert_array_equal(pixels_of(table, row), images[row], strict=True)
        groups: Any = served.columns["image"]
        assert len(groups._groups._last[1]._pixels) == 10


def test_an_upload_of_two_streams(tmp_path: Path) -> None:
    """Only the first of them would be served."""
    table = pa.table({"image": column([random_pixels((1, 1, 1, 8, 9))])})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    stream = sink.getvalue().to_pybytes()
    path = tmp_path / "part"
    path.write_bytes(stream)
    assert check_upload(str(path)) > 0
    path.write_bytes(2 * stream)
    with pytest.raises(InvalidRecord, match=f"{len(stream)} bytes behind the end"):
        check_upload(str(path))
