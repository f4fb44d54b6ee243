"""What a server knows of a dataset, whether it is loaded or not."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from ome_tensor.listing import DatasetInfo, DatasetState

from .finding import SourceFile
from .manifest import Manifest
from .readers.detect import location_name
from .usage import Usage

__all__ = ["Entry"]


@dataclass(frozen=True, slots=True)
class Entry:
    """One dataset. Travels to workers as JSON.

    Attributes:
        name: Its name.
        location: Its source.
        source_name: The source's file name, for people.
        format: The source's format.
        rows: Rows of the table.
        images: Image columns.
        others: Name and Arrow type of the other columns.
        estimated_bytes: About the memory that it takes when loaded.
        fingerprint: Of the source when it was looked at last.
        slot: Where its use is counted.
        state: Where it stands.
        problem: Why it cannot be served.
        version: Of its contents, where it is loaded or in place.
        manifest: Where it lies in the store.
        is_upload: Whether a client sent it.
        root: Below which folder its source has to lie, whatever links there are; empty where any will do.
    """

    name: str
    location: str
    source_name: str
    format: str
    rows: int
    images: tuple[str, ...]
    others: tuple[tuple[str, str], ...]
    estimated_bytes: int
    fingerprint: str
    slot: int
    state: DatasetState = DatasetState.NOT_LOADED
    problem: str = ""
    version: str = ""
    manifest: Manifest | None = None
    is_upload: bool = False
    root: str = ""

    @classmethod
    def of(cls, source: SourceFile, is_upload: bool) -> Entry:
        """Of a source that nobody has looked at yet."""
        return cls(
            name=source.name,
            location=source.location,
            source_name=location_name(source.location),
            format="",
            rows=0,
            images=(),
            others=(),
            estimated_bytes=0,
            fingerprint="",
            slot=-1,
            is_upload=is_upload,
            root=source.root,
        )

    @property
    def is_ready(self) -> bool:
        """Whether it can be read at once."""
        return self.state in (DatasetState.LOADED, DatasetState.IN_PLACE)

    def info(self, usage: Usage) -> DatasetInfo:
        """What is said of it while it is not loaded."""
        return DatasetInfo(
            name=self.name,
            version="",
            image_count=0,
            row_count=self.rows,
            image_columns=self.images,
            other_columns=self.others,
            source_name=self.source_name,
            state=self.state,
            progress=usage.progress(self.slot) if self.state is DatasetState.LOADING else 0.0,
            problem=self.problem,
            estimated_bytes=self.estimated_bytes,
            format=self.format,
        )

    def unloaded(self, state: DatasetState, problem: str = "") -> Entry:
        """The same, out of memory."""
        return replace(self, state=state, problem=problem, version="", manifest=None)

    def to_json(self) -> dict[str, Any]:
        """As JSON's values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Entry:
        """From JSON's values."""
        manifest = values["manifest"]
        return cls(
            **values
            | {
                "images": tuple(values["images"]),
                "others": tuple((name, kind) for name, kind in values["others"]),
                "state": DatasetState(values["state"]),
                "manifest": None if manifest is None else Manifest(**manifest),
            }
        )
