"""Readers' processes: whatever becomes of one, the server goes on, and says what was wrong."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.integration.images import random_pixels, write_image
from tests.unit.tabular import LOADER, column, write, write_typed

from ome_tensor import Cancelled, InvalidArgument, InvalidRecord, MissingDependency, OmeTensorError, TensorView, Unavailable
from ome_tensor_server import processes
from ome_tensor_server.loading import Loader, load_anonymous, load_in_memory, shared_loader

SHAPE = (1, 2, 2, 40, 50)

# A reader's process whose sources are files of commands, and what they raise.
_ODD = """
import errno, os, signal, sys, time
from ome_tensor import errors
from ome_tensor_server import loader

class Odd:
    location = "odd"
    def __init__(self, location):
        self.text = open(location).read()
    def __enter__(self): return self
    def __exit__(self, *_): pass
    def is_unchanged(self): return True
    def info(self):
        exec(self.text, globals())
        raise AssertionError

loader.open_source = Odd
loader.main(sys.argv[1:])
"""


@pytest.fixture
def loader() -> Iterator[Loader]:
    """One of the test's own."""
    made = Loader()
    yield made
    made.close()


class OddLoader(Loader):
    """One whose sources are Python code."""

    _code = ("-c", _ODD)


@pytest.fixture(scope="module")
def odd_loader() -> Iterator[Loader]:
    """Starting one takes half a second."""
    made = OddLoader()
    yield made
    made.close()


def is_running(process: int) -> bool:
    """Whether there is such a process, and not only its remains."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(process: int) -> bool:
    """Whether a process ends within a while."""
    deadline = time.monotonic() + 10
    while is_running(process) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not is_running(process)


def test_a_process_is_used_again(loader: Loader, tmp_path: Path) -> None:
    """Starting one costs far more than a small file."""
    path = write_image(tmp_path / "image.parquet", random_pixels(SHAPE))
    loader.describe(str(path))
    (process,) = loader.processes
    times = []
    for _ in range(20):
        before = time.perf_counter()
        table = load_anonymous(str(path), loader)
        times.append(time.perf_counter() - before)
    assert loader.processes == [process]
    assert min(times) < 0.1
    print(f"a small file takes {min(times) * 1000:.1f} ms")
    np.testing.assert_array_equal(TensorView(table.images["image"], layout="TZCYX").to_numpy(), random_pixels(SHAPE))


def test_what_is_in_memory_has_no_name(tmp_path: Path) -> None:
    """Nobody else can map it; an uncompressed Arrow file is mapped where it lies."""
    table = pa.table({"image": column([random_pixels(SHAPE)])})
    assert load_anonymous(str(write(tmp_path / "image.parquet", table)), LOADER).file is None
    path = write(tmp_path / "image.arrow", table, "arrow")
    before = pa.total_allocated_bytes()
    mapped = load_anonymous(str(path), LOADER)
    assert mapped.file is not None
    assert mapped.file.path == path
    assert pa.total_allocated_bytes() - before < 10_000


def test_versions_do_not_depend_on_the_way(tmp_path: Path) -> None:
    """They are those of the source's bytes; a known one is not read again."""
    path = write_image(tmp_path / "image.parquet", random_pixels(SHAPE))
    with open(os.memfd_create("target"), "r+b") as target:
        first = LOADER.load(str(path), target.fileno())
        assert not first.is_known
        size = os.fstat(target.fileno()).st_size
        target.truncate(0)
        again = LOADER.load(str(path), target.fileno(), known=first.version)
        assert (again.version, again.is_known, os.fstat(target.fileno()).st_size) == (first.version, True, 0)
        assert size > 0
    assert load_anonymous(str(path), LOADER).version == first.version
    folder = write_typed(tmp_path / "set", {"a": random_pixels(SHAPE)})
    version = load_anonymous(str(folder), LOADER).version
    write_typed(tmp_path / "other", {"a": random_pixels(SHAPE)})
    assert load_anonymous(str(tmp_path / "other"), LOADER).version == version
    (folder / "chunks.parquet").write_bytes((folder / "chunks.parquet").read_bytes() + b" ")
    with pytest.raises(InvalidRecord):
        load_anonymous(str(folder), LOADER)


