"""The benchmarks run, and find every result equal to NumPy; how fast anything is, is not for a test to judge."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

# The benchmarks measure against it; the oldest-versions run does without.
pytest.importorskip("ome_arrow")

from benchmarks import data, imports
from benchmarks.engine import Bar, Case, Figures, Round, measure
from tests.unit.benchmarking import figures_of, run_side_by_side

from ome_tensor import TensorView

pytestmark = pytest.mark.timeout(420)  # whether they work, not how fast anything is


@pytest.mark.slow
def test_engine_and_stream(tmp_path: Path) -> None:
    found = figures_of(tmp_path, "engine", "stream")
    cases = found["engine"]["cases"]
    assert len({(case["encoding"], case["case"]) for case in cases}) == len(cases) == 18
    assert all(case[name] > 0 for case in cases for name in ("ours_ms", "upstream_ms", "floor_ms"))
    assert {bool(case["bar"]) for case in cases} == {True, False}
    assert all((case["met"] is None) == (not case["bar"]) for case in cases)
    rows = found["stream"]
    assert len({row["what"] for row in rows}) == len(rows)
    assert [row["unit"] for row in rows if row["below"] is not None] == ["ms"]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
def test_benchmarks_of_training() -> None:
    """The last two end with an error where a single batch is not what it should be."""
    printed = run_side_by_side({"training": ["--quick"], "epoch_kills": ["--kills", "3"], "replicas": ["--seconds", "6"]})
    assert "of the stream" in printed["training"]
    assert "epochs that differ" in printed["epoch_kills"]
    assert "0 wrong" in printed["replicas"]


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
