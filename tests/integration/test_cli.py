"""The command line as a user runs it: real processes, a real server, and what they print, write and exit with."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.integration.images import random_pixels, record_of, write_images
from tests.integration.proxy import Proxy

from ome_tensor_client.cli import main
from ome_tensor_server.testing import running_server

SHAPE = (2, 3, 2, 20, 31)
COLORS = ((255, 64, 0), (0, 128, 255))

Result = subprocess.CompletedProcess[str]


def ome_tensor(*words: object, environment: Mapping[str, str] | None = None, cwd: Path | None = None) -> Result:
    """Run the command as a script would: nothing is a terminal."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("OME_TENSOR_")}
    return subprocess.run(
        [sys.executable, "-m", "ome_tensor_client", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=60,
        env=clean | dict(environment or {}),
        cwd=cwd,
        check=False,
    )


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Runs the command in this process: the same code, without a start of half a second for each of many variations."""

    def run(*words: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["ome-tensor", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return subprocess.CompletedProcess(sys.argv, int(ended.value.code or 0), out, err)

    return run


def succeeded(done: Result) -> str:
    """Its output, if it succeeded."""
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def failed(done: Result) -> str:
    """Its one line of complaint, if it failed as an operation does."""
    assert done.returncode == 1, done
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def described(pixels: np.ndarray, name: str) -> dict[str, Any]:
    """A record with channel names and colours and a physical size."""
    record = record_of(pixels, name)
    names = ("DNA", "Actin")
    record["pixels_meta"] |= {
        "physical_size_z": 2.0,
        "physical_size_y": 0.25,
        "physical_size_x": 0.25,
        "physical_size_z_unit": "µm",
        "physical_size_y_unit": "µm",
        "physical_size_x_unit": "µm",
        "channels": [
            {"id": f"Channel:{c}", "name": names[c], "color_rgba": (r << 24) + (g << 16) + (b << 8) + 255}
            for c, (r, g, b) in enumerate(COLORS[: pixels.shape[2]])
        ],
    }
    return record


@pytest.fixture(scope="module")
def images() -> dict[str, np.ndarray]:
    """Dataset -> pixels."""
    gray = random_pixels(SHAPE)
    single = (1, 2, 1, 9, 11)
    nan = random_pixels(single, np.float32)
    nan[0, :, 0, 0, :3] = np.nan
    return {
        "gray": gray,
        "signed": random_pixels(single, np.int16),
        "mask": random_pixels(single, bool),
        "nan": nan,
        "waves": random_pixels(single, np.complex64),
        "wide": random_pixels(single, np.int64),
        "flat": np.full(single, 7, np.uint16),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, images: Mapping[str, np.ndarray]) -> Path:
    """The served folder."""
    path = tmp_path_factory.mktemp("served")
    for name, pixels in images.items():
        record = described(pixels, name) if name == "gray" else record_of(pixels, name)
        pq.write_table(pa.table({"image": pa.array([record])}), path / f"{name}.ome.parquet")
    write_images(path / "plate one.parquet", [images["flat"], None, images["signed"]])
    holed = record_of(images["gray"], "a\tname\nwith \x1b[31mcontrol characters")
    del holed["chunks"][-1]
    pq.write_table(pa.table({"image": pa.array([holed])}), path / "holed.ome.parquet")
    return path


@pytest.fixture(scope="module")
def target(folder: Path) -> Iterator[str]:
    """A server of that folder."""
    with running_server([folder]) as server:
        yield server.target


# -- looking around ------------------------------------------------------------------------------------------------------------


def test_ls_lists_datasets_as_tab_separated_lines(target: str, folder: Path, images: Mapping[str, np.ndarray]) -> None:
    header, *lines = succeeded(ome_tensor("ls", target)).splitlines()
    assert header.split("\t") == ["DATASET", "STATE", "IMAGES", "ROWS", "IMAGE COLUMNS", "SIZE", "FORMAT", "SOURCE"]
    rows = {line.split("\t")[0]: line.split("\t")[1:] for line in lines}
    assert sorted(rows) == sorted([*images, "plate one", "holed"])
    assert rows["plate one"][:4] == ["loaded", "2", "3", "image"]
    assert rows["gray"][5:] == ["parquet", "gray.ome.parquet"]


def test_ls_json_of_datasets(target: str) -> None:
    datasets = json.loads(succeeded(ome_tensor("ls", target, "--json")))
    plate = next(dataset for dataset in datasets if dataset["name"] == "plate one")
    assert plate.pop("version")
    assert plate.pop("resident_bytes") > 0
    assert plate.pop("estimated_bytes") > 0
    assert plate == {
        "name": "plate one",
        "image_count": 2,
        "row_count": 3,
        "image_columns": ["image"],
        "other_columns": [{"name": "well", "arrow_type": "string"}],
        "source_name": "plate one.parquet",
        "state": "loaded",
        "progress": None,
        "problem": None,
        "format": "parquet",
    }


def test_ls_lists_images_with_whole_keys(target: str) -> None:
    header, *lines = succeeded(ome_tensor("ls", target, "plate one")).splitlines()
    assert header.split("\t")[:4] == ["KEY", "SHAPE (TZCYX)", "DTYPE", "SIZE"]
    assert [line.split("\t")[:3] for line in lines] == [
        ["plate%20one/image/0", "1×2×1×9×11", "uint16"],
        ["plate%20one/image/2", "1×2×1×9×11", "int16"],
    ]
    assert len(succeeded(ome_tensor("ls", target, "plate one", "--limit", 1)).splitlines()) == 2


def test_ls_json_of_images_is_what_info_json_says(target: str) -> None:
    listed = json.loads(succeeded(ome_tensor("ls", target, "plate one", "--json")))
    assert [image["key"] for image in listed] == ["plate%20one/image/0", "plate%20one/image/2"]
    assert json.loads(succeeded(ome_tensor("info", target, listed[1]["key"], "--json"))) == listed[1]


def test_info_json(target: str, images: Mapping[str, np.ndarray]) -> None:
    facts = json.loads(succeeded(ome_tensor("info", target, "gray", "--json")))
    assert facts == {
        "key": "gray/image/0",
        "dataset": "gray",
        "column": "image",
        "row": 0,
        "name": "gray",
        "id": "gray",
        "image_type": "",
        "acquired": None,
        "shape": list(SHAPE),
        "dtype": "uint16",
        "pixel_type": "uint16",
        "nbytes": images["gray"].nbytes,
        "physical_size": {"z": 2.0, "y": 0.25, "x": 0.25},
        "physical_unit": {"z": "µm", "y": "µm", "x": "µm"},
        "chunk_grid": {"t": 1, "z": 1, "c": 1, "y": 20, "x": 31},
        "channels": [
            {
                "id": f"Channel:{c}",
                "name": name,
                "excitation_um": None,
                "emission_um": None,
                "illumination": "",
                "color_rgba": color,
            }
            for c, (name, color) in enumerate((("DNA", "#FF4000FF"), ("Actin", "#0080FFFF")))
        ],
        "problem": None,
        "levels": [list(SHAPE)],
    }


def test_info_for_people(target: str) -> None:
    lines = dict(line.split("\t") for line in succeeded(ome_tensor("info", target, "gray")).splitlines())
    assert lines["key"] == "gray/image/0"
    assert lines["shape (TZCYX)"] == "2×3×2×20×31"
    assert lines["pixel size"] == "z 2 µm, y 0.25 µm, x 0.25 µm"
    assert lines["channel 1"] == "Actin, #0080FF"


def test_a_name_cannot_break_a_line_or_command_the_terminal(target: str) -> None:
    lines = succeeded(ome_tensor("info", target, "holed")).splitlines()
    assert "name\ta\\tname\\nwith \\x1b[31mcontrol characters" in lines


def test_output_that_an_encoding_lacks_is_no_error(target: str) -> None:
    done = ome_tensor("info", target, "gray", environment={"PYTHONIOENCODING": "ascii", "LC_ALL": "C"})
    assert "pixel size\tz 2 \\xb5m" in succeeded(done)


def test_a_reader_that_has_seen_enough_is_no_complaint(target: str) -> None:
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m ome_tensor_client ls {target} | true"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not Path("/usr/bin/script").exists(), reason="needs script(1) for a terminal")
def test_a_terminal_gets_a_table_with_whole_keys(target: str) -> None:
    command = f"stty cols 40; {sys.executable} -m ome_tensor_client ls {target} 'plate one'"
    done = subprocess.run(["script", "-qec", command, "/dev/null"], capture_output=True, text=True, timeout=60, check=True)
    assert "─────" in done.stdout
    assert "plate%20one/image/2 " in done.stdout


# -- reading -------------------------------------------------------------------------------------------------------------------


def zyx(array: np.ndarray) -> np.ndarray:
    """TZCYX without its t and c."""
    return array[0, :, 0]


NPY_CASES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "": lambda a: a,
    "--t -1 --z 1": lambda a: a[1, 1],
    "--z ::2": lambda a: a[:, ::2],
    "--z -1:": lambda a: a[:, -1:],
    "--z 2,0,2 --t 0": lambda a: a[:1, [2, 0, 2]],
    "--c 1 --t 0": lambda a: a[:1, :, 1:],
    "--roi 3,4,5,6": lambda a: a[..., 4:10, 3:8],
    "--roi3d 3,4,1,5,6,2": lambda a: a[:, 1:3, :, 4:10, 3:8],
    "--tile 0,0 --t 1 --z 0": lambda a: a[1, 0],
    "--t 1 --layout YXZC": lambda a: a[1].transpose(2, 3, 0, 1),
    "--t 0 --z 0 --c 0 --layout YX": lambda a: a[0, 0, 0],
    "--dtype float64 --t 0": lambda a: a[:1].astype(np.float64),
    "--c 0:0": lambda a: a[:, :, :0],
}


@pytest.mark.parametrize("options", NPY_CASES, ids=lambda options: options or "all")
def test_npy_holds_exactly_the_selection(
    in_process: Callable[..., Result], target: str, images: Mapping[str, np.ndarray], tmp_path: Path, options: str
) -> None:
    path = tmp_path / "view.npy"
    said = succeeded(in_process("get", target, "gray", *options.split(), "-o", path))
    read = np.load(path)
    expected = NPY_CASES[options](images["gray"])
    assert read.dtype == expected.dtype
    np.testing.assert_array_equal(read, expected)
    assert said.startswith(f"wrote {path}: {expected.dtype.name} {'×'.join(map(str, expected.shape))}")
    # Nothing but the file.
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["signed", "mask", "nan", "waves", "wide"])
def test_npy_of_every_kind_of_pixel(
    in_process: Callable[..., Result], target: str, images: Mapping[str, np.ndarray], tmp_path: Path, name: str
) -> None:
    succeeded(in_process("get", target, name, "-o", tmp_path / "view.npy"))
    np.testing.assert_array_equal(np.load(tmp_path / "view.npy"), images[name])


def test_a_view_of_many_blocks_is_put_together_right(tmp_path: Path) -> None:
    """Larger than a block of the command, in planes that are larger than one too."""
    pixels = random_pixels((2, 3, 2, 1100, 1500))
    path = write_images(tmp_path / "large.parquet", [pixels])
    with running_server([path]) as server:
        succeeded(ome_tensor("get", server.target, "large", "--z", "2,1,1", "-o", tmp_path / "large.npy"))
    np.testing.assert_array_equal(np.load(tmp_path / "large.npy", mmap_mode="r"), pixels[:, [2, 1, 1]])


def test_an_existing_file_is_replaced_and_a_link_followed(target: str, images: Mapping[str, np.ndarray], tmp_path: Path) -> None:
    real = tmp_path / "real.npy"
    real.write_text("old")
    (tmp_path / "link.npy").symlink_to(real)
    succeeded(ome_tensor("get", target, "flat", "-o", "link.npy", cwd=tmp_path))
    assert (tmp_path / "link.npy").is_symlink()
    np.testing.assert_array_equal(np.load(real), images["flat"])


def test_tif_holds_the_pixels_and_says_what_they_are(target: str, images: Mapping[str, np.ndarray], tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    path = tmp_path / "view.ome.tif"
    succeeded(ome_tensor("get", target, "gray", "--z", "::2", "--roi", "3,4,5,6", "-o", path))
    with tifffile.TiffFile(path) as tif:
        assert tif.is_ome
        assert tif.series[0].axes == "TZCYX"
        np.testing.assert_array_equal(tif.series[0].asarray(), images["gray"][:, ::2, :, 4:10, 3:8])
        pixels = tifffile.xml2dict(tif.ome_metadata)["OME"]["Image"]["Pixels"]
    # Every second plane: twice the distance.
    assert [pixels[f"PhysicalSize{axis}"] for axis in "XYZ"] == [0.25, 0.25, 4.0]
    assert [pixels[f"PhysicalSize{axis}Unit"] for axis in "XYZ"] == ["µm"] * 3
    assert [channel["Name"] for channel in pixels["Channel"]] == ["DNA", "Actin"]
    assert [channel["Color"] & 0xFFFFFFFF for channel in pixels["Channel"]] == [0xFF4000FF, 0x0080FFFF]


@pytest.mark.parametrize(
    "name,options", [("gray", "--layout CZYX --t 0"), ("signed", ""), ("nan", "--z 0"), ("mask", ""), ("waves", "")]
)
def test_tif_of_other_layouts_and_dtypes(
    in_process: Callable[..., Result], target: str, images: Mapping[str, np.ndarray], tmp_path: Path, name: str, options: str
) -> None:
    tifffile = pytest.importorskip("tifffile")
    succeeded(in_process("get", target, name, *options.split(), "-o", tmp_path / "view.tif"))
    array = images[name]
    expected = array[0].transpose(1, 0, 2, 3) if "CZYX" in options else array[:, :1] if options else array
    read = tifffile.imread(tmp_path / "view.tif")
    # Readers leave out axes of one element.
    np.testing.assert_array_equal(read.squeeze(), expected.squeeze())
    assert read.dtype == expected.dtype


def shown(planes: list[np.ndarray], colors: list[tuple[int, int, int]]) -> np.ndarray:
    """What a picture must show, worked out pixel by pixel."""
    height, width = planes[0].shape
    picture = np.zeros((height, width, 3))
    for plane, color in zip(planes, colors, strict=True):
        values = np.sort(plane[np.isfinite(plane)].astype(float))
        low, high = (np.interp(q / 100 * (len(values) - 1), np.arange(len(values)), values) for q in (0.5, 99.8))
        for y in range(height):
            for x in range(width):
                value = float(plane[y, x])
                light = 0.0 if np.isnan(value) else min(max((value - low) / (high - low), 0), 1)
                picture[y, x] += [light * part for part in color]
    return np.minimum(picture, 255)


def read_png(path: Path) -> np.ndarray:
    image = pytest.importorskip("PIL.Image")
    with image.open(path) as picture:
        assert (picture.format, picture.mode) == ("PNG", "RGB")
        return np.asarray(picture)


def test_png_adds_the_channels_in_their_colors(target: str, images: Mapping[str, np.ndarray], tmp_path: Path) -> None:
    path = tmp_path / "view.png"
    done = ome_tensor("get", target, "gray", "--t", 1, "--z", 0, "-o", path)
    assert succeeded(done) == f"wrote {path}: 31×20 pixels, {size(path)}\n"
    assert done.stderr == ""
    expected = shown(list(images["gray"][1, 0]), list(COLORS))
    assert np.abs(read_png(path) - expected).max() <= 1
    # Two channels of random values: the picture has contrast.
    assert expected.std() > 30


def size(path: Path) -> str:
    nbytes = path.stat().st_size
    return f"{nbytes} bytes" if nbytes < 1000 else f"{nbytes / 1000:.1f} kB"


def test_png_of_several_z_is_their_maximum_and_says_so(
    in_process: Callable[..., Result], target: str, images: Mapping[str, np.ndarray], tmp_path: Path
) -> None:
    done = in_process("get", target, "gray", "--t", 0, "--c", 1, "-o", tmp_path / "view.png")
    succeeded(done)
    assert done.stderr == "maximum of 3 z (choose one with --z)\n"
    expected = shown([images["gray"][0, :, 1].max(axis=0)], [COLORS[1]])
    assert np.abs(read_png(tmp_path / "view.png") - expected).max() <= 1


@pytest.mark.parametrize("name", ["signed", "nan"])
def test_png_of_negative_values_and_nan(
    in_process: Callable[..., Result], target: str, images: Mapping[str, np.ndarray], tmp_path: Path, name: str
) -> None:
    succeeded(in_process("get", target, name, "-o", tmp_path / "view.png"))
    plane = np.fmax(*zyx(images[name]))
    expected = shown([plane], [(255, 255, 255)])
    assert np.abs(read_png(tmp_path / "view.png") - expected).max() <= 1


def test_png_of_a_mask_and_of_a_constant(
    in_process: Callable[..., Result], target: str, images: Mapping[str, np.ndarray], tmp_path: Path
) -> None:
    succeeded(in_process("get", target, "mask", "--z", 0, "-o", tmp_path / "mask.png"))
    np.testing.assert_array_equal(read_png(tmp_path / "mask.png")[..., 0], zyx(images["mask"])[0] * 255)
    succeeded(in_process("get", target, "flat", "--z", 0, "-o", tmp_path / "flat.png"))
    np.testing.assert_array_equal(np.unique(read_png(tmp_path / "flat.png")), [128])


# -- used wrongly --------------------------------------------------------------------------------------------------------------

MISUSES = [
    ("ls nonsense", "target must be HOST:PORT, not 'nonsense'"),
    ("ls 127.0.0.1:99999", "target must be HOST:PORT"),
    ("ls ::1:50051", "target must be HOST:PORT"),
    ("ls 127.0.0.1:1", "127.0.0.1:1"),
    ("info 127.0.0.1:1 x", "127.0.0.1:1"),
    ("get 127.0.0.1:1 x -o x.npy", "127.0.0.1:1"),
    ("health 127.0.0.1:1", "127.0.0.1:1"),
    ("health nonsense", "target must be HOST:PORT"),
    ("ls TARGET nope", "no dataset 'nope'"),
    ("info TARGET nope", "no dataset 'nope'"),
    ("info TARGET a/b/c/d", "image key 'a/b/c/d' must be"),
    ("info TARGET gray/x", "row 'x' is not a row number"),
    ("info TARGET gray/7", "no image at row 7"),
    ("info TARGET plate%20one", "name a row in the key"),
    ("info TARGET plate%20one/1", "that row holds no image"),
    ("get TARGET gray -o x.jpg", "must end in .npy, .png, .tif or .tiff"),
    ("get 127.0.0.1:1 gray -o x.jpg", "must end in .npy"),
    ("get TARGET gray -o x", "must end in .npy"),
    ("get TARGET gray -o .", "it is a folder"),
    ("get TARGET gray -o folder.npy", "it is a folder"),
    ("get TARGET gray -o nowhere/x.npy", "there is no folder 'nowhere'"),
    ("get TARGET gray -o link.npy", "cannot write 'link.npy': it is a link to '/nope/x.npy', and there is no folder '/nope'"),
    ("get TARGET gray -o /proc/x.npy", "cannot write '/proc/x.npy'"),
    ("get TARGET gray --t 0 -o /proc/x.png", "cannot write '/proc/x.png'"),
    ("get TARGET gray -o /proc/x.tif", "cannot write '/proc/x.tif'"),
    ("get TARGET gray -o x.npy --t two", "--t takes an index (3 or -1), a slice (0:4 or ::2) or a list (0,2,5), not 'two'"),
    ("get TARGET gray -o x.npy --z 1.5", "--z takes an index"),
    ("get TARGET gray -o x.npy --c 0,,1", "--c takes an index"),
    ("get TARGET gray -o x.npy --c 0:1:2:3", "--c takes an index"),
    ("get TARGET gray -o x.npy --t 2", "t index 2 out of range for size 2"),
    (
        "get TARGET gray -o x.npy --z 99999999999999999999999",
        "--z 99999999999999999999999 is out of range: it does not fit in 64 bits",
    ),
    (
        "get TARGET gray -o x.npy --z -9999999999999999999",
        "z index -9999999999999999999 out of range: it does not fit in 64 bits",
    ),
    (f"get TARGET gray -o x.npy --z {'9' * 5000}", f"--z {'9' * 80}… is out of range: it does not fit in 64 bits"),
    (f"get TARGET gray -o x.npy --z 0:{'9' * 5000}", "is out of range"),
    (f"get TARGET gray -o x.npy --roi 0,0,1,{'9' * 5000}", "--roi 999"),
    (f"get TARGET gray -o x.npy --t {'x' * 5000}", f"or a list (0,2,5), not '{'x' * 80}…'"),
    (f"ls 127.0.0.1:{'9' * 5000}", "target must be HOST:PORT, not '127.0.0.1:999"),
    ("ls \udcff:5", "target '\\udcff:5' is not valid text"),
    ("ls TARGET \udcff", "dataset name '\\udcff' is not valid text"),
    ("info TARGET \udcff", "image key '\\udcff' is not valid text"),
    ("get TARGET \udcff -o x.npy", "image key '\\udcff' is not valid text"),
    ("health \udcff:5", "target '\\udcff:5' is not valid text"),
    ("get TARGET gray -o x.npy --z ::0", "z slice step cannot be zero"),
    ("get TARGET gray -o x.npy --roi 1,2,3", "--roi takes whole numbers x,y,w,h, not '1,2,3'"),
    ("get TARGET gray -o x.npy --roi 0,0,99,99", "roi is out of bounds"),
    ("get TARGET gray -o x.npy --roi3d 1,2,3,4", "--roi3d takes whole numbers x,y,z,w,h,d"),
    ("get TARGET gray -o x.npy --tile 5", "--tile takes whole numbers ty,tx"),
    ("get TARGET gray -o x.npy --roi 0,0,1,1 --tile 0,0", "Provide either roi or tile, not both."),
    ("get TARGET gray -o x.npy --layout QQ", "layout must use only"),
    ("get TARGET gray -o x.npy --layout YX", "drops non-singleton dimension"),
    ("get TARGET gray -o x.npy --dtype pixels", "dtype 'pixels' is not a NumPy dtype"),
    ("get TARGET gray -o x.png", "a .png shows one time point, and 2 are selected: choose one with --t"),
    ("get TARGET gray -o x.png --t 0 --layout YX", "--layout means nothing to a .png"),
    ("get TARGET waves -o x.png", "complex pixels cannot be shown"),
    ("get TARGET gray -o x.png --t 0:0", "the selection is empty"),
    ("get TARGET wide -o x.tif", "OME-TIFF has no int64 pixels"),
    ("get TARGET gray -o x.tif --layout YXC --t 0 --z 0", "the layout of a .tif must end in YX"),
    ("get TARGET gray -o x.tif --z 0:0", "the selection is empty"),
    ("get TARGET holed -o x.npy", "chunk missing at (t=1, z=2, c=1)"),
]


@pytest.mark.parametrize("command,complaint", MISUSES)
def test_a_mistake_is_one_line_and_leaves_nothing_behind(
    in_process: Callable[..., Result],
    target: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    complaint: str,
) -> None:
    (tmp_path / "folder.npy").mkdir()
    (tmp_path / "link.npy").symlink_to("/nope/x.npy")
    monkeypatch.chdir(tmp_path)
    began = time.monotonic()
    assert complaint in failed(in_process(*command.replace("TARGET", target).split()))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.npy", "link.npy"]
    # A wrong address fails while one still looks at the screen.
    assert time.monotonic() - began < 15


@pytest.mark.parametrize("command,complaint", MISUSES[3::6])
def test_a_mistake_is_one_line_of_a_process_too(target: str, tmp_path: Path, command: str, complaint: str) -> None:
    """Whatever is written past Python's own streams, gRPC's log above all, would show here."""
    (tmp_path / "folder.npy").mkdir()
    (tmp_path / "link.npy").symlink_to("/nope/x.npy")
    assert complaint in failed(ome_tensor(*command.replace("TARGET", target).split(), cwd=tmp_path))


@pytest.mark.parametrize(
    "command", ["", "fly", "ls", "ls TARGET --color", "get TARGET gray", "ls TARGET --timeout soon", "serve"]
)
def test_a_command_that_cannot_be_understood_is_status_2(in_process: Callable[..., Result], target: str, command: str) -> None:
    done = in_process(*command.replace("TARGET", target).split())
    assert done.returncode == 2
    assert "Usage: " in done.stderr + done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_write_protected_file_is_left_alone(target: str, tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    path.write_text("mine")
    path.chmod(0o444)
    assert "write-protected" in failed(ome_tensor("get", target, "flat", "-o", path))
    assert path.read_text() == "mine"


@pytest.mark.parametrize("command", ["ls TARGET", "get TARGET x -o x.npy", "health TARGET --timeout 30"])
def test_ctrl_c_is_130_and_one_line(tmp_path: Path, command: str) -> None:
    """While waiting for a server that accepts and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(20)
        words = command.replace("TARGET", f"127.0.0.1:{silent.getsockname()[1]}").split()
        process = subprocess.Popen(
            [sys.executable, "-m", "ome_tensor_client", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
        )
        with process:
            connection, _ = silent.accept()
            with connection:
                process.send_signal(signal.SIGINT)
                out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (130, "", "error: interrupted\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_read_that_is_ended_leaves_nothing_behind(tmp_path: Path, number: signal.Signals) -> None:
    """Neither the file nor the hidden part that was to become it, of full size from the start."""
    pixels = random_pixels((1, 8, 2, 1024, 1024))
    source = write_images(tmp_path / "large.parquet", [pixels])
    folder = tmp_path / "out"
    folder.mkdir()
    # Over the wire, where the end of the image never comes.
    with (
        running_server([source], mapping="off") as server,
        Proxy(server.target, (4 << 20, 4 << 20), stall=True) as proxy,
    ):
        command = [sys.executable, "-m", "ome_tensor_client", "get", proxy.target, "large", "-o", str(folder / "x.npy")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            deadline = time.monotonic() + 30
            while not list(folder.glob(".*.part")) and time.monotonic() < deadline:
                time.sleep(0.01)
            assert list(folder.glob(".*.part")), "it has begun"
            process.send_signal(number)
            out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (128 + number, "", "")
    assert not list(folder.iterdir())


def test_a_command_under_nohup_goes_on(target: str, tmp_path: Path) -> None:
    """A signal that is ignored stays so."""
    script = (
        "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); import ome_tensor_client.files as files; "
        "write = files.write_npy; "
        "files.write_npy = lambda *rest: (os.kill(os.getpid(), signal.SIGHUP), write(*rest)); "
        "from ome_tensor_client.cli import main; main()"
    )
    words = [sys.executable, "-c", script, "get", target, "flat", "-o", str(tmp_path / "x.npy")]
    succeeded(subprocess.run(words, capture_output=True, text=True, timeout=60, check=False))


@pytest.mark.parametrize(
    "command", ["ls TARGET", "ls TARGET gray --json", "info TARGET gray", "info TARGET gray --json", "health TARGET"]
)
def test_a_closed_stdout_is_one_line(target: str, command: str) -> None:
    """``>&-``: Python has no stdout then."""
    words = f"{sys.executable} -m ome_tensor_client {command.replace('TARGET', target)} >&-"
    assert failed(subprocess.run(["bash", "-c", words], capture_output=True, text=True, timeout=60, check=False)) == (
        "error: standard output is closed"
    )


def test_a_file_is_written_whether_or_not_somebody_listens(target: str, tmp_path: Path, images: Mapping[str, np.ndarray]) -> None:
    words = f"{sys.executable} -m ome_tensor_client get {target} flat -o {tmp_path}/x.npy >&- 2>&-"
    succeeded(subprocess.run(["bash", "-c", words], capture_output=True, text=True, timeout=60, check=False))
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), images["flat"])


@pytest.mark.parametrize("file", ["x.npy", "x.tif", "x.png"])
def test_a_file_that_finds_no_room_is_named(target: str, tmp_path: Path, file: str) -> None:
    """A limit on the size of files stands for a full disk, which no test can have."""
    words = f"ulimit -f 1; {sys.executable} -m ome_tensor_client get {target} gray --t 0 -o {file} --dtype float64"
    done = subprocess.run(["bash", "-c", words], capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path)
    assert failed(done) == f"error: {tmp_path / file}: File too large"
    assert not list(tmp_path.iterdir())


def test_a_server_that_never_answers_is_given_up_after_the_timeout() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        assert failed(ome_tensor("ls", address, "--timeout", 0.5)) == f"error: {address}: no answer within 0.5 s"


def without(tmp_path: Path, *packages: str) -> dict[str, str]:
    """An environment in which packages are not installed."""
    for package in packages:
        (tmp_path / f"{package}.py").write_text(f"raise ModuleNotFoundError('No module named {package}', name='{package}')\n")
    return {"PYTHONPATH": str(tmp_path)}


@pytest.mark.parametrize("package,file,name", [("PIL", "x.png", "pillow"), ("tifffile", "x.tif", "tifffile")])
def test_a_missing_extra_is_named_before_any_traffic(tmp_path: Path, package: str, file: str, name: str) -> None:
    done = ome_tensor("get", "127.0.0.1:1", "x", "-o", tmp_path / file, environment=without(tmp_path, package))
    assert failed(done) == f"error: {Path(file).suffix} needs {name}: pip install 'ome-tensor[image]'"


def test_version_and_help(in_process: Callable[..., Result]) -> None:
    assert succeeded(ome_tensor("--version")).startswith("ome-tensor ")
    for words in (["--help"], *([command, "-h"] for command in ("serve", "ls", "info", "get", "health", "demo"))):
        assert "Usage: " in succeeded(in_process(*words))
    commands = succeeded(ome_tensor("--help"))
    assert all(f" {command} " in commands for command in ("serve", "ls", "info", "get", "health", "demo"))
