"""``ome-tensor get``: pixels of a view into a file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_arguments import Key, Level, Seconds, Target, parse_index, parse_numbers
from .cli_connect import reach

if TYPE_CHECKING:
    import numpy as np

    from ome_tensor.lazy import LazyTensorView

    from .files import Blocks

__all__ = ["get"]

#: Seconds to find a server that may not be there; a person waits.

#: Seconds without progress after which a read under way is given up: a server may be restarting, and what arrived is worth a wait.
_RESUME_FOR = 10.0

#: Aim of a block read at once: a few messages, so that the bar moves and the assembled copy stays small.
_BLOCK_BYTES = 4 << 20


def get(
    target: Target,
    key: Key,
    output: Annotated[
        str,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="FILE.npy, FILE.tif (OME-TIFF) or FILE.png: channels in their colours, several z as their maximum.",
            show_default=False,
        ),
    ],
    t: Annotated[
        str | None, typer.Option(metavar="INDEX", help="Time points: 3, -1, 0:4, ::2 or 0,2,5.", show_default="all")
    ] = None,
    z: Annotated[str | None, typer.Option(metavar="INDEX", help="Focal planes.", show_default="all")] = None,
    c: Annotated[str | None, typer.Option(metavar="INDEX", help="Channels.", show_default="all")] = None,
    roi: Annotated[str | None, typer.Option(metavar="X,Y,W,H", help="A rectangle, in pixels.", show_default="the frame")] = None,
    roi3d: Annotated[
        str | None, typer.Option(metavar="X,Y,Z,W,H,D", help="A box, in pixels and planes.", show_default=False)
    ] = None,
    tile: Annotated[
        str | None, typer.Option(metavar="TY,TX", help="One cell of the stored chunk grid.", show_default=False)
    ] = None,
    layout: Annotated[
        str | None, typer.Option(metavar="AXES", help="Letters of TZCYX.", show_default="TZCYX, or CYX for one t and z")
    ] = None,
    dtype: Annotated[str | None, typer.Option(metavar="DTYPE", help="Convert to it.", show_default="as stored")] = None,
    level: Level = 0,
    timeout: Seconds = 60,
) -> None:
    """Read pixels of an image into a file. It appears whole or not at all."""
    # Everything that can be wrong without a server is said before one is asked.
    from . import files

    path = files.check_output(output)
    suffix = path.suffix.lower()
    if suffix == ".png" and layout is not None:
        from ome_tensor.errors import InvalidArgument

        raise InvalidArgument(
            "--layout means nothing to a .png: leave it out, or write .npy or .tif", field="layout", value=layout
        )
    arguments: dict[str, Any] = {
        "t": parse_index(t, "t"),
        "z": parse_index(z, "z"),
        "c": parse_index(c, "c"),
        "roi": parse_numbers(roi, "x,y,w,h", "roi"),
        "roi3d": parse_numbers(roi3d, "x,y,z,w,h,d", "roi3d"),
        "tile": parse_numbers(tile, "ty,tx", "tile"),
        "layout": layout,
        "dtype": dtype,
    }
    from ome_tensor.plan import Plan

    from .cli_output import progress_bar, size_text
    from .cli_text import printable
    from .signals import unwinding

    wanted = Plan.of(arguments)
    with reach(target, timeout=timeout) as client:
        image = client.image(key, level=level)
        meta = image.meta
        assert meta is not None  # a view of a damaged record is refused by the server
        plan = wanted.resolve(meta.extent, meta.dtype, meta.grid).check()
    if suffix == ".png":
        files.check_png(plan)
    elif suffix != ".npy":
        files.check_tif(plan)
    with (
        # Ended by a signal, it leaves no half of a file behind.
        unwinding(),
        reach(target, timeout=timeout, retry_for=_RESUME_FOR) as client,
        progress_bar("reading", plan.nbytes) as advance,
    ):
        view = client.tensor_view(image.key, level=level, **arguments | {"layout": "TZCYX"})
        blocks = read_blocks(view)
        if suffix == ".npy":
            files.write_npy(path, plan, blocks, advance)
        elif suffix == ".png":
            files.write_png(path, plan, meta, blocks, advance)
        else:
            files.write_tif(path, plan, meta, blocks, advance, name=meta.name or image.key)
    if suffix == ".png":
        if len(plan.shown.z) > 1:
            typer.echo(f"maximum of {len(plan.shown.z)} z (choose one with --z)", err=True)
        what = f"{plan.shown.w}×{plan.shown.h} pixels"
    else:
        axes = plan.layout.translate(str.maketrans("HW", "YX"))
        what = f"{plan.dtype.name} {'×'.join(map(str, plan.shape))} ({axes})"
    # The file is what was asked for: where nobody listens, saying so is not missed.
    typer.echo(f"wrote {printable(output)}: {what}, {size_text(path.stat().st_size)}")


def read_blocks(view: LazyTensorView) -> Blocks:
    """Stream a view in pieces of a few MiB, in order, the next already on its way.

    Args:
        view: In TZCYX.

    Returns:
        Where in the view each piece belongs, and the piece. Nothing for an empty view.
    """
    nt, nz, nc, h, w = view.shape
    row = nc * w * view.dtype.itemsize
    if not nt * nz * h * row:
        return
    # Whole planes with all their channels where they are small, else strips of rows.
    rows = min(h, max(1, _BLOCK_BYTES // row))
    planes = min(nz, max(1, _BLOCK_BYTES // (h * row))) if rows == h else 1
    counts = (nt, -(-nz // planes), -(-h // rows))
    for piece in view.iter_tiles(tile_size=(planes, rows, w), prefetch=2):
        # A tile's number counts along t, z and y: its origin could not tell duplicates apart (`--z 3,3`).
        rest, y = divmod(piece.number, counts[2])
        t, z = divmod(rest, counts[1])
        yield _place(piece.array, t, z * planes, y * rows), piece.array


def _place(block: np.ndarray, t: int, z: int, y: int) -> tuple[slice, ...]:
    return slice(t, t + 1), slice(z, z + block.shape[1]), slice(None), slice(y, y + block.shape[3]), slice(None)
