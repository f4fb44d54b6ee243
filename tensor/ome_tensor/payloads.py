"""How a record's blocks store their pixels: Arrow lists of numbers, bytes with a dtype and perhaps a compression, the Python sequences of a dict."""

from __future__ import annotations

import array as packed
import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from .errors import InvalidRecord, LimitExceeded
from .pixel_types import payload_dtype

__all__ = ["BytesPayload", "ChunkCache", "ListPayload", "ObjectPayload", "Payload"]

# Codecs with a framing that tells where the data ends: of others Arrow cannot say whether a payload was too short.
_CODECS = frozenset({"brotli", "bz2", "gzip", "lz4", "zstd"})


class ChunkCache:
    """Decompressed chunks, least recently used out first; shared by the indexes it is handed to.

    Args:
        max_bytes: Bound on the bytes kept. A chunk larger than this is decompressed anew each time.
        max_chunk_bytes: Largest chunk that is decompressed at all, or ``None``: a few stored bytes can claim to be any size.

    Attributes:
        nbytes: Bytes kept.
        hits, misses: How often a chunk was there, and how often one had to be decompressed.
    """

    def __init__(self, max_bytes: int = 64 << 20, max_chunk_bytes: int | None = None) -> None:
        self.max_bytes = max_bytes
        self.max_chunk_bytes = max_chunk_bytes
        self.nbytes = 0
        self.hits = self.misses = 0
        self._entries: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        self._lock = threading.Lock()
        self._owners = itertools.count()
        # Threads that want the same chunk wait for the one that decompresses it; a few locks serve all chunks.
        self._busy = [threading.Lock() for _ in range(16)]

    def check_size(self, name: str, nbytes: int) -> None:
        """LimitExceeded, with the chunk's name, where one would be too large to decompress."""
        limit = self.max_chunk_bytes
        if limit is not None and nbytes > limit:
            raise LimitExceeded(
                f"{name} is {nbytes} bytes when decompressed; at most {limit} are allowed (max_chunk_bytes)",
                field="chunks",
                value=nbytes,
            )

    def busy(self, key: tuple[int, int]) -> threading.Lock:
        """Held while the chunk of that key is being decompressed."""
        return self._busy[hash(key) % len(self._busy)]

    def new_owner(self) -> int:
        """A number no other index uses in this cache."""
        return next(self._owners)

    def get(self, key: tuple[int, int]) -> np.ndarray | None:
        """The chunk of ``(owner, block)``, or ``None``."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                self._entries.move_to_end(key)
                self.hits += 1
            return entry

    def put(self, key: tuple[int, int], chunk: np.ndarray) -> None:
        """Keep a chunk, forgetting old ones to stay inside the bound."""
        with self._lock:
            self.misses += 1
            if chunk.nbytes > self.max_bytes or key in self._entries:
                return
            self._entries[key] = chunk
            self.nbytes += chunk.nbytes
            while self.nbytes > self.max_bytes:
                self.nbytes -= self._entries.popitem(last=False)[1].nbytes


class Payload(Protocol):
    """The pixels of all blocks, by block number."""

    #: Dtype of the stored values where all blocks share one, else ``None``.
    dtype: np.dtype | None
    #: Whether pixels are stored as bytes, so that there are no Arrow values to hand out.
    bytes_backed: bool

    def length(self, block: int) -> int | None:
        """Number of stored values, or ``None`` where only decoding can tell."""

    def values(self, block: int, expected: int) -> np.ndarray:
        """The stored values as a 1-D array of any length; ``expected`` is what the geometry wants."""

    def addresses(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Where all blocks lie in one typed memory: ``(uint8 memory, byte offset of each block)``; ``None`` where they do not."""


