"""Bytes that a forward pass keeps for backward, from the config alone: no torch here.

N tokens of a micro-batch, D model width, H query heads, K key and value heads, h head size, F inner width, E experts,
k experts a token, V vocabulary (padded), b bytes of an element. T tensor-parallel and S sequence-parallel ranks.

The arithmetic is that of Korthikanti et al. 2022 (arXiv 2205.05198, section 4), for this decoder's own operations. A
rank works on N / S tokens, in its matrices on 1 / T of their width, and between them (norms, residual stream) on 1 / T
of its tokens. Kept by a block that recomputes nothing, in bytes a token of a rank that splits nothing:

    each of the two norms    b D + 4, its input and the inverse root mean square
    the norms' outputs       2 b D, what the projections of attention and of the MLP take
    qk-norm, if there is     as the norms, with (H + K) h in place of D, and 4 (H + K)
    attention                b (2 H + 2 K) h + 4 H: q and k rotated, v, the result, and a logarithm of a sum a head,
                             which a processor in 16 bits computes again, unless it multiplies tiles and sequences
                             are above 1024
    SwiGLU                   3 b F: gate, up, and silu(gate) up, which the last projection takes
    mask, if there is        on a processor in fp32 4 times the tokens of a sequence: attention makes a bias of it in
                             each block; elsewhere documents take no memory to speak of

Experts are not split by T: the tensor ranks take different tokens to them. A layer of experts keeps its input, b D; the
logits and scores of the router, 8 E, and 16 for each of its k choices; 2 b F, gate and up, and 12 of each slot, which
holds one of a token's k rows or pads an expert's; and SwiGLU of the shared experts. The rows of all ranks are taken to
fall evenly on all experts. Where those are split, a row is kept as it arrives, and its result as well: 2 b D + 24.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from model.config import ModelConfig, has_experts, padded_vocab_size
from pretrain.config import Recompute

# As in `model/loss.py`, `model/token_rows.py` and `model/blockwise_attention.py`, which need torch; a test holds them
# together.
EXPERT_SLOT_MULTIPLE = 64
LOSS_CHUNK_TOKENS = 2048
LOSS_SOFTMAX_ELEMENTS = 1 << 19
LOSS_GRADIENT_COLUMNS = 8192
LOSS_GRADIENT_ROWS = 64
MOST_TILED_QUERIES = 1024
FP32 = 4


@dataclass(frozen=True)
class Work:
    """The tokens that one forward pass of a rank works on, and how.

    tokens: N, of the micro-batch, before sequence parallelism splits it.   sequence_length: tokens of one sequence.
    element_bytes: b.     tensor, sequence: T and S.     expert: ranks that share out the experts.
    fused: a GPU's kernels (`pretrain/kernels.py`), which also convert an operand on the way in. Elsewhere adding 16
        bits to fp32 makes an fp32 copy first.
    """

    tokens: int
    sequence_length: int
    element_bytes: int
    tensor: int = 1
    sequence: int = 1
    expert: int = 1
    fused: bool = True

    @property
    def inside(self) -> int:
        """Tokens of this rank in its matrices."""
        return self.tokens // self.sequence

    @property
    def outside(self) -> int:
        """Tokens of this rank between the matrices."""
        return self.inside // self.tensor


class Kept(NamedTuple):
    """Bytes of one block: `kept` from its forward to its backward, `recomputed` only while its backward runs."""

    kept: int
    recomputed: int


def block_activations(config: ModelConfig, layer: int, work: Work, recompute: Recompute = "none") -> Kept:
    """What a block keeps.

    selective: the block's input, and the results of its matrix products and of attention; the norms, the rotation and
    SwiGLU's product are made again. full: the block's input.
    """
    b, attention, mlp = work.element_bytes, _attention(config, work), _mlp(config, layer, work)
    block_input = b * work.outside * config.hidden_size
    everything = 2 * _norm(work.outside, config.hidden_size, b) + attention.everything + mlp.everything
    if recompute == "none":
        return Kept(everything, 0)
    if recompute == "full":
        return Kept(block_input, everything)
    products = attention.products + mlp.products
    return Kept(block_input + products, everything - attention.shared - mlp.shared)


def activation_bytes(config: ModelConfig, work: Work, recompute: Recompute = "none", every: int = 1) -> Kept:
    """All blocks and the final norm: what is kept when backward starts, and the most that one block makes again.

    recompute applies to every `every`-th block, the first one included.
    """
    blocks = [
        block_activations(config, layer, work, recompute if layer % every == 0 else "none")
        for layer in range(config.num_layers)
    ]
    final = _norm(work.outside, config.hidden_size, work.element_bytes)
    return Kept(sum(block.kept for block in blocks) + final, max(block.recomputed for block in blocks))


def loss_bytes(config: ModelConfig, work: Work) -> int:
    """The most that the head's loss holds besides: the hidden states and their gradient, the fp32 gradient of the
    head's weight, and with it either a chunk's logits and what is made of them, or the scaled gradient. See
    `model/loss.py`."""
    b, rows = work.element_bytes, padded_vocab_size(config.vocab_size) // work.tensor
    chunk = min(LOSS_CHUNK_TOKENS, work.inside)
    softmax_rows = min(chunk, max(1, LOSS_SOFTMAX_ELEMENTS // rows)) if work.tensor == 1 else chunk
    hidden, weight = work.inside * config.hidden_size, rows * config.hidden_size
    part = min(LOSS_GRADIENT_COLUMNS, rows) * config.hidden_size
    added = b * part + (0 if work.fused or b == FP32 or chunk == work.inside else FP32 * part)
    forward = b * chunk * rows + max(FP32 * softmax_rows * rows, b * chunk * config.hidden_size + added)
    scaled = b * weight + (FP32 if b == FP32 else FP32 + b) * min(LOSS_GRADIENT_ROWS, config.hidden_size) * rows
    return 2 * b * hidden + FP32 * weight + max(forward, scaled)


class _Part(NamedTuple):
    """Bytes of a part of a block: `everything` that its backward wants, `products` of matrices and of attention, and
    `shared`, those of the one that are among the other."""

    everything: int
    products: int
    shared: int

    def plus(self, other: "_Part") -> "_Part":
        return _Part(self.everything + other.everything, self.products + other.products, self.shared + other.shared)


def _norm(rows: int, width: int, b: int) -> int:
    return rows * (b * width + FP32)


def _attention(config: ModelConfig, work: Work) -> _Part:
    b, n, D, h = work.element_bytes, work.inside, config.hidden_size, config.head_size
    heads = config.num_heads // work.tensor
    kv_heads = max(1, config.num_kv_heads // work.tensor)
    # Ulysses repeats key and value heads until each rank gets an equal share, of all tokens.
    repeated = kv_heads * (work.sequence // math.gcd(work.sequence, kv_heads))
    projected, attended = n * (heads + 2 * kv_heads) * h, n * heads * h
    tiled = work.sequence_length > MOST_TILED_QUERIES and not config.document_mask  # or may be, by the processor
    softmax = FP32 * n * heads if work.fused or b == FP32 or tiled else 0
    everything = b * n * D + b * (2 * attended + 2 * n * repeated * h) + softmax
    if work.sequence > 1:
        everything += b * attended  # the result, given back to the ranks of its tokens
    if config.qk_norm:
        everything += sum(_norm(n * count, h, b) for count in (heads, kv_heads))
    if config.document_mask and b == FP32 and not work.fused:
        everything += b * work.tokens * work.sequence_length
    result = b * attended + softmax
    return _Part(everything, b * projected + result + b * n * D, result)


def _mlp(config: ModelConfig, layer: int, work: Work) -> _Part:
    moe, b, D = config.moe, work.element_bytes, config.hidden_size
    gathered = b * work.inside * D
    if moe is None or not has_experts(config, layer):
        return _swiglu(b, work.inside, D, config.ffn_size // work.tensor, gathered)
    tokens, rows = work.outside, work.outside * moe.experts_per_token
    slots = rows + min(rows, moe.experts // work.expert) * (EXPERT_SLOT_MULTIPLE - 1)
    gate_up = 2 * b * slots * moe.expert_ffn_size
    part = _Part(gate_up + 12 * slots, gate_up + b * slots * D, gate_up)
    if work.expert > 1:
        part = part.plus(_Part(rows * (2 * b * D + 24), 0, 0))
    routing = _Part(tokens * (b * D + 2 * FP32 * moe.experts) + 16 * rows, 0, 0)
    if not moe.shared_experts:
        return part.plus(routing)
    inputs = gathered if work.tensor > 1 else 0  # on a rank of its own, their input is the router's
    width = moe.shared_experts * moe.expert_ffn_size // work.tensor
    return part.plus(routing).plus(_swiglu(b, work.inside, D, width, inputs))


def _swiglu(b: int, rows: int, D: int, F: int, inputs: int) -> _Part:
    return _Part(inputs + 3 * b * rows * F, b * rows * (2 * F + D), 2 * b * rows * F)
