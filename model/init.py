"""Initial values as a pure function of (seed, logical name, global index): every layout starts from the same bits.

A tensor's elements, in row-major order, are cut into blocks of BLOCK_ELEMENTS. Each block has a random stream of its
own, keyed by the seed, the name and the block's index (Philox, a counter-based generator: Salmon et al. 2011, "Parallel
random numbers: as easy as 1, 2, 3"), so that a box of the tensor takes only the blocks it touches, one at a time.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

from model.config import ModelConfig
from model.parameters import VOCABULARY_PARAMETERS, is_norm, parameter_shapes

BLOCK_ELEMENTS = 1 << 16
STD = 0.02


def initial_value(name: str, shape: Sequence[int], seed: int, config: ModelConfig) -> Tensor:
    """The whole parameter at initialisation, fp32 on the CPU.

    Norms are one. Matrices are normal with standard deviation 0.02, those that write into the residual stream (o_proj,
    down_proj) with 0.02 / sqrt(2 num_layers) (GPT-2, Radford et al. 2019, section 2.3).
    Rows that pad the vocabulary are 0.

    shape: the parameter's full logical shape (the vocabulary padded).
    """
    return initial_slice(name, shape, [slice(0, size) for size in shape], seed, config)


def initial_slice(name: str, shape: Sequence[int], box: Sequence[slice], seed: int, config: ModelConfig) -> Tensor:
    """The box of `initial_value(name, shape, ...)`, bit for bit, making one block more than the box at a time.

    box: a slice with start and stop for each dimension of `shape`.
    """
    assert len(box) == len(shape), f"a box of {len(box)} dimensions in {name} of {len(shape)}"
    sizes = [b.stop - b.start for b in box]
    if is_norm(name):
        return torch.ones(sizes, device="cpu")
    assert len(shape) == 2, f"no rule to initialise {name} of shape {tuple(shape)}"
    (row, row_end), (column, column_end), width = (box[0].start, box[0].stop), (box[1].start, box[1].stop), shape[1]
    values = np.zeros(sizes, dtype=np.float32)
    # Rows that pad the vocabulary come last, so that leaving them 0 shifts no other element's index.
    drawn_end = min(row_end, config.vocab_size) if name in VOCABULARY_PARAMETERS else row_end
    if drawn_end > row and column_end > column:
        _fill(values[: drawn_end - row], name, seed, row, column, width)
        values *= np.float32(_std(name, config))
    return torch.from_numpy(values)


def initialise(decoder: nn.Module, seed: int) -> None:
    """Fill every parameter of a `Decoder` in place, whatever its dtype and device; `to_empty` a meta one first."""
    config = decoder.config
    assert isinstance(config, ModelConfig)
    shapes = parameter_shapes(config)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            assert not parameter.is_meta, f"{name} is on the meta device: call to_empty first"
            parameter.copy_(initial_value(name, shapes[name], seed, config))


def _std(name: str, config: ModelConfig) -> float:
    writes_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
    return STD / math.sqrt(2 * config.num_layers) if writes_residual else STD


def _fill(values: np.ndarray, name: str, seed: int, row: int, column: int, width: int) -> None:
    """Standard normal values of the box at (row, column) of a matrix with `width` columns, into `values` (2-D)."""
    rows, columns = values.shape
    first, last = row * width + column, (row + rows - 1) * width + column + columns - 1
    for block in range(first // BLOCK_ELEMENTS, last // BLOCK_ELEMENTS + 1):
        start = block * BLOCK_ELEMENTS
        drawn = _block(name, seed, block)
        # The rows of the box that meet this block; only the first and the last can be cut by its ends.
        for r in range(max(row, start // width), min(row + rows, -(-(start + BLOCK_ELEMENTS) // width))):
            begin = max(r * width + column, start)
            end = min(r * width + column + columns, start + BLOCK_ELEMENTS)
            if begin < end:
                offset = begin - r * width - column
                values[r - row, offset : offset + end - begin] = drawn[begin - start : end - start]


def _block(name: str, seed: int, block: int) -> np.ndarray:
    key = xxhash.xxh3_128_intdigest(f"{seed}:{name}".encode())
    # 2^64 counters apart, no two blocks' streams can meet.
    generator = np.random.Generator(np.random.Philox(key=key, counter=block << 64))
    return generator.standard_normal(BLOCK_ELEMENTS, dtype=np.float32)
