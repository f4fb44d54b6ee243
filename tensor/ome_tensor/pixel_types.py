"""OME pixel types <-> NumPy dtypes, and the dtypes that can be served at all.

Names are those of the OME schema's ``PixelType`` (https://www.openmicroscopy.org/Schemas/Documentation/Generated/OME-2016-06/ome.html);
NumPy's names (``float32``, ``bool`` ...) are accepted beside them because upstream writes them.
"""

from __future__ import annotations

import re

import numpy as np

from .errors import InvalidArgument, InvalidRecord

__all__ = ["check_dtype", "dtype_of_pixel_type", "first_misfit", "payload_dtype"]

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


#: Values that are looked at in one go. Measured: half of it costs a third of the speed, twice of it a fifth of that of floats, whose passing copies
#: then come fresh from the system each time.
_CHECKED_AT_ONCE = 1 << 15

_WORD = re.compile(r"[<>=|]?[A-Za-z][A-Za-z0-9-]*")


def dtype_of_pixel_type(name: object, field: str = "pixels_meta.type") -> np.dtype:
    """The dtype of ``pixels_meta.type``; ``None`` means uint16, as upstream.

    Args:
        name: As stored.
        field: Which field of the record says so, for the error.

    Raises:
        InvalidRecord: the name is neither an OME pixel type nor a NumPy number type.
    """
    if name is None:
        return np.dtype(np.uint16)
    text = str(name).strip()
    try:
        # NumPy reads a whole language, of which this is a word.
        dtype = np.dtype(_OME.get(text.lower(), text) if _WORD.fullmatch(text) else object)
    except (TypeError, ValueError, SyntaxError, OverflowError):
        dtype = np.dtype(object)
    if dtype.newbyteorder("=") not in _SUPPORTED:
        raise InvalidRecord(
            f"{field} {text!r} is not a pixel type (expected one of: {', '.join(_OME)})",
            field=field,
            value=text,
        )
    return dtype.newbyteorder("=")


def payload_dtype(name: object, fallback: np.dtype) -> np.dtype:
    """The dtype of a byte payload, byte order kept (``>u2``); ``fallback`` where the chunk names none.

    Booleans are given as uint8: a NumPy boolean whose byte is neither 0 nor 1 is undefined, so the bytes want a look before they are taken for some.

    Raises:
        InvalidRecord: not a pixel type.
    """
    text = "" if name is None else str(name).strip()
    dtype = dtype_of_pixel_type(text.lstrip("<>"), "chunks.dtype") if text else fallback
    if text[:1] in ("<", ">"):
        dtype = dtype.newbyteorder("<" if text[0] == "<" else ">")
    return np.dtype(np.uint8) if dtype.kind == "b" else dtype


def first_misfit(values: np.ndarray, dtype: np.dtype) -> int | None:
    """The place of the first of 1-D ``values`` that ``dtype`` cannot hold, or ``None`` where it holds them all.

    Held is what comes back equal, but for rounding among floats: an integer type holds whole numbers in its range (so no NaN), a boolean 0 and 1, a
    float all numbers that stay finite, a real type complex numbers without an imaginary part.
    """
    if np.can_cast(values.dtype, dtype, "safe"):
        return None
    for first in range(0, len(values), _CHECKED_AT_ONCE):
        wrong = _misfits(values[first : first + _CHECKED_AT_ONCE], dtype)
        if wrong.any():
            return first + int(wrong.argmax())
    return None


def _misfits(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    wrong: np.ndarray
    if values.dtype.kind == "c" and dtype.kind != "c":
        wrong = (values.imag != 0) | _misfits(values.real, dtype)
        return wrong
    if dtype.kind in "fc":
        with np.errstate(over="ignore"):
            wrong = np.isfinite(values) & ~np.isfinite(values.astype(dtype))
        return wrong
    low, high = (0, 1) if dtype.kind == "b" else (int(np.iinfo(dtype).min), int(np.iinfo(dtype).max))
    if values.dtype.kind == "f":
        exact = values.astype(np.float64)
        # One more than the largest is a power of two: a double holds that one exactly, the largest of 64 bits not.
        wrong = ~((exact >= float(low)) & (exact < float(high + 1)) & (exact == np.trunc(exact)))
        return wrong
    own = np.iinfo(values.dtype)
    wrong = (values < max(low, int(own.min))) | (values > min(high, int(own.max)))
    return wrong


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
