"""A batch as a dict of tensors, which goes from a DataLoader's worker to its parent in memory that both keep.

torch's own way makes new shared memory for each tensor of each batch: a file descriptor and a mapping apiece, and pages that are touched for
the first
time, which costs more than the copy into them. Here a worker has a few blocks of memory (*slots*) that its parent maps once; a batch is copied
into a free
one, and the slot is free again when the parent has dropped the batch's last tensor. Nothing of it lies in /dev/shm, which containers keep small.
"""

from __future__ import annotations

import mmap
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Mapping
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import torch

from .ranks import is_worker

__all__ = ["Batch", "as_batch"]

#: Slots of one worker, and their bytes in all; what does not fit goes torch's own way.
_MOST_SLOTS, _MOST_BYTES = 64, 1 << 30

_ALIGNMENT = 64

#: Mappings of slots that a parent keeps: those of some workers.
_MOST_MAPPED = 512


class Batch(dict[str, Any]):
    """Samples by key: tensors with a leading axis N, and lists. A dict in every way but for how it is pickled by a DataLoader's worker."""

    def __copy__(self) -> Batch:
        return Batch(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return Batch, (dict(self),)


def _to_another_process(batch: Batch) -> tuple[Any, ...]:
    """How the queue between processes pickles a batch. Nobody else does so: a file that is saved in a worker is to have the tensors in it."""
    placed = _writer().place(batch) if is_worker() and hasattr(os, "memfd_create") else None
    return batch.__reduce__() if placed is None else (_taken, placed)


ForkingPickler.register(Batch, _to_another_process)


def as_batch(data: Any) -> Any:
    """A plain dict as a batch; whatever else as it is."""
    return Batch(data) if type(data) is dict else data


class _Place:
    """Where in a slot a tensor is."""

    __slots__ = ("dtype", "nbytes", "offset", "shape")

    def __init__(self, offset: int, nbytes: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.offset, self.nbytes, self.shape, self.dtype = offset, nbytes, shape, dtype

    def __reduce__(self) -> tuple[Any, ...]:
        return _Place, (self.offset, self.nbytes, self.shape, self.dtype)

    def of(self, memory: np.ndarray) -> torch.Tensor:
        """The tensor in a slot's bytes."""
        if not self.nbytes:
            return torch.empty(self.shape, dtype=self.dtype)
        # The tensor holds the array, and that the memory: a slot is in use for as long as any of them.
        return torch.from_numpy(memory[self.offset : self.offset + self.nbytes]).view(self.dtype).view(self.shape)


# --- in a worker ------------------------------------------------------------------------------------------------------


class _Slot:
    """A block of memory that is shared with the parent."""

    def __init__(self, number: int, nbytes: int) -> None:
        self.number = number
        self.nbytes = nbytes
        self.descriptor = os.memfd_create("ome-tensor-slot")
        os.ftruncate(self.descriptor, nbytes)
        self.memory = np.frombuffer(mmap.mmap(self.descriptor, nbytes), np.uint8)

    def close(self) -> None:
        """Forget it; the parent may still have it mapped."""
        os.close(self.descriptor)


class _Writer:
    """The slots of a worker."""

    def __init__(self) -> None:
        self._slots: list[_Slot] = []
        # One byte a slot: not 0 while the parent uses it.
        self._flags = _Slot(-1, mmap.PAGESIZE)
        self._made = 0
        self._lock = threading.Lock()

    def place(self, batch: Mapping[str, Any]) -> tuple[Any, ...] | None:
        """Copy the tensors of a batch into a free slot: the arguments of :func:`_taken`. ``None``: it is to go torch's own way."""
        # Not those of a transform's own class, which goes the way that keeps it.
        tensors = {key: value for key, value in batch.items() if type(value) is torch.Tensor and value.device.type == "cpu"}
        places, end = {}, 0
        for key, tensor in tensors.items():
            if tensor.layout != torch.strided or tensor.requires_grad:
                return None
            places[key] = _Place(end, tensor.nbytes, tuple(tensor.shape), tensor.dtype)
            end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        with self._lock:
            slot = self._free(end)
            if slot is None:
                return None
            self._flags.memory[slot.number] = 1
        for key, tensor in tensors.items():
            if tensor.nbytes:
                places[key].of(slot.memory).copy_(tensor)
        handle = (os.getpid(), slot.number, slot.descriptor, slot.nbytes, self._flags.descriptor)
        return (*handle, [(key, places.get(key, value)) for key, value in batch.items()])

    def _free(self, nbytes: int) -> _Slot | None:
        """The smallest slot that is free and large enough, or a new one."""
        free = [slot for slot in self._slots if not self._flags.memory[slot.number]]
        fitting = [slot for slot in free if slot.nbytes >= nbytes]
        if fitting:
            return min(fitting, key=lambda slot: slot.nbytes)
        size = max(1 << 16, 1 << (nbytes - 1).bit_length()) if nbytes < 1 << 20 else -(-nbytes // (1 << 20)) << 20
        # Smaller ones make room: batches have become larger.
        for slot in sorted(free, key=lambda slot: slot.nbytes):
            if len(self._slots) < _MOST_SLOTS and sum(one.nbytes for one in self._slots) + size <= _MOST_BYTES:
                break
            self._slots.remove(slot)
            slot.close()
        numbers = set(range(_MOST_SLOTS)) - {slot.number for slot in self._slots}
        if not numbers or sum(one.nbytes for one in self._slots) + size > _MOST_BYTES:
            return None
        slot = _Slot(min(numbers), size)
        self._slots.append(slot)
        return slot


_writers: dict[int, _Writer] = {}


def _writer() -> _Writer:
    """This process's; a forked child has its own."""
    number = os.getpid()
    if number not in _writers:
        _writers.clear()
        _writers[number] = _Writer()
    return _writers[number]


# --- in its parent ----------------------------------------------------------------------------------------------------

# Memory of workers that is mapped: by the worker and its descriptor, and by what the kernel tells apart.
_mapped: OrderedDict[tuple[int, ...], mmap.mmap] = OrderedDict()
_mapped_lock = threading.Lock()


def _memory_of(process: int, descriptor: int, nbytes: int) -> mmap.mmap:
    """A block of memory of another process of this user. https://man7.org/linux/man-pages/man5/proc_pid_fd.5.html"""
    path = f"/proc/{process}/fd/{descriptor}"
    found = os.stat(path)
    # A slot that took another's place has another inode, whatever its number is.
    key = (process, descriptor, found.st_dev, found.st_ino, nbytes)
    with _mapped_lock:
        if key not in _mapped:
            # Workers come and go with each epoch, and make room for larger batches: what they have left here would add up.
            for gone in [one for one in _mapped if not _is_kept(*one[:4])]:
                del _mapped[gone]
            file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                _mapped[key] = mmap.mmap(file, nbytes)
            finally:
                os.close(file)
            while len(_mapped) > _MOST_MAPPED:
                _mapped.popitem(last=False)
        _mapped.move_to_end(key)
        return _mapped[key]


def _is_kept(process: int, descriptor: int, device: int, inode: int) -> bool:
    """Whether a worker still has a block of memory."""
    try:
        found = os.stat(f"/proc/{process}/fd/{descriptor}")
    except OSError:
        return False
    return (found.st_dev, found.st_ino) == (device, inode)


def _taken(process: int, number: int, descriptor: int, nbytes: int, flags: int, items: list[tuple[str, Any]]) -> Batch:
    """A batch from a worker's slot, which is free again when its tensors are gone."""
    in_use = _memory_of(process, flags, mmap.PAGESIZE)
    # An array of this batch alone, which all its tensors hold: it dies with the last of them.
    memory = np.frombuffer(_memory_of(process, descriptor, nbytes), np.uint8)
    batch = Batch({key: value.of(memory) if isinstance(value, _Place) else value for key, value in items})
    weakref.finalize(memory, _release, in_use, number, os.getpid()).atexit = False
    return batch


def _release(in_use: mmap.mmap, number: int, process: int) -> None:
    # In a process that was forked off meanwhile it is a copy that dies: its parent may still read the slot, or another batch in it by then.
    if os.getpid() == process:
        in_use[number] = 0
