"""The Job of deploy/kubernetes/examples/training, as a cluster would run it: its script, its variables, servers that ask for TLS and a token."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tests.integration.images import write_images
from tests.integration.test_tls import Authority

from ome_tensor_server import tokens
from ome_tensor_server.scopes import parse_scopes
from ome_tensor_server.testing import running_server

yaml = pytest.importorskip("yaml")

EXAMPLE = Path(__file__).parents[2] / "deploy" / "kubernetes" / "examples" / "training"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed"),
]


def test_the_ranks_of_the_job_read_all_tiles(tmp_path: Path) -> None:
    """Of two servers, one of which does not run: each rank its half."""
    (job,) = yaml.safe_load_all((EXAMPLE / "job.yaml").read_text())
    variables = {found["name"]: found.get("value", "") for found in job["spec"]["template"]["spec"]["containers"][0]["env"]}
    pixels = np.zeros((1, 1, 1, 256, 320), "u2")
    source = write_images(tmp_path / f"{variables['DATASET']}.ome.parquet", [pixels], column=variables["COLUMN"])
    authority = Authority(tmp_path / "pki")
    cert, key = authority.issue("server", "localhost", "127.0.0.1")
    _, token = tokens.create(tmp_path / "tokens.json", parse_scopes(["read:*"]), name="training")
    (tmp_path / "token").write_text(token)
    with running_server([source], tls_cert=cert, tls_key=key, tokens=str(tmp_path / "tokens.json")) as server:
        names = variables["SERVERS"].split(",")
        assert len(names) == 2
        variables |= {
            # A port that nobody listens on, in the place of the first.
            "SERVERS": f"127.0.0.1:1,{server.target}",
            "CA": authority.path,
            "TOKEN_FILE": str(tmp_path / "token"),
        }
        ranks = [
            subprocess.Popen(
                [sys.executable, "-W", "error", EXAMPLE / "train.py"],
                env=os.environ | variables | {"JOB_COMPLETION_INDEX": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(int(variables["RANKS"]))
        ]
        try:
            said = [rank.communicate(timeout=100) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], said
    seen = [int(re.fullmatch(r"rank \d of 2 has seen (\d+) tiles\n", out)[1]) for out, _ in said]
    assert seen == [10, 10]
