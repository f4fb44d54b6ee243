"""Records: every kind of data and encoding that is read, and what is said about damaged ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import ome_arrow.tensor as upstream
import pyarrow as pa
import pytest
from tests.conformance import records
from tests.conformance.images import CHUNK, DAMAGED, IMAGES, SAME_PIXELS, SHAPE, Image
from tests.conformance.implementations import Implementation

import ome_tensor

PIXELS = IMAGES["chunks"].pixels

MODULES = pytest.mark.parametrize("module", [upstream, ome_tensor], ids=["upstream", "ours"])

UPSTREAMS = [name for name, image in IMAGES.items() if image.upstream]


def assert_reads(view: Callable[..., Any], image: Image) -> None:
    """Whole, one plane, a block inside several chunks, and single rows all equal the pixels."""
    whole = view().to_numpy()
    assert whole.dtype == image.pixels.dtype
    np.testing.assert_array_equal(whole.reshape(image.pixels.shape), image.pixels)
    nt, nz, nc, ny, nx = image.pixels.shape
    for t, z, c, roi in [
        (nt - 1, nz - 1, nc - 1, (0, 0, nx, ny)),
        (slice(None, None, -1), slice(1, None), slice(None), (nx // 3, ny // 4, nx // 2, ny // 2)),
        (slice(None), [0, nz - 1, 0], [nc - 1], (0, ny - 1, nx, 1)),
        (0, slice(None), [0, 0], (nx - 1, 0, 1, ny)),
    ]:
        x, y, w, h = roi
        expected = image.pixels[np.r_[:nt][t].reshape(-1)][:, np.r_[:nz][z].reshape(-1)][:, :, np.r_[:nc][c].reshape(-1)]
        found = view(t=t, z=z, c=c, roi=roi, layout="TZCYX").to_numpy()
        np.testing.assert_array_equal(found, expected[..., y : y + h, x : x + w])


@pytest.mark.parametrize("name", UPSTREAMS)
def test_encodings(any_view: Implementation, name: str) -> None:
    """NumPy as oracle on every encoding."""
    assert_reads(lambda **selection: any_view.view(name, **selection), IMAGES[name])


@pytest.mark.parametrize("name", [name for name in IMAGES if name not in UPSTREAMS])
def test_our_encodings(our_view: Implementation, name: str) -> None:
    """Encodings that upstream cannot read, or reads as another type."""
    assert_reads(lambda **selection: our_view.view(name, **selection), IMAGES[name])


def test_encodings_agree(our_view: Implementation) -> None:
    """The same pixels in different encodings are the same array."""
    arrays = [our_view.view(name, z=[3, 0], tile=None, roi=(3, 4, 10, 8)).to_numpy() for name in SAME_PIXELS]
    assert len(arrays) > 9
    for array in arrays[1:]:
        np.testing.assert_array_equal(array, arrays[0])


KINDS: dict[str, Callable[[Image], Any]] = {
    "array": lambda image: image.record,
    "scalar": lambda image: image.scalar,
    "dict": lambda image: image.dictionary,
    "chunked": lambda image: pa.chunked_array([image.record]),
    "several chunks": lambda image: pa.chunked_array([image.record, other_record(image)]),
    "empty chunks first": lambda image: pa.chunked_array([image.record.slice(0, 0), image.record, other_record(image)]),
    "several rows": lambda image: pa.concat_arrays([image.record, other_record(image)]),
    "later row": lambda image: pa.concat_arrays([other_record(image), image.record]).slice(1),
    "later scalar": lambda image: pa.concat_arrays([other_record(image), image.record])[1],
    "table column": lambda image: pa.table({"image": pa.concat_arrays([other_record(image), image.record])}).slice(1)["image"],
}


def other_record(image: Image) -> pa.StructArray:
    """A record of the same type and quite another image, to be told apart."""
    stored = image.record.type.field("planes").type.value_type.field("pixels").type.value_type
    # Six pixels: of packed booleans that is no whole byte.
    pixels = records.numbered((1, 1, 1, 2, 3), bool if stored == pa.bool_() else "uint16")
    fields = {field.name for field in image.record.type}
    part = {"planes": list(records.plane_entries(pixels)), "chunks": []}
    record = {key: value for key, value in records.as_dict(pixels.shape, "uint16", **part).items() if key in fields}
    return pa.array([record], type=image.record.type)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["planes", "chunks", "bytes_zstd", "planes_f32"])
@MODULES
def test_kinds_of_data(module: Any, name: str, kind: str) -> None:
    """A dict, a scalar, the first row of an array, the first record of a chunked array."""
    image = IMAGES[name]
    data = KINDS[kind](image)
    assert_reads(lambda **selection: module.TensorView(data, **selection), image)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["nonstrict", "null_chunks", "bit_packed", "bit_bytes", "bytes_i8_lz4", "ome_complex"])
def test_kinds_of_data_ours(name: str, kind: str) -> None:
    """The same for what upstream does not read."""
    image = IMAGES[name]
    data = KINDS[kind](image)
    assert_reads(lambda **selection: ome_tensor.TensorView(data, **selection), image)


@pytest.mark.parametrize("policy", ["auto", "combine", "keep", " Keep "])
@pytest.mark.parametrize("kind", ["chunked", "several chunks", "empty chunks first", "table column"])
@MODULES
def test_chunk_policy(module: Any, policy: str, kind: str) -> None:
    """Whatever is done with Arrow's chunks, the pixels are the same."""
    data = KINDS[kind](IMAGES["chunks"])
    assert_reads(lambda **selection: module.TensorView(data, chunk_policy=policy, **selection), IMAGES["chunks"])
    view = module.TensorView(data, chunk_policy=policy, t=0).with_layout("ZCYX")
    np.testing.assert_array_equal(view.to_numpy(), PIXELS[0])


