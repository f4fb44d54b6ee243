"""Hypothesis strategies for plans and iterations: mostly sound, sometimes not, so that refusals are compared too.

What upstream is known to get wrong is kept out: booleans as indices and fractions as bounds, which have tests of their own, and
``channel_policy="first"`` over no channel at all, where its shape and its pixels contradict each other.
"""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from tests.conformance.images import Image

Plan = dict[str, Any]


def bounded_slices(size: int) -> st.SearchStrategy[slice]:
    """Slices that start and stop around an axis, some of them empty, some backwards."""
    bound = st.none() | st.integers(-size - 2, size + 2)
    return st.builds(slice, bound, bound, st.none() | st.sampled_from([1, 1, 2, 3, -1, -2]))


def indices(size: int) -> st.SearchStrategy[Any]:
    """What may be written for t, z or c."""
    inside = st.integers(-size, size - 1)
    return st.one_of(
        st.none(),
        inside,
        inside,
        bounded_slices(size),
        st.lists(inside, min_size=1, max_size=4),
        st.lists(inside, max_size=3).map(tuple),
        st.sampled_from([range(size), range(0, size, 2), size, -size - 1, [0, size]]),
    )


def spans(size: int) -> st.SearchStrategy[tuple[int, int]]:
    """Start and positive length inside an axis."""
    return st.integers(0, size - 1).flatmap(lambda start: st.tuples(st.just(start), st.integers(1, size - start)))


@st.composite
def regions(draw: st.DrawFn, image: Image) -> Plan:
    """None, one, or now and then two of roi, roi3d, roi_nd and tile."""
    nt, nz, _, ny, nx = image.pixels.shape
    x, w = draw(spans(nx))
    y, h = draw(spans(ny))
    z, d = draw(spans(nz))
    t, n = draw(spans(nt))
    anything = st.integers(-2, max(nx, ny) + 2)
    forms: dict[str, Plan] = {
        "none": {},
        "roi": {"roi": (x, y, w, h)},
        "roi3d": {"roi3d": (x, y, z, w, h, d)},
        "2d": {"roi_nd": (y, x, y + h, x + w)},
        "2d_timelapse": {"roi_nd": (t, y, x, t + n, y + h, x + w), "roi_type": "2d_timelapse"},
        "3d": {"roi_nd": (z, y, x, z + d, y + h, x + w), "roi_type": "3d"},
        "4d": {"roi_nd": (t, z, y, x, t + n, z + d, y + h, x + w)},
        "tile": {"tile": (draw(st.integers(0, 3)), draw(st.integers(0, 3)))},
        "any roi": {"roi": tuple(draw(anything) for _ in range(4))},
        "any roi3d": {"roi3d": tuple(draw(anything) for _ in range(6))},
        "any roi_nd": {
            "roi_nd": tuple(draw(st.lists(anything, min_size=3, max_size=9))),
            "roi_type": draw(st.sampled_from([None, "2d", "2d_timelapse", "3d", "4d", "5d"])),
        },
    }
    chosen = dict(forms[draw(st.sampled_from(list(forms)))])
    if draw(st.integers(0, 9)) == 0:
        chosen |= forms[draw(st.sampled_from(list(forms)))]
    return chosen


@st.composite
def layouts(draw: st.DrawFn, plan: Plan) -> str | None:
    """Any permutation, mostly of axes that the plan cannot drop, in either spelling."""
    if draw(st.integers(0, 3)) == 0:
        return None
    droppable = [axis for axis in "TZC" if isinstance(plan.get(axis.lower()), int)]
    dropped = set(draw(st.lists(st.sampled_from(droppable), unique=True))) if droppable else set()
    if draw(st.integers(0, 9)) == 0:
        dropped |= set(draw(st.lists(st.sampled_from("TZCYX"), max_size=3)))
    letters = draw(st.permutations([axis for axis in "TZCYX" if axis not in dropped]))
    text = "".join({"Y": draw(st.sampled_from("YH")), "X": draw(st.sampled_from("XW"))}.get(letter, letter) for letter in letters)
    return text.lower() if draw(st.booleans()) else text


@st.composite
def plans(draw: st.DrawFn, image: Image) -> Plan:
    """Keyword arguments of a view."""
    sizes = dict(zip("tzc", image.pixels.shape[:3], strict=True))
    plan: Plan = draw(regions(image))
    # Bounds in t or z exclude an index there; leave the contradiction as the exception that it is.
    bound = {"3d": "z", "2d_timelapse": "t"}.get(plan.get("roi_type") or "", "z" if "roi3d" in plan else "")
    bound = "tz" if len(plan.get("roi_nd", ())) == 8 else bound
    for axis, size in sizes.items():
        if axis not in bound or draw(st.integers(0, 9)) == 0:
            plan[axis] = draw(indices(size))
    plan["dtype"] = draw(st.sampled_from([None, None, "uint8", "int16", "int64", "float32", "float64"]))
    plan["layout"] = draw(layouts(plan))
    chosen = plan.get("c")
    no_channel = isinstance(chosen, slice | list | tuple | range) and len(_selected(chosen, sizes["c"])) == 0
    plan["channel_policy"] = "error" if no_channel else draw(st.sampled_from(["error", "first"]))
    return plan


def _selected(index: Any, size: int) -> Any:
    return range(size)[index] if isinstance(index, slice) else index


@st.composite
def iterations(draw: st.DrawFn, image: Image) -> tuple[str, Plan]:
    """A method and its keyword arguments."""
    ny, nx = image.pixels.shape[-2:]
    tile = (draw(st.integers(2, ny + 2)), draw(st.integers(2, nx + 2)))
    how: Plan = {"shuffle": draw(st.booleans()), "seed": draw(st.integers(0, 2**64 - 1)), "contiguous": draw(st.booleans())}
    kind = draw(st.sampled_from(["batches", "tiles", "tiles_3d"]))
    if kind == "batches":
        return "iter_dlpack", {**how, "mode": "numpy", "batch_size": draw(st.none() | st.integers(1, 4))}
    if kind == "tiles":
        return "iter_dlpack", {**how, "mode": "numpy", "tile_size": tile}
    return "iter_tiles_3d", {**how, "tile_size": (draw(st.integers(1, 5)), *tile)}