# --- errors --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code,error",
    [
        ("raise errors.InvalidArgument('no', field='a', value=7)", InvalidArgument("no", field="a", value=7)),
        ("raise errors.MissingDependency('no package')", MissingDependency("no package")),
        ("raise RuntimeError('strange\\nand more')", InvalidRecord("code cannot be read: strange (RuntimeError)", field="path")),
        ("raise KeyError", InvalidRecord("code cannot be read: KeyError (KeyError)", field="path")),
        ("raise OSError('no number')", InvalidRecord("code cannot be read: no number (OSError)", field="path")),
        ("class Panic(BaseException): pass\nraise Panic('!')", InvalidRecord("code cannot be read: ! (Panic)", field="path")),
        ("def f(): f()\nf()", InvalidRecord("RecursionError", field="path")),
    ],
)
def test_errors_come_as_they_were_raised(odd_loader: Loader, tmp_path: Path, code: str, error: OmeTensorError) -> None:
    """Class, message, field and value."""
    path = tmp_path / "code"
    path.write_text(code)
    with pytest.raises(type(error)) as caught:
        odd_loader.describe(str(path))
    assert str(error) in str(caught.value)
    assert caught.value.field == error.field
    assert caught.value.value == (error.value if error.value is not None or error.field is None else "code")
    assert len(odd_loader.processes) == 1


def test_errors_of_the_system_keep_their_number(odd_loader: Loader, tmp_path: Path) -> None:
    """A disk that is full is not the source's fault."""
    path = tmp_path / "code"
    path.write_text("raise OSError(errno.ENOSPC, 'full')")
    with pytest.raises(OSError, match="full") as caught:
        odd_loader.describe(str(path))
    assert (caught.value.errno, caught.value.filename) == (28, str(path))


@pytest.mark.parametrize(
    "code,why",
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL"),
        ("os._exit(3)", "exit status 3"),
    ],
)
def test_a_crash_is_the_sources_error(
    odd_loader: Loader, tmp_path: Path, caplog: pytest.LogCaptureFixture, code: str, why: str
) -> None:
    """And the next job gets another process."""
    path = tmp_path / "code"
    path.write_text(code)
    with pytest.raises(InvalidRecord, match=rf"code cannot be read: its reader crashed \({why}.*\)$"):
        odd_loader.describe(str(path))
    assert f"the reader of {path} crashed: {why}" in caplog.text
    path.write_text("raise errors.NotSupported('alive')")
    with pytest.raises(OmeTensorError, match="alive"):
        odd_loader.describe(str(path))


def test_a_reader_of_a_process_with_many_files_open(tmp_path: Path) -> None:
    """Its descriptors have its parent's numbers, which select() takes only below 1,024."""
    path = write_image(tmp_path / "image.parquet", random_pixels(SHAPE))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(limits[1], 4096), limits[1]))
    with contextlib.ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
        while stack.enter_context(open(os.devnull, "rb")).fileno() < 1100:
            pass
        loader = Loader()
        stack.callback(loader.close)
        assert loader.describe(str(path)).rows == 1


def test_one_that_died_idle_is_replaced(loader: Loader, tmp_path: Path) -> None:
    """Somebody has killed it, perhaps the system for its memory; that says nothing of the next source."""
    path = write_image(tmp_path / "image.parquet", random_pixels(SHAPE))
    for _ in range(2):
        loader.describe(str(path))
        (process,) = loader.processes
        os.kill(process, signal.SIGKILL)
        assert gone(process)
    assert loader.describe(str(path)).rows == 1


