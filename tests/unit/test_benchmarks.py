"""The benchmarks run, and find every result equal to NumPy; how fast anything is, is not for a test to judge."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

# The benchmarks measure against it; the oldest-versions run does without.
pytest.importorskip("ome_arrow")

from benchmarks import data, imports
from benchmarks.engine import Bar, Case, Figures, Round, measure

from ome_tensor import TensorView

ROOT = Path(__file__).resolve().parents[2]


def bench(name: str, file: Path) -> dict[str, object]:
    """Run one as its user does; gives what it wrote."""
    command = [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    assert "| " in done.stdout
    return json.loads(file.read_text())


@pytest.mark.slow
@pytest.mark.timeout(420)  # whether it works, not how fast it is
def test_engine(tmp_path: Path) -> None:
    figures = bench("engine", tmp_path / "figures.json")["engine"]
    assert len({(case["encoding"], case["case"]) for case in figures["cases"]}) == len(figures["cases"]) == 18
    assert all(case[name] > 0 for case in figures["cases"] for name in ("ours_ms", "upstream_ms", "floor_ms"))
    assert {bool(case["bar"]) for case in figures["cases"]} == {True, False}
    assert all((case["met"] is None) == (not case["bar"]) for case in figures["cases"])


@pytest.mark.slow
@pytest.mark.timeout(420)  # whether it works, not how fast it is
def test_stream(tmp_path: Path) -> None:
    rows = bench("stream", tmp_path / "figures.json")["stream"]
    assert len({row["what"] for row in rows}) == len(rows)
    assert [row["unit"] for row in rows if row["below"] is not None] == ["ms"]


@pytest.mark.slow
@pytest.mark.timeout(420)
@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
@pytest.mark.parametrize(
    "name, arguments, words",
    [
        ("training", ["--quick"], "of the stream"),
        ("epoch_kills", ["--kills", "3"], "epochs that differ"),
        ("replicas", ["--seconds", "6"], "0 wrong"),
    ],
)
def test_benchmarks_of_training(name: str, arguments: list[str], words: str) -> None:
    """The last two end with an error where a single batch is not what it should be."""
    command = [sys.executable, "-m", f"benchmarks.{name}", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert words in done.stdout


def test_imports_of_the_client_are_light() -> None:
    found = imports.run(repeats=1)
    assert {"numpy", "pyarrow", "grpc", "ome_tensor_client"} <= found.packages
    assert 0 < found.parts_ms["numpy"] < found.total_ms


def test_a_heavy_import_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imports, "HEAVY", frozenset({"numpy"}))
    with pytest.raises(AssertionError, match="imports numpy"):
        imports.run(repeats=1)


@pytest.mark.parametrize(
    "build", [data.stored_planes, lambda a: data.list_chunks(a, (2, 24, 16)), lambda a: data.byte_chunks(a, (1, 16, 64))]
)
def test_records_hold_the_image(build) -> None:
    image = data.make_image((2, 3, 2, 40, 50))
    record = build(image)
    record.validate(full=True)
    np.testing.assert_array_equal(TensorView(record).to_numpy(), image)


def test_a_wrong_result_is_an_error_and_no_figure() -> None:
    image = np.zeros((4, 4), np.uint16)
    right, wrong = (lambda _, value=value: iter([image + np.uint16(value)]) for value in (0, 1))

    def case(ours, upstream) -> Case:
        return Case("any", "any", ours, upstream, right, lambda _: [image], Bar(floor=1e-9), fast=4, slow=1)

    assert measure(case(right, right), [(0, 0, 0, 0)], 2).met is True
    for who, one in (("ours", case(wrong, right)), ("upstream", case(right, wrong))):
        with pytest.raises(AssertionError, match=who):
            measure(one, [(0, 0, 0, 0)], 1)


def test_ratios_are_medians_of_rounds() -> None:
    case = Case("any", "any", iter, iter, iter, iter, Bar(upstream=300, over_us=60), 1, 1)
    # One bad minute for everybody changes no ratio; one for us alone does not change the median.
    rounds = [Round(1e-4, 4e-2, 5e-5), Round(1e-3, 4e-1, 5e-4), Round(9e-4, 4e-2, 5e-5)]
    found = Figures.of(case, rounds)
    assert found.upstream_ratio == pytest.approx(400)
    assert found.floor_ratio == pytest.approx(0.5)
    assert found.over_us == pytest.approx(500)
    assert found.met is False
