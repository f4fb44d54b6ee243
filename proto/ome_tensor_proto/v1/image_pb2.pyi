from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DatasetState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DATASET_STATE_UNSPECIFIED: _ClassVar[DatasetState]
    DATASET_STATE_LOADED: _ClassVar[DatasetState]
    DATASET_STATE_NOT_LOADED: _ClassVar[DatasetState]
    DATASET_STATE_LOADING: _ClassVar[DatasetState]
    DATASET_STATE_IN_PLACE: _ClassVar[DatasetState]
    DATASET_STATE_FAILED: _ClassVar[DatasetState]
DATASET_STATE_UNSPECIFIED: DatasetState
DATASET_STATE_LOADED: DatasetState
DATASET_STATE_NOT_LOADED: DatasetState
DATASET_STATE_LOADING: DatasetState
DATASET_STATE_IN_PLACE: DatasetState
DATASET_STATE_FAILED: DatasetState

class Dataset(_message.Message):
    __slots__ = ("name", "version", "image_count", "row_count", "image_columns", "other_columns", "resident_bytes", "source_name", "state", "progress", "problem", "estimated_bytes", "format")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    IMAGE_COUNT_FIELD_NUMBER: _ClassVar[int]
    ROW_COUNT_FIELD_NUMBER: _ClassVar[int]
    IMAGE_COLUMNS_FIELD_NUMBER: _ClassVar[int]
    OTHER_COLUMNS_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    SOURCE_NAME_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    ESTIMATED_BYTES_FIELD_NUMBER: _ClassVar[int]
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: str
    image_count: int
    row_count: int
    image_columns: _containers.RepeatedScalarFieldContainer[str]
    other_columns: _containers.RepeatedCompositeFieldContainer[Column]
    resident_bytes: int
    source_name: str
    state: DatasetState
    progress: float
    problem: str
    estimated_bytes: int
    format: str
    def __init__(self, name: _Optional[str] = ..., version: _Optional[str] = ..., image_count: _Optional[int] = ..., row_count: _Optional[int] = ..., image_columns: _Optional[_Iterable[str]] = ..., other_columns: _Optional[_Iterable[_Union[Column, _Mapping]]] = ..., resident_bytes: _Optional[int] = ..., source_name: _Optional[str] = ..., state: _Optional[_Union[DatasetState, str]] = ..., progress: _Optional[float] = ..., problem: _Optional[str] = ..., estimated_bytes: _Optional[int] = ..., format: _Optional[str] = ...) -> None: ...

class Column(_message.Message):
    __slots__ = ("name", "arrow_type")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ARROW_TYPE_FIELD_NUMBER: _ClassVar[int]
    name: str
    arrow_type: str
    def __init__(self, name: _Optional[str] = ..., arrow_type: _Optional[str] = ...) -> None: ...