# --- progress, and giving up -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that takes a while."""
    images = [random_pixels((1, 1, 1, 256, 512), seed=seed) for seed in range(8)] * 30
    table = pa.table({"image": column([*images], "bytes", (1, 256, 512))})
    path = tmp_path_factory.mktemp("large") / "file"
    pq.write_table(table, path, row_group_size=4, use_dictionary=False)
    return path


def test_progress_is_told(large: Path) -> None:
    """In bytes, rising to about what was estimated."""
    told: list[int] = []
    estimate = LOADER.describe(str(large)).nbytes
    table = load_in_memory(str(large), LOADER, progress=told.append)[0]
    assert told
    assert told == sorted(set(told))
    assert told[-1] <= table.nbytes * 1.1
    assert 0.9 < estimate / table.nbytes < 1.1


def test_a_load_can_be_given_up(loader: Loader, large: Path) -> None:
    """At once, and its process is gone; others go on."""
    loader.describe(str(large))
    (process,) = loader.processes
    cancelled = threading.Event()
    begun = time.monotonic()
    with pytest.raises(Cancelled):
        load_in_memory(str(large), loader, progress=lambda _: cancelled.set(), cancelled=cancelled)
    assert time.monotonic() - begun < 5
    assert loader.processes == []
    assert not is_running(process)
    assert loader.describe(str(large)).rows == 240


def test_whoever_is_told_of_progress_may_end_it(loader: Loader, large: Path) -> None:
    """By raising: the budget is spent."""

    class Enough(Exception):
        pass

    def stop(_: int) -> None:
        raise Enough

    with pytest.raises(Enough):
        load_in_memory(str(large), loader, progress=stop)
    assert loader.processes == []


def test_a_closed_loader_reads_nothing(tmp_path: Path) -> None:
    """Its processes are gone."""
    path = write_image(tmp_path / "image.parquet", random_pixels(SHAPE))
    loader = Loader()
    loader.describe(str(path))
    (process,) = loader.processes
    loader.close()
    assert not is_running(process)
    with pytest.raises(Unavailable):
        loader.describe(str(path))


