"""Which of how many processes and workers this is."""

from __future__ import annotations

import os
from multiprocessing import parent_process
from multiprocessing.context import get_spawning_popen
from typing import TypeAlias

from torch.utils.data import get_worker_info

from ome_tensor.errors import InvalidArgument

__all__ = ["Handed", "checked_epoch", "checked_shard", "handed", "inherited_rank", "is_worker", "rank_here", "worker_here"]

#: The process that hands something to one that it starts, and its rank.
Handed: TypeAlias = tuple[int, tuple[int, int]]


def rank_here() -> tuple[int, int]:
    """This process's rank and the number of ranks: of torch.distributed where that is set up, else as torchrun says, else the only one."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    rank, ranks = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
    if rank.isdecimal() and ranks.isdecimal() and int(rank) < int(ranks):
        return int(rank), int(ranks)
    return 0, 1


def handed(rank: tuple[int, int]) -> Handed | None:
    """What goes with a dataset that is pickled for a process that is being started; ``None`` where it is for anything else, such as a file."""
    return None if get_spawning_popen() is None else (os.getpid(), rank)


def inherited_rank(given: Handed | None) -> tuple[int, int] | None:
    """The rank of the process whose DataLoader started this one: a worker that was not forked knows nothing of torch.distributed.

    ``None`` in any other process: those that a dataset was handed to may be the ranks.
    """
    parent = parent_process() if given is not None and is_worker() else None
    return given[1] if given is not None and parent is not None and parent.pid == given[0] else None


def worker_here() -> tuple[int, int]:
    """This process's number among a DataLoader's workers, and how many there are; the only one where it is none of them."""
    info = get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)


def is_worker() -> bool:
    """Whether this process is a DataLoader's worker."""
    return get_worker_info() is not None


def checked_epoch(epoch: object) -> int:
    """The number of an epoch. Raises InvalidArgument."""
    if isinstance(epoch, bool) or not hasattr(epoch, "__index__") or not 0 <= epoch.__index__() < 2**62:
        raise InvalidArgument(f"epoch must be a number from 0, not {epoch!r}", field="epoch", value=epoch)
    return int(epoch.__index__())


def checked_shard(shard: object) -> tuple[int, int] | None:
    """(rank, ranks). Raises InvalidArgument."""
    if shard is None:
        return None
    if (
        not isinstance(shard, (tuple, list))
        or len(shard) != 2
        or not all(isinstance(number, int) and not isinstance(number, bool) for number in shard)
        or not 0 <= shard[0] < shard[1]
    ):
        raise InvalidArgument(f"shard must be (rank, ranks) with 0 <= rank < ranks, not {shard!r}", field="shard", value=shard)
    return shard[0], shard[1]
