"""One way to make a view, whichever implementation makes it: what lets a test run unchanged on all of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import ome_arrow.tensor as upstream
import pytest
from tests.conformance.images import DAMAGED, IMAGES, Image

import ome_tensor

Use = Callable[[Any], Any]


def image(name: str) -> Image:
    """A sound or a damaged image of the fixed set."""
    return IMAGES[name] if name in IMAGES else DAMAGED[name]


def read(view: Any) -> np.ndarray:
    """Use everything that a view can be wrong about: its description first, then its pixels."""
    assert view.shape is not None
    return view.to_numpy()


class Implementation:
    """Makes views of the fixed images."""

    name = "local"

    def view(self, image_name: str, **selection: Any) -> Any:
        """A view of an image."""
        return ome_tensor.TensorView(image(image_name).record, **selection)

    def refuses(self, words: str, image_name: str, *, use: Use = read, **selection: Any) -> Exception:
        """Assert that making or using such a view fails with a ValueError whose message has these words.

        Ours must also be one of our own errors, and what is lazy or remote must fail exactly as the local view does.
        """
        with pytest.raises(ValueError, match=re.escape(words) if words else None) as caught:
            use(self.view(image_name, **selection))
        if self.name != "upstream":
            assert isinstance(caught.value, ome_tensor.OmeTensorError), repr(caught.value)
        if self.name in ("lazy", "remote", "mapped"):
            here = Implementation().refuses(words, image_name, use=use, **selection)
            assert (type(caught.value), str(caught.value)) == (type(here), str(here))
        return caught.value


class Upstream(Implementation):
    """The oracle: ``ome-arrow`` itself."""

    name = "upstream"

    def view(self, image_name: str, **selection: Any) -> Any:
        """A view of an image."""
        return upstream.TensorView(image(image_name).record, **selection)


class Lazy(Implementation):
    """A lazy view over a loader."""

    name = "lazy"

    def view(self, image_name: str, **selection: Any) -> Any:
        """A view of an image."""
        return ome_tensor.LazyTensorView(loader=lambda: image(image_name).record, **selection)


class Remote(Implementation):
    """A lazy view through a real server; sound and damaged images are served by two of them."""

    name = "remote"

    def __init__(self, client_of: Callable[[str], Any]) -> None:
        self._client_of = client_of

    def view(self, image_name: str, **selection: Any) -> Any:
        """A view of an image."""
        return self._client_of("images" if image_name in IMAGES else "damaged").tensor_view(image_name, **selection)


class Mapped(Remote):
    """A lazy view of a server's dataset that the client maps: the server is asked where it is, and for nothing else."""

    name = "mapped"


def as_numpy(dlpack: Any) -> np.ndarray:
    """What a DLPack consumer gets; a copy, because some consumers and producers differ in who keeps what alive."""
    return np.array(np.from_dlpack(dlpack), copy=True)
