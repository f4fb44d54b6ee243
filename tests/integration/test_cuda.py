"""A remote view on a CUDA device: the whole way from a file, through a server, to tensors there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.integration.images import expected_tile, random_pixels, write_image

from ome_tensor.batches import arrays_of, with_arrays
from ome_tensor.staging import pinned_each
from ome_tensor_client import Client, connect
from ome_tensor_server.testing import running_server

torch = pytest.importorskip("torch")

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

SHAPE = (2, 3, 2, 240, 270)


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    """Of a type that torch can compare on a device."""
    return random_pixels(SHAPE, np.int16)


@pytest.fixture(scope="module", params=["tcp", "mapped"])
def client(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, pixels: np.ndarray) -> Iterator[Client]:
    """Over the wire, and from memory that the server's store shares."""
    folder = tmp_path_factory.mktemp("cuda")
    path: Path = write_image(folder / "image.parquet", pixels)
    with running_server([path], store=str(folder / "store")) as server, connect(server.target, transport=request.param) as client:
        yield client


def on_host(tensor: Any) -> np.ndarray:
    """A tensor's values, once it is shown to be where it was asked for."""
    assert tensor.is_cuda
    array: np.ndarray = tensor.cpu().numpy()
    return array


@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
@pytest.mark.parametrize("prefetch", [0, 3])
def test_tiles(client: Client, pixels: np.ndarray, device: str, prefetch: int) -> None:
    """Clipped at the edges, in the order asked for, each kept until the end: no staging buffer is used again too early."""
    view = client.tensor_view("image", layout="TZCYX")
    arguments: dict[str, Any] = {"tile_size": (64, 96), "shuffle": True, "seed": 5, "mode": "numpy", "prefetch": prefetch}
    tensors = [torch.from_dlpack(tile) for tile in view.iter_dlpack(device=device, **arguments)]
    tiles = list(view.iter_tiles(tile_size=(64, 96), shuffle=True, seed=5))
    assert len(tensors) == len(tiles) == 12
    for tensor, tile in zip(tensors, tiles, strict=True):
        np.testing.assert_array_equal(on_host(tensor), expected_tile(pixels, tile), strict=True)


@pytest.mark.parametrize("contiguous", [True, False])
def test_time_points_in_another_layout(client: Client, pixels: np.ndarray, contiguous: bool) -> None:
    """Batches over t, permuted."""
    view = client.tensor_view("image", c=1, layout="TYXZ")
    tensors = list(view.iter_dlpack(batch_size=1, device="cuda", mode="numpy", contiguous=contiguous))
    found = np.concatenate([on_host(torch.from_dlpack(tensor)) for tensor in tensors])
    np.testing.assert_array_equal(found, pixels[:, :, 1].transpose(0, 2, 3, 1), strict=True)


def test_batches(client: Client, pixels: np.ndarray) -> None:
    """Training batches, from a stream that was begun on another CUDA stream than the current one."""
    view = client.tensor_view("image", t=1, layout="CZYX")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        batches = [
            (batch.origins, torch.from_dlpack(batch))
            for batch in view.iter_batches(tile_size=(48, 54), batch_size=4, shuffle=True, seed=2, device="cuda", prefetch=2)
        ]
    side.synchronize()
    assert sum(len(tensor) for _, tensor in batches) == 25
    for origins, tensor in batches:
        for (_, _, y, x), tile in zip(origins.tolist(), on_host(tensor), strict=True):
            np.testing.assert_array_equal(tile, pixels[1, :, :, y : y + 48, x : x + 54].transpose(1, 0, 2, 3), strict=True)


def test_whole_views(client: Client, pixels: np.ndarray) -> None:
    """Uploaded at once; what is done to the tensor stays on the device."""
    view = client.tensor_view("image", t=0, z=1)
    tensor = view.to_torch(device="cuda", mode="numpy")
    np.testing.assert_array_equal(on_host(tensor), pixels[0, 1], strict=True)
    tensor.zero_()
    np.testing.assert_array_equal(view.to_numpy(), pixels[0, 1], strict=True)


