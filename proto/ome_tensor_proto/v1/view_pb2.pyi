from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ChannelPolicy(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CHANNEL_POLICY_UNSPECIFIED: _ClassVar[ChannelPolicy]
    CHANNEL_POLICY_ERROR: _ClassVar[ChannelPolicy]
    CHANNEL_POLICY_FIRST: _ClassVar[ChannelPolicy]

class ViewMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    VIEW_MODE_UNSPECIFIED: _ClassVar[ViewMode]
    VIEW_MODE_TENSOR: _ClassVar[ViewMode]
    VIEW_MODE_ARROW: _ClassVar[ViewMode]

class RoiNdType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROI_ND_TYPE_UNSPECIFIED: _ClassVar[RoiNdType]
    ROI_ND_TYPE_2D: _ClassVar[RoiNdType]
    ROI_ND_TYPE_2D_TIMELAPSE: _ClassVar[RoiNdType]
    ROI_ND_TYPE_3D: _ClassVar[RoiNdType]
    ROI_ND_TYPE_4D: _ClassVar[RoiNdType]

class EdgePolicy(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    EDGE_POLICY_UNSPECIFIED: _ClassVar[EdgePolicy]
    EDGE_POLICY_CLIP: _ClassVar[EdgePolicy]
    EDGE_POLICY_PAD: _ClassVar[EdgePolicy]
    EDGE_POLICY_DROP: _ClassVar[EdgePolicy]
CHANNEL_POLICY_UNSPECIFIED: ChannelPolicy
CHANNEL_POLICY_ERROR: ChannelPolicy
CHANNEL_POLICY_FIRST: ChannelPolicy
VIEW_MODE_UNSPECIFIED: ViewMode
VIEW_MODE_TENSOR: ViewMode
VIEW_MODE_ARROW: ViewMode
ROI_ND_TYPE_UNSPECIFIED: RoiNdType
ROI_ND_TYPE_2D: RoiNdType
ROI_ND_TYPE_2D_TIMELAPSE: RoiNdType
ROI_ND_TYPE_3D: RoiNdType
ROI_ND_TYPE_4D: RoiNdType
EDGE_POLICY_UNSPECIFIED: EdgePolicy
EDGE_POLICY_CLIP: EdgePolicy
EDGE_POLICY_PAD: EdgePolicy
EDGE_POLICY_DROP: EdgePolicy

class View(_message.Message):
    __slots__ = ("t", "z", "c", "region", "layout", "dtype", "channel_policy", "mode")
    T_FIELD_NUMBER: _ClassVar[int]
    Z_FIELD_NUMBER: _ClassVar[int]
    C_FIELD_NUMBER: _ClassVar[int]
    REGION_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    CHANNEL_POLICY_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    t: AxisIndex
    z: AxisIndex
    c: AxisIndex
    region: Region
    layout: str
    dtype: str
    channel_policy: ChannelPolicy
    mode: ViewMode
    def __init__(self, t: _Optional[_Union[AxisIndex, _Mapping]] = ..., z: _Optional[_Union[AxisIndex, _Mapping]] = ..., c: _Optional[_Union[AxisIndex, _Mapping]] = ..., region: _Optional[_Union[Region, _Mapping]] = ..., layout: _Optional[str] = ..., dtype: _Optional[str] = ..., channel_policy: _Optional[_Union[ChannelPolicy, str]] = ..., mode: _Optional[_Union[ViewMode, str]] = ...) -> None: ...

class AxisIndex(_message.Message):
    __slots__ = ("index", "slice", "list")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    SLICE_FIELD_NUMBER: _ClassVar[int]
    LIST_FIELD_NUMBER: _ClassVar[int]
    index: int
    slice: IndexSlice
    list: IndexList
    def __init__(self, index: _Optional[int] = ..., slice: _Optional[_Union[IndexSlice, _Mapping]] = ..., list: _Optional[_Union[IndexList, _Mapping]] = ...) -> None: ...

class IndexSlice(_message.Message):
    __slots__ = ("start", "stop", "step")
    START_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    start: int
    stop: int
    step: int
    def __init__(self, start: _Optional[int] = ..., stop: _Optional[int] = ..., step: _Optional[int] = ...) -> None: ...

class IndexList(_message.Message):
    __slots__ = ("values",)
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, values: _Optional[_Iterable[int]] = ...) -> None: ...

class Region(_message.Message):
    __slots__ = ("roi", "roi3d", "roi_nd", "tile")
    ROI_FIELD_NUMBER: _ClassVar[int]
    ROI3D_FIELD_NUMBER: _ClassVar[int]
    ROI_ND_FIELD_NUMBER: _ClassVar[int]
    TILE_FIELD_NUMBER: _ClassVar[int]
    roi: Roi
    roi3d: Roi3d
    roi_nd: RoiNd
    tile: GridTile
    def __init__(self, roi: _Optional[_Union[Roi, _Mapping]] = ..., roi3d: _Optional[_Union[Roi3d, _Mapping]] = ..., roi_nd: _Optional[_Union[RoiNd, _Mapping]] = ..., tile: _Optional[_Union[GridTile, _Mapping]] = ...) -> None: ...

class Roi(_message.Message):
    __slots__ = ("x", "y", "w", "h")
    X_FIELD_NUMBER: _ClassVar[int]
    Y_FIELD_NUMBER: _ClassVar[int]
    W_FIELD_NUMBER: _ClassVar[int]
    H_FIELD_NUMBER: _ClassVar[int]
    x: int
    y: int
    w: int
    h: int
    def __init__(self, x: _Optional[int] = ..., y: _Optional[int] = ..., w: _Optional[int] = ..., h: _Optional[int] = ...) -> None: ...

class Roi3d(_message.Message):
    __slots__ = ("x", "y", "z", "w", "h", "d")
    X_FIELD_NUMBER: _ClassVar[int]
    Y_FIELD_NUMBER: _ClassVar[int]
    Z_FIELD_NUMBER: _ClassVar[int]
    W_FIELD_NUMBER: _ClassVar[int]
    H_FIELD_NUMBER: _ClassVar[int]
    D_FIELD_NUMBER: _ClassVar[int]
    x: int
    y: int
    z: int
    w: int
    h: int
    d: int
    def __init__(self, x: _Optional[int] = ..., y: _Optional[int] = ..., z: _Optional[int] = ..., w: _Optional[int] = ..., h: _Optional[int] = ..., d: _Optional[int] = ...) -> None: ...

class RoiNd(_message.Message):
    __slots__ = ("type", "bounds")
    TYPE_FIELD_NUMBER: _ClassVar[int]
    BOUNDS_FIELD_NUMBER: _ClassVar[int]
    type: RoiNdType
    bounds: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, type: _Optional[_Union[RoiNdType, str]] = ..., bounds: _Optional[_Iterable[int]] = ...) -> None: ...

