"""Reading a safetensors file tensor by tensor, into memory of our own.

The library's reader maps a file and keeps it mapped: pages that were touched count as this process's memory for as long
as the file is open, so that a model read again and again would seem to be, and under pressure be, in memory as a whole.
"""

import json
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pretrain.pages import empty_pages

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class StoredTensor(NamedTuple):
    """What a header says of a tensor: dtype as safetensors names it, and where its bytes lie in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class SafetensorsFile:
    """The tensors of a file by name."""

    def __init__(self, path: Path) -> None:
        """Read the header. Raises ValueError if the file is not whole."""
        self.path = path
        try:
            with safe_open(path, framework="pt"):
                pass  # the library has checked the header: each tensor lies in the file, beside the others
        except SafetensorError as error:
            raise ValueError(f"{path} is no whole safetensors file ({error}); download it again") from error
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        self.tensors: dict[str, StoredTensor] = {}
        for name, said in header.items():
            start, stop = (8 + length + offset for offset in said["data_offsets"])
            self.tensors[name] = StoredTensor(said["dtype"], tuple(said["shape"]), start, stop)

    def read(self, name: str) -> Tensor:
        """A tensor on the CPU, in the dtype it is stored in.

        Raises ValueError for a dtype that is no plain number's, or a file that has been cut short meanwhile.
        """
        dtype, shape, start, stop = self.tensors[name]
        if dtype not in _DTYPES:
            raise ValueError(
                f"{self.path}: {name} is stored as {dtype}, and only {', '.join(_DTYPES)} are read: turn quantized "
                "weights back first"
            )
        tensor = empty_pages(shape, _DTYPES[dtype])
        raw = tensor.view(-1).view(torch.uint8)
        if raw.nbytes != stop - start:
            raise ValueError(f"{self.path}: {name} is not as long as its shape {list(shape)} says: download it again")
        view, filled = memoryview(raw.numpy().data), 0
        with open(self.path, "rb", buffering=0) as file:
            file.seek(start)
            while filled < len(view):
                count = file.readinto(view[filled:])
                if not count:
                    raise ValueError(f"{self.path} ends within {name}: it has been changed while it was read")
                filled += count
        return tensor
