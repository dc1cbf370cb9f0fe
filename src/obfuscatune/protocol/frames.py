"""Bytes <-> (fields, tensor table): the encoding of one frame, without any input or output.

    frame  = prefix header payload
    prefix = "OBFT" version:u8 0 0 0 header_length:u32 payload_length:u64       little-endian, 20 bytes
    header = msgpack map of the fields, then "tensors": [[name, dtype, shape], ...]
    payload = the tensors' elements in the order of that table, C-contiguous, little-endian, nothing between

Everything here treats its input as hostile: whatever the bytes, decoding returns or raises `ProtocolError`, and lengths
are compared with the limits and with each other before memory is asked for. The rules are in ``docs/protocol.md``.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from struct import Struct
from typing import Any, NamedTuple

import msgpack
import numpy as np
import torch

from obfuscatune.errors import ProtocolError, UsageError
from obfuscatune.protocol.limits import DEFAULT_LIMITS, Limits

if sys.byteorder != "little":  # tensor memory is sent as it lies
    raise ImportError("obfuscatune.protocol needs a little-endian machine")

PROTOCOL_VERSION = 2
MAGIC = b"OBFT"
PREFIX = Struct("<4sB3sIQ")
DTYPES: dict[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_VALUES = "nil, bool, int, float, str, list or map"
_SCALARS = frozenset({type(None), bool, int, str})
_TABLE = "tensors"  # the reserved key of the header


class TensorSpec(NamedTuple):
    """One row of the tensor table."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in the payload."""
        return math.prod(self.shape) * self.dtype.itemsize


def encode_head(
    fields: Mapping[str, Any], specs: Sequence[TensorSpec], limits: Limits = DEFAULT_LIMITS
) -> tuple[bytes, int]:
    """Encode prefix and header of a frame whose payload is the tensors of ``specs``.

    Args:
        fields: nil, bool, int, finite float, str, and lists and str-keyed dicts of these, under any key but "tensors".
        specs: the tensors that follow, in order.
        limits: what the frame must keep within.

    Returns:
        The bytes of prefix and header, and the length of the payload in bytes.

    Raises:
        UsageError: a reader with these limits would refuse the frame; nothing of it needs to be sent.
    """
    table = [[name, _NAMES.get(dtype, str(dtype)), list(shape)] for name, dtype, shape in specs]
    try:
        if _TABLE in fields:
            raise ProtocolError("reserved header key", got=_TABLE)
        _check_fields(fields, limits)
        payload_length = read_table(table, limits)[1]
        header = _pack(fields, table)
        _check_lengths(len(header), payload_length, limits)
    except ProtocolError as error:
        raise UsageError(f"frame cannot be sent: {error.what}", got=error.got, expected=error.expected) from error
    return PREFIX.pack(MAGIC, PROTOCOL_VERSION, b"\0\0\0", len(header), payload_length) + header, payload_length


def decode_prefix(prefix: bytes | bytearray, limits: Limits = DEFAULT_LIMITS) -> tuple[int, int]:
    """Return (header length, payload length) in bytes of the frame that begins with these 20 bytes.

    Raises:
        ProtocolError: wrong magic, version or reserved bytes, or a length beyond ``limits``.
    """
    if len(prefix) != PREFIX.size:
        raise ProtocolError("wrong length of a frame prefix", got=len(prefix), expected=PREFIX.size)
    magic, version, reserved, header_length, payload_length = PREFIX.unpack(prefix)
    if magic != MAGIC:
        raise ProtocolError("not a frame of this protocol", got=magic.hex(), expected=MAGIC.hex())
    if version != PROTOCOL_VERSION:
        raise ProtocolError("other protocol version", got=version, expected=PROTOCOL_VERSION)
    if reserved != b"\0\0\0":
        raise ProtocolError("reserved bytes of a frame are set", got=reserved.hex(), expected="000000")
    _check_lengths(header_length, payload_length, limits)
    return header_length, payload_length


def decode_header(
    header: bytes | bytearray, payload_length: int, limits: Limits = DEFAULT_LIMITS
) -> tuple[dict[str, Any], list[TensorSpec]]:
    """Decode a header whose prefix announced ``payload_length`` bytes of tensors.

    Raises:
        ProtocolError: the header is not canonical msgpack of the allowed types within ``limits``, or its tensor table
            is wrong or does not make up exactly ``payload_length`` bytes.
    """
    try:
        fields = msgpack.unpackb(
            header,
            raw=False,
            strict_map_key=True,
            max_array_len=max(limits.max_items, limits.max_tensors),
            max_map_len=limits.max_items,
            max_bin_len=0,
            max_ext_len=0,
        )
    except (ValueError, TypeError, OverflowError, msgpack.UnpackException) as error:
        # Only the class of the error: its text can quote the bytes.
        raise ProtocolError("header is not msgpack of the allowed types", got=type(error).__name__) from None
    if type(fields) is not dict or _TABLE not in fields:
        raise ProtocolError("header is not a map with a tensor table", got=type(fields).__name__, expected="map")
    table = fields.pop(_TABLE)
    _check_fields(fields, limits)
    specs, total = read_table(table, limits)
    if total != payload_length:
        raise ProtocolError("payload length differs from the tensor table", got=payload_length, expected=total)
    # One comparison refuses repeated keys, longer integer forms, float32, and a table that is not last.
    if _pack(fields, table) != header:
        raise ProtocolError("header is not in canonical encoding")
    return fields, specs


