"""Tables of many images: chosen on the server, read in one stream."""

from __future__ import annotations

import itertools
import pickle
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.integration.images import random_pixels, record_of
from tests.integration.proxy import Proxy
from tests.integration.relay import relay

from ome_tensor import (
    BrokenStream,
    DatasetChanged,
    ImageNotFound,
    InvalidArgument,
    InvalidRecord,
    InvalidSelection,
    LimitExceeded,
)
from ome_tensor_client import Client, connect
from ome_tensor_proto.v1 import tensor_service_pb2 as pb
from ome_tensor_server.testing import RunningServer, running_server

#: Rows that hold no image.
HOLES = (3, 17)
ROWS = 40


def make_cells() -> list[np.ndarray | None]:
    sizes = np.random.default_rng(0).integers(20, 60, (ROWS, 2))
    return [
        None if row in HOLES else random_pixels((1, 1, 2, int(y), int(x)), seed=row) for row, (y, x) in enumerate(sizes.tolist())
    ]


CELLS = make_cells()
MASKS = [None if cell is None else random_pixels((1, 1, 1, *cell.shape[3:]), np.uint8, seed=99) for cell in CELLS]


def write(path: Path, **columns: Any) -> Path:
    cells = [None if cell is None else record_of(cell, f"cell {row}") for row, cell in enumerate(CELLS)]
    masks = [None if mask is None else record_of(mask) | {"image_type": "label"} for mask in MASKS]
    other = pa.array([record_of(random_pixels((1, 1, 2, 8, 8), np.float32, seed=row)) for row in range(ROWS)])
    table = {
        "cell": pa.array(cells),
        "mask": pa.array(masks),
        "odd": other,
        "well": pa.array([f"A{row % 4:02}" for row in range(ROWS)]).dictionary_encode(),
        "area": pa.array([None if row == 5 else row * 1.5 for row in range(ROWS)]),
    }
    pq.write_table(pa.table(table | columns), path, row_group_size=16)
    return path


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with running_server([write(tmp_path_factory.mktemp("plate") / "plate.ome.parquet")]) as server:
        yield server


@pytest.fixture(scope="module")
def client(served: RunningServer) -> Iterator[Client]:
    with connect(served.target) as connected:
        yield connected


def centred(image: np.ndarray, size: int) -> np.ndarray:
    """The window in the middle of a (C, H, W) image, padded."""
    h, w = image.shape[1:]
    top, left = (h - size) // 2, (w - size) // 2
    wide = np.pad(image, ((0, 0), (size, size), (size, size)))
    return wide[:, top + size : top + 2 * size, left + size : left + 2 * size]


def test_what_a_table_holds(client: Client) -> None:
    plate = client.dataset("plate")
    assert plate.columns == ("cell", "mask", "odd", "well", "area")
    assert (len(plate), plate.row_count, plate.image_count) == (ROWS, ROWS, 3 * ROWS - 2 * len(HOLES))
    found = plate.metadata(["area", "well"], [("well", "=", "A01"), ("area", "<", 20)])
    assert found.to_pydict() == {"ome_tensor.row": [1, 9, 13], "area": [1.5, 13.5, 19.5], "well": ["A01"] * 3}
    assert plate.metadata().column_names == ["ome_tensor.row", "well", "area"]
    assert plate.metadata().num_rows == ROWS
    listed = list(plate.list("mask", [("area", ">", 50)], page_size=2))
    assert [image.row for image in listed] == [row for row in range(ROWS) if row * 1.5 > 50]
    assert {image.meta.image_type for image in listed if image.meta} == {"label"}
    assert [image.row for image in client.images("plate", filters=[("well", "=", "A00"), ("area", "<=", 6)])] == [
        0,
        0,
        0,
        4,
        4,
        4,
    ]