@pytest.mark.parametrize(
    "grid, words",
    [
        (None, "tile selection requires chunk_grid metadata"),
        ({}, "tile selection requires chunk_grid metadata"),
        ({"chunk_y": 5}, "chunk_grid"),
        ({"chunk_y": 5, "chunk_x": None}, "chunk_grid"),
        ({"chunk_y": 0, "chunk_x": 6}, "chunk_grid chunk sizes must be positive"),
        ({"chunk_y": 5, "chunk_x": -6}, "chunk_grid chunk sizes must be positive"),
    ],
    ids=str,
)
@MODULES
def test_bad_chunk_grid(module: Any, grid: Any, words: str) -> None:
    """A grid that cannot be counted in is an error where a tile is asked for, and nowhere else."""
    record = {**IMAGES["chunks"].dictionary, "chunk_grid": grid}
    with pytest.raises(ValueError, match=words) as caught:
        module.TensorView(record, tile=(0, 0))
    assert module is upstream or isinstance(caught.value, ome_tensor.OmeTensorError)
    np.testing.assert_array_equal(module.TensorView(record).to_numpy(), PIXELS)


@pytest.mark.parametrize("stored", ["python lists", "arrays"])
def test_dicts_of_arrays(stored: str) -> None:
    """A dict may hold its pixels as lists or as arrays, of whatever width."""
    array = PIXELS.astype(np.int64)
    planes = list(records.plane_entries(array))
    if stored == "python lists":
        planes = [{**plane, "pixels": plane["pixels"].tolist()} for plane in planes]
    image = Image(IMAGES["planes"].record, PIXELS)
    assert_reads(lambda **s: ome_tensor.TensorView(records.as_dict(SHAPE, "uint16", planes=planes), **s), image)


@pytest.mark.parametrize("leave_out", ["chunks", "chunk_grid", "masks", "id", "acquisition_datetime"])
def test_dicts_may_lack_fields(leave_out: str) -> None:
    """Only pixels_meta and the pixels are needed."""
    record = records.as_dict(SHAPE, "uint16", planes=list(records.plane_entries(PIXELS)))
    del record[leave_out]
    assert_reads(lambda **selection: ome_tensor.TensorView(record, **selection), IMAGES["planes"])


