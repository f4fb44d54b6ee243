"""Pictures: contrast, colours, composites; and pieces of a view put together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ome_tensor.errors import InvalidArgument, InvalidSelection
from ome_tensor.plan import Plan
from ome_tensor.record import Channel, ImageMeta
from ome_tensor.selection import Extent
from ome_tensor_client import imaging
from ome_tensor_client.cli_arguments import parse_index, parse_numbers
from ome_tensor_client.cli_output import printable
from ome_tensor_client.files import Blocks, project, write_npy
from ome_tensor_client.options import checked_target

DTYPES = "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64".split()

planes = st.sampled_from(DTYPES).flatmap(lambda name: hnp.arrays(name, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9)))


def color(rgba: int | None) -> Channel:
    return Channel(color_rgba=rgba)


# -- contrast ------------------------------------------------------------------------------------------------------------------


@given(planes)
def test_any_plane_has_limits_in_order_and_a_brightness_from_0_to_1(plane: np.ndarray) -> None:
    low, high = imaging.contrast_of(plane)
    assert np.isfinite([low, high]).all()
    assert low <= high
    bright = imaging.stretch(plane, (low, high))
    assert bright.dtype == np.float32
    assert bright.shape == plane.shape
    assert bright.min() >= 0
    assert bright.max() <= 1
    if plane.dtype.kind == "f":
        assert (bright[np.isnan(plane)] == 0).all()


@example(np.array([[0, -np.inf]], np.float16))
@example(np.array([[3, np.inf, -np.inf, np.nan]], np.float32))
@given(planes)
def test_a_brighter_pixel_is_never_darker(plane: np.ndarray) -> None:
    bright = imaging.stretch(plane, imaging.contrast_of(plane)).ravel()
    values = plane.astype(np.float64).ravel()
    values, bright = values[~np.isnan(values)], bright[~np.isnan(values)]
    assert (np.diff(bright[np.argsort(values, kind="stable")]) >= 0).all()


def test_limits_are_percentiles() -> None:
    plane = np.arange(1001, dtype=np.uint16).reshape(7, 143)
    assert imaging.contrast_of(plane) == pytest.approx((5, 998))
    assert imaging.contrast_of(plane, 0, 100) == (0, 1000)


def test_a_few_bright_spots_in_the_dark_are_seen() -> None:
    plane = np.zeros((100, 100), np.uint16)
    plane[50, 50] = 900
    assert imaging.contrast_of(plane) == (0, 900)


def test_a_mask_is_black_and_white() -> None:
    plane = np.array([[False, True]])
    np.testing.assert_array_equal(imaging.stretch(plane, imaging.contrast_of(plane)), [[0, 1]])
    full = np.ones((2, 2), bool)
    np.testing.assert_array_equal(imaging.stretch(full, imaging.contrast_of(full)), np.ones((2, 2)))


@pytest.mark.parametrize("value,bright", [(0, 0), (7, 0.5), (-3.5, 0.5), (np.nan, 0), (np.inf, 1), (-np.inf, 0)])
def test_a_constant_plane(value: float, bright: float) -> None:
    plane = np.full((3, 4), value, np.float32)
    np.testing.assert_array_equal(imaging.stretch(plane, imaging.contrast_of(plane)), np.full((3, 4), bright))


def test_infinities_do_not_spoil_the_contrast() -> None:
    plane = np.array([[np.nan, 0, 1, 2, np.inf, -np.inf]])
    np.testing.assert_allclose(imaging.stretch(plane, imaging.contrast_of(plane, 0, 100)), [[0, 0, 0.5, 1, 1, 0]])


# -- colours and composites ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "channels,colors",
    [
        ([None], [(255, 255, 255)]),
        ([color(0xFFFFFFFF)], [(255, 255, 255)]),
        ([color(0x1020FF00)], [(16, 32, 255)]),
        # No colours of their own: the palette.
        ([None, None], [(255, 0, 255), (0, 255, 0)]),
        ([color(0xFFFFFFFF), color(None), color(0x000000FF)], [(255, 0, 255), (0, 255, 0), (0, 255, 255)]),
        # One has: the others stay white.
        ([color(0xFF0000FF), color(0xFFFFFFFF)], [(255, 0, 0), (255, 255, 255)]),
        ([], []),
    ],
)
def test_colors(channels: list[Channel | None], colors: list[imaging.Color]) -> None:
    assert imaging.colors_of(channels) == colors


def test_there_are_colors_for_any_number_of_channels() -> None:
    found = imaging.colors_of([None] * 14)
    assert len(found) == 14
    assert len(set(found[: len(imaging.PALETTE)])) == len(imaging.PALETTE)


@given(st.data())
def test_a_composite_is_the_clipped_sum_of_its_channels(data: st.DataObject) -> None:
    shape = data.draw(hnp.array_shapes(min_dims=2, max_dims=2, max_side=6))
    count = data.draw(st.integers(1, 4))
    stack = [data.draw(hnp.arrays(np.uint16, shape)) for _ in range(count)]
    colors = data.draw(st.lists(st.tuples(*[st.integers(0, 255)] * 3), min_size=count, max_size=count))
    limits = [(0.0, 65535.0)] * count
    picture = imaging.composite(stack, colors, limits)
    assert picture.dtype == np.uint8
    expected = sum(plane[..., None] / 65535 * np.array(color) for plane, color in zip(stack, colors, strict=True))
    assert np.abs(picture - np.minimum(expected, 255)).max() <= 0.51


def test_no_picture_of_nothing_or_of_complex_numbers() -> None:
    with pytest.raises(InvalidArgument, match="at least one channel"):
        imaging.composite([], [])
    with pytest.raises(InvalidArgument, match="complex"):
        imaging.composite([np.zeros((2, 2), np.complex64)], [(255, 255, 255)])


# -- pieces of a view ----------------------------------------------------------------------------------------------------------


def cut(array: np.ndarray, cuts: tuple[int, ...]) -> Blocks:
    """A TZCYX array in blocks: one t each, and so many z and rows."""
    for t in range(array.shape[0]):
        for z in range(0, array.shape[1], cuts[0]):
            for y in range(0, array.shape[3], cuts[1]):
                block = array[t : t + 1, z : z + cuts[0], :, y : y + cuts[1]]
                yield (slice(t, t + 1), slice(z, z + cuts[0]), slice(None), slice(y, y + cuts[1]), slice(None)), block


stacks = st.sampled_from(["bool", "int8", "uint16", "float32"]).flatmap(
    lambda name: hnp.arrays(name, st.tuples(st.just(1), *[st.integers(1, 5)] * 4))
)


@given(stacks, st.tuples(st.integers(1, 5), st.integers(1, 5)))
def test_a_projection_in_pieces_is_the_maximum_over_z(stack: np.ndarray, cuts: tuple[int, int]) -> None:
    plan = Plan(layout="TZCHW").resolve(Extent(*stack.shape), stack.dtype)
    told: list[int] = []
    planes = project(plan, cut(stack, cuts), told.append)
    np.testing.assert_array_equal(np.stack(planes), np.fmax.reduce(stack[0], axis=0))
    assert sum(told) == stack.nbytes


@given(stacks, st.tuples(st.integers(1, 5), st.integers(1, 5)), st.permutations("TZCHW"))
def test_npy_is_as_numpy_would_write_it(
    tmp_path_factory: pytest.TempPathFactory, stack: np.ndarray, cuts: tuple[int, int], letters: list[str]
) -> None:
    plan = Plan(layout="".join(letters)).resolve(Extent(*stack.shape), stack.dtype)
    path = tmp_path_factory.mktemp("npy") / "view.npy"
    write_npy(path, plan, cut(stack, cuts), lambda count: None)
    expected = np.ascontiguousarray(stack.transpose(["TZCHW".index(letter) for letter in letters]))
    np.save(path.with_name("expected.npy"), expected)
    assert path.read_bytes() == path.with_name("expected.npy").read_bytes()


def test_a_read_that_fails_leaves_the_old_file_as_it_was(tmp_path: Path) -> None:
    plan = Plan(layout="TZCHW").resolve(Extent(1, 2, 1, 3, 4), np.dtype(np.uint8))
    path = tmp_path / "view.npy"
    path.write_text("old")

    def broken() -> Blocks:
        yield from cut(np.zeros((1, 1, 1, 3, 4), np.uint8), (1, 3))
        raise ConnectionError

    with pytest.raises(ConnectionError):
        write_npy(path, plan, broken(), lambda count: None)
    assert [(found.name, found.read_text()) for found in tmp_path.iterdir()] == [("view.npy", "old")]


# -- words of the command line -------------------------------------------------------------------------------------------------


@given(st.integers(-5, 5), st.none() | st.integers(-9, 9), st.none() | st.integers(-9, 9), st.none() | st.integers(-9, 9))
def test_indices_mean_what_python_means(number: int, start: int | None, stop: int | None, step: int | None) -> None:
    assert parse_index(str(number), "t") == number
    text = ":".join("" if part is None else str(part) for part in (start, stop, step))
    assert parse_index(text, "t") == slice(start, stop, step)
    assert parse_index(text.rpartition(":")[0], "t") == slice(start, stop)


@given(st.lists(st.integers(-99, 99), min_size=2, max_size=6))
def test_lists_keep_their_order(numbers: list[int]) -> None:
    assert parse_index(",".join(map(str, numbers)), "t") == numbers
    names = ",".join("abcdef"[: len(numbers)])
    assert parse_numbers(", ".join(map(str, numbers)), names, "roi") == tuple(numbers)


@pytest.mark.parametrize("text", ["", "x", "1.5", "1,", ",", "1:2:3:4", "1:x", "1_000", "٣", "0x3", "1 2"])
def test_what_is_no_index(text: str) -> None:
    with pytest.raises(InvalidSelection, match="--z takes an index"):
        parse_index(text, "z")


@pytest.mark.parametrize(
    "target", ["a:1", "10.0.0.1:50051", "[::1]:50051", "server.lab.example:65535", "unix:/run/x", "dns:///a:1"]
)
def test_targets(target: str) -> None:
    assert checked_target(target) == target


@pytest.mark.parametrize("target", ["", "a", ":1", "a:", "a:0", "a:65536", "a:b", "::1:5", "a:-1", "http://a", "a:٣"])
def test_what_is_no_target(target: str) -> None:
    with pytest.raises(InvalidArgument, match="target must be HOST:PORT"):
        checked_target(target)


@given(st.text())
def test_printable_is_one_line_without_control(text: str) -> None:
    shown: Any = printable(text)
    assert shown.isprintable()
    if text.isprintable():
        assert shown == text


def test_metadata_shorter_than_the_image() -> None:
    """Records describe fewer channels than they have; nobody is to fall over that."""
    from ome_tensor_client.files import picture_colors

    extent = Extent(1, 1, 3, 2, 2)
    meta = ImageMeta(extent, np.dtype(np.uint8), channels=(Channel(color_rgba=0xFF0000FF),))
    plan = Plan(c=(2, 0)).resolve(extent, meta.dtype)
    assert picture_colors(plan, meta) == [(255, 255, 255), (255, 0, 0)]