def test_choosing_images(client: Client) -> None:
    plate = client.dataset("plate")
    everything = plate.images("cell")
    assert everything.rows.tolist() == [row for row in range(ROWS) if row not in HOLES]
    assert [tuple(shape) for shape in everything.shapes.tolist()] == [cell.shape for cell in CELLS if cell is not None]
    chosen = plate.images("cell", [[("well", "in", ["A01", "A03"]), ("area", ">=", 30)], [("area", "=", 0)]], metadata=["area"])
    rows = [row for row in range(ROWS) if row not in HOLES and (row == 0 or (row % 4 in (1, 3) and row >= 20))]
    assert chosen.rows.tolist() == rows
    assert chosen.metadata.to_pydict() == {"area": [row * 1.5 for row in rows]}
    np.testing.assert_array_equal(chosen[2].to_numpy(), CELLS[rows[2]][0, 0])
    part = chosen[1:4]
    assert (part.rows.tolist(), part.metadata.num_rows) == (rows[1:4], 3)
    # An array of one number is a list of one.
    assert [chosen[np.array(numbers)].rows.tolist() for numbers in ([2], [3, 0])] == [[rows[2]], [rows[3], rows[0]]]
    np.testing.assert_array_equal(chosen[np.int64(2)].to_numpy(), CELLS[rows[2]][0, 0])
    assert len(plate.images("cell", [("well", "=", "none such")])) == 0
    assert list(plate.images("cell", [("well", "=", "none such")]).iter_tiles()) == []


def test_every_image_as_it_is(client: Client) -> None:
    cells = client.dataset("plate").images("cell")
    tiles = list(cells.iter_tiles())
    assert [tile.row for tile in tiles] == cells.rows.tolist()
    for number, tile in enumerate(tiles):
        assert (tile.number, tile.position, tile.image) == (number, number, number)
        np.testing.assert_array_equal(tile.array, CELLS[tile.row][0, 0], strict=True)


@pytest.mark.parametrize("edge", ["clip", "pad", "drop"])
def test_tiles_of_all_images_shuffled_and_shared_out(client: Client, edge: Any) -> None:
    cells = client.dataset("plate").images("cell")
    wanted = []
    for row in cells.rows.tolist():
        height, width = CELLS[row].shape[3:]
        places = [(y, x) for y in range(0, height, 16) for x in range(0, width, 16)]
        wanted += [(row, y, x) for y, x in places if edge != "drop" or (y + 16 <= height and x + 16 <= width)]
    order = list(range(len(wanted)))
    random.Random(11).shuffle(order)
    seen = {}
    for index in range(3):
        options = {"tile_size": (16, 16), "edge": edge, "shuffle": True, "seed": 11, "shard": (index, 3), "prefetch": 2 * index}
        tiles = list(cells.iter_tiles(**options, layout="CHW", pad=7))
        assert [tile.number for tile in tiles] == order[index::3]
        for tile in tiles:
            row, y, x = wanted[tile.number]
            assert (tile.row, *tile.origin[2:]) == (row, y, x)
            block = CELLS[row][0, 0, :, y : y + 16, x : x + 16]
            assert tile.valid == (1, *block.shape[1:])
            if edge == "pad":
                block = np.pad(block, ((0, 0), (0, 16 - block.shape[1]), (0, 16 - block.shape[2])), constant_values=7)
            np.testing.assert_array_equal(tile.array, block, strict=True)
            seen[tile.number] = tile
        later = list(cells.iter_tiles(**options, start=5))
        assert [tile.number for tile in later] == order[index::3][5:]
    assert len(seen) == len(wanted)