class Loader:
    """A plane loader that remembers what it was asked for."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels = pixels
        self.asked: list[tuple[int, int, int]] = []

    def __call__(self, t: int, z: int, c: int) -> np.ndarray:
        self.asked.append((t, z, c))
        return self.pixels[t, z, c]


@MODULES
@pytest.mark.parametrize("data", ["planes", "chunks", "metadata"])
def test_plane_loader(module: Any, data: str) -> None:
    """``plane_loader`` overrides whatever is stored, and is asked for the selected planes only."""
    loader = Loader(records.numbered(SHAPE)[::-1, ::-1] + 1)
    record = {"pixels_meta": records.pixels_meta(SHAPE, "uint16")} if data == "metadata" else IMAGES[data].record
    view = module.TensorView(record, plane_loader=loader, t=[2, 0], z=slice(1, 3), c=1, roi=(5, 4, 7, 6))
    np.testing.assert_array_equal(view.to_numpy(), loader.pixels[[2, 0], 1:3, 1:, 4:10, 5:12])
    assert sorted(loader.asked) == [(t, z, 1) for t in (0, 2) for z in (1, 2)]
    turned = view.with_layout("XYZTC")
    np.testing.assert_array_equal(turned.to_numpy(), loader.pixels[[2, 0], 1:3, 1:, 4:10, 5:12].transpose(4, 3, 1, 0, 2))


@MODULES
@pytest.mark.parametrize(
    "form",
    [
        pytest.param(lambda plane: plane, id="array"),
        pytest.param(lambda plane: plane.ravel(), id="flat"),
        pytest.param(lambda plane: plane.tolist(), id="lists"),
        pytest.param(lambda plane: plane.astype(float), id="floats"),
    ],
)
def test_plane_loader_may_give(module: Any, form: Callable[[np.ndarray], Any]) -> None:
    """A plane as an array, flat, as lists, or of another type."""
    record = {"pixels_meta": records.pixels_meta(SHAPE, "uint16")}
    view = module.TensorView(record, plane_loader=lambda t, z, c: form(PIXELS[t, z, c]), t=0, z=0)
    assert view.to_numpy().dtype == np.uint16
    np.testing.assert_array_equal(view.to_numpy(), PIXELS[0, 0])


@MODULES
def test_plane_loader_of_wrong_size(module: Any) -> None:
    """A plane of another size is an error."""
    view = module.TensorView(IMAGES["planes"].record, plane_loader=lambda t, z, c: np.zeros((13, 16), np.uint16))
    with pytest.raises(ValueError):
        view.to_numpy()


PIXEL_TYPES = [
    ("bit", "bool"),
    ("int8", "int8"),
    ("int16", "int16"),
    ("int32", "int32"),
    ("uint8", "uint8"),
    ("uint16", "uint16"),
    ("uint32", "uint32"),
    ("float", "float32"),
    ("double", "float64"),
    ("complex", "complex64"),
    ("double-complex", "complex128"),
    ("float32", "float32"),
    ("float64", "float64"),
    ("bool", "bool"),
    (None, "uint16"),
]


@pytest.mark.parametrize("pixel_type, dtype", PIXEL_TYPES)
def test_pixel_types(pixel_type: str | None, dtype: str) -> None:
    """OME's names mean what OME says; upstream reads ``float`` as double and ``bit`` as uint16."""
    pixels = records.numbered((1, 1, 1, 4, 5), dtype)
    record = {"pixels_meta": records.pixels_meta(pixels.shape, pixel_type)}
    view = ome_tensor.TensorView(record, plane_loader=lambda t, z, c: pixels[t, z, c])
    assert view.dtype == np.dtype(dtype)
    assert view.to_numpy().dtype == np.dtype(dtype)
    np.testing.assert_array_equal(view.to_numpy()[0], pixels[0, 0, 0])


@pytest.mark.parametrize("dtype", ["uint8", "int32", "uint32", "int64", "float64", "complex128"])
@pytest.mark.parametrize("compression", [None, "", "none", "zstd", "ZSTD", "lz4"])
def test_byte_chunks(dtype: str, compression: str | None) -> None:
    """Byte chunks of any type, compressed or not."""
    pixels = records.numbered(SHAPE, dtype)
    record = records.bytes_record(pixels, CHUNK, compression=compression)
    assert_reads(lambda **selection: ome_tensor.TensorView(record, **selection), Image(record, pixels))


