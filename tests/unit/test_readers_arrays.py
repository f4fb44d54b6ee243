"""Readers of arrays: OME-TIFF, OME-Zarr and npy, loaded and served in place."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.unit.tabular import LOADER, in_place

from ome_tensor.arrow_file import ArrowImages
from ome_tensor.errors import InvalidRecord, InvalidSelection, LimitExceeded, OmeTensorError
from ome_tensor.pixels import Pixels
from ome_tensor.record import Channel, ImageMeta
from ome_tensor.selection import ChunkGrid, Extent, Selection
from ome_tensor.tables import ImageTable
from ome_tensor_server.in_place import shared_readers
from ome_tensor_server.readers.detect import fingerprint, open_source

zarr = pytest.importorskip("zarr")
tifffile = pytest.importorskip("tifffile")
pytest.importorskip("ome_types")

DTYPES = "int8 uint8 int16 uint16 int32 uint32 float32 float64".split()

few = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def loaded(source: Path, target: Path) -> ImageTable:
    """A source written by its reader, and mapped."""
    written: list[int] = []
    with open_source(str(source)) as opened, target.open("wb") as file:
        opened.write(file, written.append)
        assert written == sorted(written)
        assert opened.is_unchanged()
        assert opened.fingerprint() == fingerprint(str(source))
        # An honest estimate: it is what room is made by.
        assert target.stat().st_size <= opened.nbytes + 200_000
        others = opened.others
    table = ArrowImages(target).load("v")
    assert list(table.others) == list(others)
    return ImageTable("d", table)


def whole(pixels: Pixels) -> np.ndarray:
    """All pixels, TZCYX."""
    t, z, c, y, x = pixels.meta.extent
    out = np.empty((t, z, c, y, x), pixels.meta.dtype)
    pixels.gather(Selection(range(t), range(z), range(c), 0, 0, x, y), out)
    return out


def check(source: Path, target: Path, wanted: np.ndarray, column: str = "image", row: int = 0, level: int = 0) -> ImageTable:
    """Loaded and in place alike are the wanted pixels, as a whole and in part; gives the loaded table."""
    tables = loaded(source, target), in_place(source)
    for table in tables:
        pixels = table.image(column, row, level).pixels
        assert pixels.meta.dtype == wanted.dtype
        np.testing.assert_array_equal(whole(pixels), wanted, strict=True)
        t, z, c, y, x = wanted.shape
        part = Selection((t - 1, 0), range(z)[::-1], (c - 1,), x // 3, y // 4, x - x // 3, max(1, y // 2))
        out = np.empty(part.shape, wanted.dtype)
        pixels.gather(part, out)
        np.testing.assert_array_equal(
            out, wanted[[t - 1, 0]][:, ::-1][:, :, [c - 1], y // 4 : y // 4 + part.h, x // 3 :], strict=True
        )
    first, second = (table.image(column, row, level).pixels.meta for table in tables)
    assert first.physical_size == second.physical_size
    assert first.channels == second.channels
    assert first.grid == second.grid
    return tables[0]


def values(shape: tuple[int, ...], dtype: Any, seed: int = 0) -> np.ndarray:
    """Values all over the dtype's range."""
    random = np.random.default_rng(seed)
    kind = np.dtype(dtype)
    if kind.kind in "iu":
        bounds = np.iinfo(kind)
        return random.integers(bounds.min, bounds.max, shape, kind.newbyteorder("="), endpoint=True).astype(kind)
    return random.standard_normal(shape).astype(kind)


# --- npy --------------------------------------------------------------------------------------------------------------


