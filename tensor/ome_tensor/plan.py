"""A plan: selection + layout + dtype + policies, first as the caller wrote it, then fitted to an image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import InvalidArgument
from .layout import check_layout, default_layout, drops_channels, normalize_layout, shape_and_strides
from .pixel_types import check_dtype
from .selection import ChunkGrid, Extent, Index, Region, Selection, canonical_index, canonical_region, select

__all__ = ["CHANNEL_POLICIES", "CHUNK_POLICIES", "PLAN_ARGUMENTS", "SELECTION_ARGUMENTS", "Plan", "ResolvedPlan", "check_policy"]

#: TensorView's keyword arguments, apart from where its pixels come from.
SELECTION_ARGUMENTS = ("t", "z", "c", "roi", "roi3d", "roi_nd", "roi_type", "tile")
PLAN_ARGUMENTS = (*SELECTION_ARGUMENTS, "layout", "dtype", "chunk_policy", "channel_policy")

CHANNEL_POLICIES = ("error", "first")
CHUNK_POLICIES = ("auto", "combine", "keep")


def check_policy(value: object, name: str, allowed: tuple[str, ...]) -> str:
    """A policy word in lower case; raises InvalidArgument ``Unsupported <name> '<value>'`` for any other."""
    policy = str(value).strip().lower()
    if policy not in allowed:
        raise InvalidArgument(f"Unsupported {name} '{value}'. Expected one of: {', '.join(allowed)}.", field=name, value=value)
    return policy


@dataclass(frozen=True, slots=True)
class Plan:
    """What a caller asks of an image, its form checked, the image not yet known. This is what travels to a server.

    Attributes:
        t, z, c: Canonical indices (see :data:`ome_tensor.selection.Index`).
        region: Canonical region, or ``None`` for the full frame.
        layout: Letters of TZCHW, or ``None`` for the default.
        dtype: Override of the image's own dtype, or ``None``.
        channel_policy: ``error`` or ``first``: what a layout without C does with several channels.
    """

    t: Index = None
    z: Index = None
    c: Index = None
    region: Region | None = None
    layout: str | None = None
    dtype: np.dtype | None = None
    channel_policy: str = "error"

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Plan:
        """From TensorView's keyword arguments (``chunk_policy`` concerns local storage and is not part of a plan).

        Raises:
            InvalidSelection, InvalidArgument: a malformed or contradictory argument.
        """
        get = arguments.get
        t, z, c = (canonical_index(get(axis), axis) for axis in "tzc")
        dtype = get("dtype")
        return cls(
            t,
            z,
            c,
            canonical_region(
                t=t, z=z, roi=get("roi"), roi3d=get("roi3d"), roi_nd=get("roi_nd"), roi_type=get("roi_type"), tile=get("tile")
            ),
            normalize_layout(get("layout")),
            None if dtype is None else check_dtype(dtype),
            check_policy(get("channel_policy", "error"), "channel_policy", CHANNEL_POLICIES),
        )

    def resolve(self, extent: Extent, dtype: np.dtype, grid: ChunkGrid | None = None) -> ResolvedPlan:
        """Fit to an image of that extent, pixel dtype and chunk grid.

        Raises:
            InvalidSelection: an index or region outside the image.
        """
        return self.fit(select(extent, t=self.t, z=self.z, c=self.c, region=self.region, grid=grid), dtype)

    def fit(self, selection: Selection, dtype: np.dtype) -> ResolvedPlan:
        """The plan's layout, dtype and policy on a selection already fitted; ``dtype`` is the image's."""
        return ResolvedPlan(
            selection, self.layout or default_layout(selection), dtype if self.dtype is None else self.dtype, self.channel_policy
        )


@dataclass(frozen=True, slots=True)
class ResolvedPlan:
    """A plan fitted to an image: what a view shows, without a pixel read.

    Attributes:
        selection: The chosen indices and ROI, in image coordinates.
        layout: Letters of TZCHW.
        dtype: The dtype of the view's elements.
        channel_policy: ``error`` or ``first``.
    """

    selection: Selection
    layout: str
    dtype: np.dtype
    channel_policy: str = "error"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in elements, in layout order; InvalidArgument where the layout drops an axis of another size than 1."""
        return shape_and_strides(self.selection, self.layout, self.dtype.itemsize, self.channel_policy)[0]

    @property
    def strides(self) -> tuple[int, ...]:
        """Strides in bytes of the C-ordered TZCYX selection, permuted to the layout."""
        return shape_and_strides(self.selection, self.layout, self.dtype.itemsize, self.channel_policy)[1]

    @property
    def shown(self) -> Selection:
        """The selection whose pixels the view needs: only the first channel where the layout drops C under ``first``."""
        chosen = self.selection
        if not drops_channels(chosen, self.layout, self.channel_policy):
            return chosen
        return Selection(chosen.t, chosen.z, chosen.c[:1], chosen.x, chosen.y, chosen.w, chosen.h)

    @property
    def nbytes(self) -> int:
        """Bytes of the view's elements."""
        return self.shown.size * self.dtype.itemsize

    @property
    def fits(self) -> bool:
        """Whether the layout can show the selection; one that cannot may still show its tiles, of one t each for example."""
        try:
            self.check()
        except InvalidArgument:
            return False
        return True

    def check(self) -> ResolvedPlan:
        """Itself, or InvalidArgument where layout and selection do not fit."""
        check_layout(self.selection, self.layout, self.channel_policy)
        return self
