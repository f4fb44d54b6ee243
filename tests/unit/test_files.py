"""Output files: what can be known beforehand is said beforehand, and what fails in writing names the file that was asked for."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from ome_tensor import BrokenStream, InvalidArgument
from ome_tensor_client.demo import run_demo
from ome_tensor_client.demo_server import complaint_of
from ome_tensor_client.files import check_output, replacing


@pytest.fixture
def locked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder that may not be written, also where root runs the tests."""
    folder = tmp_path / "locked"
    folder.mkdir()
    allowed = os.access

    def access(path: str | Path, mode: int) -> bool:
        return allowed(path, mode) and not (Path(path) == folder and mode & os.W_OK)

    monkeypatch.setattr(os, "access", access)
    return folder


def test_a_folder_that_may_not_be_written(locked: Path) -> None:
    with pytest.raises(InvalidArgument, match=rf"the folder '{locked}' is write-protected"):
        check_output(str(locked / "x.npy"))


def test_the_demo_looks_at_its_output_first(locked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not after everything has been shown."""
    pytest.importorskip("PIL.Image")
    data = locked.parent / "never read.parquet"
    data.touch()
    with pytest.raises(InvalidArgument, match="write-protected"):
        run_demo(str(data), str(locked / "x.png"))
    assert capsys.readouterr().out == ""


def test_the_demo_looks_at_its_input_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    data = tmp_path / "mine.parquet"
    data.touch()
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.R_OK)
    with pytest.raises(InvalidArgument, match=f"--data '{data}' may not be read by this user"):
        run_demo(str(data), str(tmp_path / "x.png"))


def test_a_link_into_nowhere(tmp_path: Path) -> None:
    link = tmp_path / "x.npy"
    link.symlink_to("/nowhere/y.npy")
    with pytest.raises(InvalidArgument, match=r"it is a link to '/nowhere/y.npy', and there is no folder '/nowhere'"):
        check_output(str(link))


@pytest.mark.parametrize(
    "error, number, words",
    [
        (OSError("2384800 requested and 51088 written"), errno.EIO, "is the disk full"),
        (OSError(errno.ENOSPC, "No space left on device"), errno.ENOSPC, "No space left on device"),
        (OSError(errno.ENOSPC, "No space left on device", "/some/.ome-tensor-1.part"), errno.ENOSPC, "No space left on device"),
    ],
    ids=str,
)
def test_an_error_in_writing_names_the_file(tmp_path: Path, error: OSError, number: int, words: str) -> None:
    """Not the passing one, which is gone; and NumPy's, which counts items, says what that means."""
    path = tmp_path / "x.tif"
    with pytest.raises(OSError, match=words) as caught, replacing(path):
        raise error
    assert (caught.value.errno, caught.value.filename) == (number, str(path))
    assert not list(tmp_path.iterdir())


def test_an_error_in_reading_stays_itself(tmp_path: Path) -> None:
    """It is an OSError too, of the connection."""
    with pytest.raises(BrokenStream, match=r"^cut$"), replacing(tmp_path / "x.npy"):
        raise BrokenStream("cut")


BOX = """Usage: ome-tensor serve [OPTIONS] PATH...
Try 'ome-tensor serve -h' for help.
╭─ Error ───────────────────────────────╮
│ Invalid value for 'PATH...': no good  │
╰───────────────────────────────────────╯
"""


@pytest.mark.parametrize(
    "log, complaint",
    [
        ("", "it said nothing"),
        ("error: x is not Parquet\n", "x is not Parquet"),
        ("INFO loading\nerror: x is not Parquet\nI0000 some library says goodbye\n", "x is not Parquet"),
        ("Traceback (most recent call last):\n  File\nValueError: what\n\n", "ValueError: what"),
        (BOX, "Invalid value for 'PATH...': no good"),
        ("╰────╯\n", "it said nothing"),
    ],
)
def test_what_a_server_said(log: str, complaint: str) -> None:
    """The line that a person needs, without the boxes around it."""
    assert complaint_of(log) == complaint