@few
@given(
    shape=st.lists(st.integers(1, 7), min_size=2, max_size=5).map(tuple),
    dtype=st.sampled_from([*DTYPES, "bool", ">u2", "<i4", "complex64"]),
    fortran=st.booleans(),
)
def test_npy(tmp_path: Path, shape: tuple[int, ...], dtype: str, fortran: bool) -> None:
    array = values(shape, dtype) if dtype != "bool" else values(shape, "uint8") > 127
    np.save(tmp_path / "a.npy", np.asfortranarray(array) if fortran else array)
    check(
        tmp_path / "a.npy", tmp_path / "out", array.reshape((1,) * (5 - len(shape)) + shape).astype(array.dtype.newbyteorder("="))
    )


@pytest.mark.parametrize(
    "array, words",
    [
        (np.zeros(5), "it has 1 axes"),
        (np.zeros((1,) * 6), "it has 6 axes"),
        (np.zeros((0, 3)), "its size along Y is 0"),
        (np.array([["a"]]), "no type that is served"),
        (np.array([[None]]), "Python objects"),
        (np.zeros((2, 2), [("a", "u1")]), "no type that is served"),
    ],
)
def test_npy_that_is_no_image(tmp_path: Path, array: np.ndarray, words: str) -> None:
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    with pytest.raises(InvalidRecord, match=words) as caught:
        open_source(str(tmp_path / "a.npy"))
    assert "a.npy" in caught.value.message


# --- OME-Zarr ---------------------------------------------------------------------------------------------------------

UNITS = {"z": "micrometer", "y": "micrometer", "x": "nanometer"}


def write_zarr(
    path: Path,
    levels: list[np.ndarray],
    axes: str,
    version: str = "0.5",
    chunks: tuple[int, ...] | None = None,
    extra: dict[str, Any] | None = None,
) -> Path:
    """An OME-Zarr image."""
    group = zarr.open_group(path, mode="w", zarr_format=3 if version == "0.5" else 2)
    datasets = []
    for number, level in enumerate(levels):
        array = group.create_array(str(number), shape=level.shape, dtype=level.dtype, chunks=chunks or level.shape)
        array[...] = level
        scale = [0.5 * 2**number if axis in "yx" else 2.0 for axis in axes]
        datasets.append({"path": str(number), "coordinateTransformations": [{"type": "scale", "scale": scale}]})
    multiscales = [
        {
            "name": "cells",
            "axes": [
                {"name": axis, "type": "space" if axis in "zyx" else "time" if axis == "t" else "channel"}
                | ({"unit": UNITS[axis]} if axis in UNITS else {})
                for axis in axes
            ],
            "datasets": datasets,
        }
    ]
    attributes: dict[str, Any] = {"multiscales": multiscales, "version": version} | (extra or {})
    group.attrs.update({"ome": attributes} if version == "0.5" else attributes)
    return path


AXES = ["yx", "zyx", "cyx", "czyx", "tcyx", "tczyx", "tzyx"]


