"""The demo's picture: the channels each on their own, and together, large."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ome_tensor.record import ImageMeta

from .files import replacing, require
from .imaging import colors_of, composite

__all__ = ["write_picture"]

#: Height of the large panel, in pixels: fills a good part of a screen. Images that are larger stay as they are.
_HEIGHT = 825

_GAP = 12
_INK, _PAPER = (235, 235, 235), (0, 0, 0)


def write_picture(path: Path, pixels: np.ndarray, meta: ImageMeta) -> None:
    """The maximum over z: all channels together, beside each alone.

    Args:
        path: Where.
        pixels: ZCYX.
        meta: The image's metadata.
    """
    imaging = require("PIL.Image", "the picture")
    drawing = require("PIL.ImageDraw", "the picture")
    planes = list(np.fmax.reduce(pixels, axis=0))
    listed = [meta.channels[c] if c < len(meta.channels) else None for c in range(len(planes))]
    colors = colors_of(listed)
    names = [channel.name or f"channel {c}" if channel else f"channel {c}" for c, channel in enumerate(listed)]

    large = imaging.fromarray(composite(planes, colors))
    scale = max(1.0, _HEIGHT / large.height)
    large = large.resize((round(large.width * scale), round(large.height * scale)), imaging.Resampling.LANCZOS)
    side: list[Any] = []
    # Up to four beside it; more would be stamps.
    for plane, color in list(zip(planes, colors, strict=True))[:4] if len(planes) > 1 else []:
        alone = imaging.fromarray(composite([plane], [color]))
        height = (large.height - _GAP * (min(len(planes), 4) - 1)) // min(len(planes), 4)
        width = max(1, round(alone.width * height / alone.height))
        side.append(alone.resize((width, height), imaging.Resampling.LANCZOS))

    width = large.width + (_GAP + max(panel.width for panel in side) if side else 0)
    sheet = imaging.new("RGB", (width, large.height), _PAPER)
    draw = drawing.Draw(sheet)
    sheet.paste(large, (0, 0))
    y = 0
    for panel, name, color in zip(side, names, colors, strict=False):
        sheet.paste(panel, (large.width + _GAP, y))
        _label(draw, (large.width + _GAP + 14, y + 10), [(name, color)])
        y += panel.height + _GAP
    _label(draw, (16, 12), list(zip(names, colors, strict=True)))
    with replacing(path) as passing:
        sheet.save(passing, format="PNG")


def _font(size: int) -> Any:
    # Pillow's own font: the same on every machine.
    return require("PIL.ImageFont", "the picture").load_default(size)


def _label(draw: Any, at: tuple[int, int], words: list[tuple[str, tuple[int, int, int]]]) -> None:
    font = _font(22)
    x, y = at
    for i, (word, color) in enumerate(words):
        if i:
            draw.text((x, y), " + ", fill=_INK, font=font)
            x += draw.textlength(" + ", font=font)
        draw.text((x, y), word, fill=color, font=font)
        x += draw.textlength(word, font=font)
