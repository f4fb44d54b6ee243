"""The dashboard and the alerts ask for what a server tells."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from tests.integration.processes import wait_until

from ome_tensor import DatasetNotFound
from ome_tensor_client import Client, connect
from ome_tensor_server.testing import RunningServer, running_server

DEPLOY = Path(__file__).parents[2] / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana" / "ome-tensor.json").read_text())
QUERIES = {
    f"{panel['title']}: {target['legendFormat']}": target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]
}
ALERTS = dict(
    re.findall(r"- alert: (\w+)\n\s+expr: (?:>-\n)?(.*?)\n\s+for:", (DEPLOY / "prometheus" / "alerts.yml").read_text(), re.DOTALL)
)


def filled_in(query: str) -> str:
    """As Grafana does."""
    return query.replace("$__rate_interval", "4s").replace("$job", ".*")


def work(client: Client) -> None:
    """Of every kind that a panel shows."""
    client.tensor_view("image").to_numpy()
    list(client.tensor_view("image").iter_tiles(tile_size=(64, 64)))
    with suppress(DatasetNotFound):
        client.dataset("absent")


@pytest.fixture(scope="module")
def watched(image_path: Path) -> Iterator[RunningServer]:
    with running_server([image_path], metrics="127.0.0.1:0") as server, connect(server.target, transport="tcp") as client:
        work(client)
        yield server


def page(server: RunningServer) -> str:
    with urllib.request.urlopen(f"http://{server.server.metrics_address}/metrics", timeout=10) as answer:
        return str(answer.read().decode())


def test_each_name_is_one_that_a_server_tells(watched: RunningServer) -> None:
    told = set(re.findall(r"^(ome_tensor_\w+)", page(watched), re.MULTILINE))
    assert len(QUERIES) >= 16
    assert len(ALERTS) == 8
    for query in (*QUERIES.values(), *ALERTS.values()):
        assert set(re.findall(r"ome_tensor_\w+", query)) <= told, query


def test_each_label_value_is_one_that_there_is() -> None:
    """A query for a reason or a method that no server knows would show nothing, for ever."""
    from ome_tensor.errors import Reason
    from ome_tensor_proto.methods import ADMIN_METHODS, METHODS

    known = {"reason": set(Reason), "method": {*METHODS, *ADMIN_METHODS}, "phase": {"queue", "gather", "encode", "send"}}
    for query in (*QUERIES.values(), *ALERTS.values()):
        for name, values in re.findall(r'(reason|method|phase)(?:=|=~|!~|!=)"([^"]+)"', query):
            assert set(values.split("|")) <= known[name], query


def test_alerts_are_explained() -> None:
    explained = (DEPLOY.parent / "docs" / "operations.md").read_text()
    for name in ALERTS:
        assert f"`{name}`" in explained


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("prometheus") is None, reason="no prometheus here (Debian: apt-get install prometheus)")
def test_prometheus_answers_every_panel(watched: RunningServer, tmp_path: Path) -> None:
    """A real one, which scrapes a real server: each panel's query gives numbers, each alert's can be evaluated."""
    subprocess.run(["promtool", "check", "rules", DEPLOY / "prometheus" / "alerts.yml"], check=True, capture_output=True)
    subprocess.run(["promtool", "check", "config", DEPLOY / "prometheus" / "prometheus.yml"], check=True, capture_output=True)
    (tmp_path / "prometheus.yml").write_text(
        "global: {scrape_interval: 1s, scrape_timeout: 1s}\n"
        "scrape_configs:\n- job_name: ome-tensor\n  static_configs:\n"
        f'  - targets: ["{watched.server.metrics_address}"]\n'
    )
    port = free_port()
    with subprocess.Popen(
        [
            "prometheus",
            f"--config.file={tmp_path / 'prometheus.yml'}",
            f"--storage.tsdb.path={tmp_path / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:

        def ask(query: str) -> list[Any]:
            address = f"http://127.0.0.1:{port}/api/v1/query?" + urllib.parse.urlencode({"query": query})
            with urllib.request.urlopen(address, timeout=10) as answer:
                said = json.load(answer)
            assert said["status"] == "success"
            return list(said["data"]["result"])

        def is_up() -> bool:
            with suppress(OSError):
                return bool(ask('up{job="ome-tensor"} == 1'))
            return False

        try:
            wait_until(is_up, "Prometheus scrapes", 60)
            with connect(watched.target, transport="tcp") as client:
                unanswered = set(QUERIES)
                deadline = time.monotonic() + 30
                while unanswered and time.monotonic() < deadline:
                    work(client)
                    unanswered = {name for name in unanswered if not ask(filled_in(QUERIES[name]))}
                    time.sleep(0.2)
                assert not unanswered
                tiles = client.admin.metrics().total("tiles_total")
            (told,) = wait_until(
                lambda: [x for x in ask("sum(ome_tensor_tiles_total)") if float(x["value"][1]) == tiles], "all tiles"
            )
            assert float(told["value"][1]) == tiles
            for query in ALERTS.values():
                ask(query)
        finally:
            process.terminate()


def free_port() -> int:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])
