"""Pyramid levels that a server makes of images without a pyramid: one ``.npy`` file each, in the store or in this process's memory.

Whoever reads one has it open with a shared lock (``flock``), and whoever wants its memory takes it away only with the exclusive one: a level in use
stays. Who comes too late finds no file of that name, and asks for the level again.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import math
import os
import re
import threading
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from ome_tensor.errors import InvalidRecord
from ome_tensor.pixels import Pixels
from ome_tensor.pyramids import ArrayPixels, halved, level_meta, write_level
from ome_tensor.record import ImageMeta
from ome_tensor.selection import Extent

__all__ = ["LevelFiles", "level_bytes", "level_name", "open_level"]

_NAME = re.compile(r"[0-9a-f]{16}-[0-9a-f]{16}-[0-9a-f]{16}-\d+\.npy(\.tmp)?")


def level_bytes(meta: ImageMeta, level: int) -> int:
    """Bytes of a level's pixels."""
    return math.prod(level_meta(meta, level).extent) * meta.dtype.itemsize


def level_name(dataset: str, version: str, image: str, level: int) -> str:
    """What a level's file is called.

    Args:
        dataset: What tells the dataset from others of the same store.
        version: The dataset's.
        image: Key of the image.
        level: The level.
    """
    return f"{_digests(dataset, version, image)}-{level}.npy"


def _digests(*texts: str) -> str:
    return "-".join(hashlib.sha256(os.fsencode(text)).hexdigest()[:16] for text in texts)


def open_level(path: str, name: str, meta: ImageMeta, level: int) -> ArrayPixels:
    """The pixels of a level that was made, mapped, and in use as long as they are there.

    Args:
        path: As :meth:`LevelFiles.make` gives it.
        name: See :func:`level_name`.
        meta: The image's metadata.
        level: The level.

    Raises:
        InvalidRecord: the file is not that level's.
        OSError: it is not there any more.
    """
    own = level_meta(meta, level)
    with ExitStack() as stack:
        file = stack.enter_context(open(path, "rb"))
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        # A descriptor's number may be another level's by now.
        if os.path.basename(os.readlink(f"/proc/self/fd/{file.fileno()}")).removeprefix("memfd:").partition(" ")[0] != name:
            raise FileNotFoundError(errno.ENOENT, "it has left memory", path)
        try:
            npy.read_magic(file)
            shape, _, dtype = npy.read_array_header_2_0(file)
        except ValueError as error:
            raise InvalidRecord(
                f"the file of pyramid level {level} is damaged: {error}", field="pyramid_level", value=level
            ) from None
        if shape != tuple(own.extent) or dtype != own.dtype:
            raise InvalidRecord(f"the file of pyramid level {level} is another one's", field="pyramid_level", value=level)
        array = np.memmap(file, dtype, "r", file.tell(), shape)
        # What reads a part of it keeps the whole alive, and its file open.
        weakref.finalize(array, stack.pop_all().close)
    return ArrayPixels(own, array)


class LevelFiles:
    """The levels that one server has made.

    Args:
        folder: Where they are kept; ``None``: in this process's memory, where only this process finds them.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._memory: dict[str, int] = {}
        self._lock = threading.Lock()
        if folder is not None:
            folder.mkdir(mode=0o700, exist_ok=True)

    def find(self, name: str) -> str | None:
        """The path of a level's file, if there is one."""
        if self._folder is not None:
            path = self._folder / name
            return str(path) if path.exists() else None
        with self._lock:
            held = self._memory.get(name)
        return None if held is None else f"/proc/self/fd/{held}"

    def make(self, name: str, before: Pixels, progress: Callable[[int], None]) -> str:
        """Make a level's file of the level before; its path.

        Args:
            name: See :func:`level_name`.
            before: The level before.
            progress: Told how many bytes have been written; may raise, which ends it.

        Raises:
            InvalidRecord: pixels of the level before are damaged.
            OSError: it cannot be written.
        """
        size = halved(before.meta.extent)
        if self._folder is None:
            descriptor = os.memfd_create(name)
            try:
                self._write(f"/proc/self/fd/{descriptor}", size, before, progress)
            except BaseException:
                os.close(descriptor)
                raise
            with self._lock:
                held = self._memory.setdefault(name, descriptor)
            if held != descriptor:
                # Made twice at the same time.
                os.close(descriptor)
            return f"/proc/self/fd/{held}"
        path = self._folder / name
        # Two servers that make the same write the same; whoever is last wins.
        temporary = path.with_name(f"{name}.{os.getpid()}.{threading.get_ident()}.tmp")
        try:
            self._write(str(temporary), size, before, progress)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        return str(path)

    @staticmethod
    def _write(path: str, size: Extent, before: Pixels, progress: Callable[[int], None]) -> None:
        # Not NumPy's own function, which opens a file for what is in it and would not take a name without one.
        with open(path, "wb") as file:
            npy.write_array_header_2_0(
                file, {"descr": npy.dtype_to_descr(before.meta.dtype), "fortran_order": False, "shape": tuple(size)}
            )
            offset = file.tell()
            # With room of its own: written through memory, a hole that finds none on a full disk ends the process.
            os.posix_fallocate(file.fileno(), 0, offset + math.prod(size) * before.meta.dtype.itemsize)
        out = np.memmap(path, before.meta.dtype, "r+", offset, tuple(size))
        write_level(before, out, progress)
        out.flush()

    def drop(self, name: str) -> bool:
        """Remove a level that nobody reads; whether it is gone."""
        path = self.find(name)
        if path is None:
            return True
        try:
            with open(path, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._remove(name)
        except BlockingIOError:
            return False
        except FileNotFoundError:
            pass  # Another server of the same store was sooner.
        return True

    def _remove(self, name: str) -> None:
        if self._folder is not None:
            (self._folder / name).unlink(missing_ok=True)
        with self._lock:
            descriptor = self._memory.pop(name, None)
        if descriptor is not None:
            os.close(descriptor)

    def forget(self, dataset: str, version: str) -> None:
        """Remove all levels of a version of a dataset; who has one open goes on reading it."""
        begins = f"{_digests(dataset, version)}-"
        with self._lock:
            names = list(self._memory)
        if self._folder is not None:
            names = os.listdir(self._folder)
        for name in names:
            if name.startswith(begins) and name.endswith(".npy"):
                self._remove(name)

    def clean(self) -> None:
        """Remove what servers of before have left: it is made again when it is asked for. Files of other names are never touched."""
        if self._folder is not None:
            for path in self._folder.iterdir():
                if _NAME.fullmatch(re.sub(r"\.\d+\.\d+\.tmp$", ".tmp", path.name)):
                    path.unlink(missing_ok=True)