def test_centred_windows_with_their_masks(client: Client) -> None:
    cells = client.dataset("plate").images("cell")
    seen = []
    for batch in cells.iter_batches(centred=(40, 40), batch_size=7, shuffle=True, seed=4, beside=["mask"], layout="CHW"):
        assert batch.array.shape[1:] == (2, 40, 40)
        assert batch.beside["mask"].shape[1:] == (1, 40, 40)
        assert batch.beside["mask"].dtype == np.uint8
        for place, row in enumerate(batch.rows.tolist()):
            np.testing.assert_array_equal(batch.array[place], centred(CELLS[row][0, 0], 40))
            np.testing.assert_array_equal(batch.beside["mask"][place], centred(MASKS[row][0, 0], 40))
        assert cells.rows[batch.images].tolist() == batch.rows.tolist()
        seen += batch.rows.tolist()
    assert sorted(seen) == cells.rows.tolist()
    large = [row for row in cells.rows.tolist() if min(CELLS[row].shape[3:]) >= 40]
    dropped = list(cells.iter_batches(centred=(40, 40), batch_size=100, edge="drop"))
    assert np.concatenate([batch.rows for batch in dropped]).tolist() == large
    for tile in cells.iter_tiles(beside=["mask"], c=0, layout="CHW"):
        np.testing.assert_array_equal(tile.array, CELLS[tile.row][0, 0, :1])
        np.testing.assert_array_equal(tile.beside["mask"], MASKS[tile.row][0, 0])


def test_listed_windows_of_listed_images(client: Client) -> None:
    cells = client.dataset("plate").images("cell")
    images, origins = [4, 0, 4, 30], [(3, 5), (0, 0), (-4, -2), (10, 1)]
    (batch,) = cells.iter_windows(images, origins, (12, 10), 10, edge="pad", layout="CHW")
    for place, (image, (y, x)) in enumerate(zip(images, origins, strict=True)):
        wide = np.pad(CELLS[cells.rows[image]][0, 0], ((0, 0), (20, 20), (20, 20)))
        np.testing.assert_array_equal(batch.array[place], wide[:, y + 20 : y + 32, x + 20 : x + 30])
    assert batch.images.tolist() == images
    with pytest.raises(InvalidSelection, match="window 2 at"):
        list(cells.iter_windows(images, origins, (12, 10), 10))


def test_a_cut_stream_goes_on_where_it_was(served: RunningServer, client: Client) -> None:
    cells = client.dataset("plate").images("cell")
    wanted = [(tile.number, tile.array) for tile in cells.iter_tiles(tile_size=(8, 8), shuffle=True, seed=1)]
    with Proxy(served.target, [150_000, 120_000]) as proxy, connect(proxy.target, message_bytes=65_536) as other:
        same = other.dataset("plate").images("cell")
        found = [(tile.number, tile.array) for tile in same.iter_tiles(tile_size=(8, 8), shuffle=True, seed=1)]
    assert proxy.connections > 1
    assert [number for number, _ in found] == [number for number, _ in wanted]
    for (_, one), (_, other_one) in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one, other_one)


@pytest.mark.parametrize("compression", ["auto", "zstd"])
def test_compressed(served: RunningServer, compression: str) -> None:
    with connect(served.target, compression=compression) as client:
        cells = client.dataset("plate").images("cell")
        for tile in cells.iter_tiles(tile_size=(16, 16), beside=["mask"], layout="CHW"):
            _, _, y, x = tile.origin
            np.testing.assert_array_equal(tile.array, CELLS[tile.row][0, 0, :, y : y + 16, x : x + 16])
            np.testing.assert_array_equal(tile.beside["mask"], MASKS[tile.row][0, 0, :, y : y + 16, x : x + 16])


def test_a_server_that_does_not_send_what_is_to_come_beside(served: RunningServer) -> None:
    def without(messages: list[bytes]) -> list[bytes]:
        first = pb.ReadTilesResponse.FromString(messages[0])
        first.header.ClearField("beside")
        return [first.SerializeToString(), *messages[1:]]

    with relay(served.target, {"ReadTiles": without}) as target, connect(target, retry_for=0) as client:
        cells = client.dataset("plate").images("cell")
        with pytest.raises(BrokenStream, match=r"nothing beside the tiles where \['mask'\] was asked for"):
            next(cells.iter_tiles(beside=["mask"]))


