"""Codecs: what goes through a message comes back equal, and malformed messages are refused by path and value."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ome_tensor.errors import InvalidArgument, InvalidSelection
from ome_tensor.plan import Plan
from ome_tensor.selection import Extent, Selection, compact
from ome_tensor.tiling import Order, Tiling
from ome_tensor_proto import codec
from ome_tensor_proto.v1 import tensor_service_pb2, view_pb2

DTYPES = "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64 complex64 complex128".split()

int64 = st.integers(-(2**63), 2**63 - 1)
size = st.integers(1, 2**40)
slices = st.builds(slice, st.none() | int64, st.none() | int64, st.none() | int64.filter(bool))
indices = st.none() | int64 | slices | st.lists(int64, max_size=5)


@st.composite
def plans(draw):
    arguments = {axis: draw(indices) for axis in "tzc"}
    kind = draw(st.sampled_from(["", "roi", "roi3d", "tile", "2d", "2d_timelapse", "3d", "4d"]))
    length = {"roi": 4, "roi3d": 6, "tile": 2, "2d": 4, "2d_timelapse": 6, "3d": 6, "4d": 8}.get(kind, 0)
    values = draw(st.tuples(*[int64] * length))
    if kind in ("roi", "roi3d", "tile"):
        arguments[kind] = values
    elif kind:
        arguments |= {"roi_nd": values, "roi_type": kind}
    if kind in ("2d_timelapse", "4d"):
        arguments["t"] = None
    if kind in ("roi3d", "3d", "4d"):
        arguments["z"] = None
    letters = draw(st.permutations("TZCYX"))
    arguments["layout"] = draw(st.none() | st.integers(1, 5).map(lambda n: "".join(letters[:n])))
    arguments["dtype"] = draw(st.none() | st.sampled_from(DTYPES))
    arguments["channel_policy"] = draw(st.sampled_from(["error", "first"]))
    return Plan.of(arguments)


def over_the_wire(message):
    return type(message).FromString(message.SerializeToString())


@settings(deadline=None)
@given(plans(), st.sampled_from(["numpy", "arrow"]))
def test_plans_come_back(plan, mode):
    view = over_the_wire(codec.plan_to_proto(plan, mode=mode))
    assert codec.plan_from_proto(view) == plan
    assert codec.mode_from_proto(view) == mode


far, small = st.integers(-(2**62), 2**62), st.integers(1, 2**31 - 1)
tilings = st.one_of(
    st.builds(Tiling, edge=st.sampled_from(["clip", "drop"])),
    st.builds(Tiling.time_batches, size, st.sampled_from(["clip", "drop"])),
    st.builds(Tiling.tiles, st.tuples(size, size), st.sampled_from(["clip", "pad", "drop"]), st.floats(allow_nan=False)),
    st.builds(Tiling.tiles_3d, st.tuples(size, size, size), st.sampled_from(["clip", "pad", "drop"]), st.floats(allow_nan=False)),
    st.builds(
        Tiling.windows,
        st.lists(st.tuples(far, far)),
        st.tuples(small, small),
        st.sampled_from(["clip", "pad"]),
        st.floats(allow_nan=False),
    ),
    st.builds(Tiling.windows, st.lists(st.tuples(far, far, far, far), min_size=1), st.tuples(small, small, small, small)),
)


@settings(deadline=None)
@given(tilings)
def test_tilings_come_back(tiling):
    assert codec.tiling_from_proto(over_the_wire(codec.tiling_to_proto(tiling))) == tiling


def test_a_pad_value_may_be_nan():
    tiling = Tiling.tiles((2, 2), "pad", float("nan"))
    assert np.isnan(codec.tiling_from_proto(over_the_wire(codec.tiling_to_proto(tiling))).pad)


@st.composite
def orders(draw):
    shuffle = draw(st.booleans())
    seed = draw(st.integers(0, 2**64 - 1) if shuffle else st.none() | st.integers(0, 2**64 - 1))
    count = draw(st.integers(1, 2**64 - 1))
    return Order(shuffle, seed, draw(st.integers(0, count - 1)), count, draw(st.integers(0, 2**64 - 1)))


@settings(deadline=None)
@given(orders(), st.integers(0, 2**64 - 1))
def test_orders_come_back(order, start_slab):
    message = over_the_wire(codec.order_to_proto(order, start_slab=start_slab))
    assert codec.order_from_proto(message) == order
    assert message.start_slab == start_slab


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 2**40), max_size=5).map(compact)
    | st.builds(range, st.integers(0, 50), st.integers(0, 50), st.just(1)),
    st.builds(range, st.integers(0, 20), st.integers(0, 20), st.integers(1, 5)),
    # Downwards, as far as 0.
    st.builds(range, st.integers(0, 20), st.integers(-1, 20), st.integers(-5, -1)),
    st.tuples(st.integers(0, 2**40), st.integers(0, 2**40), size, size),
)
def test_selections_come_back(t, z, c, roi):
    selection = Selection(t, z, c, *roi)
    found = codec.selection_from_proto(over_the_wire(codec.selection_to_proto(selection)))
    assert (tuple(found.t), tuple(found.z), tuple(found.c), found.roi) == (tuple(t), tuple(z), tuple(c), roi)
    assert (type(found.t), type(found.z)) == (type(t), range)


@settings(deadline=None)
@given(plans())
def test_a_resolved_plan_selects_the_same_here_and_there(plan):
    try:
        selection = plan.resolve(Extent(3, 4, 5, 60, 70), np.dtype(np.uint16)).selection
    except InvalidSelection:
        return
    assert codec.selection_from_proto(over_the_wire(codec.selection_to_proto(selection))) == selection


def test_empty_messages_are_the_defaults():
    assert codec.plan_from_proto(view_pb2.View()) == Plan()
    assert codec.mode_from_proto(view_pb2.View()) == "numpy"
    assert codec.order_from_proto(view_pb2.Order()) == Order()
    assert codec.tiling_from_proto(view_pb2.Tiling(whole={})) == Tiling()


def test_slices_beyond_64_bits_mean_the_same():
    plan = codec.plan_from_proto(codec.plan_to_proto(Plan.of({"t": slice(-(10**30), 10**30)})))
    assert plan.resolve(Extent(3, 1, 1, 2, 2), np.dtype("u1")).selection.t == range(3)


Axis, View = view_pb2.AxisIndex, view_pb2.View


@pytest.mark.parametrize(
    "view, error, field, value",
    [
        (View(t=Axis()), InvalidSelection, "view.t", None),
        (View(z=Axis(slice={"step": 0})), InvalidSelection, "view.z", "0"),
        (View(region={}), InvalidSelection, "view.region", None),
        (View(region={"roi_nd": {"bounds": [0, 0, 1, 1]}}), InvalidSelection, "view.region.roi_nd.type", "0"),
        (View(region={"roi_nd": {"type": 99, "bounds": [0]}}), InvalidSelection, "view.region.roi_nd.type", "99"),
        (View(region={"roi_nd": {"type": "ROI_ND_TYPE_3D", "bounds": [1, 2]}}), InvalidSelection, "view.region.roi_nd", "(1, 2)"),
        (View(z=Axis(index=0), region={"roi3d": {"w": 1}}), InvalidSelection, "view.region.roi3d", None),
        (View(layout="QQ"), InvalidArgument, "view.layout", "QQ"),
        (View(dtype="O"), InvalidArgument, "view.dtype", "object"),
        (View(dtype="f8,(2"), InvalidArgument, "view.dtype", "f8,(2"),
        (View(channel_policy=7), InvalidArgument, "view.channel_policy", "7"),
        (View(mode=7), InvalidArgument, "view.mode", "7"),
    ],
)
def test_malformed_views_are_refused_by_path_and_value(view, error, field, value):
    with pytest.raises(error) as caught:
        codec.plan_from_proto(over_the_wire(view))
    assert (caught.value.field, caught.value.value) == (field, value)
    assert type(caught.value) is error


Cut = view_pb2.Tiling


@pytest.mark.parametrize(
    "message, error, field",
    [
        (Cut(), InvalidArgument, "tiling"),
        (Cut(edge=9, whole={}), InvalidArgument, "tiling.edge"),
        (Cut(edge="EDGE_POLICY_PAD", whole={}), InvalidArgument, "tiling.edge"),
        (Cut(edge="EDGE_POLICY_PAD", time_batches={"t": 1}), InvalidArgument, "tiling.edge"),
        (Cut(time_batches={}), InvalidArgument, "tiling.time_batches"),
        (Cut(tiles={"h": 4}), InvalidArgument, "tiling.tiles"),
        (Cut(centred={"h": 4}), InvalidArgument, "tiling.centred"),
        (Cut(tiles_3d={"h": 4, "w": 4}), InvalidArgument, "tiling.tiles_3d"),
        (
            Cut(windows={"h": 4, "w": 4, "image": [0, 2**40], "origin_y": [0, 0], "origin_x": [0, 0]}),
            InvalidSelection,
            "tiling.windows",
        ),
        (Cut(windows={"h": 4, "w": 4, "image": [0], "origin_y": [0, 0], "origin_x": [0, 0]}), InvalidSelection, "tiling.windows"),
        (Cut(windows={"t": 1, "h": 4, "w": 4}), InvalidArgument, "tiling.windows"),
        (Cut(windows={"h": 4, "w": 0, "origin_y": [0], "origin_x": [0]}), InvalidArgument, "tiling.windows"),
        (Cut(windows={"h": 4, "w": 2**31, "origin_y": [0], "origin_x": [0]}), InvalidArgument, "tiling.windows"),
        (Cut(windows={"h": 4, "w": 4, "origin_y": [0]}), InvalidSelection, "tiling.windows"),
        (Cut(windows={"h": 4, "w": 4, "origin_t": [0], "origin_y": [0], "origin_x": [0]}), InvalidSelection, "tiling.windows"),
        (Cut(windows={"t": 1, "z": 1, "h": 4, "w": 4, "origin_y": [0], "origin_x": [0]}), InvalidSelection, "tiling.windows"),
        (Cut(windows={"h": 4, "w": 4, "origin_y": [2**63 - 1], "origin_x": [0]}), InvalidSelection, "tiling.windows"),
        (Cut(edge="EDGE_POLICY_DROP", windows={"h": 4, "w": 4}), InvalidArgument, "tiling.edge"),
        (view_pb2.Order(shuffle=True), InvalidArgument, "order.seed"),
        (view_pb2.Order(shard_index=1), InvalidArgument, "order.shard_index"),
        (view_pb2.Order(spans=[{"count": 1}], shard_count=2), InvalidArgument, "order.spans"),
    ],
)
def test_malformed_tilings_and_orders_are_refused_by_path(message, error, field):
    decode = codec.tiling_from_proto if isinstance(message, Cut) else codec.order_from_proto
    with pytest.raises(error) as caught:
        decode(over_the_wire(message))
    assert caught.value.field == field


@pytest.mark.parametrize(
    "message, field",
    [
        (view_pb2.Selection(roi={"w": 1, "h": 1}), "selection.t"),
        (view_pb2.Selection(t=Axis(index=1)), "selection.t"),
        (view_pb2.Selection(t=Axis(list={"values": [-1]})), "selection.t"),
        (view_pb2.Selection(t=Axis(slice={"start": -3, "stop": 1, "step": 1})), "selection.t"),
        (view_pb2.Selection(t=Axis(slice={"start": 0, "step": 1})), "selection.t"),
        (view_pb2.Selection(t=Axis(list={}), z=Axis(list={}), c=Axis(list={})), "selection.roi"),
    ],
)
def test_selections_that_are_not_resolved_are_refused(message, field):
    with pytest.raises(InvalidSelection) as caught:
        codec.selection_from_proto(over_the_wire(message))
    assert caught.value.field == field


@pytest.mark.parametrize("arguments", [{"t": 2**63}, {"z": [0, -(2**63) - 1]}, {"roi": (0, 0, 1, 2**64)}])
def test_numbers_that_do_not_fit_are_refused_before_they_are_sent(arguments):
    with pytest.raises(InvalidSelection, match="64 bits"):
        codec.plan_to_proto(Plan.of(arguments))


def test_orders_and_tilings_that_cannot_be_sent_are_refused():
    with pytest.raises(InvalidArgument, match="seed"):
        codec.order_to_proto(Order(shuffle=True))
    with pytest.raises(InvalidArgument, match="64 bits"):
        codec.order_to_proto(Order(start=2**64))
    with pytest.raises(InvalidArgument, match="64 bits"):
        codec.tiling_to_proto(Tiling.tiles((2**64, 1)))
    with pytest.raises(InvalidArgument, match="pad"):
        codec.tiling_to_proto(Tiling.tiles((1, 1), "pad", 10**400))


@pytest.mark.parametrize(
    "fields, error, field",
    [
        ({"keys": []}, InvalidArgument, "keys"),
        ({"image_rows": {"dataset": "a", "rows": [1]}}, InvalidArgument, "keys"),
        ({"keys": [], "image_rows": {"dataset": "a"}}, InvalidArgument, "image_rows.rows"),
        ({"checksum": 77}, InvalidArgument, "checksum"),
    ],
)
def test_a_read_says_of_which_images_and_knows_its_checksum(fields, error, field):
    request = tensor_service_pb2.ReadTilesRequest(**({"keys": ["a"]} | fields))

    def check(request: tensor_service_pb2.ReadTilesRequest) -> bool:
        codec.check_images_named(request)
        return codec.wants_checksum(request)

    with pytest.raises(error) as caught:
        check(over_the_wire(request))
    assert caught.value.field == field
    whole = tensor_service_pb2.ReadTilesRequest(keys=["a"], compression="COMPRESSION_NONE")
    codec.check_images_named(whole)
    assert not codec.wants_checksum(whole)
    whole.checksum = tensor_service_pb2.CHECKSUM_KIND_XXH3_64
    assert codec.wants_checksum(whole)


def test_compressions_are_words():
    for word in ("none", "lz4", "zstd"):
        assert codec.compression_from_proto(codec.compression_to_proto(word)) == word
    assert codec.compression_from_proto(tensor_service_pb2.COMPRESSION_UNSPECIFIED) == "none"
    with pytest.raises(InvalidArgument, match="77") as caught:
        codec.compression_from_proto(77)
    assert caught.value.field == "compression"
