"""What can be done with a server's datasets, for the process that answers calls: itself, or by asking its supervisor."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from ome_tensor.errors import DatasetNotFound, InvalidArgument, LimitExceeded, NotSupported
from ome_tensor.keys import check_name

from .budget import human_bytes
from .exchange import Asker
from .finding import find_sources
from .librarian import Librarian
from .loading import Loader
from .loads import kept_problems
from .readers.detect import is_address, leads_up
from .uploads import Uploads

__all__ = ["AskedOffice", "Office", "OwnOffice"]


class Office(Protocol):
    """What can be done with datasets. All methods raise the errors of :mod:`ome_tensor.errors`."""

    def load(self, name: str, patience: float) -> None:
        """Load a dataset; returns once it is ready. Raises Unavailable where that takes longer than ``patience`` seconds."""

    def cancel(self, name: str) -> bool:
        """Give up a load; whether there was one."""

    def make_level(self, name: str, column: str, row: int, level: int, patience: float) -> str:
        """Make a pyramid level that a source does not have; the path of its file. Raises Unavailable as :meth:`load` does."""

    def register(self, path: str, name: str) -> list[str]:
        """Serve what lies at a path; the names."""

    def refresh(self, name: str) -> bool:
        """Look at a source again; whether it has changed."""

    def remove(self, name: str) -> None:
        """Serve a dataset no more."""

    def check_upload(self, name: str, replaces: bool) -> None:
        """Whether an upload of that name would be taken; raises why not."""

    def check_part(self, part: str) -> None:
        """Whether a file that was received holds images that can be served; raises why not."""

    def take_upload(self, part: str, name: str, replaces: bool) -> None:
        """Keep a file that was received and checked, and serve it."""


class OwnOffice:
    """See :class:`Office`: in the process that has the librarian.

    Args:
        librarian: The librarian.
        loader: Checks uploads.
        uploads: Where uploads are kept, or ``None``.
        roots: Folders, and beginnings of addresses, below which sources may be registered.
    """

    def __init__(self, librarian: Librarian, loader: Loader, uploads: Uploads | None, roots: Sequence[str]) -> None:
        self._librarian = librarian
        self._loader = loader
        self._uploads = uploads
        self._roots = roots
        self._lock = threading.Lock()
        #: Of each name that is being changed: its lock, and how many hold it or wait for it.
        self._locks: dict[str, list[Any]] = {}

    @property
    def offices(self) -> dict[str, Callable[..., Any]]:
        """The methods by name, for workers."""
        return {name: getattr(self, name) for name in _METHODS}

    def load(self, name: str, patience: float) -> None:
        """See :class:`Office`."""
        self._librarian.load(name, patience)

    def cancel(self, name: str) -> bool:
        """See :class:`Office`."""
        return self._librarian.cancel(name)

    def make_level(self, name: str, column: str, row: int, level: int, patience: float) -> str:
        """See :class:`Office`."""
        return self._librarian.make_level(name, column, row, level, patience)

    def register(self, path: str, name: str) -> list[str]:
        """See :class:`Office`."""
        root = self._check_root(path)
        sources = find_sources([path])
        if not sources:
            raise InvalidArgument(f"there is nothing to serve in {path!r}", field="path", value=path)
        if name:
            check_name(name, "name", "dataset name")
            if len(sources) > 1 or not sources[0].named:
                raise InvalidArgument(
                    f"{path!r} is a folder of {len(sources)} sources: they cannot all be named {name!r}", field="name", value=name
                )
            sources = [replace(sources[0], name=name)]
        # What is found in a folder has to stay in it; what was named itself, below the root that allows it. The folder may be a link by now.
        if any(source.root and not Path(source.root).is_relative_to(root) for source in sources):
            raise _refusal(path)
        sources = [source if source.root else replace(source, root=root) for source in sources]
        return [entry.name for entry in self._librarian.register(sources)]

    def _check_root(self, path: str) -> str:
        """The root that a path lies below, its real path; empty for an address. What a path leads to counts, and not what it says.

        Raises:
            InvalidArgument: it lies outside every root.
        """
        refusal = _refusal(path)
        if "\0" in path or not path:
            raise refusal
        if is_address(path):
            below = (root for root in self._roots if is_address(root))
            if leads_up(path) or not any(path == root or path.startswith(root.rstrip("/") + "/") for root in below):
                raise refusal
            return ""
        real = Path(os.path.realpath(path))
        for root in self._roots:
            if not is_address(root) and real.is_relative_to(os.path.realpath(root)):
                return os.path.realpath(root)
        raise refusal

    def refresh(self, name: str) -> bool:
        """See :class:`Office`."""
        return self._librarian.refresh(name)[1]

    def remove(self, name: str) -> None:
        """See :class:`Office`."""
        # First of all: what is on its way to take its place is given up then, and does not hold this up.
        entry = self._librarian.remove(name)
        if entry.is_upload and self._uploads is not None:
            with self._changing(name), kept_problems(name):
                # Somebody may have sent another one.
                if not self._librarian.has(name):
                    self._uploads.remove(name)

    def check_upload(self, name: str, replaces: bool) -> None:
        """See :class:`Office`."""
        if self._uploads is None:
            raise NotSupported("this server takes no uploads (it was started without an uploads folder)", field="uploads")
        check_name(name, "header.name", "dataset name")
        try:
            entry = self._librarian.entry(name)
        except DatasetNotFound:
            if not replaces and self._uploads.has(name):
                raise InvalidArgument(
                    f"there is an upload {name!r} already, which is not served now; upload it with replace to take its place",
                    field="header.name",
                    value=name,
                ) from None
            return
        if not entry.is_upload:
            raise InvalidArgument(
                f"there is a dataset {name!r} already, and it is no upload; give this one another name",
                field="header.name",
                value=name,
            )
        if not replaces:
            raise InvalidArgument(
                f"there is an upload {name!r} already; upload it with replace to take its place", field="header.name", value=name
            )

    def check_part(self, part: str) -> None:
        """See :class:`Office`."""
        size, budget = self._loader.check(part), self._librarian.budget
        if size > budget:
            # A stream cannot be served in place.
            raise LimitExceeded(
                f"the upload takes {human_bytes(size)} when it is loaded, and this server keeps at most {human_bytes(budget)} in memory "
                f"(memory_limit)",
                field="memory_limit",
                value=size,
            )

    def take_upload(self, part: str, name: str, replaces: bool) -> None:
        """See :class:`Office`."""
        uploads = self._uploads
        assert uploads is not None
        with self._changing(name), kept_problems(name):
            # Somebody else's may have come in between.
            self.check_upload(name, replaces)
            with uploads.committed(Path(part), name) as path:
                if self._librarian.has(name):
                    self._librarian.refresh(name)
                else:
                    self._librarian.register([uploads.source(name, path)], is_upload=True)

    @contextmanager
    def _changing(self, name: str) -> Iterator[None]:
        """With the right to change the upload of a name."""
        with self._lock:
            lock, _ = found = self._locks.setdefault(name, [threading.Lock(), 0])
            found[1] += 1
        try:
            with lock:
                yield
        finally:
            with self._lock:
                found[1] -= 1
                if not found[1]:
                    del self._locks[name]


def _refusal(path: str) -> InvalidArgument:
    return InvalidArgument(f"{path!r} does not lie below any folder that this server may serve (roots)", field="path", value=path)


_METHODS = ("load", "cancel", "make_level", "register", "refresh", "remove", "check_upload", "check_part", "take_upload")


class AskedOffice:
    """See :class:`Office`: in a worker, whose supervisor does it.

    Args:
        asker: The way to the supervisor.
    """

    def __init__(self, asker: Asker) -> None:
        self._ask = asker.ask

    def load(self, name: str, patience: float) -> None:
        """See :class:`Office`."""
        self._ask("load", name=name, patience=patience)

    def cancel(self, name: str) -> bool:
        """See :class:`Office`."""
        return bool(self._ask("cancel", name=name))

    def make_level(self, name: str, column: str, row: int, level: int, patience: float) -> str:
        """See :class:`Office`."""
        return str(self._ask("make_level", name=name, column=column, row=row, level=level, patience=patience))

    def register(self, path: str, name: str) -> list[str]:
        """See :class:`Office`."""
        return list(self._ask("register", path=path, name=name))

    def refresh(self, name: str) -> bool:
        """See :class:`Office`."""
        return bool(self._ask("refresh", name=name))

    def remove(self, name: str) -> None:
        """See :class:`Office`."""
        self._ask("remove", name=name)

    def check_upload(self, name: str, replaces: bool) -> None:
        """See :class:`Office`."""
        self._ask("check_upload", name=name, replaces=replaces)

    def check_part(self, part: str) -> None:
        """See :class:`Office`."""
        self._ask("check_part", part=part)

    def take_upload(self, part: str, name: str, replaces: bool) -> None:
        """See :class:`Office`."""
        self._ask("take_upload", part=part, name=name, replaces=replaces)
