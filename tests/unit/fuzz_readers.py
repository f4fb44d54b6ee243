"""Damaged files by the thousand: ``python -m tests.unit.fuzz_readers SECONDS [SEED]``. Each is refused by name, or read; the server lives. Each is
loaded, and then served where it lies, if it can be.

What a reader's process does with one (an error, running out of memory, a crash) is counted; an error in the server that is none of its own ends the
run, with the file kept.
"""

from __future__ import annotations

import random
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
from tests.integration.images import random_pixels
from tests.unit.tabular import column, entry_of, pixels_of, write, write_typed

from ome_tensor import OmeTensorError
from ome_tensor.blocks import ChunkCache
from ome_tensor.tables import ImageTable
from ome_tensor_server.in_place import Readers, open_in_place
from ome_tensor_server.loading import Loader, load_anonymous

#: Memory that a reader may have, and that this process may have in the end.
_READER, _OWN = 512 << 20, 1 << 30

_ODD_NUMBERS = (
    0,
    1,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0x8000,
    0xFFFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    1 << 62,
    (1 << 63) - 1,
    (1 << 64) - 1,
)


def seeds(folder: Path) -> list[Path]:
    """A small whole source of each kind."""
    images = [random_pixels((1, 2, 1, 9, 11), seed=seed) for seed in range(3)]
    more = {"n": range(3), "word": pa.array(["a", "b", "a"]).dictionary_encode()}
    made = []
    for encoding in ("planes", "chunks", "bytes", "zstd"):
        table = pa.table({"image": column([*images], encoding, (1, 5, 6)), **more})
        kinds = ("parquet", "parquet zstd", "arrow", "arrow lz4", "stream", "stream zstd")
        made += [write(folder / f"{kind} {encoding}".replace(" ", "-"), table, kind, 2) for kind in kinds]
        try:
            import vortex
        except ImportError:
            continue
        made.append(folder / f"vortex-{encoding}")
        vortex.io.write(table, str(made[-1]))
    for rows, index in ((1, True), (5, False)):
        made.append(
            write_typed(folder / f"typed-{rows}", {str(n): image for n, image in enumerate(images)}, rows=rows, index=index)
        )
    return made + _array_seeds(folder)


def _array_seeds(folder: Path) -> list[Path]:
    pixels = random_pixels((2, 3, 2, 9, 11))
    np.save(folder / "array.npy", pixels)
    made = [folder / "array.npy"]
    try:
        import tifffile
        import zarr
    except ImportError:
        return made
    for name, options in (("plain", {}), ("packed", {"compression": "zlib", "tile": (16, 16)}), ("big", {"bigtiff": True})):
        made.append(folder / f"{name}.ome.tiff")
        tifffile.imwrite(made[-1], pixels.swapaxes(1, 2), ome=True, metadata={"axes": "TCZYX"}, **options)
    made.append(folder / "set.ome.zarr")
    group = zarr.open_group(made[-1], mode="w", zarr_format=2)
    group.create_array("0", data=pixels.swapaxes(1, 2), chunks=(1, 1, 1, 5, 6))
    axes = [{"name": name, "type": kind} for name, kind in zip("tczyx", ("time", "channel", *["space"] * 3), strict=True)]
    scale = [{"type": "scale", "scale": [1.0] * 5}]
    group.attrs["multiscales"] = [
        {"version": "0.4", "axes": axes, "datasets": [{"path": "0", "coordinateTransformations": scale}]}
    ]
    return made


def damaged(data: bytes, chance: random.Random) -> bytes:
    """Some bytes changed, a number replaced by an odd one, a part lost or doubled, or the end cut off."""
    content = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 5, 20))):
        if not content:
            break
        # Headers and footers say what is where.
        near = chance.choice((len(content), min(len(content), 300)))
        place = chance.randrange(near)
        place = place if chance.random() < 0.5 else len(content) - 1 - place
        how = chance.randrange(6)
        if how == 0:
            content[place] ^= 1 << chance.randrange(8)
        elif how == 1:
            content[place] = chance.randrange(256)
        elif how in (2, 3):
            size = chance.choice((1, 2, 4, 8))
            number = chance.choice(_ODD_NUMBERS) & ((1 << 8 * size) - 1)
            content[place : place + size] = number.to_bytes(size, chance.choice(("little", "big")))  # type: ignore[arg-type]
        elif how == 4:
            part = content[place : place + chance.randrange(1, 64)]
            if chance.random() < 0.5:
                content[place : place + len(part)] = b""
            else:
                content[place:place] = part
        elif chance.random() < 0.2:
            del content[place:]
    return bytes(content)


