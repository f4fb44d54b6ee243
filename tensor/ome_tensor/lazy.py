"""LazyTensorView: a plan that reads nothing until it must, over a source that may be a record in this process or a server."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from typing import Any, Literal, Protocol

import numpy as np

from .batches import BatchArray
from .errors import InvalidArgument
from .exports import TensorExports
from .indexing import narrow
from .layout import normalize_layout
from .plan import CHANNEL_POLICIES, CHUNK_POLICIES, PLAN_ARGUMENTS, SELECTION_ARGUMENTS, ResolvedPlan, check_policy
from .selection import as_index
from .tiling import Order, Tile, Tiling
from .view import TensorView

__all__ = ["LazyTensorView", "LocalSource", "Source"]


class Unset:
    """Type of :data:`UNSET`, the mark of an argument that was not given (``None`` means "all")."""

    def __repr__(self) -> str:
        return "UNSET"


UNSET = Unset()

#: TensorView's keyword arguments that make up a plan, as the caller wrote them.
Arguments = dict[str, Any]


class Source(Protocol):
    """What stands behind a lazy view: describe a plan, read it, stream its tiles. Must pickle if its views are to."""

    def open(self, arguments: Arguments) -> TensorExports:
        """Describe the plan: a view that knows its shape and can be read in parts. Moves no pixels.

        Raises:
            InvalidSelection, InvalidArgument: malformed, or outside the image.
        """

    def collect(self, opened: TensorExports) -> TensorView:
        """The view with its pixels in reach of this process."""

    def read(self, arguments: Arguments) -> tuple[TensorExports, TensorView]:
        """``open`` and ``collect`` in one step, where nobody has been told the view's shape yet: what a server can answer in one round trip."""


class LocalSource:
    """A source in this process: the seed's ``loader`` and ``resolver`` arguments.

    Args:
        loader: Gives the OME-Arrow data; called when first needed, once a view.
        resolver: Turns the plan's arguments into a view in place of ``TensorView(loader(), **arguments)``.
    """

    def __init__(self, loader: Callable[[], Any], resolver: Callable[[Arguments], TensorView] | None = None) -> None:
        if not callable(loader):
            raise InvalidArgument(f"loader must be callable, not {loader!r}", field="loader", value=loader)
        self._loader = loader
        self._resolver = resolver

    def open(self, arguments: Arguments) -> TensorView:
        """See :meth:`Source.open`."""
        return self._resolver(dict(arguments)) if self._resolver is not None else TensorView(self._loader(), **arguments)

    def collect(self, opened: TensorExports) -> TensorView:
        """See :meth:`Source.collect`."""
        assert isinstance(opened, TensorView)
        return opened

    def read(self, arguments: Arguments) -> tuple[TensorView, TensorView]:
        """See :meth:`Source.read`."""
        opened = self.open(arguments)
        return opened, opened


