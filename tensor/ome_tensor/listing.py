"""What a catalogue says of its datasets and images; the same objects on a server and at a client."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from .record import ImageMeta

__all__ = ["DatasetInfo", "DatasetState", "ImageInfo", "Level"]


class DatasetState(StrEnum):
    """Where a dataset stands."""

    LOADED = "loaded"
    NOT_LOADED = "not loaded"
    LOADING = "loading"
    IN_PLACE = "in place"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Level:
    """A level of a resolution pyramid.

    Attributes:
        shape: Its size in elements, TZCYX.
        is_stored: Whether it stands in the image's source; others are made by the server when first asked for.
    """

    shape: tuple[int, int, int, int, int]
    is_stored: bool = True


@dataclass(frozen=True, slots=True)
class DatasetInfo:
    """One registered table or file.

    Attributes:
        name: Its name, the first part of every key into it.
        version: Opaque; equal versions mean equal pixels.
        image_count: Rows times image columns, less the rows where a column holds no image.
        row_count: Rows of the table.
        image_columns: Names of the columns that hold images.
        other_columns: Name and Arrow type of the others.
        resident_bytes: Memory held for it, in bytes.
        source_name: File name it was loaded from.
        state: Where it stands. Unless it is loaded or in place, ``version`` is empty, and ``image_count`` and ``resident_bytes`` are 0: they are
            known only then.
        progress: Part of it that is loaded, from 0 to 1, while it is being loaded.
        problem: Why it cannot be served; ``""`` normally.
        estimated_bytes: About the memory it takes when loaded; 0 where unknown.
        format: Of its source: ``parquet``, ``arrow``, ``typed-chunks``, ``vortex``, ``ome-tiff``, ``ome-zarr`` or ``npy``; ``""`` where unknown.
    """

    name: str
    version: str
    image_count: int
    row_count: int
    image_columns: tuple[str, ...]
    other_columns: tuple[tuple[str, str], ...] = ()
    resident_bytes: int = 0
    source_name: str = ""
    state: DatasetState = DatasetState.LOADED
    progress: float = 1.0
    problem: str = ""
    estimated_bytes: int = 0
    format: str = ""


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """One image of a dataset.

    Attributes:
        key: Its canonical key, ``dataset/column/row``, parts percent-encoded.
        dataset, column, row: The key's parts, decoded.
        meta: Its metadata; ``None`` where the record is too damaged to tell.
        problem: Why it cannot be read; ``""`` normally.
        levels: The levels of its resolution pyramid, the image itself first; ``()`` where unknown.
    """

    key: str
    dataset: str
    column: str
    row: int
    meta: ImageMeta | None
    problem: str = ""
    levels: tuple[Level, ...] = ()

    @property
    def name(self) -> str:
        """The record's name for people; may be empty."""
        return self.meta.name if self.meta else ""

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """Size in elements, TZCYX; zeros where unknown."""
        return tuple(self.meta.extent) if self.meta else (0, 0, 0, 0, 0)  # type: ignore[return-value]

    @property
    def nbytes(self) -> int:
        """Bytes of all pixels, uncompressed; 0 where unknown."""
        return self.meta.nbytes if self.meta else 0