def damage(source: Path, target: Path, chance: random.Random) -> None:
    """A damaged copy; of a folder, one or two of its files."""
    if source.is_file():
        target.write_bytes(damaged(source.read_bytes(), chance))
        return
    shutil.copytree(source, target)
    files = sorted(file for file in target.rglob("*") if file.is_file())
    for file in chance.sample(files, min(len(files), chance.randrange(1, 3))):
        file.write_bytes(damaged(file.read_bytes(), chance))


def read(path: Path, loader: Loader) -> str:
    """What becomes of a source."""
    try:
        table = ImageTable("dataset", load_anonymous(str(path), loader), ChunkCache(1 << 20, 64 << 20))
    except OmeTensorError as error:
        if path.name not in error.message:
            raise AssertionError("an error without the source's name") from error
        return "crashed or hung" if "its reader " in error.message else type(error).__name__
    return read_images(table)


def read_in_place(path: Path, loader: Loader, readers: Readers) -> str:
    """What becomes of a source that is served where it lies."""
    cache = ChunkCache(1 << 20, 64 << 20)
    try:
        if loader.describe(str(path)).not_in_place:
            return "not in place"
        served = open_in_place(entry_of(path, loader), readers)
    except OmeTensorError as error:
        if path.name not in error.message:
            raise AssertionError("an error without the source's name") from error
        return f"in place {'crashed or hung' if 'its reader ' in error.message else type(error).__name__}"
    return f"in place {read_images(ImageTable('dataset', served.table, cache, served.columns))}"


def read_images(table: ImageTable) -> str:
    """What becomes of the pixels of a few images."""
    refused = "read"
    for name, images in table.columns.items():
        for row in np.flatnonzero(images.is_valid()).tolist()[:3]:
            try:
                image = table.image(name, row)
                if image.pixels.meta.nbytes < 64 << 20:
                    pixels_of(table, row, name)
            except OmeTensorError as error:
                refused = "crashed or hung in part" if "its reader " in error.message else "read in part"
    return refused


def run(seconds: float, seed: int, say: Callable[[str], None] = print) -> Counter[str]:
    """Read damaged files for so long; what became of them."""
    chance = random.Random(seed)
    found: Counter[str] = Counter()
    loader, readers = Loader(_READER, patience=10), Readers(_READER, 8 << 20, 64 << 20, patience=10)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "seeds").mkdir()
        sources = seeds(folder / "seeds")
        for source in sources:
            assert read(source, loader) == "read", source
            assert read_in_place(source, loader, readers) in ("not in place", "in place read"), source
        end, target = time.monotonic() + seconds, folder / "damaged"
        while time.monotonic() < end:
            source = chance.choice(sources)
            if target.exists():
                shutil.rmtree(target) if target.is_dir() else target.unlink()
            damage(source, target, chance)
            before = time.monotonic()
            try:
                kinds = read(target, loader), read_in_place(target, loader, readers)
            except BaseException:
                kept = Path(tempfile.mkdtemp()) / source.name
                shutil.move(target, kept)
                say(f"kept {kept}")
                raise
            found["inputs"] += 1
            for what in kinds:
                found[what] += 1
                found[f"{source.name}: {what}"] += 1
            if time.monotonic() - before > 5:
                say(f"{source.name} took {time.monotonic() - before:.1f} s: {kinds}")
    loader.close()
    readers.close()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    say(f"{found['inputs']} inputs, at most {peak >> 20} MiB in this process")
    assert peak < _OWN
    return found


if __name__ == "__main__":
    for outcome, count in sorted(run(float(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0).items()):
        print(f"{count:8} {outcome}")
