"""A remote view on a CUDA device: the whole way from a file, through a server, to tensors there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.integration.images import expected_tile, random_pixels, write_image

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
