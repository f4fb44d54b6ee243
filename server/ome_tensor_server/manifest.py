"""What a store says of a dataset."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path

from ome_tensor.arrow_file import ArrowImages
from ome_tensor.tables import LoadedTable, MappedFile

from .readers.detect import fingerprint, is_address

__all__ = ["FORMAT", "Manifest", "dataset_id", "read_manifest"]

FORMAT = 3


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a dataset's file is.

    Attributes:
        format: Of this manifest.
        source: Absolute path of the source, or its address.
        source_format: Its format.
        fingerprint: What differs once it was changed; see :class:`SourceInfo`.
        version: Digest of the source's contents.
        file: Absolute path of the Arrow IPC file; the source itself where that is served as it lies.
        file_inode, file_size, file_modified_ns: What tells that file from another at its path.
        rows: Rows of the table.
        images: The image columns.
        others: Name and Arrow type, in the source, of the other columns.
    """

    format: int
    source: str
    source_format: str
    fingerprint: str
    version: str
    file: str
    file_inode: int
    file_size: int
    file_modified_ns: int
    rows: int
    images: list[str]
    others: list[list[str]]

    def table(self) -> LoadedTable:
        """The dataset, mapped.

        Raises:
            InvalidRecord: the file is another one than was loaded, or was changed since; names it.
            OSError: it cannot be opened.
        """
        mapped = ArrowImages(Path(self.file), expected=self._mapped).load(self.version)
        return replace(mapped, others=tuple((name, kind) for name, kind in self.others), rows=self.rows)

    @property
    def _mapped(self) -> MappedFile:
        return MappedFile(Path(self.file), self.file_inode, self.file_size, self.file_modified_ns)

    @property
    def has_file(self) -> bool:
        """Whether the file is there, unchanged."""
        return self._mapped.is_there

    @property
    def is_current(self) -> bool:
        """Whether the source is what it was, as far as that can be told here, and the file is there, unchanged."""
        # Of an address nothing can be told without asking; refreshing the dataset does.
        return (is_address(self.source) or fingerprint(self.source) == self.fingerprint) and self.has_file


def dataset_id(source: str) -> str:
    """What the files of a source's dataset are named by: 16 hexadecimal digits of its absolute path or address."""
    return hashlib.sha256(os.fsencode(source)).hexdigest()[:16]


def read_manifest(path: Path) -> Manifest | None:
    """A manifest, unless it is none of this format."""
    try:
        values = json.loads(path.read_text())
        return Manifest(**values) if values.get("format") == FORMAT else None
    except (OSError, ValueError, TypeError, AttributeError):
        return None
