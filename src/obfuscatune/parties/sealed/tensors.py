"""Single tensors of a sealed model, so that it is keyed layer by layer without ever being held whole."""

import torch

from obfuscatune.errors import FormatError
from obfuscatune.parties.sealed.archive import SealedArchive
from obfuscatune.parties.sealed.tensor_table import Place, locate

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class SealedTensors:
    """The tensors of ``model.safetensors`` or its shards in ``archive``; lasts as long as its reader is open.

    Raises:
        FormatError: no weights, or tables that do not agree (`tensor_table`); SealError as the reader does.
    """

    def __init__(self, archive: SealedArchive) -> None:
        self._archive = archive
        self._places = locate(archive)

    def names(self) -> list[str]:
        """Return the tensors' names."""
        return list(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's sizes; raises FormatError where there is none of that name."""
        return self._place(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's dtype; raises as `shape`."""
        return DTYPES[self._place(name).dtype]

    def get(self, name: str) -> torch.Tensor:
        """Return a tensor, on the CPU. Secret. Memory: the tensor's, and the reader's two chunks.

        Raises:
            FormatError: none of that name, or a bool that is neither 0 nor 1. SealError: a changed chunk.
        """
        place = self._place(name)
        data = torch.empty(place.end - place.start, dtype=torch.uint8)
        with self._archive.open(place.file) as file:
            file.seek(place.start)
            file.readinto(data.numpy().data)
        dtype = DTYPES[place.dtype]
        if dtype == torch.bool and bool((data > 1).any()):  # what kernels make of such a bool is undefined
            raise FormatError("a bool that is neither 0 nor 1", where=name)
        return data.view(dtype).reshape(place.shape)

    def _place(self, name: str) -> Place:
        if name not in self._places:
            raise FormatError("no such tensor in the sealed model", got=repr(name))
        return self._places[name]
