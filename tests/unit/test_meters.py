"""What a server counts."""

from __future__ import annotations

import io
import math
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from ome_tensor_client.cli_top import picture
from ome_tensor_client.counts import Counts, Sample
from ome_tensor_server.meters import Meters, MetricsPage


def counts_of(meters: Meters, at: float = 0.0) -> Counts:
    page = MetricsPage(meters, lambda: [("resident_bytes", "Bytes.", 5.0), ("datasets", "By state.", ("state", {"loaded": 2.0}))])
    return Counts([Sample(*sample) for sample in page.samples()], at)


def test_numbers_of_all_workers_are_added_up() -> None:
    """Those of one that has ended too, but for what it had in progress."""
    first = Meters(2)
    second = Meters(2, os.dup(first.descriptor), 1)
    first.add("calls", "ReadTiles", "OK")
    second.add("calls", "ReadTiles", "OK", value=2)
    second.add("calls", "ReadTiles", "CANCELLED")
    first.set("reads_running", 3)
    second.set("reads_running", 4)
    counts = counts_of(first)
    assert counts.total("calls_total") == 4
    assert counts.total("calls_total", code="OK") == 3
    assert counts.total("reads_running") == 7
    first.forget_worker(1)
    assert counts_of(first).total("reads_running") == 3
    assert counts_of(first).total("calls_total") == 4
    second.close()
    first.close()


def test_another_process_writes_its_own_row() -> None:
    meters = Meters(3)
    script = (
        "import sys; from ome_tensor_server.meters import Meters\n"
        "meters = Meters(3, int(sys.argv[1]), 2)\n"
        "[meters.add('tiles', value=7) for _ in range(1000)]"
    )
    subprocess.run([sys.executable, "-c", script, str(meters.descriptor)], pass_fds=[meters.descriptor], check=True, timeout=60)
    meters.add("tiles")
    assert counts_of(meters).total("tiles_total") == 7001
    meters.close()


def test_the_page_is_prometheus_text() -> None:
    meters = Meters()
    meters.observe("call_seconds", "ReadTiles", 0.003)
    meters.observe_all("phase_seconds", [("queue", 1e-6), ("gather", 99.0)])
    page = MetricsPage(meters, lambda: [("resident_bytes", "Bytes.", 5.0)])
    found = {family.name: family for family in text_string_to_metric_families(page.text().decode())}
    assert found["ome_tensor_call_seconds"].type == "histogram"
    buckets = {
        sample.labels["le"]: sample.value
        for sample in found["ome_tensor_call_seconds"].samples
        if sample.name.endswith("_bucket")
    }
    assert (buckets["0.0025"], buckets["0.005"], buckets["+Inf"]) == (0, 1, 1)
    assert found["ome_tensor_resident_bytes"].samples[0].value == 5
    assert all(family.documentation for family in found.values())
    meters.close()


@given(st.lists(st.floats(1e-4, 500), min_size=1, max_size=50), st.sampled_from([0.01, 0.5, 0.9, 0.99, 1.0]))
def test_quantiles_lie_in_the_bucket_of_the_true_one(seconds: list[float], part: float) -> None:
    meters = Meters()
    before = counts_of(meters)
    for value in seconds:
        meters.observe("call_seconds", "ReadTiles", value)
    now = counts_of(meters, 1.0)
    found = now.quantile(before, "call_seconds", part, method="ReadTiles")
    assert found is not None
    true = sorted(seconds)[max(0, math.ceil(part * len(seconds)) - 1)]
    bounds = [0.0, *sorted({float(s.labels["le"]) for s in now.samples if s.name == "ome_tensor_call_seconds_bucket"})]
    upper = next(bound for bound in bounds if bound >= true)
    lower = max((bound for bound in bounds if bound < true), default=0.0)
    assert lower <= found <= upper
    assert now.rate(before, "call_seconds_count") == pytest.approx(len(seconds))
    meters.close()


def test_rates_of_a_server_that_started_again() -> None:
    before = Counts([Sample("ome_tensor_tiles_total", {}, 100.0)], 0.0)
    now = Counts([Sample("ome_tensor_tiles_total", {}, 30.0)], 10.0)
    assert now.rate(before, "tiles_total") == 3.0
    assert now.quantile(before, "call_seconds", 0.5) is None


def test_a_picture_for_people() -> None:
    from rich.console import Console

    meters = Meters()
    before = counts_of(meters)
    meters.add("tiles", value=2000)
    meters.add("calls", "ReadTiles", "OK")
    meters.add("refused", "OVERLOADED", value=4)
    meters.observe("call_seconds", "ReadTiles", 0.004)
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(picture("images:50051", before, counts_of(meters, 2.0)))
    text = console.export_text()
    assert "tiles/s   1,000" in text
    assert "OVERLOADED 2.0/s" in text
    assert "2 loaded" in text
    meters.close()
