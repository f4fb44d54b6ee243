"""Real images: five encodings of one crop of IDR's image 6001240, and a table of single cells as CytoDataFrame writes it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import ome_arrow.tensor as upstream
import pyarrow.parquet as pq
import pytest
from tests.conformance import records

import ome_tensor

REPOSITORY = Path(__file__).parents[2]
EXAMPLE = REPOSITORY / "examples" / "data" / "idr0062a-6001240.chunks.ome.parquet"
#: Images that cannot all be copied into the repository.
SHARED = Path(os.environ.get("OME_TENSOR_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
SHAPE = (1, 16, 2, 275, 271)
CELLS = "jump-BR00117006.ome.parquet"

MODULES = pytest.mark.parametrize("module", [upstream, ome_tensor], ids=["upstream", "ours"])


def shared(name: str) -> Path:
    """A file or folder of the shared test data; skips the test where it is absent."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path} is absent: set OME_TENSOR_TEST_DATA to the folder that holds {name}")
    return path


def column(path: Path, name: str = "ome_arrow") -> Any:
    """An OME-Arrow column as a ChunkedArray."""
    return pq.read_table(path, columns=[name])[name]


@pytest.fixture(scope="module")
def idr_pixels() -> np.ndarray:
    """The crop's TZCYX pixels, put together here, chunk by chunk."""
    (record,) = column(EXAMPLE)
    chunks = record["chunks"].values
    at = {name: chunks.field(name).to_numpy() for name in ("t", "c", "z", "y", "x", "shape_z", "shape_y", "shape_x")}
    pixels = np.zeros(SHAPE, np.uint16)
    for i, values in enumerate(chunks.field("pixels")):
        t, c, z, y, x, sz, sy, sx = (int(at[name][i]) for name in at)
        pixels[t, z : z + sz, c, y : y + sy, x : x + sx] = values.values.to_numpy().reshape(sz, sy, sx)
    assert pixels.any(axis=(3, 4)).all(), "a plane without a pixel is a mistake of this fixture"
    return pixels


def from_parquet(path: Path) -> Callable[..., ome_tensor.TensorView]:
    """Views of a file with one record."""
    data = column(path)
    return lambda **selection: ome_tensor.TensorView(data, **selection)


def from_planes(pixels: np.ndarray) -> Callable[..., ome_tensor.TensorView]:
    """Views of pixels that something else has read, through a plane loader."""
    record = {"pixels_meta": records.pixels_meta(pixels.shape, pixels.dtype.name)}
    return lambda **selection: ome_tensor.TensorView(record, plane_loader=lambda t, z, c: pixels[t, z, c], **selection)


def from_typed_chunks() -> Callable[..., ome_tensor.TensorView]:
    """Views of upstream's dataset of chunk rows."""
    folder = shared("idr0062a-6001240.typed-chunks.ome-arrow")
    (image,) = pq.read_table(folder / "images.parquet").to_pylist()
    pixels = np.zeros([image[f"size_{axis}"] for axis in "tzcyx"], image["dtype"])
    for chunk in pq.read_table(folder / "chunks.parquet").to_pylist():
        where = tuple(slice(chunk[axis], chunk[axis] + chunk[f"shape_{axis}"]) for axis in "tzcyx")
        # Stored as TCZYX.
        block = np.frombuffer(chunk["pixel_bytes"], chunk["dtype"]).reshape([chunk[f"shape_{axis}"] for axis in "tczyx"])
        pixels[where] = block.swapaxes(1, 2)
    return from_planes(pixels)


def from_zarr() -> Callable[..., ome_tensor.TensorView]:
    """Views of the full resolution of the OME-Zarr (CZYX)."""
    zarr = pytest.importorskip("zarr")
    group = zarr.open_group(shared("idr0062a-6001240.ome.zarr"), mode="r")
    return from_planes(np.asarray(group["0"][:]).swapaxes(0, 1)[np.newaxis])