def test_several_threads_have_a_process_each(loader: Loader, tmp_path: Path) -> None:
    """Two of them are kept."""
    path = write_image(tmp_path / "image.parquet", random_pixels(SHAPE))
    rows: list[int] = []
    threads = [threading.Thread(target=lambda: rows.append(loader.describe(str(path)).rows)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert rows == [1] * 4
    assert len(loader.processes) <= 2


# --- how processes end ---------------------------------------------------------------------------------------------------------------------

_SERVER = """
import sys
from ome_tensor_server.loading import shared_loader
loader = shared_loader()
loader.describe(sys.argv[1])
print(*loader.processes, flush=True)
sys.stdin.read()
"""


def test_readers_end_with_their_server(tmp_path: Path) -> None:
    """Whether it stops or is killed."""
    path = write_image(tmp_path / "image.parquet", random_pixels(SHAPE))
    for end in (signal.SIGKILL, None):
        command = [sys.executable, "-c", _SERVER, str(path)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdin is not None
            assert server.stdout is not None
            process = int(server.stdout.readline())
            assert is_running(process)
            if end is None:
                server.stdin.close()
            else:
                server.send_signal(end)
            server.wait()
        assert gone(process)


def test_a_reader_that_is_busy_ends_with_its_server(tmp_path: Path) -> None:
    """It need not say anything to notice."""
    path = tmp_path / "code"
    path.write_text(f"open({str(tmp_path / 'begun')!r}, 'w').write(str(os.getpid()))\nwhile True: pass")
    failed, loader = threading.Event(), OddLoader()

    def describe() -> None:
        with pytest.raises(InvalidRecord):
            loader.describe(str(path))
        failed.set()

    thread = threading.Thread(target=describe)
    thread.start()
    while not (tmp_path / "begun").exists() or not (tmp_path / "begun").read_text():
        time.sleep(0.01)
    process = int((tmp_path / "begun").read_text())
    # As it would be if this process went.
    (busy,) = [one for one in gc.get_objects() if type(one) is processes.Process and one.number == process]
    os.close(busy._lifeline)
    busy._lifeline = -1
    assert gone(process)
    thread.join()
    assert failed.is_set()


def test_a_process_that_was_forked_off_has_readers_of_its_own(tmp_path: Path) -> None:
    """Two processes on one socket would take each other's answers."""
    path = write_image(tmp_path / "image.parquet", random_pixels(SHAPE))
    shared_loader().describe(str(path))
    before = shared_loader().processes
    command = [sys.executable, "-W", "error", "-c", _FORK, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["0", "1", "True", "True"]
    assert shared_loader().processes == before


_FORK = """
import os, sys
from ome_tensor_server.loading import shared_loader
path = sys.argv[1]
shared_loader().describe(path)
before = shared_loader().processes
child = os.fork()
if not child:
    print(len(shared_loader().processes), shared_loader().describe(path).rows, shared_loader().processes != before, flush=True)
    sys.exit()
os.waitpid(child, 0)
shared_loader().describe(path)
print(shared_loader().processes == before)
"""


class _Sleeping(Loader):
    """Its processes take a job and do nothing."""

    _code = ("-c", "import socket, sys, time; s = socket.socket(fileno=int(sys.argv[1])); s.recv(1 << 16); time.sleep(60)")


def test_a_reader_that_hangs_is_ended(tmp_path: Path) -> None:
    """As one does whose library waits for a thread that has failed: nothing says so but that no time is used."""
    loader = _Sleeping(patience=0.3)
    with pytest.raises(InvalidRecord, match=r"its reader hung \(it did nothing for 0.3 s\)"):
        loader.describe(str(tmp_path / "x.parquet"))
    loader.close()


class _Opening(Loader):
    """Its processes compute for ever, and are never done with opening."""

    _code = ("-c", "import socket, sys; s = socket.socket(fileno=int(sys.argv[1])); s.recv(1 << 16)\nwhile True: pass")


def test_a_reader_that_never_gets_a_source_open_is_ended(tmp_path: Path) -> None:
    """As one does that follows metadata which lead back to themselves."""
    loader = _Opening(patience=0.3)
    with pytest.raises(InvalidRecord, match=r"its reader hung \(it worked for long and got nowhere\)"):
        loader.describe(str(tmp_path / "x.tif"))
    loader.close()


def test_a_reader_ends_with_its_server_whatever_it_is_doing(tmp_path: Path) -> None:
    """Also one that lets no other thread of its own run: the search through a range is one call in C, for hours."""
    busy = tmp_path / "busy.py"
    busy.write_text(
        "import sys, ome_tensor_server.loader as loader\n"
        "loader._JOBS['describe'] = lambda *_: -1 in iter(range(10 ** 12))\n"
        "loader.main(sys.argv[1:])\n"
    )
    script = f"""
import os, threading, time
from pathlib import Path
from ome_tensor_server.loading import Loader
class Busy(Loader):
    _code = ("-P", {str(busy)!r})
loader = Busy()
threading.Thread(target=lambda: loader.describe("x"), daemon=True).start()
def children():
    return [number for task in Path("/proc/self/task").iterdir() for number in (task / "children").read_text().split()]
while not (found := children()):
    time.sleep(0.01)
# Until it is at its job.
while int(Path(f"/proc/{{found[0]}}/stat").read_text().rpartition(")")[2].split()[11]) < 200:
    time.sleep(0.05)
print(*found, flush=True)
os._exit(0)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    (number,) = map(int, done.stdout.split())
    deadline = time.monotonic() + 5
    try:
        while _is_running(number):
            assert time.monotonic() < deadline, f"the reader {number} lives on"
            time.sleep(0.02)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)


def _is_running(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
