"""LazyTensorView: what is deferred, what is cached, how plans are changed, and that plans travel to other processes."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import ome_arrow.tensor as upstream
import pyarrow as pa
import pytest
from tests.conformance.images import IMAGES
from tests.conformance.implementations import Implementation, as_numpy, read

import ome_tensor

PIXELS = IMAGES["chunks"].pixels

MODULES = pytest.mark.parametrize("module", [upstream, ome_tensor], ids=["upstream", "ours"])


class CountingLoader:
    """A loader that knows how often it was called, and takes its time."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.calls = 0
        self._seconds = seconds
        self._lock = threading.Lock()

    def __call__(self) -> pa.StructArray:
        with self._lock:
            self.calls += 1
        threading.Event().wait(self._seconds)
        return IMAGES["chunks"].record


def load_chunks() -> pa.StructArray:
    """A loader that pickles: a function of a module."""
    return IMAGES["chunks"].record


@MODULES
def test_nothing_is_read_before_collect(module: Any) -> None:
    """Making and changing a plan, and asking for its device, load nothing."""
    loader = CountingLoader()
    view = module.LazyTensorView(loader=loader, t=0, roi=(0, 0, 4, 4), layout="CYX")
    assert view.select(z=1).with_layout("YXC").device == view.device == "cpu"
    assert module.LazyTensorView(loader=loader, layout="TZCHW").layout == "TZCHW"
    assert loader.calls == 0


@MODULES
def test_collect_is_cached(module: Any) -> None:
    """One load, one view, however it is used."""
    loader = CountingLoader()
    view = module.LazyTensorView(loader=loader, t=0, z=1)
    collected = view.collect()
    assert isinstance(collected, module.TensorView)
    assert view.collect() is collected
    assert view.shape == collected.shape == (2, 13, 17)
    np.testing.assert_array_equal(view.to_numpy(), PIXELS[0, 1])
    assert len(list(view.iter_dlpack(tile_size=(5, 6), mode="numpy"))) == 9
    assert loader.calls == 1


@MODULES
def test_collect_is_thread_safe(module: Any) -> None:
    """Many threads, one load."""
    loader = CountingLoader(seconds=0.05)
    view = module.LazyTensorView(loader=loader)
    with ThreadPoolExecutor(8) as pool:
        collected = list(pool.map(lambda _: view.collect(), range(8)))
    assert all(one is collected[0] for one in collected)
    assert loader.calls == 1


def test_everything_is_thread_safe(our_view: Implementation) -> None:
    """One view, read by many threads at once."""
    view = our_view.view("chunks", t=[2, 0])
    barrier = threading.Barrier(8)

    def use(number: int) -> np.ndarray:
        barrier.wait()
        if number % 2:
            return np.concatenate([as_numpy(batch) for batch in view.iter_dlpack(batch_size=1, mode="numpy", prefetch=1)])
        return view.to_numpy()

    with ThreadPoolExecutor(8) as pool:
        for array in pool.map(use, range(8)):
            np.testing.assert_array_equal(array, PIXELS[[2, 0]])


def test_collect_gives_the_view(our_lazy_view: Implementation) -> None:
    """What is collected is a TensorView of the same plan, once."""
    view = our_lazy_view.view("chunks", t=1, z=[3, 0], tile=(1, 1), layout="XYZC", dtype="int32")
    collected = view.collect()
    assert isinstance(collected, ome_tensor.TensorView)
    assert collected is view.collect()
    for name in ("shape", "strides", "dtype", "layout", "device"):
        assert getattr(collected, name) == getattr(view, name), name
    np.testing.assert_array_equal(collected.to_numpy(), view.to_numpy())
    np.testing.assert_array_equal(collected.to_numpy(), PIXELS[1, [3, 0], :, 5:10, 6:12].transpose(3, 2, 0, 1))