SOURCES: dict[str, Callable[[], Callable[..., ome_tensor.TensorView]]] = {
    "example": lambda: from_parquet(EXAMPLE),
    "chunks": lambda: from_parquet(shared(EXAMPLE.name)),
    "planes": lambda: from_parquet(shared("idr0062a-6001240.planes.ome.parquet")),
    "bytes": lambda: from_parquet(shared("idr0062a-6001240.bytes.ome.parquet")),
    "typed chunks": from_typed_chunks,
    "zarr": from_zarr,
}

SELECTIONS = [
    {},
    {"z": 5, "c": 1, "layout": "YX"},
    {"z": [15, 0, 7], "roi": (100, 120, 140, 20), "layout": "CZYX"},
    {"roi3d": (127, 127, 3, 2, 2, 10)},
    {"c": 0, "z": slice(None, None, 5), "roi": (0, 256, 271, 19), "dtype": np.float32},
]


@pytest.mark.parametrize("selection", SELECTIONS, ids=str)
@pytest.mark.parametrize("source", SOURCES)
def test_encodings_of_one_image(source: str, selection: dict[str, Any], idr_pixels: np.ndarray) -> None:
    """Whatever the encoding, the pixels are the same."""
    view = SOURCES[source]()(**selection)
    assert_reads(view, selection, idr_pixels)


def assert_reads(view: Any, selection: dict[str, Any], pixels: np.ndarray) -> None:
    """A view of the crop equals the same view of the array, which upstream cuts."""
    record = {"pixels_meta": records.pixels_meta(pixels.shape, pixels.dtype.name)}
    expected = upstream.TensorView(record, plane_loader=lambda t, z, c: pixels[t, z, c], **selection)
    array = view.to_numpy()
    assert (view.shape, view.strides, view.dtype, view.layout) == (
        expected.shape,
        expected.strides,
        expected.dtype,
        expected.layout,
    )
    np.testing.assert_array_equal(array, expected.to_numpy())


@pytest.mark.parametrize("source", ["example", "planes", "bytes", "zarr"])
def test_tiles_of_one_image(source: str, idr_pixels: np.ndarray) -> None:
    """Shuffled 3-D tiles put together again are the image."""
    view = SOURCES[source]()(layout="TZCYX")
    tiles = [np.from_dlpack(tile) for tile in view.iter_tiles_3d(tile_size=(6, 100, 128), shuffle=True, seed=1, prefetch=2)]
    origins = [(z, y, x) for z in range(0, 16, 6) for y in range(0, 275, 100) for x in range(0, 271, 128)]
    np.random.default_rng(0).shuffle(origins)  # any order: each tile is found by its pixels, not by its place
    expected = [idr_pixels[:, z : z + 6, :, y : y + 100, x : x + 128] for z, y, x in origins]
    assert sorted(tile.tobytes() for tile in tiles) == sorted(tile.tobytes() for tile in expected)


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    """A client of a server that serves the example, and the shared files where they are."""
    from ome_tensor_client import connect
    from ome_tensor_server.testing import running_server

    names = ["idr0062a-6001240.planes.ome.parquet", "idr0062a-6001240.bytes.ome.parquet", CELLS]
    paths = [EXAMPLE, *(SHARED / name for name in names if (SHARED / name).exists())]
    with running_server(paths) as server, connect(server.target) as client:
        yield client


@pytest.mark.parametrize("selection", SELECTIONS, ids=str)
@pytest.mark.parametrize("encoding", ["chunks", "planes", "bytes"])
def test_encodings_over_the_wire(client: Any, encoding: str, selection: dict[str, Any], idr_pixels: np.ndarray) -> None:
    """The same through a server."""
    if encoding != "chunks":
        shared(f"idr0062a-6001240.{encoding}.ome.parquet")
    assert_reads(client.tensor_view(f"idr0062a-6001240.{encoding}", **selection), selection, idr_pixels)


def cell_columns(kind: str) -> list[str]:
    """The columns of single cells of one kind that hold structs; one of the file's is null throughout."""
    schema = pq.read_schema(shared(CELLS))
    return [f.name for f in schema if f.name.endswith(f"_OMEArrow_{kind}") and str(f.type).startswith("struct")]


