from google.protobuf import timestamp_pb2 as _timestamp_pb2
from ome_tensor_proto.v1 import image_pb2 as _image_pb2
from ome_tensor_proto.v1 import view_pb2 as _view_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Comparison(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    COMPARISON_UNSPECIFIED: _ClassVar[Comparison]
    COMPARISON_EQUAL: _ClassVar[Comparison]
    COMPARISON_NOT_EQUAL: _ClassVar[Comparison]
    COMPARISON_LESS: _ClassVar[Comparison]
    COMPARISON_LESS_EQUAL: _ClassVar[Comparison]
    COMPARISON_GREATER: _ClassVar[Comparison]
    COMPARISON_GREATER_EQUAL: _ClassVar[Comparison]
    COMPARISON_IN: _ClassVar[Comparison]
    COMPARISON_NOT_IN: _ClassVar[Comparison]

class MapRefusal(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MAP_REFUSAL_UNSPECIFIED: _ClassVar[MapRefusal]
    MAP_REFUSAL_OTHER_HOST: _ClassVar[MapRefusal]
    MAP_REFUSAL_NOT_ALLOWED: _ClassVar[MapRefusal]
    MAP_REFUSAL_NO_FILE: _ClassVar[MapRefusal]

class Compression(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    COMPRESSION_UNSPECIFIED: _ClassVar[Compression]
    COMPRESSION_NONE: _ClassVar[Compression]
    COMPRESSION_LZ4: _ClassVar[Compression]
    COMPRESSION_ZSTD: _ClassVar[Compression]

class ChecksumKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CHECKSUM_KIND_UNSPECIFIED: _ClassVar[ChecksumKind]
    CHECKSUM_KIND_NONE: _ClassVar[ChecksumKind]
    CHECKSUM_KIND_XXH3_64: _ClassVar[ChecksumKind]
COMPARISON_UNSPECIFIED: Comparison
COMPARISON_EQUAL: Comparison
COMPARISON_NOT_EQUAL: Comparison
COMPARISON_LESS: Comparison
COMPARISON_LESS_EQUAL: Comparison
COMPARISON_GREATER: Comparison
COMPARISON_GREATER_EQUAL: Comparison
COMPARISON_IN: Comparison
COMPARISON_NOT_IN: Comparison
MAP_REFUSAL_UNSPECIFIED: MapRefusal
MAP_REFUSAL_OTHER_HOST: MapRefusal
MAP_REFUSAL_NOT_ALLOWED: MapRefusal
MAP_REFUSAL_NO_FILE: MapRefusal
COMPRESSION_UNSPECIFIED: Compression
COMPRESSION_NONE: Compression
COMPRESSION_LZ4: Compression
COMPRESSION_ZSTD: Compression
CHECKSUM_KIND_UNSPECIFIED: ChecksumKind
CHECKSUM_KIND_NONE: ChecksumKind
CHECKSUM_KIND_XXH3_64: ChecksumKind

class ListDatasetsRequest(_message.Message):
    __slots__ = ("page_size", "page_token")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListDatasetsResponse(_message.Message):
    __slots__ = ("datasets", "next_page_token")
    DATASETS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    datasets: _containers.RepeatedCompositeFieldContainer[_image_pb2.Dataset]
    next_page_token: str
    def __init__(self, datasets: _Optional[_Iterable[_Union[_image_pb2.Dataset, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class GetDatasetRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class GetDatasetResponse(_message.Message):
    __slots__ = ("dataset",)
    DATASET_FIELD_NUMBER: _ClassVar[int]
    dataset: _image_pb2.Dataset
    def __init__(self, dataset: _Optional[_Union[_image_pb2.Dataset, _Mapping]] = ...) -> None: ...

class ListImagesRequest(_message.Message):
    __slots__ = ("dataset", "page_size", "page_token", "column", "filter")
    DATASET_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    COLUMN_FIELD_NUMBER: _ClassVar[int]
    FILTER_FIELD_NUMBER: _ClassVar[int]
    dataset: str
    page_size: int
    page_token: str
    column: str
    filter: RowFilter
    def __init__(self, dataset: _Optional[str] = ..., page_size: _Optional[int] = ..., page_token: _Optional[str] = ..., column: _Optional[str] = ..., filter: _Optional[_Union[RowFilter, _Mapping]] = ...) -> None: ...

class RowFilter(_message.Message):
    __slots__ = ("any_of",)
    ANY_OF_FIELD_NUMBER: _ClassVar[int]
    any_of: _containers.RepeatedCompositeFieldContainer[Conjunction]
    def __init__(self, any_of: _Optional[_Iterable[_Union[Conjunction, _Mapping]]] = ...) -> None: ...

class Conjunction(_message.Message):
    __slots__ = ("all_of",)
    ALL_OF_FIELD_NUMBER: _ClassVar[int]
    all_of: _containers.RepeatedCompositeFieldContainer[Predicate]
    def __init__(self, all_of: _Optional[_Iterable[_Union[Predicate, _Mapping]]] = ...) -> None: ...

class Predicate(_message.Message):
    __slots__ = ("column", "comparison", "values")
    COLUMN_FIELD_NUMBER: _ClassVar[int]
    COMPARISON_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    column: str
    comparison: Comparison
    values: _containers.RepeatedCompositeFieldContainer[FilterValue]
    def __init__(self, column: _Optional[str] = ..., comparison: _Optional[_Union[Comparison, str]] = ..., values: _Optional[_Iterable[_Union[FilterValue, _Mapping]]] = ...) -> None: ...

class FilterValue(_message.Message):
    __slots__ = ("bool_value", "int_value", "double_value", "string_value", "bytes_value", "time_value")
    BOOL_VALUE_FIELD_NUMBER: _ClassVar[int]
    INT_VALUE_FIELD_NUMBER: _ClassVar[int]
    DOUBLE_VALUE_FIELD_NUMBER: _ClassVar[int]
    STRING_VALUE_FIELD_NUMBER: _ClassVar[int]
    BYTES_VALUE_FIELD_NUMBER: _ClassVar[int]
    TIME_VALUE_FIELD_NUMBER: _ClassVar[int]
    bool_value: bool
    int_value: int
    double_value: float
    string_value: str
    bytes_value: bytes
    time_value: _timestamp_pb2.Timestamp
    def __init__(self, bool_value: bool = ..., int_value: _Optional[int] = ..., double_value: _Optional[float] = ..., string_value: _Optional[str] = ..., bytes_value: _Optional[bytes] = ..., time_value: _Optional[_Union[_timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class SelectImagesRequest(_message.Message):
    __slots__ = ("dataset", "column", "filter", "metadata_columns", "all_metadata", "whole_table", "if_version")
    DATASET_FIELD_NUMBER: _ClassVar[int]
    COLUMN_FIELD_NUMBER: _ClassVar[int]
    FILTER_FIELD_NUMBER: _ClassVar[int]
    METADATA_COLUMNS_FIELD_NUMBER: _ClassVar[int]
    ALL_METADATA_FIELD_NUMBER: _ClassVar[int]
    WHOLE_TABLE_FIELD_NUMBER: _ClassVar[int]
    IF_VERSION_FIELD_NUMBER: _ClassVar[int]
    dataset: str
    column: str
    filter: RowFilter
    metadata_columns: _containers.RepeatedScalarFieldContainer[str]
    all_metadata: bool
    whole_table: bool
    if_version: str
    def __init__(self, dataset: _Optional[str] = ..., column: _Optional[str] = ..., filter: _Optional[_Union[RowFilter, _Mapping]] = ..., metadata_columns: _Optional[_Iterable[str]] = ..., all_metadata: bool = ..., whole_table: bool = ..., if_version: _Optional[str] = ...) -> None: ...

class SelectImagesResponse(_message.Message):
    __slots__ = ("dataset_version", "row_count", "payload")
    DATASET_VERSION_FIELD_NUMBER: _ClassVar[int]
    ROW_COUNT_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    dataset_version: str
    row_count: int
    payload: bytes
    def __init__(self, dataset_version: _Optional[str] = ..., row_count: _Optional[int] = ..., payload: _Optional[bytes] = ...) -> None: ...

class ListImagesResponse(_message.Message):
    __slots__ = ("images", "next_page_token", "total_count", "dataset_version")
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    TOTAL_COUNT_FIELD_NUMBER: _ClassVar[int]
    DATASET_VERSION_FIELD_NUMBER: _ClassVar[int]
    images: _containers.RepeatedCompositeFieldContainer[_image_pb2.Image]
    next_page_token: str
    total_count: int
    dataset_version: str
    def __init__(self, images: _Optional[_Iterable[_Union[_image_pb2.Image, _Mapping]]] = ..., next_page_token: _Optional[str] = ..., total_count: _Optional[int] = ..., dataset_version: _Optional[str] = ...) -> None: ...

class ResolveViewRequest(_message.Message):
    __slots__ = ("key", "view", "tiling", "order", "pyramid_level")
    KEY_FIELD_NUMBER: _ClassVar[int]
    VIEW_FIELD_NUMBER: _ClassVar[int]
    TILING_FIELD_NUMBER: _ClassVar[int]
    ORDER_FIELD_NUMBER: _ClassVar[int]
    PYRAMID_LEVEL_FIELD_NUMBER: _ClassVar[int]
    key: str
    view: _view_pb2.View
    tiling: _view_pb2.Tiling
    order: _view_pb2.Order
    pyramid_level: int
    def __init__(self, key: _Optional[str] = ..., view: _Optional[_Union[_view_pb2.View, _Mapping]] = ..., tiling: _Optional[_Union[_view_pb2.Tiling, _Mapping]] = ..., order: _Optional[_Union[_view_pb2.Order, _Mapping]] = ..., pyramid_level: _Optional[int] = ...) -> None: ...

class ResolveViewResponse(_message.Message):
    __slots__ = ("dataset_version", "key", "image", "selection", "layout", "dtype", "shape", "strides", "nbytes", "tile_count", "total_tiles")
    DATASET_VERSION_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    SELECTION_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    STRIDES_FIELD_NUMBER: _ClassVar[int]
    NBYTES_FIELD_NUMBER: _ClassVar[int]
    TILE_COUNT_FIELD_NUMBER: _ClassVar[int]
    TOTAL_TILES_FIELD_NUMBER: _ClassVar[int]
    dataset_version: str
    key: str
    image: _image_pb2.Image
    selection: _view_pb2.Selection
    layout: str
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    strides: _containers.RepeatedScalarFieldContainer[int]
    nbytes: int
    tile_count: int
    total_tiles: int
    def __init__(self, dataset_version: _Optional[str] = ..., key: _Optional[str] = ..., image: _Optional[_Union[_image_pb2.Image, _Mapping]] = ..., selection: _Optional[_Union[_view_pb2.Selection, _Mapping]] = ..., layout: _Optional[str] = ..., dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., strides: _Optional[_Iterable[int]] = ..., nbytes: _Optional[int] = ..., tile_count: _Optional[int] = ..., total_tiles: _Optional[int] = ...) -> None: ...

class ReadTilesRequest(_message.Message):
    __slots__ = ("keys", "view", "tiling", "order", "tiles_per_batch", "compression", "pyramid_level", "if_version", "checksum", "max_message_bytes", "image_rows", "beside")
    KEYS_FIELD_NUMBER: _ClassVar[int]
    VIEW_FIELD_NUMBER: _ClassVar[int]
    TILING_FIELD_NUMBER: _ClassVar[int]
    ORDER_FIELD_NUMBER: _ClassVar[int]
    TILES_PER_BATCH_FIELD_NUMBER: _ClassVar[int]
    COMPRESSION_FIELD_NUMBER: _ClassVar[int]
    PYRAMID_LEVEL_FIELD_NUMBER: _ClassVar[int]
    IF_VERSION_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    IMAGE_ROWS_FIELD_NUMBER: _ClassVar[int]
    BESIDE_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.RepeatedScalarFieldContainer[str]
    view: _view_pb2.View
    tiling: _view_pb2.Tiling
    order: _view_pb2.Order
    tiles_per_batch: int
    compression: Compression
    pyramid_level: int
    if_version: str
    checksum: ChecksumKind
    max_message_bytes: int
    image_rows: ImageRows
    beside: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, keys: _Optional[_Iterable[str]] = ..., view: _Optional[_Union[_view_pb2.View, _Mapping]] = ..., tiling: _Optional[_Union[_view_pb2.Tiling, _Mapping]] = ..., order: _Optional[_Union[_view_pb2.Order, _Mapping]] = ..., tiles_per_batch: _Optional[int] = ..., compression: _Optional[_Union[Compression, str]] = ..., pyramid_level: _Optional[int] = ..., if_version: _Optional[str] = ..., checksum: _Optional[_Union[ChecksumKind, str]] = ..., max_message_bytes: _Optional[int] = ..., image_rows: _Optional[_Union[ImageRows, _Mapping]] = ..., beside: _Optional[_Iterable[str]] = ...) -> None: ...

class ImageRows(_message.Message):
    __slots__ = ("dataset", "column", "rows")
    DATASET_FIELD_NUMBER: _ClassVar[int]
    COLUMN_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    dataset: str
    column: str
    rows: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, dataset: _Optional[str] = ..., column: _Optional[str] = ..., rows: _Optional[_Iterable[int]] = ...) -> None: ...

class MapDatasetRequest(_message.Message):
    __slots__ = ("dataset", "nonce", "host_proof")
    DATASET_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    HOST_PROOF_FIELD_NUMBER: _ClassVar[int]
    dataset: str
    nonce: bytes
    host_proof: bytes
    def __init__(self, dataset: _Optional[str] = ..., nonce: _Optional[bytes] = ..., host_proof: _Optional[bytes] = ...) -> None: ...

class MapDatasetResponse(_message.Message):
    __slots__ = ("refusal", "dataset_version", "path", "inode", "size", "modified_ns", "host_proof")
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    DATASET_VERSION_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    INODE_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    MODIFIED_NS_FIELD_NUMBER: _ClassVar[int]
    HOST_PROOF_FIELD_NUMBER: _ClassVar[int]
    refusal: MapRefusal
    dataset_version: str
    path: str
    inode: int
    size: int
    modified_ns: int
    host_proof: bytes
    def __init__(self, refusal: _Optional[_Union[MapRefusal, str]] = ..., dataset_version: _Optional[str] = ..., path: _Optional[str] = ..., inode: _Optional[int] = ..., size: _Optional[int] = ..., modified_ns: _Optional[int] = ..., host_proof: _Optional[bytes] = ...) -> None: ...

class ReadTilesResponse(_message.Message):
    __slots__ = ("header", "first_position", "tile_count", "slab", "timings", "xxh3", "padding", "payload")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    FIRST_POSITION_FIELD_NUMBER: _ClassVar[int]
    TILE_COUNT_FIELD_NUMBER: _ClassVar[int]
    SLAB_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    XXH3_FIELD_NUMBER: _ClassVar[int]
    PADDING_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    header: ReadTilesHeader
    first_position: int
    tile_count: int
    slab: int
    timings: ReadTilesTimings
    xxh3: int
    padding: bytes
    payload: bytes
    def __init__(self, header: _Optional[_Union[ReadTilesHeader, _Mapping]] = ..., first_position: _Optional[int] = ..., tile_count: _Optional[int] = ..., slab: _Optional[int] = ..., timings: _Optional[_Union[ReadTilesTimings, _Mapping]] = ..., xxh3: _Optional[int] = ..., padding: _Optional[bytes] = ..., payload: _Optional[bytes] = ...) -> None: ...

class ReadTilesHeader(_message.Message):
    __slots__ = ("dataset_version", "tile_count", "total_tiles", "tile_shape", "dtype", "slabs", "slab_bytes", "beside", "request_xxh3")
    DATASET_VERSION_FIELD_NUMBER: _ClassVar[int]
    TILE_COUNT_FIELD_NUMBER: _ClassVar[int]
    TOTAL_TILES_FIELD_NUMBER: _ClassVar[int]
    TILE_SHAPE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SLABS_FIELD_NUMBER: _ClassVar[int]
    SLAB_BYTES_FIELD_NUMBER: _ClassVar[int]
    BESIDE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_XXH3_FIELD_NUMBER: _ClassVar[int]
    dataset_version: str
    tile_count: int
    total_tiles: int
    tile_shape: _containers.RepeatedScalarFieldContainer[int]
    dtype: str
    slabs: bool
    slab_bytes: int
    beside: _containers.RepeatedCompositeFieldContainer[Beside]
    request_xxh3: int
    def __init__(self, dataset_version: _Optional[str] = ..., tile_count: _Optional[int] = ..., total_tiles: _Optional[int] = ..., tile_shape: _Optional[_Iterable[int]] = ..., dtype: _Optional[str] = ..., slabs: bool = ..., slab_bytes: _Optional[int] = ..., beside: _Optional[_Iterable[_Union[Beside, _Mapping]]] = ..., request_xxh3: _Optional[int] = ...) -> None: ...

class Beside(_message.Message):
    __slots__ = ("column", "dtype", "tile_shape")
    COLUMN_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    TILE_SHAPE_FIELD_NUMBER: _ClassVar[int]
    column: str
    dtype: str
    tile_shape: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, column: _Optional[str] = ..., dtype: _Optional[str] = ..., tile_shape: _Optional[_Iterable[int]] = ...) -> None: ...

class ReadTilesTimings(_message.Message):
    __slots__ = ("queue_us", "gather_us", "encode_us")
    QUEUE_US_FIELD_NUMBER: _ClassVar[int]
    GATHER_US_FIELD_NUMBER: _ClassVar[int]
    ENCODE_US_FIELD_NUMBER: _ClassVar[int]
    queue_us: int
    gather_us: int
    encode_us: int
    def __init__(self, queue_us: _Optional[int] = ..., gather_us: _Optional[int] = ..., encode_us: _Optional[int] = ...) -> None: ...
