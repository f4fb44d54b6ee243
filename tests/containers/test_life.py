"""What becomes of a server in a container, and of those who read from it: stopped, killed, short of memory, replaced by its successor."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.containers.conftest import build
from tests.containers.services import DATA, DEFAULTS, KEY, ROOT, Start, free_port, healthy, logs, plane_of_file, run_in, target_of

from ome_tensor import LimitExceeded, OmeTensorError
from ome_tensor_client import connect

pytestmark = [pytest.mark.containers, pytest.mark.timeout(900)]

#: Kills the server, which PID 1 has started, as the system would.
KILL_SERVER = """
import os, pathlib, signal
for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
    number, rest = int(stat.parent.name), stat.read_text().rpartition(")")[2].split()
    if int(rest[1]) == 1 and number != os.getpid() and b"serve" in (stat.parent / "cmdline").read_bytes():
        os.kill(number, signal.SIGKILL)
"""


def tiles_of(client: Any, pause: float = 0.0) -> Iterator[tuple[int, bytes]]:
    """All tiles of the example image, shuffled, as a slow reader takes them."""
    view = client.tensor_view(KEY, layout="ZCYX")
    for tile in view.iter_tiles(tile_size=(1, 64, 64), shuffle=True, seed=5, edge="pad"):
        yield tile.number, tile.array.tobytes()
        time.sleep(pause)


def test_sigterm_ends_an_idle_server_at_once_and_cleanly(start: Start) -> None:
    container = healthy(start())
    began = time.monotonic()
    container.kill("SIGTERM")
    assert container.wait(timeout=30)["StatusCode"] == 0, logs(container)
    assert time.monotonic() - began < 10


def test_sigterm_lets_a_stream_finish(start: Start) -> None:
    """A reader that is slow, on a server that does not come back: it gets all its tiles, and once each."""
    container = healthy(start())
    with connect(target_of(container), retry_for=0, transport="tcp", message_bytes=1 << 16) as client:
        expected = dict(tiles_of(client))
        reading = tiles_of(client, 0.01)
        got = [next(reading)]
        container.kill("SIGTERM")
        got += reading
    assert len(got) == len(expected) > 300
    assert dict(got) == expected
    assert container.wait(timeout=60)["StatusCode"] == 0, logs(container)


def test_a_killed_server_is_started_again_and_its_client_goes_on(start: Start) -> None:
    """Killed twice in the middle of a read: no tile is wrong, missing or repeated."""
    port = free_port()
    container = healthy(start(ports={"50051/tcp": ("127.0.0.1", port)}, restart_policy={"Name": "unless-stopped"}))
    with connect(f"127.0.0.1:{port}", retry_for=60, transport="tcp", message_bytes=1 << 16) as client:
        expected = dict(tiles_of(client))
        got = []
        for one in tiles_of(client, 0.01):
            got.append(one)
            if len(got) in (20, 200):
                # The container ends with its server, and this command with it, unless it was quicker: it need not end well.
                container.exec_run(["python", "-c", KILL_SERVER])
    assert len(got) == len(expected)
    assert dict(got) == expected
    container.reload()
    assert container.attrs["RestartCount"] == 2


def test_a_memory_limit_is_obeyed(start: Start, tmp_path: Path) -> None:
    """What does not fit is refused with its size, what is larger than the container is served piece by piece, and nobody is killed for memory."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from tests.integration.images import record_of

    tmp_path.chmod(0o755)  # The container's user is another.
    shutil.copy(DATA / f"{KEY}.ome.parquet", tmp_path)
    large = np.lib.format.open_memmap(tmp_path / "large.npy", "w+", np.uint16, (1, 24, 1, 8192, 8192))  # 3 GB, most of it holes
    large[0, 5, 0, 4000:4100, 4000:4100] = np.arange(10_000, dtype=np.uint16).reshape(100, 100)
    large.flush()
    # Small on the disk, a gigabyte and a half in memory, in one row group: it can neither be loaded nor be read by pieces.
    row = pa.array([record_of(np.ones((1, 1, 1, 4096, 4096), np.uint16))])
    pq.write_table(
        pa.table({"image": pa.concat_arrays([row] * 48)}), tmp_path / "bomb.ome.parquet", compression="zstd", row_group_size=48
    )
    # The largest row groups that are read: with what comes of them on the way, more than is left.
    pq.write_table(
        pa.table({"image": pa.concat_arrays([row] * 45)}), tmp_path / "groups.ome.parquet", compression="zstd", row_group_size=15
    )
    container = healthy(
        start(
            mem_limit="1g",
            memswap_limit="1g",
            volumes={str(tmp_path): {"bind": "/data", "mode": "ro"}},
            restart_policy={"Name": "no"},
        )
    )
    with connect(target_of(container), timeout=120, retry_for=0) as client:
        view = client.tensor_view("large", layout="ZYX", c=0)
        np.testing.assert_array_equal(view[5, 4000:4100, 4000:4100].to_numpy(), large[0, 5, 0, 4000:4100, 4000:4100])
        seen = sum(int(tile.array.astype(np.int64).sum()) for tile in view.iter_tiles(tile_size=(1, 1024, 1024)))
        assert seen == int(np.arange(10_000).sum())
        with pytest.raises(OmeTensorError, match="bomb") as caught:
            client.tensor_view("bomb/image/0").to_numpy()
        print(f"refused: {caught.value}")
        for key in ("groups/image/0", "groups/image/44"):
            try:
                assert (client.tensor_view(key, layout="YX", z=0, c=0).to_numpy() == 1).all()
            except LimitExceeded as error:
                print(f"refused: {error}")
        pixels = client.tensor_view(KEY, t=0, z=3, c=1, layout="YX").to_numpy()
    np.testing.assert_array_equal(pixels, plane_of_file(z=3, c=1))
    assert not healthy(container).attrs["State"]["OOMKilled"]
    assert re.search(r"^oom_kill 0$", memory_events(container), re.MULTILINE)


