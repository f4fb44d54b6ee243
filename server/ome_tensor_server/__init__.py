"""The ome-tensor server: datasets in memory, views of them as streams of Arrow tiles."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .app import TensorServer
    from .settings import Settings

__all__ = ["Settings", "TensorServer"]


def __getattr__(name: str) -> Any:
    # Only when they are asked for: a loader's process serves nothing, and has no use for gRPC.
    if name == "TensorServer":
        from .app import TensorServer

        return TensorServer
    if name == "Settings":
        from .settings import Settings

        return Settings
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
