"""`ome-tensor serve`, `health` and `demo`, as processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from tests.integration.images import random_pixels, write_image
from tests.integration.processes import ServerProcess, wait_until
from tests.integration.test_cli import failed, ome_tensor, succeeded, without

from ome_tensor_client import connect
from ome_tensor_server import Settings, TensorServer
from ome_tensor_server.finding import find_sources

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A small file to serve."""
    return write_image(tmp_path / "image.ome.parquet", random_pixels((1, 1, 1, 8, 9)))


@contextmanager
def serving(path: Path, *flags: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server process and its address."""
    command = [
        sys.executable,
        "-m",
        "ome_tensor_client",
        "serve",
        str(path),
        "--listen",
        "127.0.0.1:0",
        "--store",
        "none",
        *flags,
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            assert line.startswith("listening on 127.0.0.1:"), line
            yield process, line.split()[-1]
        finally:
            if process.poll() is None:
                process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serve_says_where_and_ends_cleanly_on_a_signal(path: Path, number: signal.Signals) -> None:
    with serving(path) as (process, target):
        assert not target.endswith(":0")
        deadline = time.monotonic() + 30
        while (done := ome_tensor("health", target)).returncode and time.monotonic() < deadline:
            pass
        assert succeeded(done) == "SERVING\n"
        assert "image\tnot loaded\t-\t1\timage" in succeeded(ome_tensor("ls", target))
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 0
    assert out == ""
    assert "Traceback" not in err


def test_serve_leaves_out_what_it_cannot_name(path: Path, tmp_path: Path) -> None:
    """One file whose name is not UTF-8 must not take its folder off the air; named itself it is an error."""
    odd = os.fsencode(path.parent) + b"/odd\xff.ome.parquet"
    shutil.copyfile(path, odd)
    with serving(path.parent) as (process, target):
        wait_until(lambda: ome_tensor("health", target).returncode == 0, "the server is ready", 30)
        assert [line.split("\t")[0] for line in succeeded(ome_tensor("ls", target)).splitlines()[1:]] == ["image"]
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=30)
    assert "its name is not UTF-8" in err
    assert "Traceback" not in err
    assert "is not UTF-8; rename it" in failed(ome_tensor("serve", os.fsdecode(odd)))


def test_serve_says_when_there_is_nothing(tmp_path: Path) -> None:
    with serving(tmp_path) as (process, target):
        wait_until(lambda: ome_tensor("health", target).returncode == 0, "the server is ready", 30)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=30)
    assert f"nothing to serve in {tmp_path}" in err


def test_serve_of_what_is_no_file(tmp_path: Path) -> None:
    assert "/dev/null is not a file or a folder" in failed(ome_tensor("serve", "/dev/null"))
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nowhere")
    assert "link is not a file or a folder" in failed(ome_tensor("serve", link))


def test_serve_takes_a_folder_and_settings_from_the_environment(path: Path) -> None:
    bad = {"OME_TENSOR_LOG_FORMAT": "prose"}
    assert "OME_TENSOR_LOG_FORMAT must be one of text, json" in failed(ome_tensor("serve", path.parent, environment=bad))
    assert "OME_TENSOR_BATCH_BYTES must be a whole number" in failed(
        ome_tensor("serve", path, environment={"OME_TENSOR_BATCH_BYTES": "many"})
    )
    assert "OME_TENSOR_LISTENN is not a setting" in failed(ome_tensor("serve", path, environment={"OME_TENSOR_LISTENN": "x"}))


def test_serve_refuses_a_path_that_is_not_there_or_not_parquet(path: Path, tmp_path: Path) -> None:
    assert "does not exist" in failed(ome_tensor("serve", tmp_path / "nothing"))
    text = tmp_path / "notes.txt"
    text.write_text("not Parquet")
    assert "is not a file of images that this server reads" in failed(ome_tensor("serve", path, text))


def test_serve_refuses_a_port_in_use(path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert failed(ome_tensor("serve", path, "--listen", address)) == (
            f"error: cannot listen on {address}: Address already in use"
        )


@pytest.mark.parametrize(
    "listen,complaint",
    [
        ("0.0.0.0:0", "add --insecure"),
        ("example.org:0", "add --insecure"),
        ("nonsense", "listen must be HOST:PORT"),
        ("127.0.0.1:99999", "listen must be HOST:PORT"),
    ],
)
def test_serve_refuses_an_address_that_is_unsafe_or_none(path: Path, listen: str, complaint: str) -> None:
    assert complaint in failed(ome_tensor("serve", path, "--listen", listen))


def test_serve_refuses_an_address_of_another_host(path: Path) -> None:
    # A block for documentation: nobody's address (RFC 5737).
    done = ome_tensor("serve", path, "--listen", "192.0.2.1:0", "--insecure")
    assert failed(done).startswith("error: cannot listen on 192.0.2.1:0: ")


def test_serve_without_its_extra_says_how_to_get_it(tmp_path: Path) -> None:
    environment = without(tmp_path, "grpc_health")
    line = failed(ome_tensor("serve", "anything", "--listen", "127.0.0.1:0", environment=environment))
    assert line == "error: ome-tensor serve: grpc_health is missing; install it with: pip install 'ome-tensor[server]'"
    assert " serve " in succeeded(ome_tensor("--help", environment=environment))


def test_health_is_an_error_until_the_server_is_ready(path: Path) -> None:
    server = TensorServer(Settings(listen="127.0.0.1:0", store="none"))
    try:
        target = server.start()
        assert failed(ome_tensor("health", target)) == f"error: {target}: NOT_SERVING"
        server.load(find_sources([path]))
        assert succeeded(ome_tensor("health", target)) == "SERVING\n"
    finally:
        server.stop(grace=0)


def test_health_needs_nothing_of_the_server_extra(path: Path, tmp_path: Path) -> None:
    server = TensorServer(Settings(listen="127.0.0.1:0", store="none"))
    try:
        target = server.start()
        server.load(find_sources([path]))
        assert succeeded(ome_tensor("health", target, environment=without(tmp_path, "grpc_health"))) == "SERVING\n"
    finally:
        server.stop(grace=0)


def test_health_of_something_else(tmp_path: Path) -> None:
    """A gRPC server without health, and one that is no gRPC server at all."""
    from concurrent import futures

    import grpc

    server = grpc.server(futures.ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        assert "does not answer health checks" in failed(ome_tensor("health", f"127.0.0.1:{port}"))
    finally:
        server.stop(0).wait()


# -- demo ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_demo_shows_the_whole_way_and_a_picture(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    image = pytest.importorskip("PIL.Image")
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    for _ in range(2):  # the second time over its own leavings
        temporary = tmp_path_factory.mktemp("temporary")
        out = succeeded(ome_tensor("demo", cwd=tmp_path, environment={"TMPDIR": str(temporary)}))
        assert not list(temporary.iterdir()), "the server's store is gone"
    for heading in ("Serve", "List", "A lazy view", "Stream tiles", "Measure", "Picture", "Stop"):
        assert heading in out
    assert "LaminB1, Dapi" in out
    assert "all 25 tiles, 2,384,800 pixels, are exactly those of the file" in out
    for figure in ("throughput", "first tile", "single read", "on the same host"):
        assert f"  {figure} " in out
    assert "exited with status 0" in out
    with image.open(tmp_path / "demo.png") as picture:
        pixels = np.asarray(picture)
    assert pixels.shape[0] > 600
    # Something to look at: bright parts, dark parts, more than one colour.
    assert pixels.max() == 255
    assert np.median(pixels) < 30
    assert np.abs(pixels[..., 0].astype(int) - pixels[..., 1]).max() > 100
    assert sorted(found.name for found in tmp_path.iterdir()) == ["demo.png", "examples"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bool", "int16"])
def test_demo_of_another_file(tmp_path: Path, dtype: str) -> None:
    pytest.importorskip("PIL.Image")
    pixels = random_pixels((2, 3, 1, 100, 70), dtype)
    if dtype == "float32":
        pixels[0, 0, 0, 0, 0] = np.nan
    path = write_image(tmp_path / "mine.parquet", pixels)
    out = succeeded(ome_tensor("demo", "--data", path, "-o", tmp_path / "mine.png"))
    assert "all 8 tiles, 42,000 pixels, are exactly those of the file" in out


def test_demo_fails_loudly_where_one_pixel_differs(tmp_path: Path) -> None:
    """A client whose file is not the server's, by one pixel."""
    pytest.importorskip("PIL.Image")
    write_image(tmp_path / "mine.parquet", random_pixels((1, 1, 1, 8, 9)))
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "if 'demo' in sys.argv:\n"
        "    import ome_tensor.view as view\n"
        "    honest = view.TensorView.to_numpy\n"
        "    def wrong(self, **options):\n"
        "        pixels = honest(self, **options).copy()\n"
        "        pixels.flat[5] ^= 1\n"
        "        return pixels\n"
        "    view.TensorView.to_numpy = wrong\n"
    )
    done = ome_tensor(
        "demo", "--data", tmp_path / "mine.parquet", "-o", tmp_path / "x.png", environment={"PYTHONPATH": str(tmp_path)}
    )
    assert done.returncode == 1
    assert done.stderr == "error: tile 0 of t=0 at y=0, x=0 differs from the file\n"


