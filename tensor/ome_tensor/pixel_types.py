"""OME pixel types <-> NumPy dtypes, and the dtypes that can be served at all.

Names are those of the OME schema's ``PixelType`` (https://www.openmicroscopy.org/Schemas/Documentation/Generated/OME-2016-06/ome.html);
NumPy's names (``float32``, ``bool`` ...) are accepted beside them because upstream writes them.
"""

from __future__ import annotations

import numpy as np

from .errors import InvalidArgument, InvalidRecord

__all__ = ["check_dtype", "dtype_of_pixel_type", "payload_dtype"]

_OME = {
    "bit": "bool",
    "int8": "int8",
    "int16": "int16",
    "int32": "int32",
    "uint8": "uint8",
    "uint16": "uint16",
    "uint32": "uint32",
    # OME's "float" and "complex" are single precision; NumPy reads both words as double.
    "float": "float32",
    "double": "float64",
    "complex": "complex64",
    "double-complex": "complex128",
}

# What the wire and DLPack can carry: booleans, integers up to 64 bit, IEEE floats of 2, 4, 8 bytes, complex of 8 and 16.
_SUPPORTED = frozenset(np.dtype(name) for name in "bool i1 i2 i4 i8 u1 u2 u4 u8 f2 f4 f8 c8 c16".split())


def dtype_of_pixel_type(name: object) -> np.dtype:
    """The dtype of ``pixels_meta.type``; ``None`` means uint16, as upstream.

    Raises:
        InvalidRecord: the name is neither an OME pixel type nor a NumPy number type.
    """
    if name is None:
        return np.dtype(np.uint16)
    text = str(name).strip()
    try:
        dtype = np.dtype(_OME.get(text.lower(), text))
    except TypeError:
        dtype = np.dtype(object)
    if dtype.newbyteorder("=") not in _SUPPORTED:
        raise InvalidRecord(
            f"pixels_meta.type {text!r} is not a pixel type (expected one of: {', '.join(_OME)})",
            field="pixels_meta.type",
            value=text,
        )
    return dtype.newbyteorder("=")


def payload_dtype(name: object, fallback: np.dtype) -> np.dtype:
    """The dtype of a byte payload, byte order kept (``>u2``); ``fallback`` where the chunk names none.

    Raises:
        InvalidRecord: not a pixel type.
    """
    text = "" if name is None else str(name).strip()
    if not text:
        return fallback
    if text[0] in "<>":
        return dtype_of_pixel_type(text[1:]).newbyteorder("<" if text[0] == "<" else ">")
    return dtype_of_pixel_type(text)


def check_dtype(dtype: object) -> np.dtype:
    """A dtype override as a native-endian NumPy dtype.

    Raises:
        InvalidArgument: not a dtype, or one that cannot be served (text, objects, dates, long double ...).
    """
    try:
        resolved: np.dtype = np.dtype(dtype)  # type: ignore[call-overload]
    except (TypeError, ValueError) as error:
        raise InvalidArgument(f"dtype {dtype!r} is not a NumPy dtype", field="dtype", value=dtype) from error
    resolved = resolved.newbyteorder("=")
    if resolved not in _SUPPORTED:
        raise InvalidArgument(
            f"dtype '{resolved}' is not supported (expected bool, int8-64, uint8-64, float16-64, complex64 or complex128)",
            field="dtype",
            value=str(resolved),
        )
    return resolved
