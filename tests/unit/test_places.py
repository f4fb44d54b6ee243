"""Where the store is: in memory while there is room, else on a disk, and there again at the next start."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.integration.images import random_pixels, write_image

# In name spaces of its own, where /dev/shm is a small file system.
_AUTO = """
import gc, os, sys
from pathlib import Path
from ome_tensor_server.loading import load_anonymous, shared_loader
from ome_tensor_server.places import open_store
path, loader = sys.argv[1], shared_loader()

def fill(leaving):
    with open("/dev/shm/filler", "wb") as file:
        free = os.statvfs("/dev/shm")
        file.write(bytes(free.f_bavail * free.f_frsize - leaving))

def opened(setting="auto"):
    return open_store(setting, [path], lambda location: loader.describe(location).nbytes, 1 << 40)

def started():
    store = opened()
    store.clean()
    return store.load(path, loader).file
"""


def auto(tmp_path: Path, script: str, size: int) -> list[str]:
    """The lines that a script printed, run where shared memory is of this many bytes."""
    path = write_image(tmp_path / "image.ome.parquet", random_pixels((1, 2, 2, 512, 512)))
    mount = f"mount -t tmpfs -o size={size} tmpfs /dev/shm"
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", f'{mount} || exit 99; exec "$@"', "sh"]
    if shutil.which("unshare") is None:
        pytest.skip("no unshare")
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [*command, sys.executable, "-c", _AUTO + script, str(path)], env=environment, capture_output=True, text=True, timeout=60
    )
    if done.returncode == 99 or "unshare failed" in done.stderr or "Operation not permitted" in done.stderr:
        pytest.skip(f"no small file system to be had: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_auto_goes_on_where_it_began(tmp_path: Path) -> None:
    """A second start finds the datasets of the first, though there is less room now; and so it does after shared memory was lost."""
    lines = auto(
        tmp_path,
        """
print(started())
fill(leaving=100_000)
print(started())
os.unlink("/dev/shm/filler")
os.system("rm -r /dev/shm/ome-tensor-*")
fill(leaving=3_000_000)
print(started())
os.unlink("/dev/shm/filler")
print(started())
""",
        6 << 20,
    )
    assert lines[0].startswith("/dev/shm/ome-tensor-")
    assert lines[1] == lines[0]
    # 2 MiB do not fit in half of 3 MB.
    assert lines[2].startswith(str(tmp_path / "cache"))
    assert lines[3] == lines[2]


def test_auto_goes_elsewhere_when_it_is_full(tmp_path: Path) -> None:
    """What fitted at the start may no longer fit; nothing is left where it did not."""
    lines = auto(
        tmp_path,
        """
store = opened()
fill(leaving=1_000_000)
print(store.load(path, loader).file)
print(*(name for name in os.listdir(store.folder) if not name.startswith(".")))
""",
        6 << 20,
    )
    assert len(lines) == 1
    assert lines[0].startswith(str(tmp_path / "cache"))


def test_memory_is_the_last_place(tmp_path: Path) -> None:
    """Where nobody has asked for a store, and there is no room anywhere; one that was asked for is full, and that is an error."""
    lines = auto(
        tmp_path,
        """
os.environ["XDG_CACHE_HOME"] = "/dev/shm/cache"
stores = [opened(), opened("/dev/shm/named")]
fill(leaving=500_000)
for store in stores:
    try:
        store.load(path, loader)
    except OSError as error:
        print(error.errno, store.is_optional)
    print(*(name for name in os.listdir(store.folder) if not name.startswith(".")))
print(load_anonymous(path, loader).file)
""",
        6 << 20,
    )
    assert lines == ["28", "True", "28", "False", "None"]


def test_a_level_finds_no_room(tmp_path: Path) -> None:
    """That is an error; written through memory that lies in a full file system it would be the end of the process."""
    lines = auto(
        tmp_path,
        """
import numpy as np
from ome_tensor.pyramids import ArrayPixels
from ome_tensor.record import ImageMeta
from ome_tensor.selection import Extent
from ome_tensor_server.levels import LevelFiles
levels = LevelFiles(Path("/dev/shm/levels"))
fill(leaving=500_000)
array = np.ones((1, 1, 1, 4096, 4096), np.uint8)
meta = ImageMeta(Extent(*array.shape), array.dtype)
try:
    levels.make("level", ArrayPixels(meta, array), lambda written: None)
except OSError as error:
    print(error.errno)
print(len(os.listdir("/dev/shm/levels")))
""",
        6 << 20,
    )
    assert lines == ["28", "0"]


def test_several_workers_keep_nothing_in_memory(tmp_path: Path) -> None:
    """What no store has room for lies nowhere for a worker: it is refused, and may be loaded once there is room."""
    lines = auto(
        tmp_path,
        """
from ome_tensor_server.finding import find_sources
from ome_tensor_server.house import House
from ome_tensor_server.settings import Settings
from ome_tensor_server.usage import Usage
os.environ["XDG_CACHE_HOME"] = "/dev/shm/cache"
sources = find_sources([path])
for workers in (1, 2):
    house = House(Settings(workers=workers), Usage(workers), lambda *_: None, None, sources)
    house.move_in(sources, lambda: False)
    fill(leaving=500_000)
    try:
        print(house.librarian.load(sources[0].name).manifest)
    except Exception as error:
        print(type(error).__name__)
    os.unlink("/dev/shm/filler")
    house.close()
print(house.librarian.load(sources[0].name).manifest.rows)
""",
        6 << 20,
    )
    assert lines == ["None", "Overloaded", "1"]
