"""A model's weights where they are stored, each read when it is asked for: none is in memory that is not being used."""

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
import xxhash
from torch import Tensor

from model.config import ModelConfig
from model.parameters import buffer_shapes, keeps_fp32, parameter_shapes


class StoredWeights(Mapping[str, Tensor]):
    """Our parameters, and the buffers that training moves, by our names: of a checkpoint of any layout, or of
    Hugging Face's files.

    read: one of them as it is stored, whole, on the CPU. dtype: what they become, but for routers, which stay fp32.
    """

    def __init__(self, config: ModelConfig, read: Callable[[str], Tensor], dtype: torch.dtype) -> None:
        self.config, self.read, self.dtype = config, read, dtype
        self.shapes = parameter_shapes(config) | buffer_shapes(config)

    def __getitem__(self, name: str) -> Tensor:
        return self.cast(name, self.read(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def cast(self, name: str, weight: Tensor) -> Tensor:
        """A weight that was read, as the model computes with it."""
        return weight.to(self.dtype_of(name))

    def dtype_of(self, name: str) -> torch.dtype:
        """In which dtype the model computes with a weight."""
        return torch.float32 if keeps_fp32(name) else self.dtype


def checked_weights(
    where: str, names: Iterable[str], read: Callable[[str], Tensor], digest: xxhash.xxh3_64
) -> Iterator[tuple[str, Tensor]]:
    """Read every weight once, and add its name and values to `digest`; one is in memory at a time if the caller lets
    go of it.

    Raises ValueError, naming the model as `where`, at the first that holds what is not finite.
    """
    for name in names:
        weight = read(name)
        if weight.is_floating_point() and weight.numel() and not torch.stack(torch.aminmax(weight)).isfinite().all():
            bad = weight.numel() - int(weight.isfinite().sum())
            raise ValueError(f"{where}: {name} holds {bad} values that are NaN or infinite; use an earlier checkpoint")
        digest.update(name.encode())
        digest.update(memoryview(weight.contiguous().view(-1).view(torch.uint8).numpy().data))
        yield name, weight
        del weight  # before the next one is read
