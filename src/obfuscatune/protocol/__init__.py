"""All that enclave and worker share: addresses, connections, frames and their limits.

    enclave                                                      worker
    Connection.send(fields, tensors)  ->  [ prefix | header | tensor bytes ]  ->  Connection.receive()
    Connection.receive()              <-  [ prefix | header | tensor bytes ]  <-  Connection.send(fields, tensors)

`limits` bounds one frame, `frames` is its encoding (bytes only, no input or output), `connection` moves frames over a
socket without copies, `address` finds or makes that socket. What the fields mean is told in ``docs/protocol.md``.
Nothing here is pickled, and nothing here knows a key, a model or a profile.
"""

from obfuscatune.protocol.activations import ACTIVATION_NAMES
from obfuscatune.protocol.address import Address, address_of, close_listener, connect, listen
from obfuscatune.protocol.connection import Connection
from obfuscatune.protocol.frames import (
    DTYPES,
    PROTOCOL_VERSION,
    TensorSpec,
    decode_frame,
    decode_header,
    decode_prefix,
    encode_head,
)
from obfuscatune.protocol.limits import DEFAULT_LIMITS, Limits

__all__ = [
    "ACTIVATION_NAMES",
    "DEFAULT_LIMITS",
    "DTYPES",
    "PROTOCOL_VERSION",
    "Address",
    "Connection",
    "Limits",
    "TensorSpec",
    "address_of",
    "close_listener",
    "connect",
    "decode_frame",
    "decode_header",
    "decode_prefix",
    "encode_head",
    "listen",
]