def test_images_of_which_the_view_shows_nothing(tmp_path: Path) -> None:
    """They have empty tiles, as each has alone, and those of the others come all the same."""
    pixels = [random_pixels((1, depth, 1, 6, 7), seed=depth) for depth in (4, 1, 3)]
    pq.write_table(pa.table({"image": pa.array([record_of(one) for one in pixels])}), tmp_path / "t.parquet")
    with running_server([tmp_path / "t.parquet"]) as server, connect(server.target) as client:
        images = client.dataset("t").images()
        for size, chosen in itertools.product((None, (4, 4)), (slice(2, 4), slice(9, 9))):
            tiles = list(images.iter_tiles(tile_size=size, z=chosen))
            alone = [
                (row, tile)
                for row in range(3)
                for tile in client.tensor_view(f"t/{row}", z=chosen, layout="TZCHW").iter_tiles(tile_size=size or (6, 7))
            ]
            assert [tile.number for tile in tiles] == list(range(len(alone)))
            for tile, (row, own) in zip(tiles, alone, strict=True):
                assert (tile.row, tile.origin, tile.valid) == (row, own.origin, own.valid)
                np.testing.assert_array_equal(tile.array, own.array, strict=True)
        batches = list(images.iter_batches(tile_size=(3, 7), z=slice(9, 9), batch_size=4))
        assert [batch.array.shape for batch in batches] == [(4, 1, 0, 1, 3, 7), (2, 1, 0, 1, 3, 7)]
        assert np.concatenate([batch.rows for batch in batches]).tolist() == [0, 0, 1, 1, 2, 2]
        with pytest.raises(InvalidSelection, match="nothing comes beside"):
            list(images.iter_tiles(z=slice(9, 9), beside=["image"]))


def test_what_cannot_be_read_together(client: Client) -> None:
    plate = client.dataset("plate")
    cells = plate.images("cell")
    with pytest.raises(ImageNotFound, match="3 image columns"):
        plate.images()
    with pytest.raises(ImageNotFound, match="no image column 'none'"):
        plate.images("none")
    with pytest.raises(InvalidArgument, match="no column 'none' to filter by; there are: well, area"):
        plate.images("cell", [("none", "=", 1)])
    with pytest.raises(InvalidArgument, match="no other column 'cell'"):
        plate.metadata(["cell"])
    with pytest.raises(InvalidArgument, match="no image column 'none' to come beside"):
        list(cells.iter_tiles(beside=["none"]))
    with pytest.raises(InvalidSelection, match=r"plate/odd/0 is of shape .* which it is to come beside"):
        list(cells.iter_tiles(beside=["odd"]))
    with pytest.raises(InvalidSelection, match=r"plate/cell/\d+: roi is out of bounds"):
        list(cells.iter_tiles(roi=(0, 0, 40, 40)))
    with pytest.raises(InvalidArgument, match="tiles of one shape"):
        cells.iter_batches(tile_size=(16, 16), batch_size=4, edge="clip")  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="not both"):
        cells.iter_tiles(tile_size=(4, 4), centred=(4, 4))
    with pytest.raises(InvalidArgument, match="one image's chunk grid"):
        cells.iter_tiles(tile=(0, 0))
    with pytest.raises(TypeError, match="colour"):
        cells.iter_tiles(colour=1)
    with pytest.raises(LimitExceeded, match="too many for tiles"):
        list(cells.iter_batches(centred=(2000, 2000), batch_size=8))


def test_images_of_several_dtypes_and_damaged_ones(tmp_path: Path) -> None:
    good = [record_of(random_pixels((1, 1, 1, 6, 7), np.uint16, seed=row)) for row in range(4)]
    float_one = record_of(random_pixels((1, 1, 1, 6, 7), np.float32))
    cut = record_of(random_pixels((1, 1, 1, 6, 7), np.uint16))
    cut["chunks"][0]["pixel_bytes"] = cut["chunks"][0]["pixel_bytes"][:-2]
    wrong = record_of(random_pixels((1, 1, 1, 6, 7), np.uint16))
    wrong["pixels_meta"]["size_x"] = -1
    table = {
        "mixed": [good[0], float_one, good[1], good[2]],
        "cut": [good[0], cut, good[1], good[2]],
        "bad": [good[0], wrong, wrong, good[1]],
    }
    pq.write_table(pa.table({name: pa.array(records) for name, records in table.items()}), tmp_path / "t.parquet")
    with running_server([tmp_path / "t.parquet"]) as server, connect(server.target) as client:
        t = client.dataset("t")
        with pytest.raises(InvalidArgument, match="t/mixed/1 is float32, and t/mixed/0 uint16"):
            list(t.images("mixed").iter_tiles())
        assert [tile.array.dtype.name for tile in t.images("mixed").iter_tiles(dtype="float64")] == ["float64"] * 4
        begun = t.images("cut").iter_tiles(tile_size=(3, 7))
        assert [next(begun).row for _ in range(2)] == [0, 0]
        with pytest.raises(InvalidRecord, match="t/cut/1: chunk"):
            next(begun)
        with pytest.raises(InvalidRecord, match=r"t/bad/1: x size must be positive.*; 2 images are damaged"):
            t.images("bad")
        assert t.images("bad", on_problem="skip").rows.tolist() == [0, 3]


