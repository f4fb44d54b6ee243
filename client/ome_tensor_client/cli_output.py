"""What commands print: tables for people, tab-separated lines for pipes, JSON for programs, a progress bar for patience."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import typer
from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from ome_tensor.listing import DatasetInfo, DatasetState, ImageInfo
from ome_tensor.record import Channel

from .cli_text import printable, say, stdout

__all__ = [
    "image_facts",
    "print_datasets",
    "print_image",
    "print_images",
    "print_rows",
    "progress_bar",
    "size_text",
]

#: A person scrolls no further; a program reads from a pipe, which gets everything.
TERMINAL_ROWS = 1000

_AXES = "tzcyx"


def size_text(nbytes: int) -> str:
    """``4.8 MB``; powers of 1000."""
    return decimal(nbytes)


def print_datasets(datasets: Sequence[DatasetInfo], *, as_json: bool) -> None:
    """The datasets of a server."""
    if as_json:
        _print_json([_dataset_facts(dataset) for dataset in datasets])
        return
    _print_table(
        ("DATASET", "STATE", "IMAGES", "ROWS", "IMAGE COLUMNS", "SIZE", "FORMAT", "SOURCE"),
        map(_dataset_row, datasets),
        right="IMAGES ROWS SIZE",
        fold="IMAGE COLUMNS,SOURCE,STATE",
    )


def _dataset_row(d: DatasetInfo) -> tuple[str, ...]:
    state = str(d.state)
    if d.state is DatasetState.LOADING:
        state = f"{state} {d.progress:.0%}"
    elif d.state is DatasetState.FAILED:
        state = f"{state}: {d.problem}"
    # How many rows hold an image is known once it is loaded.
    is_known = d.state in (DatasetState.LOADED, DatasetState.IN_PLACE)
    return (
        d.name,
        state,
        str(d.image_count) if is_known else "-",
        str(d.row_count),
        _some(d.image_columns),
        size_text(d.resident_bytes if d.state is DatasetState.LOADED else d.estimated_bytes),
        d.format,
        d.source_name,
    )


def print_rows(found: pa.Table, most: int) -> None:
    """A table's rows: all of them where nobody looks at a terminal."""
    is_terminal = stdout().isatty()
    shown = found.slice(0, most) if is_terminal else found
    rows = (
        tuple("" if value is None else str(value) for value in row.values())
        for batch in shown.to_batches(max_chunksize=1000)
        for row in batch.to_pylist()
    )
    _print_table(tuple(found.column_names), rows, fold=",".join(found.column_names[1:]))
    if shown.num_rows < found.num_rows:
        typer.echo(f"… and {found.num_rows - shown.num_rows} more rows: --where and --columns choose, --csv writes all", err=True)


def _some(names: Sequence[str], most: int = 3) -> str:
    """Names, or on a terminal a few of them."""
    left_out = len(names) - most
    if stdout().isatty() and left_out > 1:
        return f"{', '.join(names[:most])} and {left_out} more"
    return ", ".join(names)


def print_images(images: Iterator[ImageInfo], limit: int | None, *, as_json: bool) -> None:
    """The images of a dataset, each as it arrives where nobody looks at a table."""
    terminal = stdout().isatty() and not as_json
    most = limit or (TERMINAL_ROWS if terminal else None)
    chosen = itertools.islice(images, most)
    if as_json:
        # One by one: a dataset may have millions.
        start = "["
        for image in chosen:
            stdout().write(f"{start}\n  {json.dumps(image_facts(image), ensure_ascii=False)}")
            start = ","
        say("[]" if start == "[" else "\n]")
        return
    _print_table(
        ("KEY", "SHAPE (TZCYX)", "DTYPE", "SIZE", "CHANNELS", "PROBLEM"),
        (_image_row(image) for image in chosen),
        right="SIZE",
        fold="CHANNELS,PROBLEM",
    )
    if terminal and limit is None and next(images, None) is not None:
        typer.echo(f"… and more than these {most}: --limit N shows more, and a pipe gets all", err=True)


def _image_row(image: ImageInfo) -> tuple[str, ...]:
    meta = image.meta
    if meta is None:
        return image.key, "", "", "", "", image.problem
    channels = ", ".join(channel.name or f"#{i}" for i, channel in enumerate(meta.channels))
    return image.key, _shape(meta.extent), meta.dtype.name, size_text(meta.nbytes), channels, image.problem


def print_image(image: ImageInfo, *, as_json: bool) -> None:
    """All that is known of one image."""
    facts = image_facts(image)
    if as_json:
        _print_json(facts)
        return
    meta = image.meta
    rows: list[tuple[str, str]] = [("key", image.key)]
    if meta is not None:
        rows += [(name, str(facts[name])) for name in ("name", "id", "image_type", "acquired") if facts[name]]
        rows += [
            ("shape (TZCYX)", _shape(meta.extent)),
            ("dtype", meta.dtype.name + ("" if meta.pixel_type in ("", meta.dtype.name) else f" (stored as {meta.pixel_type})")),
            ("size", size_text(meta.nbytes)),
        ]
        pixel = [
            f"{axis} {size:g} {unit}".rstrip()
            for axis, size, unit in zip("zyx", meta.physical_size, meta.physical_unit, strict=True)
            if size is not None
        ]
        rows.append(("pixel size", ", ".join(pixel) or "unknown"))
        grid = meta.grid
        rows.append(("stored in", "whole planes" if grid is None else f"chunks of {grid.z} × {grid.y} × {grid.x} (ZYX)"))
        if len(image.levels) > 1:
            sizes = (f"{level.shape[3]}×{level.shape[4]}" for level in image.levels)
            rows.append(("levels", f"{', '.join(sizes)} (YX{'' if image.levels[1].is_stored else '; made when asked for'})"))
        rows += [(f"channel {i}", _channel_text(channel)) for i, channel in enumerate(meta.channels)]
    if image.problem:
        rows.append(("problem", image.problem))
    _print_facts(rows, colors={} if meta is None else {f"channel {i}": c for i, c in enumerate(meta.channels)})


