"""Training datasets in the worker processes of DataLoaders, however they are started, and when one is killed.

Each case runs in a process of its own against a server elsewhere, and a hang is a failure.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import pyarrow as pa
import pytest
from tests.integration.processes import ServerProcess, run_script
from tests.integration.test_image_sets import ROWS, write

pytest.importorskip("torch")

#: grpcio survives a fork of a process that has used it since 1.74.
OLD_GRPC = tuple(map(int, grpc.__version__.split(".")[:2])) < (1, 74)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(OLD_GRPC, reason=f"grpcio {grpc.__version__} does not survive a fork"),
]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("plate")
    write(folder / "plate.parquet", label=pa.array([row % 3 for row in range(ROWS)]))
    with ServerProcess(Path(folder / "plate.parquet"), folder / "log") as server:
        yield server.wait_serving().target


@pytest.mark.parametrize("context", ["fork", "spawn", "forkserver"])
def test_the_same_batches_from_any_number_of_workers(target: str, context: str) -> None:
    run_script("training_client.py", "workers", target, context, seconds=100)


@pytest.mark.parametrize(
    "case",
    [
        "windows",
        "resume",
        "plain",
        "stateful",
        "windows_stateful",
        "held",
        "epochs",
        "begins",
        "beside",
        "saved",
        "slow",
        "killed",
        "errors",
    ],
)
def test_forked_workers(target: str, case: str) -> None:
    run_script("training_client.py", case, target, "fork", seconds=100)


@pytest.mark.parametrize("case", ["later", "finished", "refused", "ranks", "classes", "failed", "windows"])
def test_states_and_ranks(target: str, case: str) -> None:
    run_script("training_states_client.py", case, target, seconds=100)
