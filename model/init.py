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

    Norms are one. Matrices, stacked ones too, are normal with standard deviation 0.02, those that write into the
    residual stream (o_proj, down_proj) with 0.02 / sqrt(2 num_layers) (GPT-2, Radford et al. 2019, section 2.3).
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
    assert len(shape) >= 2, f"no rule to initialise {name} of shape {tuple(shape)}"
    values = np.zeros(sizes, dtype=np.float32)
    # Rows that pad the vocabulary come last, so that leaving them 0 shifts no other element's index.
    drawn_end = min(box[0].stop, config.vocab_size) if name in VOCABULARY_PARAMETERS else box[0].stop
    drawn = values[: max(0, drawn_end - box[0].start)]
    if drawn.size:
        _fill(drawn.reshape(-1), name, seed, *_runs(shape, [slice(box[0].start, drawn_end), *box[1:]]))
        drawn *= np.float32(_std(name, config))
    return torch.from_numpy(values)


def initialise(decoder: nn.Module, seed: int) -> None:
    """Fill every parameter and buffer of a `Decoder` in place, whatever its dtype and device; `to_empty` a meta one
    first. Buffers, counts and biases of routers, start at 0."""
    config = decoder.config
    assert isinstance(config, ModelConfig)
    shapes = parameter_shapes(config)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            assert not parameter.is_meta, f"{name} is on the meta device: call to_empty first"
            parameter.copy_(initial_value(name, shapes[name], seed, config))
        for buffer in decoder.buffers():
            buffer.zero_()


def _std(name: str, config: ModelConfig) -> float:
    writes_residual = name.removesuffix(".weight").endswith(("o_proj", "down_proj"))
    return STD / math.sqrt(2 * config.num_layers) if writes_residual else STD


def _runs(shape: Sequence[int], box: Sequence[slice]) -> tuple[np.ndarray, int]:
    """The box as runs of consecutive elements of the flat tensor: where each starts, ascending, and their length."""
    strides = [math.prod(shape[dimension + 1 :]) for dimension in range(len(shape))]
    # A dimension is cut if the box leaves something of it out; from the last cut one on, elements are consecutive.
    cut = [d for d, (b, size) in enumerate(zip(box, shape, strict=True)) if (b.start, b.stop) != (0, size)]
    last = cut[-1] if cut else 0
    starts = np.zeros(1, dtype=np.int64)
    for dimension in range(last):
        indices = np.arange(box[dimension].start, box[dimension].stop, dtype=np.int64)
        starts = np.add.outer(starts, indices * strides[dimension]).reshape(-1)
    return starts + box[last].start * strides[last], (box[last].stop - box[last].start) * strides[last]


def _fill(values: np.ndarray, name: str, seed: int, starts: np.ndarray, length: int) -> None:
    """Standard normal values of the runs, one after the other, into `values` (flat). Each block is drawn once."""
    drawn_block, drawn, filled = -1, np.empty(0), 0
    for start in starts.tolist():
        at, end = start, start + length
        while at < end:
            block, offset = divmod(at, BLOCK_ELEMENTS)
            if block != drawn_block:
                drawn_block, drawn = block, _block(name, seed, block)
            count = min(end - at, BLOCK_ELEMENTS - offset)
            values[filled : filled + count] = drawn[offset : offset + count]
            at, filled = at + count, filled + count


def _block(name: str, seed: int, block: int) -> np.ndarray:
    key = xxhash.xxh3_128_intdigest(f"{seed}:{name}".encode())
    # 2^64 counters apart, no two blocks' streams can meet.
    generator = np.random.Generator(np.random.Philox(key=key, counter=block << 64))
    return generator.standard_normal(BLOCK_ELEMENTS, dtype=np.float32)