def _shape(extent: Sequence[int]) -> str:
    return "×".join(map(str, extent))


def _channel_text(channel: Channel) -> str:
    words = [channel.name or channel.id or "unnamed"]
    for label, wavelength in (("excitation", channel.excitation_um), ("emission", channel.emission_um)):
        if wavelength:  # writers put 0 where they know none
            words.append(f"{label} {wavelength * 1000:g} nm")
    if channel.color_rgba is not None:
        words.append(f"#{channel.color_rgba >> 8:06X}")
    return ", ".join(words)


# -- facts for programs ----------------------------------------------------------------------------------------------------------------


def _dataset_facts(dataset: DatasetInfo) -> dict[str, Any]:
    return {
        "name": dataset.name,
        "version": dataset.version,
        "image_count": dataset.image_count,
        "row_count": dataset.row_count,
        "image_columns": list(dataset.image_columns),
        "other_columns": [{"name": name, "arrow_type": kind} for name, kind in dataset.other_columns],
        "resident_bytes": dataset.resident_bytes,
        "source_name": dataset.source_name,
        "state": str(dataset.state),
        "progress": dataset.progress if dataset.state is DatasetState.LOADING else None,
        "problem": dataset.problem or None,
        "estimated_bytes": dataset.estimated_bytes,
        "format": dataset.format or None,
    }


def image_facts(image: ImageInfo) -> dict[str, Any]:
    """One image for JSON. The keys are a promise (README): they may become more, never other ones; unknown is null."""
    facts: dict[str, Any] = {"key": image.key, "dataset": image.dataset, "column": image.column, "row": image.row}
    meta = image.meta
    facts |= {
        "name": meta.name if meta else None,
        "id": meta.id if meta else None,
        "image_type": meta.image_type if meta else None,
        "acquired": meta.acquired.isoformat() if meta and meta.acquired else None,
        "shape": list(meta.extent) if meta else None,
        "dtype": meta.dtype.name if meta else None,
        "pixel_type": meta.pixel_type if meta else None,
        "nbytes": meta.nbytes if meta else None,
        "physical_size": dict(zip("zyx", meta.physical_size, strict=True)) if meta else None,
        "physical_unit": dict(zip("zyx", (unit or None for unit in meta.physical_unit), strict=True)) if meta else None,
        "chunk_grid": {axis: getattr(meta.grid, axis) for axis in _AXES} if meta and meta.grid else None,
        "channels": [_channel_facts(channel) for channel in meta.channels] if meta else [],
        "problem": image.problem or None,
        "levels": [list(level.shape) for level in image.levels],
    }
    return facts


def _channel_facts(channel: Channel) -> dict[str, Any]:
    return {
        "id": channel.id,
        "name": channel.name,
        "excitation_um": channel.excitation_um,
        "emission_um": channel.emission_um,
        "illumination": channel.illumination,
        "color_rgba": None if channel.color_rgba is None else f"#{channel.color_rgba:08X}",
    }


def _print_json(value: Any) -> None:
    say(json.dumps(value, indent=2, ensure_ascii=False))


# -- tables ----------------------------------------------------------------------------------------------------------------------------


def _print_table(header: Sequence[str], rows: Iterable[Sequence[str]], *, right: str = "", fold: str = "") -> None:
    """A table on a terminal; elsewhere a header and lines of tab-separated fields, whole and as they come.

    Args:
        header: Names of the columns.
        rows: Their cells.
        right: Names of columns to align right.
        fold: Names of columns, between commas, that give way where a terminal is narrow, and that it is spared where they are empty.
    """
    if not stdout().isatty():
        say("\t".join(header))
        for row in rows:
            say("\t".join(map(printable, row)))
        return
    found = [tuple(map(printable, row)) for row in rows]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    needed = 0
    shown = [i for i, name in enumerate(header) if name not in fold.split(",") or any(row[i] for row in found)]
    for i in shown:
        folds = header[i] in fold.split(",")
        table.add_column(header[i], justify="right" if header[i] in right.split() else "left", overflow="fold", no_wrap=not folds)
        needed += 2 + max(len(header[i]), 0 if folds else max((cell_len(row[i]) for row in found), default=0))
    for row in found:
        table.add_row(*(Text(row[i]) for i in shown))
    # A key is there to be copied: rather than cut it, the table grows beyond the terminal, which wraps its lines.
    console = Console()
    console.width = max(console.width, needed)
    console.print(table, crop=False, soft_wrap=False)


def _print_facts(rows: Sequence[tuple[str, str]], colors: Mapping[str, Channel]) -> None:
    if not stdout().isatty():
        for name, value in rows:
            say(f"{name}\t{printable(value)}")
        return
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows:
        text = Text(printable(value))
        channel = colors.get(name)
        if channel is not None and channel.color_rgba is not None:
            text = Text.assemble(("■ ", f"#{channel.color_rgba >> 8:06x}"), text)
        table.add_row(name, text)
    Console().print(table)


# -- progress --------------------------------------------------------------------------------------------------------------------------


@contextmanager
def progress_bar(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar of bytes on stderr, gone when done; nothing where stderr is not a terminal. Gives the function to report bytes with."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda count: None
        return
    from rich import progress

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(printable(label).replace("[", r"\["), total=total)
        yield lambda count: bar.advance(task, count)