class ListPayload:
    """Pixels in an Arrow list column: one flat array, offsets into it."""

    bytes_backed = False

    def __init__(self, lists: pa.Array, what: str) -> None:
        values, offsets = _flatten(lists, what)
        first, last = int(offsets[0]), int(offsets[-1])
        values = values.slice(first, last - first)
        if values.null_count:
            raise InvalidRecord(f"{what} hold {values.null_count} null pixels", field=what)
        self.flat: np.ndarray = values.to_numpy(zero_copy_only=False)
        if self.flat.dtype.kind not in "biufc":
            raise InvalidRecord(f"{what} are not numbers but {values.type}", field=what, value=str(values.type))
        self._offsets = offsets - first
        self.dtype: np.dtype | None = self.flat.dtype

    def length(self, block: int) -> int:
        return int(self._offsets[block + 1] - self._offsets[block])

    def values(self, block: int, expected: int) -> np.ndarray:
        return self.flat[self._offsets[block] : self._offsets[block + 1]]

    def addresses(self) -> tuple[np.ndarray, np.ndarray]:
        return self.flat.view(np.uint8), self._offsets * self.flat.dtype.itemsize


def _flatten(lists: pa.Array, what: str) -> tuple[pa.Array, np.ndarray]:
    """The child array of a list array and the offsets (int64, one more than lists) into it."""
    if isinstance(lists, (pa.ListArray, pa.LargeListArray)):
        return lists.values, lists.offsets.to_numpy(zero_copy_only=False).astype(np.int64, copy=False)
    if isinstance(lists, pa.FixedSizeListArray):
        width = lists.type.list_size
        return lists.values, (np.arange(len(lists) + 1, dtype=np.int64) + lists.offset) * width
    raise InvalidRecord(f"{what} must be lists of numbers, not {lists.type}", field=what, value=str(lists.type))