@pytest.mark.parametrize("layout, normal", [("tzcyx", "TZCHW"), (" yXc", "HWC"), ("HWC", "HWC")])
def test_layout_is_normalised(our_lazy_view: Implementation, layout: str, normal: str) -> None:
    """A lazy view answers with the letters that the collected one has; upstream gives back what was typed."""
    view = our_lazy_view.view("chunks", layout=layout, **({} if "T" in normal else {"t": 0, "z": 0}))
    assert view.layout == normal
    assert view.collect().layout == normal
    assert view.layout == normal


SELECTS = [
    ({}, {"t": 1}, {"t": 1}),
    ({"t": 0, "roi": (1, 2, 5, 6)}, {"z": [3, 1]}, {"t": 0, "z": [3, 1], "roi": (1, 2, 5, 6)}),
    ({"t": 0, "z": 2}, {"t": None}, {"z": 2}),
    ({"t": 0, "roi": (1, 2, 5, 6)}, {"roi": None, "tile": (1, 1)}, {"t": 0, "tile": (1, 1)}),
    ({"c": 1, "tile": (0, 1)}, {"tile": (2, 0)}, {"c": 1, "tile": (2, 0)}),
    ({"t": 0}, {"roi3d": (1, 2, 1, 5, 6, 2)}, {"t": 0, "roi3d": (1, 2, 1, 5, 6, 2)}),
    ({"c": 0}, {"roi_nd": (0, 1, 2, 2, 5, 6), "roi_type": "3d"}, {"c": 0, "roi_nd": (0, 1, 2, 2, 5, 6), "roi_type": "3d"}),
    (
        {"t": 0, "z": 0, "layout": "HW", "channel_policy": "first", "dtype": np.float32},
        {"c": 1},
        {"t": 0, "z": 0, "c": 1, "layout": "HW", "channel_policy": "first", "dtype": np.float32},
    ),
]


@MODULES
@pytest.mark.parametrize("first, then, together", SELECTS, ids=str)
def test_select(module: Any, first: dict[str, Any], then: dict[str, Any], together: dict[str, Any]) -> None:
    """``select`` replaces only the named parts; the view that it is called on stays as it was."""
    view = module.LazyTensorView(loader=load_chunks, **first)
    expected = module.TensorView(load_chunks(), **together)
    selected = view.select(**then)
    assert (selected.shape, selected.layout, selected.dtype) == (expected.shape, expected.layout, expected.dtype)
    np.testing.assert_array_equal(selected.to_numpy(), expected.to_numpy())
    np.testing.assert_array_equal(view.to_numpy(), module.TensorView(load_chunks(), **first).to_numpy())


@pytest.mark.parametrize("first, then, together", SELECTS, ids=str)
def test_select_lazily(
    our_lazy_view: Implementation, first: dict[str, Any], then: dict[str, Any], together: dict[str, Any]
) -> None:
    """The same over the wire, also when the view was read before."""
    view = our_lazy_view.view("chunks", **first)
    assert view.to_numpy().size > 0
    expected = Implementation().view("chunks", **together)
    selected = view.select(**then)
    assert (selected.shape, selected.strides, selected.layout) == (expected.shape, expected.strides, expected.layout)
    np.testing.assert_array_equal(selected.to_numpy(), expected.to_numpy())


def test_select_keeps_conflicts(our_lazy_view: Implementation) -> None:
    """A part that was not named is still there, and may contradict the new one."""
    view = our_lazy_view.view("chunks", roi=(0, 0, 2, 2))
    with pytest.raises(ome_tensor.OmeTensorError, match=r"Provide either roi or tile, not both\."):
        read(view.select(tile=(0, 0)))
    with pytest.raises(ome_tensor.OmeTensorError, match="t index 3 out of range"):
        read(view.select(t=3))


def test_select_takes_no_other_names(our_lazy_view: Implementation) -> None:
    """Layout has its own method; a typo is a TypeError, not a plan that ignores it."""
    with pytest.raises(TypeError):
        our_lazy_view.view("chunks").select(layout="YX")