def test_byte_chunks_without_dtype() -> None:
    """A chunk that does not say what its bytes are has the image's type."""
    entries = [{**entry, "dtype": None} for entry in records.byte_entries(PIXELS, CHUNK)]
    record = records.as_dict(SHAPE, "uint16", chunks=entries, chunk_grid=records.chunk_grid(CHUNK))
    data = records.as_array(record, records.struct_type(byte_chunks=True))
    assert_reads(lambda **selection: ome_tensor.TensorView(data, **selection), IMAGES["chunks"])


@MODULES
@pytest.mark.parametrize(
    "data",
    [
        pytest.param(IMAGES["planes"].record.slice(0, 0), id="array"),
        pytest.param(pa.chunked_array([], type=records.struct_type()), id="no chunks"),
    ],
)
def test_empty_arrays(module: Any, data: Any) -> None:
    """No record, no view."""
    with pytest.raises(ValueError, match=r"Cannot create TensorView from an empty OME-Arrow array\."):
        module.TensorView(data)


@pytest.mark.parametrize("policy", ["auto", "combine", "keep"])
def test_empty_chunks_only(policy: str) -> None:
    """The same where there are chunks but no row in them."""
    data = pa.chunked_array([IMAGES["planes"].record.slice(0, 0)] * 2)
    with pytest.raises(ome_tensor.InvalidRecord, match=r"Cannot create TensorView from an empty OME-Arrow array\."):
        ome_tensor.TensorView(data, chunk_policy=policy)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(pa.array([None], type=records.struct_type()), id="null row"),
        pytest.param(pa.scalar(None, type=records.struct_type()), id="null scalar"),
        pytest.param({}, id="empty dict"),
        pytest.param({"pixels_meta": None}, id="null pixels_meta"),
        pytest.param({"pixels_meta": {"size_x": 3}}, id="sizes missing"),
        pytest.param(pa.array([1, 2]), id="numbers"),
        pytest.param(pa.array([{"a": 1}]), id="another struct"),
        pytest.param(None, id="nothing"),
        pytest.param(np.zeros((3, 3)), id="array"),
    ],
)
def test_not_a_record(data: Any) -> None:
    """What is no OME-Arrow record is refused as such, not with a KeyError from inside."""
    with pytest.raises(ome_tensor.OmeTensorError) as caught:
        ome_tensor.TensorView(data).to_numpy()
    assert isinstance(caught.value, ValueError)


REFUSED_BY_BOTH = {
    "chunk_short": "",
    "chunk_long": "",
    "chunk_order": "chunk_order='ZYX'",
    "chunk_outside": "out of range",
    "bytes_short": "",
    "bytes_long": "",
    "plane_missing": "(t=1, z=1, c=0)",
    "plane_short": "",
    "plane_tripled": "",
    "plane_twice": "(t",
}


@pytest.mark.parametrize("name", REFUSED_BY_BOTH)
def test_damaged_records(any_view: Implementation, name: str) -> None:
    """Payloads of the wrong length, blocks outside the image, another chunk order, planes that are missing or there twice."""
    any_view.refuses("chunk_order" if name == "chunk_order" else "", name)


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_records_are_named(our_view: Implementation, name: str) -> None:
    """Whatever is wrong with a record, reading it is an InvalidRecord, never wrong pixels and never an error from inside."""
    error = our_view.refuses("", name)
    assert type(error) is ome_tensor.InvalidRecord
    assert str(error)


@pytest.mark.parametrize("name", ["chunk_missing", "plane_missing"])
def test_a_hole_is_named(our_view: Implementation, name: str) -> None:
    """Upstream shows zeros where a chunk is missing; ours says which plane lacks what."""
    error = our_view.refuses("", name)
    message = str(error)
    assert all(part in message for part in ("t=1", "z=1", "c=0")), message
    if name == "chunk_missing":
        # The missing chunk begins at row 3, column 0.
        assert "y=3" in message, message
        assert "x=0" in message, message