class BytesPayload:
    """Pixels as bytes, each chunk with its dtype and compression; a chunk without bytes may have a list instead.

    Args:
        chunks: The chunks.
        fallback: Dtype of those that name none.
        cache: Where decompressed ones are kept.
        name: A chunk by number, for errors.

    Raises:
        InvalidRecord: an unknown dtype or compression, or no bytes at all.
    """

    bytes_backed = True

    def __init__(
        self, chunks: pa.StructArray, fallback: np.dtype, cache: ChunkCache, name: Callable[[int], str] = "chunk {}".format
    ) -> None:
        self._name = name
        names = {field.name for field in chunks.type}
        column = chunks.field("pixel_bytes")
        if not isinstance(column, (pa.BinaryArray, pa.LargeBinaryArray)):
            column = _cast(column, pa.large_binary(), "chunks.pixel_bytes")
        wide = isinstance(column, pa.LargeBinaryArray)
        _, offsets, data = column.buffers()
        count = len(column)
        self._offsets = np.frombuffer(offsets, np.int64 if wide else np.int32)[column.offset :][: count + 1].astype(np.int64)
        self._data = np.frombuffer(data if data is not None else b"", np.uint8)
        self._lists: ListPayload | None = None
        self._is_list = np.zeros(count, bool)
        if column.null_count:
            self._is_list = column.is_null().to_numpy(zero_copy_only=False)
            if "pixels" in names and chunks.field("pixels").type != pa.null():
                self._lists = ListPayload(chunks.field("pixels"), "chunks.pixels")
        self._dtypes, self._dtype_of = _dictionary(chunks, "dtype", names, lambda text: payload_dtype(text, fallback))
        self._codecs, self._codec_of = _dictionary(chunks, "compression", names, _codec)
        plain = not self._is_list.any() and len(self._dtypes) == 1
        self.dtype: np.dtype | None = self._dtypes[0] if plain else None
        self._addressable = plain and self._codecs == [None]
        self._cache = cache
        self._owner = cache.new_owner()

    def length(self, block: int) -> int | None:
        if self._is_list[block]:
            return self._lists.length(block) if self._lists else 0
        if self._codecs[self._codec_of[block]] is not None:
            return None
        nbytes, itemsize = int(self._offsets[block + 1] - self._offsets[block]), self._dtypes[self._dtype_of[block]].itemsize
        # Bytes left over mean a wrong length too; there is no number of values to name then, so name one that cannot be right.
        return nbytes // itemsize if nbytes % itemsize == 0 else -1

    def values(self, block: int, expected: int) -> np.ndarray:
        if self._is_list[block]:
            return self._lists.values(block, expected) if self._lists else np.empty(0, np.uint8)
        dtype, codec = self._dtypes[self._dtype_of[block]], self._codecs[self._codec_of[block]]
        raw = self._data[self._offsets[block] : self._offsets[block + 1]]
        if codec is None:
            return raw[: len(raw) // dtype.itemsize * dtype.itemsize].view(dtype)
        key = (self._owner, block)
        decoded = self._cache.get(key)
        if decoded is None:
            with self._cache.busy(key):
                decoded = self._cache.get(key)
                if decoded is None:
                    decoded = self._decompress(block, raw, codec, expected, dtype)
                    self._cache.put(key, decoded)
        return decoded

    def _decompress(self, block: int, raw: np.ndarray, codec: str, expected: int, dtype: np.dtype) -> np.ndarray:
        nbytes = expected * dtype.itemsize
        self._cache.check_size(self._name(block), nbytes)
        try:
            # As a stream, since Arrow's one-shot decompression gives memory that was never written where a payload is too short.
            with pa.CompressedInputStream(pa.BufferReader(pa.py_buffer(raw)), codec) as stream:
                buffer = stream.read_buffer(nbytes)
                more = buffer.size == nbytes and bool(stream.read(1))
        except (OSError, ValueError, OverflowError, MemoryError, pa.ArrowException) as error:
            why = (str(error).splitlines() or [type(error).__name__])[0]
            raise InvalidRecord(
                f"{self._name(block)}: its {codec} bytes do not decompress: {why}", field="chunks.pixel_bytes"
            ) from error
        if buffer.size != nbytes or more:
            found = "more" if more else f"only {buffer.size // dtype.itemsize}"
            raise InvalidRecord(
                f"{self._name(block)}: pixels length != expected {expected}: its {codec} bytes hold {found}",
                field="chunks.pixel_bytes",
            )
        values: np.ndarray = np.frombuffer(buffer, dtype)
        return values

    def addresses(self) -> tuple[np.ndarray, np.ndarray] | None:
        return (self._data, self._offsets) if self._addressable else None


def _dictionary(chunks: pa.StructArray, name: str, names: set[str], parse: Any) -> tuple[list[Any], np.ndarray]:
    """A text column as its parsed distinct values and, for each chunk, which of them."""
    if name not in names or chunks.field(name).type == pa.null():
        return [parse(None)], np.zeros(len(chunks), np.int64)
    # Nulls become a value of their own: "no compression", "the image's dtype".
    encoded = _cast(chunks.field(name), pa.string(), f"chunks.{name}").dictionary_encode(null_encoding="encode")
    return [parse(text) for text in encoded.dictionary.to_pylist()], encoded.indices.to_numpy(zero_copy_only=False).astype(
        np.int64
    )


def _cast(column: pa.Array, wanted: pa.DataType, field: str) -> pa.Array:
    try:
        return column.cast(wanted)
    except pa.ArrowException as error:
        raise InvalidRecord(f"{field} cannot be {column.type}", field=field, value=str(column.type)) from error


def _codec(name: str | None) -> str | None:
    text = (name or "").strip().lower()
    if text in ("", "none"):
        return None
    if text not in _CODECS or not pa.Codec.is_available(text):
        raise InvalidRecord(f"chunk compression {name!r} is not supported", field="chunks.compression", value=name)
    return text


class ObjectPayload:
    """The Python sequences of a dict, each turned into an array once, when first asked for; of a flat list only the rows asked for at first.

    Args:
        entries: The dict's planes or chunks.
        what: Which of them.
        fallback: Dtype of byte payloads that name none.
        cache: Where decompressed chunks are kept.
        name: A block by number, for errors.
    """

    dtype: np.dtype | None = None

    def __init__(
        self,
        entries: Sequence[Mapping[str, Any]],
        what: str,
        fallback: np.dtype,
        cache: ChunkCache,
        name: Callable[[int], str] = "block {}".format,
    ) -> None:
        self._entries = entries
        self._what = what
        self._fallback = fallback
        self._arrays: dict[int, np.ndarray] = {}
        self._converted: dict[int, int] = {}
        self._cache = cache
        self._name = name
        self.bytes_backed = any(entry.get("pixel_bytes") is not None for entry in entries)

    def length(self, block: int) -> None:
        return None

    def values(self, block: int, expected: int) -> np.ndarray:
        array = self._arrays.get(block)
        if array is None:
            array = self._arrays[block] = self._read(block, expected)
        return array

    def window(self, block: int, shape: tuple[int, int, int], z: slice, y: slice, x: slice) -> np.ndarray | None:
        """A part of a block, converted for itself; ``None`` where the whole block is at hand, or is the way to it.

        A ROI needs few rows of a megapixel plane, and turning Python's integers into numbers is what reading a dict costs. Once that has been done
        for as many values as the block has, the block is converted and kept: reading it over and over in parts costs at most twice its conversion.

        Args:
            block: Its number.
            shape: Its size in elements, ZYX.
            z, y, x: The part, counted in the block; steps of 1.
        """
        if block in self._arrays:
            return None
        entry = self._entries[block]
        pixels, (depth, height, width) = entry.get("pixels"), shape
        size = depth * height * width
        if not isinstance(pixels, list) or len(pixels) != size or entry.get("pixel_bytes") is not None:
            return None
        part = (z.stop - z.start, y.stop - y.start, x.stop - x.start)
        converted = self._converted.get(block, 0) + part[0] * part[1] * part[2]
        if converted >= size:
            return None
        self._converted[block] = converted
        chosen: list[Any] = []
        for at_z in range(z.start, z.stop):
            for row in range((at_z * height + y.start) * width, (at_z * height + y.stop) * width, width):
                chosen += pixels[row + x.start : row + x.stop]
        try:
            return np.frombuffer(packed.array("q", chosen), np.int64).reshape(part)
        except (TypeError, OverflowError):
            return None  # Not integers, or beyond 64 bits: for the whole to judge.

    def _read(self, block: int, expected: int) -> np.ndarray:
        entry = self._entries[block]
        raw = entry.get("pixel_bytes")
        if raw is not None:
            try:
                one = pa.array([{"pixel_bytes": raw, "dtype": entry.get("dtype"), "compression": entry.get("compression")}])
            except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
                field = f"{self._what}[{block}].pixel_bytes"
                raise InvalidRecord(f"{field} is not bytes with the names of a dtype and a compression", field=field) from error
            return BytesPayload(one, self._fallback, self._cache, lambda _: self._name(block)).values(0, expected)
        try:
            values = _numbers(entry.get("pixels")).reshape(-1)
        except (TypeError, ValueError):
            values = np.empty(0, object)
        if values.dtype.kind not in "biufc":
            raise InvalidRecord(
                f"{self._what}[{block}].pixels is not a sequence of numbers", field=f"{self._what}[{block}].pixels"
            )
        return values

    def addresses(self) -> None:
        return None


def _numbers(values: Any) -> np.ndarray:
    """A dict's pixels as an array. A list of integers is by far the usual case, and half again as fast through ``array``."""
    if isinstance(values, list):
        try:
            return np.frombuffer(packed.array("q", values), np.int64)
        except (TypeError, OverflowError):
            pass  # Nested, floats, or beyond 64 bits: NumPy's to judge.
    return np.asarray(values)
