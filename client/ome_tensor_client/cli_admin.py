"""Commands that change what a server serves: ``put``, ``register``, ``refresh``, ``load``, ``cancel``, ``rm``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ome_tensor.errors import InvalidArgument

from .cli_arguments import DatasetName, Seconds, Target
from .cli_connect import reach

__all__ = ["add_commands"]

#: Endings that a dataset's name leaves out.
_SUFFIXES = (".parquet", ".arrow", ".arrows", ".feather", ".npy", ".ome")


def _dataset_name(path: Path) -> str:
    name, shorter = path.name, True
    while shorter:
        shorter = False
        for suffix in _SUFFIXES:
            if name.lower().endswith(suffix) and len(name) > len(suffix):
                name, shorter = name[: -len(suffix)], True
    return name


def put(
    target: Target,
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Parquet, Arrow or .npy files.", show_default=False)],
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name of the dataset; for one file.", show_default="the file's")
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Take the place of an upload of that name.")] = False,
    timeout: Seconds = 60,
) -> None:
    """Upload datasets to a server, which keeps them."""
    from .cli_output import progress_bar, size_text
    from .cli_text import printable, say

    if name is not None and len(files) > 1:
        raise InvalidArgument(f"--name is for one file, not for {len(files)}", field="name", value=name)
    with reach(target, timeout=timeout) as client:
        for file in files:
            path = Path(file)
            size = path.stat().st_size if path.is_file() else 0
            sent = 0
            with progress_bar(path.name, size) as advance:

                def progress(now: int, _: int, advance=advance) -> None:  # type: ignore[no-untyped-def]
                    nonlocal sent
                    advance(now - sent)
                    sent = now

                info = client.upload(name or _dataset_name(path), path, replace=replace, progress=progress)
            say(f"{printable(info.name)}: {info.row_count} row{'s' * (info.row_count != 1)}, {size_text(sent)} sent")


def register(
    target: Target,
    path: Annotated[str, typer.Argument(help="File, folder or address, as the server sees it.", show_default=False)],
    name: Annotated[
        str, typer.Option(metavar="NAME", help="Name of the dataset; for one source.", show_default="the source's")
    ] = "",
    timeout: Seconds = 60,
) -> None:
    """Have a server serve a file, a folder or an address of its own."""
    from .cli_output import print_datasets

    with reach(target, timeout=timeout) as client:
        print_datasets(client.admin.register(path, name), as_json=False)


def refresh(target: Target, dataset: DatasetName, timeout: Seconds = 60) -> None:
    """Have a server look at a dataset's source again."""
    from .cli_text import printable, say

    with reach(target, timeout=timeout) as client:
        info, changed = client.admin.refresh(dataset)
    version = f" (version {info.version})" if info.version else ""
    say(f"{printable(dataset)}: {'changed' if changed else 'unchanged'}{version}")


def load(target: Target, dataset: DatasetName, timeout: Seconds = 60) -> None:
    """Have a server load a dataset now, and wait for it."""
    from ome_tensor.listing import DatasetInfo, DatasetState

    from .cli_output import progress_bar, size_text
    from .cli_text import printable, say

    with reach(target, timeout=timeout) as client:
        total = client.dataset(dataset).estimated_bytes
        done = 0
        with progress_bar("loading", total) as advance:

            def show(info: DatasetInfo) -> None:
                nonlocal done
                if info.state is DatasetState.LOADING:
                    now = int(info.progress * total)
                    advance(now - done)
                    done = now

            info = client.admin.load(dataset, show)
    if info.state is DatasetState.IN_PLACE:
        say(f"{printable(dataset)}: served in place, since it is larger than the server's memory limit")
    else:
        say(f"{printable(dataset)}: {info.state}, {size_text(info.resident_bytes)}")


def cancel(target: Target, dataset: DatasetName, timeout: Seconds = 60) -> None:
    """Have a server give up loading a dataset."""
    from .cli_text import printable, say

    with reach(target, timeout=timeout) as client:
        cancelled = client.admin.cancel_load(dataset)
    say(f"{printable(dataset)}: {'cancelled' if cancelled else 'was not being loaded'}")


def remove(target: Target, dataset: DatasetName, timeout: Seconds = 60) -> None:
    """Have a server serve a dataset no more. Its source stays; an upload is deleted."""
    from .cli_text import printable, say

    with reach(target, timeout=timeout) as client:
        client.admin.remove(dataset)
    say(f"{printable(dataset)}: removed")


def add_commands(app: typer.Typer) -> None:
    """Add them to the command line."""
    for name, command in (
        ("put", put),
        ("register", register),
        ("refresh", refresh),
        ("load", load),
        ("cancel", cancel),
        ("rm", remove),
    ):
        app.command(name)(command)