def test_a_dataset_that_is_replaced_meanwhile(tmp_path: Path) -> None:
    path = write(tmp_path / "plate.ome.parquet")
    with running_server([path]) as server, connect(server.target) as client:
        cells = pickle.loads(pickle.dumps(client.dataset("plate").images("cell")))
        assert next(iter(cells.iter_tiles())).row == 0
        write(tmp_path / "new", area=pa.array(range(ROWS)))
        (tmp_path / "new").replace(path)
        client.admin.refresh("plate")
        with pytest.raises(DatasetChanged):
            list(cells.iter_tiles())
        assert len(client.dataset("plate").images("cell", [("area", "<", 3)])) == 3


def test_levels_of_many_images(tmp_path: Path) -> None:
    pixels = [random_pixels((1, 1, 1, 300 + row, 400), seed=row) for row in range(3)]
    pq.write_table(pa.table({"image": pa.array([record_of(one) for one in pixels])}), tmp_path / "t.parquet")
    with running_server([tmp_path / "t.parquet"]) as server, connect(server.target) as client:
        half = client.dataset("t").images(level=1)
        assert half.shapes[:, 3:].tolist() == [[150, 200], [151, 200], [151, 200]]
        for tile in half.iter_tiles(layout="HW"):
            whole = np.pad(pixels[tile.row][0, 0, 0], ((0, tile.row % 2), (0, 0)), mode="edge").astype(np.int64)
            mean = np.rint((whole[::2, ::2] + whole[1::2, ::2] + whole[::2, 1::2] + whole[1::2, 1::2]) / 4)
            np.testing.assert_array_equal(tile.array, mean.astype(np.uint16), strict=True)
        np.testing.assert_array_equal(half[1].to_numpy(), next(iter(half[1:].iter_tiles())).array)
        with pytest.raises(InvalidArgument, match=r"t/image/0 has levels 0 to 1, not 2"):
            client.dataset("t").images(level=2)
        with pytest.raises(InvalidArgument, match="level must be a number"):
            client.tensor_view("t", level=-1)


def test_a_real_table(tmp_path: Path) -> None:
    path = Path(__file__).resolve().parents[3] / "shared" / "data" / "jump-BR00117006.ome.parquet"
    if not path.exists():
        pytest.skip("no real images beside the project")
    with running_server([path]) as server, connect(server.target) as client:
        table = client.dataset("jump-BR00117006")
        assert (len(table), len(table.image_columns)) == (3, 8)
        read = 0
        for column in table.image_columns:
            if column.endswith("_COMP"):
                # Composites whose planes hold three values a pixel: what their record says of them is not so.
                with pytest.raises(InvalidRecord, match=f"{column}/0: plane .*: pixels length"):
                    list(table.images(column).iter_tiles())
                continue
            for tile in table.images(column).iter_tiles():
                one = client.tensor_view(f"jump-BR00117006/{column}/{tile.row}").to_numpy()
                np.testing.assert_array_equal(tile.array, one, strict=True)
                read += bool(one.any())
        assert read == 15
        assert table.metadata(["Metadata_ImageNumber"]).num_rows == 3