def cell(name: str, row: int) -> tuple[Any, np.ndarray]:
    """One record, and its stored values."""
    record = column(shared(CELLS), name)[row]
    return record, record["planes"][0]["pixels"].values.to_numpy()


@pytest.mark.parametrize("row", range(3))
@pytest.mark.parametrize("kind, count", [("ORIG", 3), ("LABL", 2)])
def test_cells(kind: str, count: int, row: int) -> None:
    """Non-strict records, as found in the wild: fields sorted by name, int64 pixels, no chunk fields."""
    names = cell_columns(kind)
    assert len(names) == count
    for name in names:
        record, values = cell(name, row)
        meta = record["pixels_meta"]
        expected = values.reshape(meta["size_y"].as_py(), meta["size_x"].as_py()).astype(np.uint16)
        data = column(shared(CELLS), name).slice(row)
        for kind_of_data in (record, data, data.combine_chunks(), record.as_py()):
            view = ome_tensor.TensorView(kind_of_data, layout="YX")
            assert view.dtype == np.uint16
            np.testing.assert_array_equal(view.to_numpy(), expected)
        stored = np.from_dlpack(ome_tensor.TensorView(record).to_dlpack())
        np.testing.assert_array_equal(stored, values)
        assert stored.dtype == np.int64


@pytest.mark.parametrize("row", range(3))
def test_cells_over_the_wire(client: Any, row: int) -> None:
    """The same through a server; a key names column and row."""
    for kind in ("ORIG", "LABL"):
        for name in cell_columns(kind):
            record, values = cell(name, row)
            view = client.tensor_view(f"jump-BR00117006/{name}/{row}", layout="YX")
            np.testing.assert_array_equal(view.to_numpy(), values.reshape(view.shape).astype(np.uint16))
            assert view.shape == ome_tensor.TensorView(record, layout="YX").shape


@pytest.mark.parametrize("row", range(3))
def test_composites_are_refused(row: int) -> None:
    """The composites hold three values a pixel in a plane of one channel: refused, not cut off or misread."""
    names = cell_columns("COMP")
    assert len(names) == 3
    for name in names:
        record, values = cell(name, row)
        meta = record["pixels_meta"]
        expected = meta["size_y"].as_py() * meta["size_x"].as_py()
        assert len(values) == 3 * expected
        with pytest.raises(ome_tensor.InvalidRecord) as caught:
            ome_tensor.TensorView(record).to_numpy()
        for part in ("t=0", "z=0", "c=0", str(len(values)), str(expected)):
            assert part in str(caught.value), str(caught.value)


def test_composites_are_refused_over_the_wire(client: Any) -> None:
    """With the same words, and without harm to the rest of the file."""
    name = cell_columns("COMP")[0]
    with pytest.raises(ome_tensor.InvalidRecord) as local:
        ome_tensor.TensorView(cell(name, 1)[0]).to_numpy()
    with pytest.raises(ome_tensor.InvalidRecord) as remote:
        client.tensor_view(f"jump-BR00117006/{name}/1").to_numpy()
    assert str(remote.value) == str(local.value)


@MODULES
def test_time_series_through_a_plane_loader(module: Any) -> None:
    """OME's artificial 5-D series: int8, and a reader that is somebody else's."""
    tifffile = pytest.importorskip("tifffile")
    pixels = tifffile.imread(shared("multi-channel-4D-series.ome.tiff"))
    assert pixels.dtype == np.int8
    assert pixels.ndim == 5
    record = {"pixels_meta": records.pixels_meta(pixels.shape, "int8")}
    # How the file orders z and c does not matter here.
    view = module.TensorView(record, plane_loader=lambda t, z, c: pixels[t, z, c], t=slice(None, None, 3), roi=(400, 100, 39, 67))
    assert view.shape == (3, *pixels.shape[1:3], 67, 39)
    np.testing.assert_array_equal(view.to_numpy(), pixels[::3, ..., 100:167, 400:439])