class GridTile(_message.Message):
    __slots__ = ("tile_y", "tile_x")
    TILE_Y_FIELD_NUMBER: _ClassVar[int]
    TILE_X_FIELD_NUMBER: _ClassVar[int]
    tile_y: int
    tile_x: int
    def __init__(self, tile_y: _Optional[int] = ..., tile_x: _Optional[int] = ...) -> None: ...

class Selection(_message.Message):
    __slots__ = ("t", "z", "c", "roi")
    T_FIELD_NUMBER: _ClassVar[int]
    Z_FIELD_NUMBER: _ClassVar[int]
    C_FIELD_NUMBER: _ClassVar[int]
    ROI_FIELD_NUMBER: _ClassVar[int]
    t: AxisIndex
    z: AxisIndex
    c: AxisIndex
    roi: Roi
    def __init__(self, t: _Optional[_Union[AxisIndex, _Mapping]] = ..., z: _Optional[_Union[AxisIndex, _Mapping]] = ..., c: _Optional[_Union[AxisIndex, _Mapping]] = ..., roi: _Optional[_Union[Roi, _Mapping]] = ...) -> None: ...

class Tiling(_message.Message):
    __slots__ = ("whole", "time_batches", "tiles", "tiles_3d", "windows", "centred", "edge", "pad_value")
    WHOLE_FIELD_NUMBER: _ClassVar[int]
    TIME_BATCHES_FIELD_NUMBER: _ClassVar[int]
    TILES_FIELD_NUMBER: _ClassVar[int]
    TILES_3D_FIELD_NUMBER: _ClassVar[int]
    WINDOWS_FIELD_NUMBER: _ClassVar[int]
    CENTRED_FIELD_NUMBER: _ClassVar[int]
    EDGE_FIELD_NUMBER: _ClassVar[int]
    PAD_VALUE_FIELD_NUMBER: _ClassVar[int]
    whole: WholeCut
    time_batches: TimeBatchesCut
    tiles: TilesCut
    tiles_3d: Tiles3dCut
    windows: WindowsCut
    centred: CentredCut
    edge: EdgePolicy
    pad_value: float
    def __init__(self, whole: _Optional[_Union[WholeCut, _Mapping]] = ..., time_batches: _Optional[_Union[TimeBatchesCut, _Mapping]] = ..., tiles: _Optional[_Union[TilesCut, _Mapping]] = ..., tiles_3d: _Optional[_Union[Tiles3dCut, _Mapping]] = ..., windows: _Optional[_Union[WindowsCut, _Mapping]] = ..., centred: _Optional[_Union[CentredCut, _Mapping]] = ..., edge: _Optional[_Union[EdgePolicy, str]] = ..., pad_value: _Optional[float] = ...) -> None: ...