@few
@given(data=st.data(), axes=st.sampled_from(AXES), dtype=st.sampled_from(DTYPES), version=st.sampled_from(["0.4", "0.5"]))
def test_ome_zarr(tmp_path: Path, data: st.DataObject, axes: str, dtype: str, version: str) -> None:
    shape = tuple(data.draw(st.integers(1, 9)) for _ in axes)
    chunks = tuple(data.draw(st.integers(1, length)) for length in shape)
    array = values(shape, dtype)
    shutil.rmtree(tmp_path / "a.zarr", ignore_errors=True)
    write_zarr(tmp_path / "a.zarr", [array], axes, version, chunks)
    full = np.expand_dims(array, tuple(place for place, axis in enumerate("tczyx") if axis not in axes)).swapaxes(1, 2)
    table = check(tmp_path / "a.zarr", tmp_path / "out", full)
    meta = table.image("image", 0).pixels.meta
    assert (meta.name, meta.image_type, meta.dtype.name) == ("cells", "image", dtype)
    assert meta.physical_size == (2.0 if "z" in axes else None, 0.5, 0.5)
    assert meta.physical_unit == ("µm" if "z" in axes else "", "µm", "nm")


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_ome_zarr_with_levels_labels_and_channels(tmp_path: Path, version: str) -> None:
    image, mask = values((2, 20, 30), "uint16"), values((20, 30), "uint32")
    omero = {"channels": [{"label": "DNA", "color": "0000FF"}, {"label": "RNA", "color": "FF0080"}]}
    path = write_zarr(tmp_path / "a.zarr", [image, image[:, ::2, ::2]], "cyx", version, (1, 8, 8), {"omero": omero})
    write_zarr(path / "labels" / "nuclei", [mask], "yx", version, (8, 8), {"image-label": {}})
    write_zarr(path / "labels" / "small", [mask[:5]], "yx", version, None, {"image-label": {}})
    labels = zarr.open_group(path / "labels", mode="a", zarr_format=3 if version == "0.5" else 2)
    listed = {"labels": ["nuclei", "small"]}
    labels.attrs.update({"ome": listed} if version == "0.5" else listed)
    table = check(path, tmp_path / "out", image[None, None])
    assert list(table.columns) == ["image", "label_nuclei"]
    np.testing.assert_array_equal(whole(table.image("label_nuclei", 0).pixels), mask[None, None, None], strict=True)
    assert table.image("label_nuclei", 0).pixels.meta.image_type == "label"
    meta = table.image("image", 0).pixels.meta
    assert [(channel.name, channel.color_rgba) for channel in meta.channels] == [("DNA", 0x0000FFFF), ("RNA", 0xFF0080FF)]
    assert [level.shape for level in table.levels("image", 0)] == [(1, 1, 2, 20, 30), (1, 1, 2, 10, 15)]
    check(path, tmp_path / "out2", image[None, None, :, ::2, ::2], level=1)
    assert table.image("image", 0, 1).pixels.meta.physical_size == (None, 1.0, 1.0)


def test_a_plate(tmp_path: Path) -> None:
    root = zarr.open_group(tmp_path / "plate.zarr", mode="w")
    wells = ["A/1", "B/2"]
    root.attrs.update({"ome": {"plate": {"wells": [{"path": well} for well in wells]}}})
    images = {}
    for number, well in enumerate(wells):
        group = root.create_group(well)
        group.attrs.update({"ome": {"well": {"images": [{"path": "0"}, {"path": "1"}]}}})
        for field in range(2):
            images[well, field] = values((6, 7 + number), "uint8", seed=2 * number + field)
            write_zarr(tmp_path / "plate.zarr" / well / str(field), [images[well, field]], "yx")
    table = loaded(tmp_path / "plate.zarr", tmp_path / "out")
    assert table.metadata.to_pydict() == {
        "well": ["A1", "A1", "B2", "B2"],
        "field": [0, 1, 0, 1],
        "path": ["A/1/0", "A/1/1", "B/2/0", "B/2/1"],
    }
    for row, image in enumerate(images.values()):
        np.testing.assert_array_equal(whole(table.image("image", row).pixels)[0, 0, 0], image)


def test_chunks_that_are_not_stored_are_the_fill_value(tmp_path: Path) -> None:
    path = write_zarr(tmp_path / "a.zarr", [values((16, 16), "uint16")], "yx", chunks=(8, 8))
    shutil.rmtree(path / "0" / "c" / "0" / "1", ignore_errors=True)
    (path / "0" / "c" / "0" / "1").unlink(missing_ok=True)
    wanted = values((16, 16), "uint16")
    wanted[:8, 8:] = 0
    check(path, tmp_path / "out", wanted[None, None, None])


def test_a_changed_folder_has_another_fingerprint_and_version(tmp_path: Path) -> None:
    path = write_zarr(tmp_path / "a.zarr", [values((16, 16), "uint16")], "yx", chunks=(8, 8))
    with open_source(str(path)) as source:
        before = source.fingerprint(), source.version()
        zarr.open_array(path / "0", mode="r+")[0, 0] = 7
        os.utime(path / "0" / "zarr.json", ns=(1, 1))
        assert not source.is_unchanged()
    with open_source(str(path)) as source:
        assert source.fingerprint() != before[0]
        assert source.version() != before[1]