class LazyTensorView(TensorExports):
    """A deferred TensorView: nothing is read, and no server asked, before its shape or its pixels are needed.

    Args:
        loader: Callable that returns OME-Arrow data.
        resolver: Callable that turns the plan's arguments into a TensorView, in place of ``loader``.
        t, z, c, roi, roi3d, roi_nd, roi_type, tile, layout, dtype, chunk_policy, channel_policy: As in :class:`TensorView`. Layout and policies
            are checked here, the rest when the plan is opened.

    Raises:
        InvalidArgument: a malformed layout or policy.
    """

    def __init__(
        self,
        *,
        loader: Callable[[], Any],
        resolver: Callable[[Arguments], TensorView] | None = None,
        t: int | slice | Sequence[int] | np.ndarray | None = None,
        z: int | slice | Sequence[int] | np.ndarray | None = None,
        c: int | slice | Sequence[int] | np.ndarray | None = None,
        roi: tuple[int, int, int, int] | None = None,
        roi3d: tuple[int, int, int, int, int, int] | None = None,
        roi_nd: tuple[int, ...] | None = None,
        roi_type: Literal["2d", "2d_timelapse", "3d", "4d"] | None = None,
        tile: tuple[int, int] | None = None,
        layout: str | None = None,
        dtype: Any = None,
        chunk_policy: Literal["auto", "combine", "keep"] = "auto",
        channel_policy: Literal["error", "first"] = "error",
    ) -> None:
        given = locals()
        self._open_on(LocalSource(loader, resolver), {name: given[name] for name in PLAN_ARGUMENTS})

    def _open_on(self, source: Source, arguments: Arguments) -> None:
        # A plan is deferred, so a list that its owner changes meanwhile must not change it.
        arguments = {name: copy(value) if isinstance(value, (list, np.ndarray)) else value for name, value in arguments.items()}
        arguments["layout"] = normalize_layout(arguments.get("layout"))
        for name, allowed in (("chunk_policy", CHUNK_POLICIES), ("channel_policy", CHANNEL_POLICIES)):
            arguments[name] = check_policy(arguments.get(name, allowed[0]), name, allowed)
        self._source = source
        self._arguments = arguments
        self._opened: TensorExports | None = None
        self._collected: TensorView | None = None
        self._lock = threading.RLock()

    @classmethod
    def of_source(cls, source: Source, arguments: Mapping[str, Any]) -> LazyTensorView:
        """A lazy view over any source; ``arguments`` are TensorView's keyword arguments."""
        view = cls.__new__(cls)
        view._open_on(source, dict(arguments))
        return view

    # -- plans ---------------------------------------------------------------------------------------------------------------------

    def select(
        self,
        *,
        t: int | slice | Sequence[int] | np.ndarray | Unset | None = UNSET,
        z: int | slice | Sequence[int] | np.ndarray | Unset | None = UNSET,
        c: int | slice | Sequence[int] | np.ndarray | Unset | None = UNSET,
        roi: tuple[int, int, int, int] | Unset | None = UNSET,
        roi3d: tuple[int, int, int, int, int, int] | Unset | None = UNSET,
        roi_nd: tuple[int, ...] | Unset | None = UNSET,
        roi_type: Literal["2d", "2d_timelapse", "3d", "4d"] | Unset | None = UNSET,
        tile: tuple[int, int] | Unset | None = UNSET,
    ) -> LazyTensorView:
        """A new lazy view with the named parts replaced; ``None`` means all again."""
        given = locals()
        return self._with({name: given[name] for name in SELECTION_ARGUMENTS if not isinstance(given[name], Unset)})

    def with_layout(self, layout: str) -> LazyTensorView:
        """A new lazy view in another layout. Raises InvalidArgument for a malformed one."""
        return self._with({"layout": layout})

    def _with(self, changes: Mapping[str, Any]) -> LazyTensorView:
        return type(self).of_source(self._source, self._arguments | dict(changes))

    def __getitem__(self, key: Any) -> LazyTensorView:
        """A narrower lazy view by NumPy basic indexing on this view's axes; asks for the shape, reads no pixels.

        Raises:
            InvalidSelection: ``newaxis``, masks, lists, or a step other than 1 on Y or X.
            IndexError: out of range, or too many indices.
        """
        resolved = self._resolve().check()
        s, layout = narrow(resolved.shown, resolved.layout, key)
        return self._with(
            {"t": as_index(s.t), "z": as_index(s.z), "c": as_index(s.c), "roi": s.roi, "layout": layout}
            | dict.fromkeys(("roi3d", "roi_nd", "roi_type", "tile"))
        )

    # -- state ---------------------------------------------------------------------------------------------------------------------

    @property
    def layout(self) -> str:
        """Axis letters of TZCHW; asks the source only where the plan names none."""
        return self._arguments["layout"] or super().layout

    @property
    def device(self) -> str:
        """Where the view's memory is: ``cpu``, also before it is collected."""
        return "cpu"

    def collect(self) -> TensorView:
        """The view with its pixels in reach: a record is opened, a server's pixels are fetched. Once; safe to call from many threads."""
        if self._collected is None:
            with self._lock:
                if self._collected is None:
                    if self._opened is None:
                        self._opened, self._collected = self._source.read(dict(self._arguments))
                    else:
                        # What has been said of the view, its shape, must be of the same version as its pixels.
                        self._collected = self._source.collect(self._opened)
        return self._collected

    def _open(self) -> TensorExports:
        if self._opened is None:
            with self._lock:
                if self._opened is None:
                    self._opened = self._source.open(dict(self._arguments))
        return self._opened

    def __getstate__(self) -> dict[str, Any]:
        # A plan travels to a worker process; what it has read stays here.
        return {"source": self._source, "arguments": self._arguments}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self._open_on(state["source"], state["arguments"])

    def __repr__(self) -> str:
        # Only what was asked for: policies at their defaults say nothing.
        defaults = {"chunk_policy": CHUNK_POLICIES[0], "channel_policy": CHANNEL_POLICIES[0]}
        given = {name: value for name, value in self._arguments.items() if value is not None and name not in defaults}
        given |= {name: self._arguments[name] for name, usual in defaults.items() if self._arguments[name] != usual}
        return f"LazyTensorView({', '.join(f'{name}={value!r}' for name, value in given.items())})"

    # -- primitives ----------------------------------------------------------------------------------------------------------------

    def _resolve(self) -> ResolvedPlan:
        return self._open()._resolve()

    def _array(self) -> np.ndarray:
        return self.collect()._array()

    def _read_into(self, out: np.ndarray) -> None:
        (self._collected or self._open())._read_into(out)

    def _values(self) -> np.ndarray:
        return self._open()._values()

    def _tiles(
        self, tiling: Tiling, order: Order, *, contiguous: bool, prefetch: int, arrow: bool
    ) -> Iterator[tuple[Tile, np.ndarray]]:
        # Flat stored values cannot be cut from collected pixels: only the source knows the blocks.
        source = self._open() if arrow or self._collected is None else self._collected
        return source._tiles(tiling, order, contiguous=contiguous, prefetch=prefetch, arrow=arrow)

    def _batches(self, tiling: Tiling, order: Order, size: int, *, contiguous: bool, prefetch: int) -> Iterator[BatchArray]:
        source = self._open() if self._collected is None else self._collected
        return source._batches(tiling, order, size, contiguous=contiguous, prefetch=prefetch)