class Image(_message.Message):
    __slots__ = ("key", "dataset", "column", "row", "id", "name", "image_type", "acquisition_datetime", "pixel_type", "dtype", "size_t", "size_z", "size_c", "size_y", "size_x", "physical_size_z", "physical_size_y", "physical_size_x", "channels", "chunk_grid", "nbytes", "problem", "levels")
    KEY_FIELD_NUMBER: _ClassVar[int]
    DATASET_FIELD_NUMBER: _ClassVar[int]
    COLUMN_FIELD_NUMBER: _ClassVar[int]
    ROW_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    IMAGE_TYPE_FIELD_NUMBER: _ClassVar[int]
    ACQUISITION_DATETIME_FIELD_NUMBER: _ClassVar[int]
    PIXEL_TYPE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SIZE_T_FIELD_NUMBER: _ClassVar[int]
    SIZE_Z_FIELD_NUMBER: _ClassVar[int]
    SIZE_C_FIELD_NUMBER: _ClassVar[int]
    SIZE_Y_FIELD_NUMBER: _ClassVar[int]
    SIZE_X_FIELD_NUMBER: _ClassVar[int]
    PHYSICAL_SIZE_Z_FIELD_NUMBER: _ClassVar[int]
    PHYSICAL_SIZE_Y_FIELD_NUMBER: _ClassVar[int]
    PHYSICAL_SIZE_X_FIELD_NUMBER: _ClassVar[int]
    CHANNELS_FIELD_NUMBER: _ClassVar[int]
    CHUNK_GRID_FIELD_NUMBER: _ClassVar[int]
    NBYTES_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    LEVELS_FIELD_NUMBER: _ClassVar[int]
    key: str
    dataset: str
    column: str
    row: int
    id: str
    name: str
    image_type: str
    acquisition_datetime: _timestamp_pb2.Timestamp
    pixel_type: str
    dtype: str
    size_t: int
    size_z: int
    size_c: int
    size_y: int
    size_x: int
    physical_size_z: PhysicalSize
    physical_size_y: PhysicalSize
    physical_size_x: PhysicalSize
    channels: _containers.RepeatedCompositeFieldContainer[Channel]
    chunk_grid: ChunkGrid
    nbytes: int
    problem: str
    levels: _containers.RepeatedCompositeFieldContainer[Level]
    def __init__(self, key: _Optional[str] = ..., dataset: _Optional[str] = ..., column: _Optional[str] = ..., row: _Optional[int] = ..., id: _Optional[str] = ..., name: _Optional[str] = ..., image_type: _Optional[str] = ..., acquisition_datetime: _Optional[_Union[_timestamp_pb2.Timestamp, _Mapping]] = ..., pixel_type: _Optional[str] = ..., dtype: _Optional[str] = ..., size_t: _Optional[int] = ..., size_z: _Optional[int] = ..., size_c: _Optional[int] = ..., size_y: _Optional[int] = ..., size_x: _Optional[int] = ..., physical_size_z: _Optional[_Union[PhysicalSize, _Mapping]] = ..., physical_size_y: _Optional[_Union[PhysicalSize, _Mapping]] = ..., physical_size_x: _Optional[_Union[PhysicalSize, _Mapping]] = ..., channels: _Optional[_Iterable[_Union[Channel, _Mapping]]] = ..., chunk_grid: _Optional[_Union[ChunkGrid, _Mapping]] = ..., nbytes: _Optional[int] = ..., problem: _Optional[str] = ..., levels: _Optional[_Iterable[_Union[Level, _Mapping]]] = ...) -> None: ...

class Level(_message.Message):
    __slots__ = ("size_t", "size_z", "size_c", "size_y", "size_x", "is_stored")
    SIZE_T_FIELD_NUMBER: _ClassVar[int]
    SIZE_Z_FIELD_NUMBER: _ClassVar[int]
    SIZE_C_FIELD_NUMBER: _ClassVar[int]
    SIZE_Y_FIELD_NUMBER: _ClassVar[int]
    SIZE_X_FIELD_NUMBER: _ClassVar[int]
    IS_STORED_FIELD_NUMBER: _ClassVar[int]
    size_t: int
    size_z: int
    size_c: int
    size_y: int
    size_x: int
    is_stored: bool
    def __init__(self, size_t: _Optional[int] = ..., size_z: _Optional[int] = ..., size_c: _Optional[int] = ..., size_y: _Optional[int] = ..., size_x: _Optional[int] = ..., is_stored: bool = ...) -> None: ...

class PhysicalSize(_message.Message):
    __slots__ = ("value", "unit")
    VALUE_FIELD_NUMBER: _ClassVar[int]
    UNIT_FIELD_NUMBER: _ClassVar[int]
    value: float
    unit: str
    def __init__(self, value: _Optional[float] = ..., unit: _Optional[str] = ...) -> None: ...

class Channel(_message.Message):
    __slots__ = ("id", "name", "emission_um", "excitation_um", "illumination", "color_rgba")
    ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    EMISSION_UM_FIELD_NUMBER: _ClassVar[int]
    EXCITATION_UM_FIELD_NUMBER: _ClassVar[int]
    ILLUMINATION_FIELD_NUMBER: _ClassVar[int]
    COLOR_RGBA_FIELD_NUMBER: _ClassVar[int]
    id: str
    name: str
    emission_um: float
    excitation_um: float
    illumination: str
    color_rgba: int
    def __init__(self, id: _Optional[str] = ..., name: _Optional[str] = ..., emission_um: _Optional[float] = ..., excitation_um: _Optional[float] = ..., illumination: _Optional[str] = ..., color_rgba: _Optional[int] = ...) -> None: ...

class ChunkGrid(_message.Message):
    __slots__ = ("t", "z", "c", "y", "x")
    T_FIELD_NUMBER: _ClassVar[int]
    Z_FIELD_NUMBER: _ClassVar[int]
    C_FIELD_NUMBER: _ClassVar[int]
    Y_FIELD_NUMBER: _ClassVar[int]
    X_FIELD_NUMBER: _ClassVar[int]
    t: int
    z: int
    c: int
    y: int
    x: int
    def __init__(self, t: _Optional[int] = ..., z: _Optional[int] = ..., c: _Optional[int] = ..., y: _Optional[int] = ..., x: _Optional[int] = ...) -> None: ...
