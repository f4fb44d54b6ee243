"""The ome-tensor server: datasets in memory, views of them as streams of Arrow tiles."""

from .app import TensorServer
from .settings import Settings

__all__ = ["Settings", "TensorServer"]
