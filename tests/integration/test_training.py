"""Datasets for PyTorch over a real server: right pixels, every sample once, exact checkpoints."""

from __future__ import annotations

import copy
import os
import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.integration.images import random_pixels, record_of, write_image
from tests.integration.test_image_sets import CELLS, HOLES, MASKS, ROWS, write

from ome_tensor import DeviceUnavailable, InvalidArgument, InvalidSelection, TensorView
from ome_tensor.tiling import Order
from ome_tensor_client import Client, connect
from ome_tensor_client.image_set import ImageSet
from ome_tensor_client.jax import device_put_each
from ome_tensor_server.testing import RunningServer, running_server

torch = pytest.importorskip("torch")
from torch.utils.data import DataLoader  # noqa: E402

from ome_tensor_client.torch import (  # noqa: E402
    RandomWindowSampler,
    TileDataset,
    TileLoader,
    WindowDataset,
    WindowSampler,
)
from ome_tensor_client.torch.samples import convert_of  # noqa: E402

#: Cases of the exactly-once test: `make exactly-once` reads a thousand.
CASES = int(os.environ.get("OME_TENSOR_CASES", "80"))


@pytest.fixture(scope="module")
def plate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("training")
    more = {"label": pa.array([row % 3 for row in range(ROWS)]), "pixels": pa.array(range(ROWS))}
    write(folder / "plate.parquet", **more)
    write_image(folder / "field.ome.parquet", FIELD)
    with running_server([folder / "plate.parquet", folder / "field.ome.parquet"]) as server:
        yield server


FIELD = random_pixels((2, 3, 2, 70, 90), seed=5)


@pytest.fixture
def client(plate: RunningServer) -> Iterator[Client]:
    with connect(plate.target) as connected:
        yield connected


@pytest.fixture
def cells(client: Client) -> ImageSet:
    return client.dataset("plate").images("cell", metadata=["well", "area", "label"])


def numbers_of(batches: Any) -> list[int]:
    return [number for batch in batches for number in batch["tile"].tolist()]