def memory_events(container: Any) -> str:
    """What the kernel has done to the container for want of memory."""
    return run_in(
        container,
        "sh",
        "-c",
        "cat /sys/fs/cgroup/memory.events 2>/dev/null || grep oom_kill /sys/fs/cgroup/memory/memory.oom_control",
    )


def test_from_another_container(engine: Any, network: str, client_image: str, start: Start) -> None:
    """By its name, over the network that both are on."""
    name = f"{network}-server"
    healthy(start(network=network, name=name))
    code = (
        "import hashlib; from ome_tensor_client import connect;"
        f"view = connect('{name}:50051').tensor_view('{KEY}', t=0, z=3, c=1, layout='YX');"
        "print(hashlib.sha256(view.to_torch(mode='numpy').numpy().tobytes()).hexdigest())"
    )
    said = engine.containers.run(client_image, ["python", "-c", code], remove=True, network=network, read_only=True)
    assert said.decode().strip() == hashlib.sha256(plane_of_file(z=3, c=1).tobytes()).hexdigest()


def test_two_containers_share_a_mapped_store(engine: Any, network: str, volume: str, client_image: str, start: Start) -> None:
    """One volume, in two places: pixels do not travel."""
    name = f"{network}-server"
    volumes = DEFAULTS["volumes"] | {volume: {"bind": "/var/lib/ome-tensor", "mode": "rw"}}
    healthy(start(network=network, name=name, volumes=volumes))
    code = (
        "import hashlib; from ome_tensor_client import connect;"
        f"client = connect('{name}:50051', transport='mapped', store='/shared/store');"
        f"pixels = client.tensor_view('{KEY}', t=0, z=3, c=1, layout='YX').to_numpy();"
        "print(client.transport, hashlib.sha256(pixels.tobytes()).hexdigest())"
    )
    said = engine.containers.run(
        client_image,
        ["python", "-c", code],
        remove=True,
        network=network,
        read_only=True,
        volumes={volume: {"bind": "/shared", "mode": "ro"}},
    )
    assert said.decode().split() == ["mapped", hashlib.sha256(plane_of_file(z=3, c=1).tobytes()).hexdigest()]


@pytest.fixture(scope="session")
def previous_image(
    engine: Any, base_image: str, python_version: str, image: str, tmp_path_factory: pytest.TempPathFactory
) -> str:
    """The image of the latest release; before there is one, of this code under an earlier version."""
    tree = tmp_path_factory.mktemp("previous")
    described = subprocess.run(
        ["git", "describe", "--tags", "--abbrev=0", "--match", "v*", "HEAD^"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if described.returncode == 0:
        archive = subprocess.run(["git", "archive", described.stdout.strip()], cwd=ROOT, capture_output=True, check=True).stdout
        subprocess.run(["tar", "-x", "-C", str(tree)], input=archive, check=True)
        shutil.copytree(ROOT / "wheels", tree / "wheels", dirs_exist_ok=True)
        # What it locks may be older than what is locked now.
        subprocess.run([sys.executable, "deploy/fetch_wheels.py", python_version], cwd=tree, check=True)
        return build(engine, base_image, "server", "ome-tensor:previous", tree)
    for name in ("tensor", "proto", "client", "server", "wheels", "deploy/locks"):
        shutil.copytree(ROOT / name, tree / name)
    for name in ("Dockerfile", ".dockerignore", "README.md", "LICENSE", "pyproject.toml"):
        shutil.copy(ROOT / name, tree)
    project = (tree / "pyproject.toml").read_text()
    changed = re.sub(r'^version = "[^"]+"', 'version = "0.0.1"', project, flags=re.MULTILINE)
    assert changed != project
    (tree / "pyproject.toml").write_text(changed)
    return build(engine, base_image, "server", "ome-tensor:previous", tree, VERSION="0.0.1")


def test_an_upgrade_keeps_the_store(volume: str, previous_image: str, start: Start) -> None:
    """Datasets are not made again, and uploads are there, on the volume of the image before."""
    pixels = np.random.default_rng(7).integers(0, 60_000, (1, 2, 1, 50, 60), np.uint16)
    volumes = DEFAULTS["volumes"] | {volume: {"bind": "/var/lib/ome-tensor", "mode": "rw"}}
    options: dict[str, Any] = {"volumes": volumes, "environment": {"OME_TENSOR_INSECURE": "true", "OME_TENSOR_ADMIN": "on"}}
    before = healthy(start(image=previous_image, **options))
    with connect(target_of(before)) as client:
        client.upload("kept", pixels)
        client.tensor_view(KEY, t=0, z=3, c=1, layout="YX").to_numpy()
        client.tensor_view("kept", layout="TZCYX").to_numpy()
    held = listing(before)
    assert held.count(".arrow") >= 2
    before.stop(timeout=30)
    after = healthy(start(**options))
    with connect(target_of(after)) as client:
        np.testing.assert_array_equal(client.tensor_view("kept", layout="TZCYX").to_numpy(), pixels)
        np.testing.assert_array_equal(client.tensor_view(KEY, t=0, z=3, c=1, layout="YX").to_numpy(), plane_of_file(z=3, c=1))
    assert listing(after) == held


def listing(container: Any) -> str:
    """The datasets' files: numbers, sizes, times of the last change."""
    return run_in(
        container, "sh", "-c", "cd /var/lib/ome-tensor && find store uploads -name '*.arrow' -printf '%p %i %s %T@\\n' | sort"
    )