def test_masks_come_along(client: Client, pixels: np.ndarray) -> None:
    """Of an image set: what comes beside is on the device too."""
    images = client.dataset("image").images()
    batches = list(
        images.iter_batches(tile_size=(48, 54), batch_size=4, beside=["image"], t=0, layout="CZYX", device="cuda", prefetch=2)
    )
    assert sum(map(len, batches)) == 25
    for batch in batches:
        np.testing.assert_array_equal(on_host(batch.beside["image"]), on_host(batch.array), strict=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_on_a_device(client: Client, workers: int) -> None:
    """The same batches as on the host, in order; and in page-locked memory."""
    from ome_tensor_client.torch import TileDataset, TileLoader

    def made() -> TileDataset:
        return TileDataset(client.dataset("image").images(), tile_size=(48, 54), batch_size=4, shuffle=True, seed=3, t=0)

    wanted = list(made())
    more: dict[str, Any] = {"num_workers": workers, "multiprocessing_context": "spawn" if workers else None}
    loader = TileLoader(made(), device="cuda", **more)
    for there, here in zip(loader, wanted, strict=True):
        for key, value in here.items():
            assert there[key].is_cuda
            assert torch.equal(there[key].cpu(), value), key
    assert loader.stats().copy > 0
    for there, here in zip(TileLoader(made(), pin_memory=True, **more), wanted, strict=True):
        assert all(tensor.is_pinned() for tensor in there.values())
        assert torch.equal(there["pixels"], here["pixels"])


def test_cupy_takes_a_batch(client: Client, pixels: np.ndarray) -> None:
    cupy = pytest.importorskip("cupy")
    view = client.tensor_view("image", t=1, layout="CZYX")
    with cupy.cuda.Stream(non_blocking=True):
        for batch in view.iter_batches(tile_size=(48, 54), batch_size=4, device="cuda", prefetch=2):
            found = batch.to_cupy()
            for (_, _, y, x), tile in zip(batch.origins.tolist(), cupy.asnumpy(found), strict=True):
                np.testing.assert_array_equal(tile, pixels[1, :, :, y : y + 48, x : x + 54].transpose(1, 0, 2, 3), strict=True)


def test_batches_in_page_locked_memory(client: Client) -> None:
    """With their masks; for those who take them to the device by themselves."""
    images = client.dataset("image").images()
    arguments: dict[str, Any] = {"tile_size": (48, 54), "batch_size": 4, "beside": ["image"], "t": 0, "layout": "CZYX"}
    pinned = pinned_each(images.iter_batches(**arguments, prefetch=2), arrays_of, with_arrays)
    for there, here in zip(pinned, images.iter_batches(**arguments), strict=True):
        assert there.array.is_pinned()
        assert there.beside["image"].is_pinned()
        moved = there.to_torch().to("cuda", non_blocking=True)
        del there
        np.testing.assert_array_equal(on_host(moved), here.array, strict=True)


def test_a_read_that_is_given_up(client: Client) -> None:
    """Its buffers and its stream of tiles end with it; what was handed over stays what it is."""
    view = client.tensor_view("image", t=0, layout="CZYX")
    batches = view.iter_batches(tile_size=(48, 54), batch_size=2, device="cuda", prefetch=2)
    first = next(batches)
    wanted = next(view.iter_batches(tile_size=(48, 54), batch_size=2)).array
    batches.close()  # type: ignore[attr-defined]
    assert next(batches, None) is None
    np.testing.assert_array_equal(on_host(first.to_torch()), wanted, strict=True)


def test_a_whole_view_for_cupy(client: Client, pixels: np.ndarray) -> None:
    cupy = pytest.importorskip("cupy")
    found = client.tensor_view("image", t=0, z=1).to_cupy()
    np.testing.assert_array_equal(cupy.asnumpy(found), pixels[0, 1], strict=True)
