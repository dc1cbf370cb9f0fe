"""The sealing key of an SEV-SNP guest, derived by the secure processor (MSG_KEY_REQ) through ``/dev/sev-guest``.

Source: the kernel's include/uapi/linux/sev-guest.h, and the SEV-SNP Firmware ABI, MSG_KEY_REQ and MSG_KEY_RSP:

    snp_guest_request_ioctl   u8 msg_version (1), 7 bytes of padding, u64 req_data, u64 resp_data, u64 exitinfo2
    snp_derived_key_req       u32 root_key_select, u32 zero, u64 guest_field_select, u32 vmpl, u32 guest_svn,
                              u64 tcb_version
    snp_derived_key_resp      u32 status, 28 bytes zero, 32 bytes key

The word root_key_select is zero: not the VMRK, and the processor's own choice of the other two (KEY_SEL, bits 1 and 2).
That is the VCEK, a secret of this chip, unless the host has loaded a VLEK; then it is the VLEK, which AMD makes for a
cloud provider, the same for all its chips. On such a host, chips of that provider may derive the same key for the same
guest, and it is as secret as the provider's VLEK. Nothing here was tried on either.

Guest policy and launch measurement are mixed in, so another image or a debug guest gets another key. An update of the
chip's firmware may change it: then the enclave starts anew.
"""

import ctypes
import fcntl
import os
import struct
from collections.abc import Callable
from pathlib import Path

from obfuscatune.errors import AttestationError
from obfuscatune.parties.attestation.quoting import derive_sealing_key

DEVICE = Path("/dev/sev-guest")
SNP_GET_DERIVED_KEY = 0xC0205301  # _IOWR('S', 1, 32 bytes)
_REQUEST = struct.Struct("<B7xQQQ")
_KEY_REQUEST = struct.Struct("<IIQIIQ")
_RESPONSE_BYTES, _KEY_AT, _KEY_BYTES = 64, 32, 32
_NOT_VMRK = 0  # the VLEK where one is loaded, otherwise the VCEK
_GUEST_POLICY, _MEASUREMENT = 1 << 0, 1 << 3


def derived_key(device: Path = DEVICE, ioctl: Callable[[int, int, bytearray], int] = fcntl.ioctl) -> bytes:
    """Return the sealing key, 32 bytes. Secret. ``device`` and ``ioctl`` are other ones in tests.

    Raises:
        AttestationError: no such device, or the secure processor refuses.
    """
    key_request = ctypes.create_string_buffer(
        _KEY_REQUEST.pack(_NOT_VMRK, 0, _GUEST_POLICY | _MEASUREMENT, 0, 0, 0), _KEY_REQUEST.size
    )
    response = ctypes.create_string_buffer(_RESPONSE_BYTES)
    request = bytearray(_REQUEST.pack(1, ctypes.addressof(key_request), ctypes.addressof(response), 0))
    try:
        handle = os.open(device, os.O_RDWR | os.O_CLOEXEC)
        try:
            ioctl(handle, SNP_GET_DERIVED_KEY, request)
        finally:
            os.close(handle)
        key = response.raw[_KEY_AT : _KEY_AT + _KEY_BYTES]
        status, firmware = int.from_bytes(response.raw[:4], "little"), _REQUEST.unpack(request)[3]
    except OSError as error:
        raise AttestationError("no derived key of the guest", got=error.strerror, where=str(device)) from None
    finally:
        ctypes.memset(response, 0, _RESPONSE_BYTES)
    if status or firmware or not any(key):
        raise AttestationError(
            "the secure processor gives no derived key", got=f"status {status:#x}, {firmware:#x}", where=str(device)
        )
    return derive_sealing_key(key)
