"""Planes to a picture: contrast, colours, additive composite. Pure NumPy; knows nothing of files, servers or views."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

from ome_tensor.errors import InvalidArgument
from ome_tensor.record import Channel

__all__ = ["HIGH", "LOW", "PALETTE", "Color", "colors_of", "composite", "contrast_of", "stretch"]

#: Red, green and blue, 0 to 255.
Color: TypeAlias = tuple[int, int, int]

#: Percentiles that become black and full brightness. Background is broad and highlights are few: the darkest half percent may go, but
#: of the brightest, which are what one looks for, only two in a thousand.
LOW, HIGH = 0.5, 99.8

#: For channels that bring no colours of their own. Magenta with green, in place of red with green, can be told apart with any kind of
#: colour vision (B. Wong, "Points of view: Color blindness", Nature Methods 8, 441 (2011), doi:10.1038/nmeth.1618).
PALETTE: tuple[Color, ...] = (
    (255, 0, 255),  # magenta
    (0, 255, 0),  # green
    (0, 255, 255),  # cyan
    (255, 255, 0),  # yellow
    (0, 114, 255),  # blue
    (255, 128, 0),  # orange
)

_WHITE: Color = (255, 255, 255)


def colors_of(channels: Sequence[Channel | None]) -> list[Color]:
    """One display colour a channel.

    A channel's own colour is its ``color_rgba``; alpha is not used, since writers disagree on what it means and many leave it 0.
    White, black (invisible in a sum of light) and none at all count as having no colour. One such channel alone is shown in grey;
    where none of several has a colour, the palette gives them; beside coloured ones, those without are white.

    Args:
        channels: Their metadata in order; ``None`` where the record describes none.
    """
    own = [_own_color(channel) for channel in channels]
    if len(own) > 1 and not any(own):
        return [PALETTE[i % len(PALETTE)] for i in range(len(own))]
    return [color or _WHITE for color in own]


def _own_color(channel: Channel | None) -> Color | None:
    if channel is None or channel.color_rgba is None:
        return None
    rgba = channel.color_rgba
    color = (rgba >> 24 & 255, rgba >> 16 & 255, rgba >> 8 & 255)
    return None if color in ((0, 0, 0), _WHITE) else color


def contrast_of(plane: np.ndarray, low: float = LOW, high: float = HIGH) -> tuple[float, float]:
    """The values of a plane to show as black and as full brightness.

    Args:
        plane: Real numbers or booleans of any shape. Values that are not finite do not count.
        low, high: Percentiles.

    Returns:
        The limits, the first below the second; equal only where the plane is constant. Where the percentiles coincide (a dark plane
        with a few bright spots), the smallest and the largest value; ``(0, 1)`` for booleans, and where no value is finite.
    """
    if plane.dtype.kind == "b":
        return 0.0, 1.0
    # Percentiles of float16 or of 64-bit integers would be rounded, or overflow, in their own type.
    values = plane.astype(np.float64).ravel()
    values = values[np.isfinite(values)]
    if not values.size:
        return 0.0, 1.0
    bottom, top = np.percentile(values, (low, high))
    if not bottom < top:
        bottom, top = values.min(), values.max()
    return float(bottom), float(top)


def stretch(plane: np.ndarray, limits: tuple[float, float]) -> np.ndarray:
    """Brightness from 0 to 1, float32: linear between the limits, clipped beyond them; NaN is black.

    A constant plane (equal limits) has no contrast to show: it is black where its value is 0, and half bright otherwise, so that
    "nothing there" and "the same everywhere" look different.
    """
    bottom, top = limits
    values = plane.astype(np.float64)
    if bottom == top:
        # What is not finite lies beyond the limits here too.
        bright = np.where(values == bottom, 0.5 if bottom else 0.0, (values > top).astype(np.float64))
    else:
        # Halves, since the difference of two large numbers may exceed the largest.
        bright = np.clip((values / 2 - bottom / 2) / (top / 2 - bottom / 2), 0, 1)
    bright[np.isnan(values)] = 0
    return bright.astype(np.float32)


def composite(
    planes: Sequence[np.ndarray], colors: Sequence[Color], limits: Sequence[tuple[float, float]] | None = None
) -> np.ndarray:
    """Channels as one picture: each in its colour, added as light is, clipped at full brightness.

    Args:
        planes: One YX plane a channel.
        colors: One a channel.
        limits: Contrast, one a channel; default from each plane's percentiles.

    Returns:
        (Y, X, 3) uint8.

    Raises:
        InvalidArgument: no planes, or complex ones.
    """
    if not planes:
        raise InvalidArgument("a picture needs at least one channel", field="c")
    if any(plane.dtype.kind == "c" for plane in planes):
        raise InvalidArgument("complex pixels cannot be shown as a picture", field="dtype")
    light = np.zeros((*planes[0].shape, 3), np.float32)
    for plane, color, limit in zip(planes, colors, limits or map(contrast_of, planes), strict=True):
        bright = stretch(plane, limit)
        for i, part in enumerate(color):
            if part:
                light[..., i] += bright * np.float32(part)
    return np.clip(np.rint(light), 0, 255).astype(np.uint8)