def decode_frame(
    frame: bytes | bytearray | memoryview, limits: Limits = DEFAULT_LIMITS
) -> tuple[dict[str, Any], dict[str, tuple[TensorSpec, memoryview]]]:
    """Decode one whole frame, for recordings and tests: its fields, and each tensor's row and bytes (not copied).

    Raises:
        ProtocolError: the frame breaks a rule, is cut short, or bytes follow it.
    """
    view = memoryview(frame)
    header_length, payload_length = decode_prefix(bytes(view[: PREFIX.size]), limits)
    start, expected = PREFIX.size + header_length, PREFIX.size + header_length + payload_length
    if len(view) != expected:
        raise ProtocolError("frame is cut short or bytes follow it", got=len(view), expected=expected)
    fields, specs = decode_header(bytes(view[PREFIX.size : start]), payload_length, limits)
    tensors: dict[str, tuple[TensorSpec, memoryview]] = {}
    for spec in specs:
        tensors[spec.name] = spec, view[start : start + spec.nbytes]
        if spec.dtype is torch.bool:
            check_bools(np.asarray(tensors[spec.name][1]))
        start += spec.nbytes
    return fields, tensors


def check_bools(elements: "np.ndarray[Any, Any]") -> None:
    """Refuse bytes of a bool tensor (uint8, any shape) other than 0 and 1: what kernels make of those is undefined."""
    if elements.max(initial=0) > 1:
        raise ProtocolError("bytes of a bool tensor", got="a byte above 1", expected="0 or 1")


def _check_lengths(header_length: int, payload_length: int, limits: Limits) -> None:
    if header_length > limits.max_header_bytes:
        raise ProtocolError("header too long", got=header_length, expected=f"at most {limits.max_header_bytes}")
    if payload_length > limits.max_payload_bytes:
        raise ProtocolError("payload too long", got=payload_length, expected=f"at most {limits.max_payload_bytes}")


def _pack(fields: Mapping[str, Any], table: list[Any]) -> bytes:
    try:
        return bytes(msgpack.packb({**fields, _TABLE: table}))
    except (ValueError, OverflowError) as error:  # an integer beyond 64 bits, a lone surrogate
        raise ProtocolError("header value has no encoding", got=type(error).__name__) from None


def _check_fields(fields: Mapping[str, Any], limits: Limits) -> None:
    """Refuse other types than the allowed ones, non-finite floats, and too many or too deeply nested values."""
    containers: list[Any] = [fields]
    items = 0
    for _ in range(limits.max_depth):  # level by level, so that depth costs no stack
        values: list[Any] = []
        for container in containers:
            if isinstance(container, list):
                values += container
                continue
            for key in container:
                if type(key) is not str:
                    raise ProtocolError("header key of another type", got=type(key).__name__, expected="str")
            values += container.values()
        items += len(values)
        if items > limits.max_items:
            raise ProtocolError("too many header values", got=items, expected=f"at most {limits.max_items}")
        containers = []
        for value in values:
            kind = type(value)
            if kind in _SCALARS:
                continue
            if kind is list or kind is dict:
                containers.append(value)
            elif kind is not float:
                raise ProtocolError("header value of another type", got=kind.__name__, expected=_VALUES)
            elif not math.isfinite(value):
                raise ProtocolError("header value is not finite", got=value)
        if not containers:
            return
    raise ProtocolError("header nested too deeply", expected=f"at most {limits.max_depth} levels")


def read_table(table: Any, limits: Limits) -> tuple[list[TensorSpec], int]:
    """Return the rows of a tensor table and the bytes of all its tensors; python integers, so no product overflows."""
    if type(table) is not list or len(table) > limits.max_tensors:
        got = len(table) if type(table) is list else type(table).__name__
        raise ProtocolError("wrong tensor table", got=got, expected=f"a list of at most {limits.max_tensors} tensors")
    specs: list[TensorSpec] = []
    names: set[str] = set()
    total = 0
    for row in table:
        if type(row) is not list or len(row) != 3:
            raise ProtocolError("wrong row of the tensor table", expected="[name, dtype, shape]")
        name, dtype_name, shape = row
        # Printable ASCII only: names end up in errors and logs.
        if type(name) is not str or not (name.isascii() and name.isprintable()):
            raise ProtocolError("wrong tensor name", expected="printable ASCII characters")
        if not 0 < len(name) <= limits.max_name_chars:
            raise ProtocolError(
                "wrong length of a tensor name", got=len(name), expected=f"1 to {limits.max_name_chars}"
            )
        if name in names:
            raise ProtocolError("tensor name used twice", got=name)
        names.add(name)
        dtype = DTYPES.get(dtype_name) if type(dtype_name) is str else None
        if dtype is None:
            # Text only: the repr of a deeply nested list, unlike its decoding, would exhaust the stack.
            got = ascii(dtype_name)[:32] if type(dtype_name) is str else type(dtype_name).__name__
            raise ProtocolError("unknown dtype", got=got, expected=", ".join(DTYPES), where=name)
        if type(shape) is not list or len(shape) > limits.max_dims:
            raise ProtocolError("wrong shape", expected=f"a list of at most {limits.max_dims} sizes", where=name)
        size = extent = dtype.itemsize
        for dim in shape:
            if type(dim) is not int or dim < 0:
                raise ProtocolError("wrong size of a dimension", expected="an integer, 0 or more", where=name)
            size *= dim
            extent *= dim or 1
        # An empty tensor of huge sizes takes no memory, yet its strides overflow: so zeros do not excuse the others.
        if extent > limits.max_payload_bytes:
            raise ProtocolError("tensor too large", expected=f"at most {limits.max_payload_bytes} bytes", where=name)
        total += size
        specs.append(TensorSpec(name, dtype, tuple(shape)))
    return specs, total