def edited(path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A folder with another zarr.json."""
    document = json.loads((path / "zarr.json").read_text())
    change(document["attributes"]["ome"])
    (path / "zarr.json").write_text(json.dumps(document))
    return path


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda ome: ome["multiscales"][0]["datasets"][0].update(path="../../secret"), "does not lie in it"),
        (lambda ome: ome["multiscales"][0]["datasets"][0].update(path="/etc"), "does not lie in it"),
        (lambda ome: ome["multiscales"][0]["datasets"][0].update(path="9"), "lacks the array '9'"),
        (lambda ome: ome["multiscales"][0]["datasets"][0].update(path=5), "does not lie in it"),
        (lambda ome: ome["multiscales"][0].update(datasets=[]), "have no datasets"),
        (lambda ome: ome["multiscales"][0].update(datasets="many"), "no list of objects"),
        (lambda ome: ome["multiscales"][0].update(axes=["q", "x"]), "its axes are"),
        (lambda ome: ome["multiscales"][0].update(axes=["z", "y", "x"]), "are not an image's"),
        (lambda ome: ome.update(multiscales=[]), "multiscales are none"),
        (lambda ome: ome.update(multiscales=7), "multiscales are none"),
        (lambda ome: ome.pop("multiscales"), "holds no image"),
    ],
)
def test_damaged_ome_zarr(tmp_path: Path, change: Callable[[dict[str, Any]], None], words: str) -> None:
    path = edited(write_zarr(tmp_path / "a.zarr", [values((6, 7), "uint8")], "yx"), change)
    with pytest.raises(InvalidRecord, match=words) as caught:
        open_source(str(path))
    assert "a.zarr" in caught.value.message


def test_links_out_of_a_folder_are_refused(tmp_path: Path) -> None:
    path = write_zarr(tmp_path / "a.zarr", [values((6, 7), "uint8")], "yx")
    (tmp_path / "secret").write_bytes(b"secret")
    (path / "0" / "c" / "0" / "0").unlink()
    (path / "0" / "c" / "0" / "0").symlink_to(tmp_path / "secret")
    with pytest.raises(InvalidRecord, match="a link that leads out of it"):
        open_source(str(path))


def test_a_damaged_chunk_is_an_error_where_it_is_read(tmp_path: Path) -> None:
    path = write_zarr(tmp_path / "a.zarr", [values((2048, 512), "uint16")], "yx", chunks=(1024, 512))
    chunk = path / "0" / "c" / "1" / "0"
    chunk.write_bytes(chunk.read_bytes()[:100])
    # Whatever the codec says; a loader makes the project's error of it.
    with pytest.raises((OmeTensorError, ValueError, RuntimeError)):
        loaded(path, tmp_path / "out")
    pixels = in_place(path).image("image", 0).pixels
    out = np.empty((1, 1, 1, 10, 10), np.uint16)
    pixels.gather(Selection(range(1), range(1), range(1), 0, 0, 10, 10), out)
    with pytest.raises(InvalidRecord, match=r"the block at \(0, 0, 0, 1024, 0\)"):
        pixels.gather(Selection(range(1), range(1), range(1), 0, 1500, 10, 10), out)


def test_absurd_sizes_are_only_numbers(tmp_path: Path) -> None:
    """Nothing is allocated for what a header claims: the one who asks is told how much it would be."""
    path = write_zarr(tmp_path / "a.zarr", [values((64, 64), "uint8")], "yx", chunks=(64, 64))
    document = json.loads((path / "0" / "zarr.json").read_text())
    document["shape"] = [2**31 - 1, 2**31 - 1]
    (path / "0" / "zarr.json").write_text(json.dumps(document))
    with open_source(str(path)) as source:
        assert source.info().nbytes >= (2**31 - 1) ** 2
    document["shape"] = [2**31, 2**31]
    (path / "0" / "zarr.json").write_text(json.dumps(document))
    with pytest.raises(InvalidRecord, match="at most 2147483647"):
        open_source(str(path))


def test_in_place_a_block_has_a_limit_and_stored_values_are_none(tmp_path: Path) -> None:
    path = write_zarr(tmp_path / "a.zarr", [values((256, 2048), "uint16")], "yx")
    pixels = in_place(path, shared_readers(0, 4 << 20, 1 << 19)).image("image", 0).pixels
    out = np.empty((1, 1, 1, 1, 1), np.uint16)
    with pytest.raises(LimitExceeded, match="max_chunk_bytes"):
        pixels.gather(Selection(range(1), range(1), range(1), 0, 0, 1, 1), out)
    with pytest.raises(InvalidSelection, match="does not support byte-backed"):
        pixels.flat_values(Selection(range(1), range(1), range(1), 0, 0, 2048, 256))


@pytest.mark.parametrize("where", ["", "variables", "profile"])
def test_a_key_for_s3_is_found_where_boto_finds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Without one, public buckets are read unsigned."""
    pytest.importorskip("botocore")
    from ome_tensor_server.readers.ome_zarr import _has_s3_key

    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    if where == "variables":
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    elif where == "profile":
        (tmp_path / "credentials").write_text("[lab]\naws_access_key_id = a\naws_secret_access_key = b\n")
        monkeypatch.setenv("AWS_PROFILE", "lab")
    _has_s3_key.cache_clear()
    assert _has_s3_key() == bool(where)
    _has_s3_key.cache_clear()


# --- TIFF -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values_of", [(0, 1), (0, 255), (0, 7)])
def test_a_bit_may_be_stored_as_any_byte(tmp_path: Path, values_of: tuple[int, int]) -> None:
    """All but 0 is True, loaded and in place alike."""
    mask = np.random.default_rng(3).random((64, 80)) < 0.4
    path = tmp_path / "mask.ome.tiff"
    tifffile.imwrite(path, np.where(mask, values_of[1], values_of[0]).astype(np.uint8), ome=True, metadata={"axes": "YX"})
    with tifffile.TiffFile(path) as file:
        xml = file.ome_metadata
    assert xml is not None
    tifffile.tiffcomment(path, xml.replace('Type="uint8"', 'Type="bit"').encode())
    table = check(path, tmp_path / "out", mask[None, None, None])
    assert table.image("image", 0).pixels.meta.pixel_type == "bit"


@few
@given(
    data=st.data(),
    axes=st.sampled_from(["YX", "CYX", "ZYX", "ZCYX", "TCYX", "TZCYX", "TCZYX", "YXS"]),
    dtype=st.sampled_from(DTYPES),
    tiled=st.booleans(),
    compression=st.sampled_from([None, "zlib"]),
)
def test_ome_tiff(tmp_path: Path, data: st.DataObject, axes: str, dtype: str, tiled: bool, compression: str | None) -> None:
    shape = tuple(3 if axis == "S" else data.draw(st.integers(2, 40 if axis in "YX" else 3)) for axis in axes)
    array = values(shape, "uint8" if axes == "YXS" else dtype)
    options: dict[str, Any] = {"tile": (16, 16)} if tiled else {"rowsperstrip": data.draw(st.integers(1, 8))}
    # Else an image three pixels wide is taken for one of three samples.
    options["photometric"] = "rgb" if axes == "YXS" else "minisblack"
    tifffile.imwrite(tmp_path / "a.ome.tiff", array, metadata={"axes": axes}, compression=compression, **options)
    order = [axes.index(axis) for axis in "TZCYX" if axis in axes]
    if axes == "YXS":
        full = array.transpose(2, 0, 1)[None, None]
    else:
        full = np.expand_dims(array.transpose(order), tuple(place for place, axis in enumerate("TZCYX") if axis not in axes))
    check(tmp_path / "a.ome.tiff", tmp_path / "out", full)


def test_what_ome_xml_says(tmp_path: Path) -> None:
    array = values((2, 3, 20, 30), "uint16")
    metadata = {
        "axes": "CZYX",
        "Name": "cells",
        "AcquisitionDate": "2026-01-02T03:04:05",
        "PhysicalSizeX": 0.25,
        "PhysicalSizeXUnit": "µm",
        "PhysicalSizeY": 0.5,
        "PhysicalSizeYUnit": "µm",
        "PhysicalSizeZ": 2.0,
        "PhysicalSizeZUnit": "µm",
        "Channel": {
            "Name": ["DNA", "RNA"],
            "EmissionWavelength": [461.0, 590.0],
            "EmissionWavelengthUnit": ["nm", "nm"],
            "Color": [65535, -16776961],
        },
    }
    with tifffile.TiffWriter(tmp_path / "a.ome.tiff", ome=True) as writer:
        writer.write(array, metadata=metadata, subifds=1, tile=(16, 16))
        writer.write(array[:, :, ::2, ::2], subfiletype=1, tile=(16, 16))
    table = check(tmp_path / "a.ome.tiff", tmp_path / "out", array.swapaxes(0, 1)[None])
    meta = table.image("image", 0).pixels.meta
    assert meta.name == "cells"
    assert meta.physical_size == (2.0, 0.5, 0.25)
    assert meta.physical_unit == ("µm", "µm", "µm")
    assert meta.acquired is not None
    assert meta.acquired.isoformat()[:19] == "2026-01-02T03:04:05"
    assert [(c.name, c.color_rgba) for c in meta.channels] == [("DNA", 0x0000FFFF), ("RNA", 0xFF0000FF)]
    assert [c.emission_um for c in meta.channels] == pytest.approx([0.461, 0.590])
    check(tmp_path / "a.ome.tiff", tmp_path / "out2", array.swapaxes(0, 1)[None, ..., ::2, ::2], level=1)
    assert table.image("image", 0, 1).pixels.meta.physical_size == (2.0, 1.0, 0.5)


def test_several_series_are_rows(tmp_path: Path) -> None:
    first, second = values((2, 10, 12), "uint8"), values((30, 20), "int16")
    with tifffile.TiffWriter(tmp_path / "a.ome.tiff", ome=True) as writer:
        writer.write(first, metadata={"axes": "CYX"})
        writer.write(second, metadata={"axes": "YX"})
    check(tmp_path / "a.ome.tiff", tmp_path / "out", first[None, None])
    check(tmp_path / "a.ome.tiff", tmp_path / "out2", second[None, None, None], row=1)


def test_a_part_of_a_set_of_files_is_refused(tmp_path: Path) -> None:
    """Its planes may lie anywhere, and are never looked for."""
    tifffile.imwrite(tmp_path / "a.ome.tiff", values((2, 8, 8), "uint8"), metadata={"axes": "CYX"})
    with tifffile.TiffFile(tmp_path / "a.ome.tiff") as tiff:
        xml = tiff.ome_metadata
    uuid = '<UUID FileName="{}">urn:uuid:0</UUID></TiffData>'
    changed = xml.replace("</TiffData>", "") if "</TiffData>" in xml else xml
    parts = "".join(
        f'<TiffData IFD="{number}" FirstC="{number}" PlaneCount="1">' + uuid.format(name)
        for number, name in enumerate(("a.ome.tiff", "../../etc/passwd"))
    )
    changed = changed[: changed.index("<TiffData")] + parts + "</Pixels></Image></OME>"
    tifffile.imwrite(tmp_path / "a.ome.tiff", values((2, 8, 8), "uint8"), description=changed.encode(), metadata=None)
    with pytest.raises(InvalidRecord, match="spread over 2 files"):
        open_source(str(tmp_path / "a.ome.tiff"))


@pytest.mark.parametrize("size", [4, 8, 100, 1000])
def test_truncated_files(tmp_path: Path, size: int) -> None:
    tifffile.imwrite(tmp_path / "a.tif", values((2, 64, 64), "uint16"))
    np.save(tmp_path / "a.npy", values((2, 64, 64), "uint16"))
    for name in ("a.tif", "a.npy"):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises((OmeTensorError, ValueError, EOFError, OSError)):
            loaded(path, tmp_path / "out")


# --- real data --------------------------------------------------------------------------------------------------------


@pytest.fixture
def data() -> Path:
    """The folder of real images beside the project; skipped, saying so, where there is none."""
    folder = Path(__file__).resolve().parents[3] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no real images beside the project")
    return folder


def test_real_ome_zarr_is_what_parquet_holds(data: Path, tmp_path: Path) -> None:
    tables = {}
    for number, name in enumerate(
        ("chunks.ome.parquet", "planes.ome.parquet", "bytes.ome.parquet", "typed-chunks.ome-arrow", "ome.zarr")
    ):
        tables[name] = loaded(data / f"idr0062a-6001240.{name}", tmp_path / str(number))
    images = {name: table.image(None, None) for name, table in tables.items()}
    wanted = whole(images["chunks.ome.parquet"].pixels)
    assert wanted.shape == (1, 16, 2, 275, 271)
    assert wanted.any()
    for image in images.values():
        np.testing.assert_array_equal(whole(image.pixels), wanted, strict=True)
    metas = {name: image.pixels.meta for name, image in images.items()}
    # All that upstream wrote into its three Parquet files; of a plane nobody says how it is chunked.
    grid = ChunkGrid(128, 128, 1, 1, 1)
    parquet = ImageMeta(
        Extent(1, 16, 2, 275, 271),
        np.dtype(np.uint16),
        pixel_type="uint16",
        id="idr0062A-6001240",
        name="6001240",
        acquired=metas["chunks.ome.parquet"].acquired,
        physical_size=(1.0, 1.0, 1.0),
        physical_unit=("µm", "µm", "µm"),
        channels=tuple(
            Channel(f"ch-{number}", name, 0.0, 0.0, "Unknown", 0xFFFFFFFF) for number, name in enumerate(("LaminB1", "Dapi"))
        ),
        grid=grid,
    )
    assert metas["chunks.ome.parquet"] == parquet
    # Written a second later than the others, with the time as that of the acquisition.
    later = metas["bytes.ome.parquet"].acquired
    assert parquet.acquired is not None
    assert later is not None
    assert abs((later - parquet.acquired).total_seconds()) < 5
    assert metas["bytes.ome.parquet"] == replace(parquet, acquired=later)
    assert metas["planes.ome.parquet"] == replace(parquet, grid=None)
    # Upstream's writer of typed chunks keeps neither sizes nor channels (its channels_json is empty), and gives names of its own.
    assert metas["typed-chunks.ome-arrow"] == ImageMeta(
        parquet.extent, parquet.dtype, pixel_type="uint16", id="image-00000", name="image-00000", grid=grid
    )
    # The original has the true sizes and colours, and neither an identifier nor a time.
    name = "idr0062a-6001240.ome.zarr"
    assert metas["ome.zarr"] == ImageMeta(
        parquet.extent,
        parquet.dtype,
        pixel_type="uint16",
        id=name,
        name=name,
        image_type="image",
        physical_size=(0.5002025531914894, 0.3603981534640209, 0.3603981534640209),
        physical_unit=("µm", "µm", "µm"),
        channels=(
            Channel("Channel:0:0", "LaminB1", color_rgba=0x0000FFFF),
            Channel("Channel:0:1", "Dapi", color_rgba=0xFFFF00FF),
        ),
        grid=ChunkGrid(275, 271, 8, 1, 1),
    )
    for name, meta in metas.items():
        # In place, whatever can be.
        path = data / f"idr0062a-6001240.{name}"
        if not LOADER.describe(str(path)).not_in_place:
            assert in_place(path).image(None, None).pixels.meta == meta
    assert [level.shape[3:] for level in tables["ome.zarr"].levels("image", 0)] == [(275, 271), (137, 135), (68, 67)]
    np.testing.assert_array_equal(whole(in_place(data / "idr0062a-6001240.ome.zarr").image("image", 0).pixels), wanted)


def test_real_int8_keeps_its_negatives(data: Path, tmp_path: Path) -> None:
    table = loaded(data / "multi-channel-4D-series.ome.tiff", tmp_path / "out")
    found = whole(table.image("image", 0).pixels)
    assert (found.dtype, found.shape) == (np.int8, (7, 5, 3, 167, 439))
    wanted = tifffile.imread(data / "multi-channel-4D-series.ome.tiff")
    assert wanted.min() < 0
    np.testing.assert_array_equal(found, wanted.swapaxes(1, 2), strict=True)


def test_a_tiff_whose_tiles_are_not_there(tmp_path: Path) -> None:
    """It would be shown as zeros: a length that says more than there is, tiles behind the end, and tiles that are none."""
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, values((40, 48), "uint16"), tile=(16, 16))
    check(path, tmp_path / "out", values((40, 48), "uint16")[None, None, None])
    with tifffile.TiffFile(path) as tiff:
        tags = tiff.pages[0].tags
        length, offsets, counts = (
            tags["ImageLength"].valueoffset,
            tags["TileOffsets"].valueoffset,
            tags["TileByteCounts"].valueoffset,
        )
    good = path.read_bytes()
    for place, number, words in (
        (length, 587_202_569, "of the .* strips or tiles of its size"),
        (offsets, 2**30, "does not lie in the file"),
        (offsets, 0, "does not lie in the file"),
        (counts, 0, "does not lie in the file"),
    ):
        size = 4 if place != counts else 2
        path.write_bytes(good[:place] + number.to_bytes(size, "little") + good[place + size :])
        with pytest.raises(InvalidRecord, match=words):
            open_source(str(path))


