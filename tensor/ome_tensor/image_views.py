"""One plan for many images: images that are alike get one view."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from .errors import InvalidArgument
from .layout import AXES
from .plan import Plan, ResolvedPlan
from .selection import ChunkGrid, Extent, Selection

__all__ = ["resolve_views"]


def resolve_views(
    plan: Plan,
    extents: np.ndarray,
    dtypes: Sequence[str],
    key: Callable[[int], str],
    grid: Callable[[int], ChunkGrid | None] | None = None,
) -> tuple[list[ResolvedPlan], np.ndarray]:
    """The views that a plan gives of many images, all in one layout and of one dtype.

    Args:
        plan: What is wanted of each.
        extents: (n, 5) sizes in elements, TZCYX; n at least 1.
        dtypes: NumPy name of each one's dtype.
        key: An image's key by its number, for errors.
        grid: An image's chunk grid by its number, where the plan selects a block of it.

    Returns:
        The views, that of the first image first, and for each image which of them is its own.

    Raises:
        InvalidSelection, InvalidArgument: the plan does not fit an image, or nothing is said of a dtype and images differ in theirs.
    """
    if plan.dtype is None:
        for image, name in enumerate(dtypes):
            if name != dtypes[0]:
                raise InvalidArgument(
                    f"{key(image)} is {name}, and {key(0)} {dtypes[0]}: a read of many images has one dtype; name the one wanted",
                    field="view.dtype",
                    value=name,
                )
    names = sorted(set(dtypes))
    number = {name: place for place, name in enumerate(names)}
    codes = np.array([[number[name]] for name in dtypes], np.int64)
    what = np.concatenate([extents, codes], axis=1)
    if plan.region is not None and plan.region.kind == "tile" and grid is not None:
        # Then it depends on how each one's pixels are stored, too.
        grids = [grid(image) for image in range(len(what))]
        what = np.concatenate([what, [tuple(one) if one else (0, 0, 0, 0, 0) for one in grids]], axis=1)
    first, of = _alike(what)
    images = first.tolist()
    framed: dict[tuple[str | None, tuple[int, ...]], ResolvedPlan] = {}

    def resolve(one: Plan, image: int) -> ResolvedPlan:
        values = what[image].tolist()
        if one.region is not None:
            return fit(one, image, values)
        # Of images that differ only in y and x, so do the views: tables of single cells have thousands of sizes.
        t, z, c, y, x, code = values
        like = framed.get((one.layout, (t, z, c, code)))
        if like is None:
            like = framed[one.layout, (t, z, c, code)] = fit(one, image, values)
        s = like.selection
        return ResolvedPlan(Selection(s.t, s.z, s.c, 0, 0, x, y), like.layout, like.dtype, like.channel_policy)

    def fit(one: Plan, image: int, values: list[int]) -> ResolvedPlan:
        own = ChunkGrid(*values[6:]) if len(values) > 6 and all(values[6:]) else None
        try:
            return one.resolve(Extent(*values[:5]), np.dtype(dtypes[image]), own)
        except InvalidArgument as error:
            if len(what) == 1:
                raise
            raise type(error)(f"{key(image)}: {error.message}", field=error.field, value=error.value) from None

    views = [resolve(plan, image) for image in images]
    if len({view.layout for view in views}) > 1:
        # Their defaults differ.
        views = [resolve(replace(plan, layout=AXES), image) for image in images]
    return views, of


def _alike(what: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of the distinct rows of an array the first of each, in order of appearance; and for each row which of them it is like."""
    codes = np.zeros(len(what), np.int64)
    if len(what) == 1:
        # Most reads are of one image, and small ones are to be quick.
        return codes, codes
    for column in what.T:
        values, place = np.unique(column, return_inverse=True)
        if len(values) > 1:
            # Column by column, so that the codes stay small.
            codes = np.unique(codes * len(values) + place.reshape(-1), return_inverse=True)[1].reshape(-1)
    _, first = np.unique(codes, return_index=True)
    order = np.argsort(first)
    ranks = np.empty(len(order), np.int64)
    ranks[order] = np.arange(len(order))
    return first[order], ranks[codes]