@MODULES
def test_resolver(module: Any) -> None:
    """A resolver gets the whole plan and takes the loader's place."""
    seen: list[dict[str, Any]] = []

    def resolver(plan: dict[str, Any]) -> Any:
        seen.append(plan)
        return module.TensorView(load_chunks(), **plan)

    loader = CountingLoader()
    view = module.LazyTensorView(loader=loader, resolver=resolver, t=1).select(z=2).with_layout("CHW")
    np.testing.assert_array_equal(view.to_numpy(), PIXELS[1, 2])
    assert view.shape == (2, 13, 17)
    assert loader.calls == 0
    assert [plan["t"] for plan in seen] == [1]
    assert (seen[0]["z"], seen[0]["layout"], seen[0]["roi"], seen[0]["channel_policy"]) == (2, "CHW", None, "error")
    assert set(seen[0]) == set("tzc") | {
        "roi", "roi3d", "roi_nd", "roi_type", "tile", "layout", "dtype", "chunk_policy", "channel_policy",
    }  # fmt: skip


@MODULES
def test_failed_load_is_not_cached(module: Any) -> None:
    """A loader that failed may be tried again."""
    answers: list[Callable[[], Any]] = [lambda: 1 / 0, load_chunks]
    view = module.LazyTensorView(loader=lambda: answers.pop(0)(), t=0, z=0)
    with pytest.raises(ZeroDivisionError):
        view.collect()
    np.testing.assert_array_equal(view.to_numpy(), PIXELS[0, 0])


def test_bad_selection_waits_for_the_image(our_lazy_view: Implementation) -> None:
    """Only the image can tell whether an index is in range: making the plan costs nothing and fails at nothing."""
    view = our_lazy_view.view("chunks", t=99)
    with pytest.raises(ome_tensor.OmeTensorError, match="t index 99 out of range"):
        view.collect()
    with pytest.raises(ome_tensor.OmeTensorError, match="t index 99 out of range"):
        view.iter_dlpack(mode="numpy")


def pickled(view: Any) -> Any:
    """There and back."""
    return pickle.loads(pickle.dumps(view))


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
@pytest.mark.parametrize("where", ["loader", "tcp", "mapped"])
def test_lazy_views_pickle(request: pytest.FixtureRequest, where: str, used: bool) -> None:
    """A plan travels to a worker process, before or after it was read here; upstream's holds a lock and cannot."""
    plan = {"t": [2, 0], "z": 1, "tile": (1, 1), "layout": "YXTC", "dtype": np.dtype("float32")}
    if where == "loader":
        view = ome_tensor.LazyTensorView(loader=load_chunks, **plan)
    else:
        view = request.getfixturevalue("client_of")(where, "images").tensor_view("chunks", **plan)
    if used:
        assert view.to_numpy().shape == (5, 6, 2, 2)
    travelled = pickled(view)
    assert isinstance(travelled, ome_tensor.LazyTensorView)
    assert (travelled.layout, travelled.dtype) == ("HWTC", np.float32)
    np.testing.assert_array_equal(travelled.to_numpy(), PIXELS[[2, 0], 1, :, 5:10, 6:12].transpose(2, 3, 0, 1))
    assert len(pickle.dumps(view)) < 5000


def test_errors_pickle(our_view: Implementation) -> None:
    """An error raised in a worker process arrives as it was raised."""
    error = our_view.refuses("t index 99 out of range", "chunks", t=99)
    travelled = pickled(error)
    assert (type(travelled), str(travelled)) == (type(error), str(error))


@pytest.mark.parametrize(
    "plan",
    [{}, {"z": [1, 0], "t": slice(1, 3)}, {"z": np.array([2, 0])}, {"roi": np.array([0, 0, 2, 2]), "dtype": np.float32}],
    ids=repr,
)
def test_lazy_views_show_themselves(our_lazy_view: Implementation, plan: dict[str, Any]) -> None:
    """``repr`` works for whatever a plan may hold."""
    shown = repr(our_lazy_view.view("chunks", **plan))
    assert all(f"{name}=" in shown for name in plan), shown