def test_blocks_that_nobody_could_read(tmp_path: Path) -> None:
    path = write_zarr(tmp_path / "a.zarr", [values((6, 7), "uint8")], "yx", chunks=(1, 1))
    document = json.loads((path / "0" / "zarr.json").read_text())
    document["shape"] = [100_000, 100_000]
    (path / "0" / "zarr.json").write_text(json.dumps(document))
    with pytest.raises(InvalidRecord, match="stored in 10000000000 blocks of 1 bytes"):
        open_source(str(path))


@pytest.mark.timeout(20)
@pytest.mark.parametrize("bigtiff", [False, True])
@pytest.mark.parametrize("back_to", [0, 1, 2])
def test_a_tiff_whose_pages_go_round(tmp_path: Path, bigtiff: bool, back_to: int) -> None:
    """A page whose next one is itself, or one before it: following it never ends."""
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path, bigtiff=bigtiff) as writer:
        for number in range(3):
            writer.write(values((9, 11), "uint16") + number, metadata=None)
    with tifffile.TiffFile(path) as tiff:
        offsets = [page.offset for page in tiff.pages]
        last, form = tiff.pages[2], tiff.tiff
        link = last.offset + form.tagnosize + len(last.tags) * form.tagsize
    data = bytearray(path.read_bytes())
    assert not any(data[link : link + form.offsetsize])
    open_source(str(path)).close()
    data[link : link + form.offsetsize] = offsets[back_to].to_bytes(form.offsetsize, "little")
    path.write_bytes(data)
    with pytest.raises(InvalidRecord, match=r"leads back to where it was \(page 3\)"):
        open_source(str(path))
