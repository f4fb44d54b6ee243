"""Everyone measured by :mod:`benchmarks.wire`: the same image, the same requests, each as its competent user would set it up."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .base import Peer

__all__ = ["peers"]


def peers() -> list[Peer]:
    """All of them; :meth:`Peer.missing` says which cannot run here, and why."""
    # Imported here, since each of these modules is also a server's program, which must not find itself imported already.
    from .flight import Flight
    from .numpy_floor import Floor
    from .ours import Mapped, Ours, Workers
    from .raw import RawSocket
    from .tiled_http import Tiled
    from .upstream import Upstream
    from .zarr_http import TensorStore, ZarrPython

    return [RawSocket(), Flight(), Ours(), Workers(), Mapped(), Floor(), TensorStore(), ZarrPython(), Tiled(), Upstream()]