def test_demo_used_wrongly(tmp_path: Path) -> None:
    pytest.importorskip("PIL.Image")
    assert "is not a file" in failed(ome_tensor("demo", "--data", tmp_path / "nothing.parquet"))
    assert "the demo writes a .png" in failed(ome_tensor("demo", "-o", tmp_path / "x.npy"))
    text = tmp_path / "notes.parquet"
    text.write_text("not Parquet")
    done = ome_tensor("demo", "--data", text, "-o", tmp_path / "x.png")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert (
        line
        == f"error: the server did not start: {text} is not a file of images that this server reads (Parquet, Arrow, Vortex, OME-TIFF, npy)"
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_demo_leaves_no_server_behind_when_it_is_stopped(tmp_path: Path, number: signal.Signals) -> None:
    pytest.importorskip("PIL.Image")
    # It waits in the middle of its work: however late this process hears of it, it has not come to its end by then.
    (tmp_path / "halted").mkdir()
    (tmp_path / "halted" / "sitecustomize.py").write_text(
        "import sys, time\n"
        "if 'demo' in sys.argv:\n"
        "    import ome_tensor.view as view\n"
        "    view.TensorView.to_numpy = lambda self, **options: time.sleep(60)\n"
    )
    command = [sys.executable, "-u", "-m", "ome_tensor_client", "demo", "-o", str(tmp_path / "x.png")]
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(tmp_path / "halted")}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment
    ) as process:
        assert process.stdout is not None
        line = next(line for line in process.stdout if line.startswith("  process "))
        server = int(line.split()[1].rstrip(","))
        process.send_signal(number)
        process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert [found.name for found in tmp_path.iterdir()] == ["halted"], "neither a picture nor a store"
    with pytest.raises(ProcessLookupError):
        os.kill(server, 0)


def test_lines_for_a_program_are_all_of_them(path: Path, tmp_path: Path) -> None:
    """A collector takes each line of stderr for JSON, from the first on."""
    with ServerProcess(path, tmp_path / "log", "--log-format", "json", "--metrics", "127.0.0.1:0") as server:
        with connect(server.wait_serving().target) as client:
            client.datasets()
        wait_until(lambda: "ListDatasets" in server.log.read_text(), "the call is in the log")
        lines = [json.loads(line) for line in server.log.read_text().splitlines()]
    assert {"metrics", "serving", "call"} <= {line["event"] for line in lines}
    assert next(line for line in lines if line["event"] == "serving")["datasets"] == 1