def test_samples_are_the_pixels_with_their_masks_and_metadata(cells: ImageSet) -> None:
    dataset = TileDataset(
        cells,
        tile_size=(16, 16),
        batch_size=8,
        shuffle=True,
        seed=4,
        beside={"target": "mask"},
        metadata={"y": "label", "w": "well"},
    )
    batches = list(dataset)
    assert len(batches) == len(dataset) == -(-dataset.total // 8)
    assert sorted(numbers_of(batches)) == list(range(dataset.total))
    for batch in batches:
        assert set(batch) == {"pixels", "target", "y", "w", "image", "row", "tile", "origin", "valid"}
        assert (batch["pixels"].dtype, batch["target"].dtype) == (torch.float32, torch.uint8)
        for place, row in enumerate(batch["row"].tolist()):
            (_, _, top, left), (_, h, w) = batch["origin"][place].tolist(), batch["valid"][place].tolist()
            wanted = np.zeros((2, 16, 16), np.float32)
            wanted[:, :h, :w] = CELLS[row][0, 0, :, top : top + 16, left : left + 16]
            np.testing.assert_array_equal(batch["pixels"][place].numpy(), wanted, strict=True)
            np.testing.assert_array_equal(
                batch["target"][place, 0, :h, :w].numpy(), MASKS[row][0, 0, 0, top : top + 16, left : left + 16]
            )
            assert (batch["y"][place].item(), batch["w"][place]) == (row % 3, f"A{row % 4:02}")
            assert cells.rows[batch["image"][place]] == row


def test_single_samples_may_differ_in_size(cells: ImageSet) -> None:
    """Each in memory of its own: it is not to take a whole message to another process."""
    dataset = TileDataset(cells, tile_size=(16, 16), edge="clip", dtype="int32", transform=lambda sample: sample | {"seen": True})
    samples = list(dataset)
    assert len(samples) == len(dataset) == dataset.total
    assert len({tuple(sample["pixels"].shape) for sample in samples}) > 4
    for sample in samples:
        (_, _, top, left), (_, h, w) = sample["origin"].tolist(), sample["valid"].tolist()
        wanted = CELLS[sample["row"]][0, 0, :, top : top + h, left : left + w]
        np.testing.assert_array_equal(sample["pixels"].numpy(), wanted.astype(np.int32), strict=True)
        assert sample["pixels"].untyped_storage().nbytes() == sample["pixels"].nbytes
        assert sample["seen"] is True


def test_a_view_here_and_a_view_there_are_the_same_dataset(client: Client) -> None:
    here = TensorView(record_of(FIELD), t=1, c=1, roi=(5, 3, 80, 60))
    there = client.tensor_view("field", t=1, c=1, roi=(5, 3, 80, 60))
    arguments: dict[str, Any] = {"tile_size": (2, 32, 32), "batch_size": 3, "shuffle": True, "seed": 9, "dtype": torch.int32}
    for mine, theirs in zip(TileDataset(here, **arguments), TileDataset(there, **arguments), strict=True):
        assert mine.keys() == theirs.keys()
        for key in mine:
            assert torch.equal(mine[key], theirs[key]), key
    with pytest.raises(InvalidArgument, match="roi= is for sets of images"):
        TileDataset(there, roi=(0, 0, 8, 8), **arguments)
    with pytest.raises(InvalidArgument, match="beside= is for sets of images"):
        TileDataset(here, beside=["mask"], **arguments)


@pytest.mark.parametrize(
    "stored, wanted",
    [
        ("uint8", torch.float32),
        ("int8", torch.float32),
        ("uint16", torch.float32),
        ("int16", torch.float32),
        ("int32", torch.int32),
        ("uint32", torch.int64),
        ("float32", torch.float32),
        ("float64", torch.float64),
        ("bool", torch.bool),
    ],
)
def test_the_usual_dtype_holds_every_value(stored: str, wanted: torch.dtype) -> None:
    """And is one that torch can compute with."""
    pixels = (
        random_pixels((1, 1, 1, 16, 16), np.dtype(stored))
        if stored != "bool"
        else np.random.default_rng(0).random((1, 1, 1, 16, 16)) > 0.5
    )
    view = TensorView(record_of(pixels))
    (sample,) = TileDataset(view, tile_size=(16, 16))
    assert sample["pixels"].dtype == wanted
    np.testing.assert_array_equal(sample["pixels"].numpy().astype(pixels.dtype), pixels[0, 0], strict=True)
    (kept,) = TileDataset(view, tile_size=(16, 16), dtype=stored)
    assert kept["pixels"].dtype == getattr(torch, stored)


# --- exactly once -----------------------------------------------------------------------------------------------------


def in_turn(parts: list[Iterator[tuple[int, Any]]], block: int) -> Iterator[list[int]]:
    """The tiles of batches, as a DataLoader takes them from its workers."""
    while parts:
        for part in list(parts):
            tiles: list[int] = []
            while len(tiles) < block:
                taken, samples = next(part, (0, None))
                if samples is None:
                    parts.remove(part)
                    break
                tiles += [samples["tile"]] if isinstance(samples["tile"], int) else samples["tile"].tolist()
                assert len(tiles) == taken or taken == 1
            if tiles:
                yield tiles


@settings(max_examples=CASES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_sample_of_an_epoch_once(plate: RunningServer, data: st.DataObject) -> None:
    """Over images, tiles, edges, shuffles, ranks, workers, a checkpoint anywhere, and another number of ranks and workers after it."""
    rows = data.draw(st.lists(st.integers(0, ROWS - len(HOLES) - 1), min_size=1, max_size=6), label="images")
    size = data.draw(st.sampled_from([(16, 16), (24, 40), (7, 31)]), label="tile")
    batch_size = data.draw(st.sampled_from([None, 1, 3, 8]), label="batch_size")
    edge = data.draw(st.sampled_from(["pad", "drop"] + ["clip"] * (batch_size is None)), label="edge")
    shuffle = data.draw(st.booleans(), label="shuffle")
    epoch = data.draw(st.integers(0, 2), label="epoch")
    runs = [
        (data.draw(st.integers(1, 8), label="ranks"), max(1, data.draw(st.integers(0, 4), label="workers"))) for _ in range(2)
    ]
    with connect(plate.target) as client:
        images = client.dataset("plate").images("cell")[np.array(rows)]

        def made(rank: int, ranks: int) -> TileDataset:
            dataset = TileDataset(
                images, tile_size=size, batch_size=batch_size, edge=edge, shuffle=shuffle, seed=7, shard=(rank, ranks), prefetch=1
            )
            dataset.set_epoch(epoch)
            return dataset

        block = batch_size or 2
        whole = made(0, 1)
        seen: Counter[int] = Counter()
        states: list[Any] = []
        in_step, at = data.draw(st.booleans(), label="in step"), data.draw(st.integers(0, 12), label="checkpoint")
        for number, (ranks, workers) in enumerate(runs):
            before, states = states, []
            for rank in range(ranks):
                dataset = made(rank, ranks)
                if before:
                    dataset.load_state_dict(before)
                    assert dataset.epoch == epoch
                begun = dataset.begin(0)
                parts = [iter(dataset.read(begun, worker, workers, block)) for worker in range(workers)]
                # The second run comes to the end.
                most = 10**9 if number else at if in_step else data.draw(st.integers(0, 12), label="checkpoint")
                taken = [tiles for tiles, _ in zip(in_turn(parts, block), range(most), strict=False)]
                seen.update(chain.from_iterable(taken))
                states.append(begun.after(sum(map(len, taken))).state())
    assert seen == Counter(range(whole.total))


def test_an_epoch_is_another_order_and_the_same_on_every_rank(cells: ImageSet) -> None:
    def read(epoch: int, **more: Any) -> list[int]:
        dataset = TileDataset(cells, centred=(20, 20), batch_size=4, shuffle=True, seed=1, **more)
        dataset.set_epoch(epoch)
        return numbers_of(dataset)

    assert read(0) == read(0)
    assert len({tuple(read(epoch)) for epoch in range(4)}) == 4
    ranks = [read(2, shard=(rank, 3)) for rank in range(3)]
    assert [one for together in zip(*ranks, strict=False) for one in together] == read(2)[: 3 * min(map(len, ranks))]
    even = [read(2, shard=(rank, 3), drop_last=True) for rank in range(3)]
    assert {len(one) for one in even} == {len(cells) // 12 * 4}


# --- checkpoints ------------------------------------------------------------------------------------------------------


def dataset_of(images: ImageSet, **more: Any) -> TileDataset:
    return TileDataset(images, **{"tile_size": (16, 16), "batch_size": 8, "shuffle": True, "seed": 3} | more)


def test_a_state_is_after_the_last_batch_and_is_used_once(cells: ImageSet) -> None:
    dataset = dataset_of(cells)
    whole = numbers_of(dataset)
    read = iter(dataset)
    first = numbers_of([next(read) for _ in range(5)])
    state = dataset.state_dict()
    assert (state["taken"], state["epoch"]) == (40, 0)
    again = dataset_of(cells)
    again.load_state_dict(state)
    assert again.state_dict() == state
    assert first + numbers_of(again) == whole
    assert numbers_of(again) == whole
    # The first goes on as if nothing had been.
    assert first + numbers_of(read) == whole


def test_a_state_is_of_its_epoch(cells: ImageSet) -> None:
    dataset = dataset_of(cells)
    dataset.set_epoch(5)
    whole = numbers_of(dataset)
    read = iter(dataset)
    first = numbers_of([next(read) for _ in range(3)])
    again = dataset_of(cells)
    again.load_state_dict(dataset.state_dict())
    assert again.epoch == 5
    assert first + numbers_of(again) == whole
    again.load_state_dict(dataset.state_dict())
    again.set_epoch(6)
    assert sorted(numbers_of(again)) == list(range(again.total))


@pytest.mark.parametrize(
    "change", [{"tile_size": (16, 17)}, {"seed": 4}, {"shuffle": False}, {"edge": "drop"}, {"c": 0}, {"beside": ["mask"]}]
)
def test_a_state_of_other_samples_is_refused(cells: ImageSet, change: dict[str, Any]) -> None:
    state = dataset_of(cells).state_dict()
    dataset_of(cells, batch_size=5).load_state_dict(state)
    with pytest.raises(InvalidArgument, match="of other samples") as caught:
        dataset_of(cells, **change).load_state_dict(state)
    assert caught.value.field == "state_dict"
    with pytest.raises(InvalidArgument, match="of other samples"):
        dataset_of(cells[1:]).load_state_dict(state)


def test_a_checkpoint_costs_microseconds(cells: ImageSet) -> None:
    import time

    loader = TileLoader(dataset_of(cells))
    costs = []
    for _ in loader:
        began = time.perf_counter()
        loader.state_dict()
        costs.append(time.perf_counter() - began)
    assert sorted(costs)[len(costs) // 2] < 100e-6


@pytest.mark.parametrize("kind", ["tiles", "singles", "dataset", "windows"])
def test_two_iterations_at_a_time(cells: ImageSet, kind: str) -> None:
    """Each has all of its samples, however the other ends; and the state is that of the later one."""

    def made() -> Any:
        if kind == "windows":
            windows = WindowDataset(cells, (16, 16), origins=[(0, 0)] * 60, numbers=list(range(30)) * 2, edge="pad")
            return TileLoader(windows, batch_size=4)
        dataset = TileDataset(cells, tile_size=(16, 16), batch_size=None if kind == "singles" else 4, shuffle=True)
        return dataset if kind == "dataset" else TileLoader(dataset, batch_size=4 if kind == "singles" else None)

    def places(batches: Any) -> list[list[int]]:
        return [batch["image"].tolist() + batch["tile"].tolist() for batch in batches]

    wanted = places(made())
    assert len(wanted) > 10
    loader = made()
    for _ in range(3):
        first = iter(loader)
        begun = places([next(first)])
        second = iter(loader)
        also = places([next(second) for _ in range(3)])
        assert loader.state_dict()["taken"] == 12
        del second
        assert begun + places(first) == wanted
        assert also == wanted[:3]
        if kind != "dataset":
            # Nor does one that goes on say where the later one is.
            assert loader.state_dict()["taken"] == 12
        # And one that is thrown away before it has begun.
        third = iter(loader)
        iter(loader)
        assert places(third) == wanted


@pytest.mark.parametrize("kind", ["loader", "dataset", "windows", "sampler"])
def test_an_epoch_that_is_set_is_the_next_one(cells: ImageSet, kind: str) -> None:
    """Not that of an iteration that has begun, though nothing of it has been taken."""
    windows = WindowDataset(cells, (16, 16), edge="pad")
    made: Any = {
        "loader": lambda: TileLoader(TileDataset(cells, tile_size=(16, 16), batch_size=8, shuffle=True)),
        "dataset": lambda: TileDataset(cells, tile_size=(16, 16), batch_size=8, shuffle=True),
        "windows": lambda: TileLoader(windows, batch_size=8, sampler=RandomWindowSampler(windows, 40)),
        "sampler": lambda: RandomWindowSampler(windows, 40),
    }[kind]

    def order(found: Any) -> list[Any]:
        return [one if kind == "sampler" else one["image"].tolist() + one["origin"].flatten().tolist() for one in found]

    orders = []
    for epoch in range(2):
        whole = made()
        whole.set_epoch(epoch)
        orders.append(order(whole))
    assert orders[0] != orders[1]
    loader = made()
    for epoch in (0, 1, 0):
        loader.set_epoch(epoch)
        iteration = iter(loader)
        loader.set_epoch(1 - epoch)
        assert order(iteration) == orders[epoch]


def test_a_small_tile_keeps_no_message(cells: ImageSet) -> None:
    """Neither one that is stored as it is wanted, nor what comes beside it."""
    convert = convert_of(None, ["pixels"])
    message = np.zeros((1000, 4), np.float32)
    assert np.shares_memory(convert("pixels", message[3]).numpy(), message)
    assert not np.shares_memory(convert.alone("pixels", message[3]).numpy(), message)
    assert np.shares_memory(convert.alone("pixels", message).numpy(), message)


def test_seeds_beyond_63_bits_differ(cells: ImageSet) -> None:
    windows = WindowDataset(cells, (16, 16), edge="pad")
    drawn = {tuple(RandomWindowSampler(windows, 20, seed=seed)) for seed in (2**63 + 1, 2**63 + 2, 2**64 - 2, 2**64 - 1)}
    assert len(drawn) == 4


def test_a_dataset_from_elsewhere_is_of_the_rank_here(cells: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of whoever pickled it."""
    data = pickle.dumps(dataset_of(cells))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert pickle.loads(data).rank == (1, 3)
    assert pickle.loads(pickle.dumps(dataset_of(cells, shard=(0, 2)))).rank == (0, 2)


def test_a_reader_that_is_cancelled_begins_no_other_read(cells: ImageSet) -> None:
    reader = dataset_of(cells).reader()
    assert len(list(reader.batches(Order(), 8))) > 20
    reader.cancel()
    assert list(reader.batches(Order(), 8)) == list(reader.tiles(Order())) == []


def test_the_end_of_an_epoch_does_not_take_back_the_next(cells: ImageSet) -> None:
    """A StatefulDataLoader loads its state when the next epoch, which has been set, is about to begin."""
    loader = TileLoader(dataset_of(cells))
    middle = iter(loader)
    next(middle)
    half = loader.state_dict()
    list(middle)
    dataset = dataset_of(cells)
    dataset.load_state_dict(loader.state_dict())
    assert list(dataset) == []
    dataset.set_epoch(1)
    dataset.load_state_dict(loader.state_dict())
    assert dataset.epoch == 1
    assert sorted(numbers_of(dataset)) == list(range(dataset.total))
    dataset.set_epoch(1)
    dataset.load_state_dict(half)
    assert dataset.epoch == 0


def _stop(_: Any) -> Any:
    raise StopIteration


def test_a_transform_cannot_end_an_epoch(cells: ImageSet) -> None:
    windows = WindowDataset(cells, (16, 16), origins=[(0, 0)], edge="pad", transform=_stop)
    with pytest.raises(RuntimeError, match="transform raised StopIteration"):
        list(TileLoader(windows, batch_size=1))
    with pytest.raises(RuntimeError, match="StopIteration"):
        list(TileLoader(TileDataset(cells, tile_size=(16, 16), batch_size=4, transform=_stop)))


def test_a_view_here_does_not_travel() -> None:
    """And says so, by name."""
    dataset = TileDataset(TensorView(record_of(random_pixels((1, 1, 1, 32, 32)))), tile_size=(16, 16), batch_size=2)
    with pytest.raises(InvalidArgument, match="not forked") as caught:
        pickle.dumps(dataset)
    assert caught.value.field == "images"


@pytest.mark.parametrize("single", [False, True])
def test_a_loader_counts_what_it_has_handed_out(cells: ImageSet, single: bool) -> None:
    """Whatever has been read ahead; also of single samples, which it puts together."""
    more = {"batch_size": None} if single else {}

    def made() -> TileLoader:
        return TileLoader(dataset_of(cells, **more), batch_size=8 if single else None)

    whole = numbers_of(made())
    loader = made()
    assert len(loader) == -(-len(whole) // 8)
    read = iter(loader)
    first = numbers_of([next(read) for _ in range(6)])
    state = loader.state_dict()
    assert state["taken"] == 48
    other = made()
    other.load_state_dict(state)
    assert other.state_dict() == state
    assert first + numbers_of(other) == whole
    assert numbers_of(other) == whole
    stats = other.stats()
    assert (stats.samples, stats.batches, stats.read.tiles) == (len(whole), len(loader), len(whole))
    assert stats.read.nbytes > 0
    assert 0 < stats.waited <= stats.elapsed
    assert str(stats).startswith(f"epoch 0: {len(whole)} tiles in ")


# --- windows ----------------------------------------------------------------------------------------------------------


def window(row: int, y: int, x: int, h: int, w: int) -> np.ndarray:
    return CELLS[row][0, 0, :, y : y + h, x : x + w].astype(np.float32)


def test_windows_by_number_and_by_place_a_call_a_batch(cells: ImageSet, server_log: pytest.LogCaptureFixture) -> None:
    origins, numbers = [[1, 2], [0, 0], [3, 3], [2, 1]], [5, 0, 30, 5]
    dataset = WindowDataset(cells, (12, 10), origins=origins, numbers=numbers, metadata=["well"])
    assert len(dataset) == 4
    for place, (origin, number) in enumerate(zip(origins, numbers, strict=True)):
        row = int(cells.rows[number])
        one, same = dataset[place], dataset[number, origin[0], origin[1]]
        for sample in (one, same, dataset[place - 4]):
            np.testing.assert_array_equal(sample["pixels"].numpy(), window(row, *origin, 12, 10), strict=True)
            assert (sample["image"].item(), sample["row"].item(), sample["well"]) == (number, row, f"A{row % 4:02}")
    server_log.clear()
    for collate in (None, WindowDataset.collate):
        loader = DataLoader(dataset, batch_size=3, sampler=WindowSampler(dataset, shuffle=True), collate_fn=collate)
        assert sorted(chain.from_iterable(batch["image"].tolist() for batch in loader)) == sorted(numbers)
    assert server_log.text.count("method=ReadTiles") == 4


def test_a_batch_of_windows_is_the_message_itself(cells: ImageSet) -> None:
    dataset = WindowDataset(cells, (12, 10), dtype="uint16")
    batch = WindowDataset.collate(dataset.__getitems__([(3, 0, 0), (1, 2, 2), (3, 1, 1)]))
    assert batch["pixels"].dtype == torch.uint16
    assert not batch["pixels"].numpy().flags.owndata
    assert batch["image"].tolist() == [3, 1, 3]


def test_padded_windows_and_windows_of_planes(client: Client) -> None:
    field = client.tensor_view("field")
    dataset = WindowDataset(field, (8, 8), edge="pad", pad=7, dtype="float32")
    sample = dataset[0, -3, 86]
    wanted = np.full((2, 3, 2, 8, 8), 7, np.float32)
    wanted[..., 3:, :4] = FIELD[..., :5, 86:]
    np.testing.assert_array_equal(sample["pixels"].numpy(), wanted, strict=True)
    planes = WindowDataset(field, (8, 8))[0, 1, 2, 5, 6]
    np.testing.assert_array_equal(planes["pixels"].numpy().reshape(2, 8, 8), FIELD[1, 2, :, 5:13, 6:14])


@pytest.mark.parametrize(
    "index, error, words",
    [
        ((99, 0, 0), InvalidSelection, "there is no image 99 in a set of 38"),
        ((0, 0, 600), InvalidSelection, r"window 0 at \(y=0, x=600\)"),
        ((0, 0), InvalidSelection, "places must all be"),
        ((0, 1.5, 0), InvalidSelection, "places must be integers"),
        ("x", InvalidSelection, "an index must be a number"),
        (4, IndexError, "window 4 of 0"),
        ((-1, 0, 0), InvalidSelection, "there is no image -1"),
        ((-10_000, 0, 0), InvalidSelection, "there is no image -10000"),
    ],
)
def test_wrong_places(cells: ImageSet, index: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        WindowDataset(cells, (8, 8))[index]


def test_random_windows_are_the_same_for_any_number_of_ranks(cells: ImageSet) -> None:
    dataset = WindowDataset(cells, (20, 20), edge="pad")
    everything = list(RandomWindowSampler(dataset, 3000, seed=5))
    ranks = [list(RandomWindowSampler(dataset, 3000, seed=5, shard=(rank, 3))) for rank in range(3)]
    assert [one for together in zip(*ranks, strict=True) for one in together] == everything
    assert len(set(everything)) > 1500
    other = RandomWindowSampler(dataset, 3000, seed=5)
    other.set_epoch(1)
    assert list(other) != everything
    # Every place is as likely: images by how many they have.
    counts = Counter(image for image, _, _ in everything)
    places = [(max(1, h - 19)) * (max(1, w - 19)) for h, w in cells.shapes[:, 3:].tolist()]
    largest = max(range(len(places)), key=places.__getitem__)
    assert counts[largest] == pytest.approx(3000 * places[largest] / sum(places), rel=0.35)
    for image, y, x in everything:
        _, _, _, h, w = cells.shapes[image].tolist()
        assert 0 <= y <= h - 20 or (h < 20 and y == (h - 20) // 2)
        assert 0 <= x <= w - 20 or (w < 20 and x == (w - 20) // 2)


def test_weights_choose_images(cells: ImageSet) -> None:
    dataset = WindowDataset(cells, (20, 20))
    weights = np.zeros(len(cells))
    weights[[2, 7]] = 1, 3
    counts = Counter(image for image, _, _ in RandomWindowSampler(dataset, 4000, weights=weights))
    assert set(counts) == {2, 7}
    assert counts[7] / 4000 == pytest.approx(0.75, abs=0.05)


def test_planes_are_drawn_too(client: Client) -> None:
    dataset = WindowDataset(client.tensor_view("field"), (8, 8))
    places = list(RandomWindowSampler(dataset, 500, planes=True))
    assert {place[1:3] for place in places} == {(t, z) for t in range(2) for z in range(3)}
    batch = next(iter(TileLoader(dataset, batch_size=16, sampler=RandomWindowSampler(dataset, 500, planes=True))))
    for place, pixels in zip(batch["origin"].tolist(), batch["pixels"].numpy(), strict=True):
        t, z, y, x = place
        np.testing.assert_array_equal(pixels.reshape(2, 8, 8), FIELD[t, z, :, y : y + 8, x : x + 8])


def test_a_loader_of_windows_goes_on_where_it_was(cells: ImageSet) -> None:
    dataset = WindowDataset(cells, (16, 16), edge="pad")

    def made(shard: tuple[int, int] = (0, 1)) -> TileLoader:
        return TileLoader(dataset, batch_size=8, sampler=RandomWindowSampler(dataset, 203, seed=2, shard=shard))

    def places(batches: Any) -> list[tuple[int, ...]]:
        return [(i, *o) for batch in batches for i, o in zip(batch["image"].tolist(), batch["origin"].tolist(), strict=True)]

    loader = made()
    assert len(loader) == 26
    whole = places(loader)
    assert len(whole) == 203
    read = iter(loader)
    first = places([next(read) for _ in range(7)])
    state = loader.state_dict()
    other = made()
    other.load_state_dict(state)
    assert first + places(other) == whole
    assert places(other) == whole
    # Two ranks go on with what one began.
    rest = []
    for rank in range(2):
        part = made((rank, 2))
        part.load_state_dict([state])
        rest += places(part)
    assert sorted(first + rest) == sorted(whole)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
@pytest.mark.parametrize("where", [{"device": "cuda"}, {"pin_memory": True}])
def test_a_device_that_is_not_there(cells: ImageSet, where: dict[str, Any]) -> None:
    with pytest.raises(DeviceUnavailable, match="torch reports no CUDA") as caught:
        TileLoader(dataset_of(cells), **where)
    assert caught.value.field == next(iter(where))


def test_batches_for_jax(cells: ImageSet) -> None:
    jax = pytest.importorskip("jax")
    arguments: dict[str, Any] = {"tile_size": (16, 16), "batch_size": 8, "beside": ["mask"], "shuffle": True, "seed": 1}
    wanted = list(cells.iter_batches(**arguments))
    found = list(device_put_each(cells.iter_batches(**arguments), depth=3))
    for mine, theirs in zip(found, wanted, strict=True):
        assert isinstance(mine.array, jax.Array)
        np.testing.assert_array_equal(np.asarray(mine.array), theirs.array, strict=True)
        np.testing.assert_array_equal(np.asarray(mine.beside["mask"]), theirs.beside["mask"], strict=True)
        assert mine.rows.tolist() == theirs.rows.tolist()
    with pytest.raises(InvalidArgument, match="depth must be > 0"):
        device_put_each([], depth=0)


# --- mistakes ---------------------------------------------------------------------------------------------------------

MISTAKES: list[tuple[Callable[[ImageSet], Any], str, str]] = [
    (lambda s: TileDataset(s), "tile_size", "name a tile_size or a centred window"),
    (lambda s: TileDataset(s, tile_size=(8, 8), batch_size=0), "batch_size", "batch_size must be > 0: 0"),
    (lambda s: TileDataset(s, tile_size=(8, 8), prefetch=0), "prefetch", "prefetch must be > 0"),
    (lambda s: TileDataset(s, tile_size=(8, 8), batch_size=2, edge="clip"), "edge", "differ in shape"),
    (lambda s: TileDataset(s, tile_size=(8, 8), shuffle=True, seed=None), "seed", "every rank needs the same"),
    (lambda s: TileDataset(s, tile_size=(8, 8), shard=(2, 2)), "shard", r"not \(2, 2\)"),
    (lambda s: TileDataset(s, tile_size=(8, 8), transform=3), "transform", "must be callable"),
    (lambda s: TileDataset(s, tile_size=(8, 8), dtype="uint17"), "dtype", "not 'uint17'"),
    (lambda s: TileDataset(s, tile_size=(8, 8), dtype={"mask": "int64"}), "dtype", "no pixels 'mask', but pixels"),
    (lambda s: TileDataset(s, tile_size=(8, 8), metadata=["none"]), "metadata", "come without the column 'none'"),
    (lambda s: TileDataset(s, tile_size=(8, 8), metadata={"image": "well"}), "metadata", "a sample has 'image' already"),
    (lambda s: TileDataset(s, tile_size=(8, 8), beside="mask"), "beside", "must be a list of column names"),
    (lambda s: TileDataset(s, tile_size=(8, 8), beside={"well": "mask"}), "metadata", "both have 'well'"),
    (lambda s: TileDataset([s], tile_size=(8, 8)), "images", "not list"),
    (lambda s: TileDataset(s, tile_size=(8, 8)).set_epoch(-1), "epoch", "not -1"),
    (lambda s: TileDataset(s, tile_size=(8, 8)).load_state_dict([]), "state_dict", "the list is empty"),
    (
        lambda s: TileLoader(TileDataset(s, tile_size=(8, 8))),
        "batch_size",
        "name a batch_size for the loader, or for its dataset",
    ),
    (lambda s: TileLoader(TileDataset(s, tile_size=(8, 8), batch_size=2), batch_size=2), "batch_size", "not for both"),
    (lambda s: TileLoader(TileDataset(s, tile_size=(8, 8), batch_size=2), drop_last=True), "drop_last", "is for windows"),
    (lambda s: TileLoader(s), "dataset", "not ImageSet"),
    (lambda s: TileLoader(TileDataset(s, tile_size=(8, 8), batch_size=2), num_workers=-1), "num_workers", "cannot be made"),
    (lambda s: TileDataset(s, tile_size=(8, 8), beside=None), "beside", "must be a list"),
    (lambda s: TileDataset(s, tile_size=(8, 8), metadata=3), "metadata", "must be a list"),
    (lambda s: TileLoader(WindowDataset(s, (8, 8)), batch_size=2, sampler=[1]), "sampler", "not list"),
    (lambda s: TileLoader(WindowDataset(s, (8, 8))), "batch_size", "must be an integer"),
    (lambda s: WindowDataset(s, (8, 8), edge="clip"), "edge", "error or pad"),
    (lambda s: WindowDataset(s, (8, 8), origins=[[0, 900]]), "origins", "window 0"),
    (lambda s: RandomWindowSampler(WindowDataset(s, (8, 8)), 0), "samples", "samples must be > 0"),
    (lambda s: RandomWindowSampler(WindowDataset(s, (900, 8)), 5), "size", "no image has room"),
    (lambda s: RandomWindowSampler(WindowDataset(s, (8, 8)), 5, weights=[1]), "weights", "must be 38 numbers"),
    (
        lambda s: RandomWindowSampler(WindowDataset(s, (900, 8)), 5, weights=[1] * 38),
        "weights",
        "image 0 has weight 1 and is too small",
    ),
    (lambda s: RandomWindowSampler(WindowDataset(s, (1, 8, 8)), 5), "planes", "say planes=True"),
]


@pytest.mark.parametrize("number", range(len(MISTAKES)))
def test_mistakes_name_the_argument(cells: ImageSet, number: int) -> None:
    call, field, words = MISTAKES[number]
    with pytest.raises((InvalidArgument, InvalidSelection), match=words) as caught:
        call(cells)
    assert caught.value.field == field


def test_metadata_with_a_sample_s_own_name_need_another(client: Client) -> None:
    images = client.dataset("plate").images("cell", metadata=["pixels"])
    with pytest.raises(InvalidArgument, match="a sample has 'pixels' already"):
        TileDataset(images, tile_size=(8, 8))
    (first, *_) = TileDataset(images, tile_size=(8, 8), metadata={"number": "pixels"})
    assert first["number"].item() == first["row"]


def test_a_set_without_images(client: Client) -> None:
    nothing = client.dataset("plate").images("cell", [("well", "=", "none such")])
    dataset = TileDataset(nothing, tile_size=(8, 8), batch_size=4, shuffle=True)
    assert (len(dataset), dataset.total, list(dataset), list(TileLoader(dataset))) == (0, 0, [], [])


def test_datasets_pickle_small(cells: ImageSet) -> None:
    """To a worker goes what is to be read, and nothing that can be worked out there."""
    dataset = dataset_of(cells)
    data = pickle.dumps(dataset)
    assert len(data) < 30_000
    assert numbers_of(pickle.loads(data)) == numbers_of(dataset)
    copied = copy.deepcopy(dataset)
    assert numbers_of(copied) == numbers_of(dataset)
    # Each has an epoch of its own, and workers of the copy see the copy's.
    copied.set_epoch(3)
    assert (copied.epoch, dataset.epoch) == (3, 0)
    assert copied._shared._numbers.is_shared()