class WholeCut(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class TimeBatchesCut(_message.Message):
    __slots__ = ("t",)
    T_FIELD_NUMBER: _ClassVar[int]
    t: int
    def __init__(self, t: _Optional[int] = ...) -> None: ...

class TilesCut(_message.Message):
    __slots__ = ("h", "w")
    H_FIELD_NUMBER: _ClassVar[int]
    W_FIELD_NUMBER: _ClassVar[int]
    h: int
    w: int
    def __init__(self, h: _Optional[int] = ..., w: _Optional[int] = ...) -> None: ...

class Tiles3dCut(_message.Message):
    __slots__ = ("z", "h", "w")
    Z_FIELD_NUMBER: _ClassVar[int]
    H_FIELD_NUMBER: _ClassVar[int]
    W_FIELD_NUMBER: _ClassVar[int]
    z: int
    h: int
    w: int
    def __init__(self, z: _Optional[int] = ..., h: _Optional[int] = ..., w: _Optional[int] = ...) -> None: ...

class CentredCut(_message.Message):
    __slots__ = ("z", "h", "w")
    Z_FIELD_NUMBER: _ClassVar[int]
    H_FIELD_NUMBER: _ClassVar[int]
    W_FIELD_NUMBER: _ClassVar[int]
    z: int
    h: int
    w: int
    def __init__(self, z: _Optional[int] = ..., h: _Optional[int] = ..., w: _Optional[int] = ...) -> None: ...

class WindowsCut(_message.Message):
    __slots__ = ("t", "z", "h", "w", "image", "origin_t", "origin_z", "origin_y", "origin_x")
    T_FIELD_NUMBER: _ClassVar[int]
    Z_FIELD_NUMBER: _ClassVar[int]
    H_FIELD_NUMBER: _ClassVar[int]
    W_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    ORIGIN_T_FIELD_NUMBER: _ClassVar[int]
    ORIGIN_Z_FIELD_NUMBER: _ClassVar[int]
    ORIGIN_Y_FIELD_NUMBER: _ClassVar[int]
    ORIGIN_X_FIELD_NUMBER: _ClassVar[int]
    t: int
    z: int
    h: int
    w: int
    image: _containers.RepeatedScalarFieldContainer[int]
    origin_t: _containers.RepeatedScalarFieldContainer[int]
    origin_z: _containers.RepeatedScalarFieldContainer[int]
    origin_y: _containers.RepeatedScalarFieldContainer[int]
    origin_x: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, t: _Optional[int] = ..., z: _Optional[int] = ..., h: _Optional[int] = ..., w: _Optional[int] = ..., image: _Optional[_Iterable[int]] = ..., origin_t: _Optional[_Iterable[int]] = ..., origin_z: _Optional[_Iterable[int]] = ..., origin_y: _Optional[_Iterable[int]] = ..., origin_x: _Optional[_Iterable[int]] = ...) -> None: ...

class Order(_message.Message):
    __slots__ = ("shuffle", "seed", "shard_index", "shard_count", "start", "start_slab", "spans")
    SHUFFLE_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    SHARD_INDEX_FIELD_NUMBER: _ClassVar[int]
    SHARD_COUNT_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    START_SLAB_FIELD_NUMBER: _ClassVar[int]
    SPANS_FIELD_NUMBER: _ClassVar[int]
    shuffle: bool
    seed: int
    shard_index: int
    shard_count: int
    start: int
    start_slab: int
    spans: _containers.RepeatedCompositeFieldContainer[PositionSpan]
    def __init__(self, shuffle: bool = ..., seed: _Optional[int] = ..., shard_index: _Optional[int] = ..., shard_count: _Optional[int] = ..., start: _Optional[int] = ..., start_slab: _Optional[int] = ..., spans: _Optional[_Iterable[_Union[PositionSpan, _Mapping]]] = ...) -> None: ...

class PositionSpan(_message.Message):
    __slots__ = ("first", "count", "stride")
    FIRST_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    STRIDE_FIELD_NUMBER: _ClassVar[int]
    first: int
    count: int
    stride: int
    def __init__(self, first: _Optional[int] = ..., count: _Optional[int] = ..., stride: _Optional[int] = ...) -> None: ...