@pytest.mark.parametrize("name", ["chunk_missing", "plane_missing"])
def test_pixels_beside_a_hole_are_readable(our_view: Implementation, name: str) -> None:
    """A hole is an error when it is read, not when it is near."""
    pixels = DAMAGED[name].pixels
    np.testing.assert_array_equal(our_view.view(name, t=0).to_numpy(), pixels[:1])
    np.testing.assert_array_equal(our_view.view(name, t=1, z=0).to_numpy(), pixels[1, 0])
    if name == "chunk_missing":
        np.testing.assert_array_equal(our_view.view(name, roi=(0, 0, 8, 3)).to_numpy(), pixels[..., :3, :])
        our_view.refuses("t=1", name, roi=(0, 2, 8, 2))
        our_view.refuses("t=1", name, t=1, z=1, roi=(7, 5, 1, 1))


MISFITS = {
    "plane_value_large": "planes hold 70000",
    "plane_value_nan": "planes hold nan",
    "chunk_value_negative": "chunks hold -1",
    "bytes_value_large": "chunks hold 70000",
    "zstd_value_large": "chunks hold 70000",
}


@pytest.mark.parametrize("name, words", MISFITS.items())
def test_a_value_that_the_pixel_type_cannot_hold(our_view: Implementation, name: str, words: str) -> None:
    """Upstream wraps it around; ours says where it is and what it is. Pixels elsewhere are readable."""
    for selection in ({}, {"t": 1, "z": 1}, {"roi": (1, 3, 4, 2)}, {"dtype": np.uint16}):
        error = our_view.refuses(words, name, **selection)
        assert "at (t=1, z=1, c=0, y=3, x=2), which does not fit pixel type 'uint16'" in str(error)
        # Asked again it must say so again: a verdict is kept, but only a good one.
        our_view.refuses(words, name, **selection)
    np.testing.assert_array_equal(our_view.view(name, t=0).to_numpy(), DAMAGED[name].pixels[:1])
    np.testing.assert_array_equal(our_view.view(name, t=1, z=0).to_numpy(), DAMAGED[name].pixels[1, 0])


@pytest.mark.parametrize("name", MISFITS)
def test_a_callers_dtype_is_astype_of_what_is_stored(our_view: Implementation, name: str) -> None:
    """As upstream has it, also where the pixel type is not true."""
    value = {"nan": np.nan, "negative": -1, "large": 70_000}[name.split("_")[-1]]
    found = our_view.view(name, t=1, z=1, dtype=np.float64).to_numpy()
    expected = DAMAGED[name].pixels[1, 1].astype(np.float64)
    expected[0, 3, 2] = value
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", [name for name in DAMAGED if "_value_" in name])
def test_dicts_of_misfits(name: str) -> None:
    """The same of a dict, whose lists are converted in parts."""
    record = DAMAGED[name].dictionary
    for selection in ({}, {"t": 1, "z": 1}, {"roi": (1, 3, 4, 2)}):
        with pytest.raises(
            ome_tensor.InvalidRecord, match=r"at \(t=1, z=1, c=0, y=3, x=2\), which does not fit pixel type 'uint16'"
        ):
            ome_tensor.TensorView(record, **selection).to_numpy()
    pixels = DAMAGED[name].pixels
    np.testing.assert_array_equal(ome_tensor.TensorView(record, t=0, roi=(3, 3, 5, 3)).to_numpy(), pixels[:1, ..., 3:, 3:])


def test_tiles_of_a_hole(our_view: Implementation) -> None:
    """Tiles before the hole arrive; the one with the hole is the error."""
    view = our_view.view("chunk_missing")
    tiles = view.iter_tiles_3d(tile_size=(1, 3, 8))
    found = [np.from_dlpack(next(tiles)) for _ in range(7)]
    np.testing.assert_array_equal(found[-1][0, 0, 0], DAMAGED["chunk_missing"].pixels[1, 1, 0, :3])
    with pytest.raises(ome_tensor.InvalidRecord, match="t=1"):
        next(tiles)


def test_damage_elsewhere_does_not_matter_to_the_description(our_view: Implementation) -> None:
    """Shape and dtype come from the metadata, which is sound here."""
    view = our_view.view("chunk_missing", t=1)
    assert (view.shape, view.dtype) == ((1, 2, 1, 6, 8), np.uint16)
