"""The limit of `steppe bench train`: a step's matrix products, attention and AdamW, each timed alone.

B batch, T sequence, N = B T tokens, D model width, R rows of a weight, V vocabulary (padded), H query heads, K key and
value heads, h head size.

Left out is all else that a step needs: norms, rotations, activations, the softmax over the vocabulary, the copies
between precisions and transpositions, the gradient's norm. So a step cannot reach the limit; how near it comes says how
little the rest costs. Operands stay in the cache from one repetition to the next as far as they fit, and of ways to do
the same the fastest counts.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from model.attention import CausalAttention
from model.blockwise_attention import BlockwiseAttention
from model.config import ModelConfig, has_experts, padded_vocab_size
from model.parameters import parameter_shapes
from pretrain.config import RunConfig
from pretrain.engine import DTYPES

LEAST_RUNS = 5
LEAST_SECONDS = 0.2  # of repetitions, where they are short

Shape = tuple[int, int, int]  # rows of the input, its columns D, rows of the weight R


def seconds_of_parts(config: RunConfig, device: torch.device) -> dict[str, float]:
    """Seconds of a step of one micro-batch: `matrix products`, `attention`, `adamw`."""
    dtype = DTYPES[config.precision]
    tokens = config.batch.micro_batch_size * config.data.sequence_length
    products = Counter(products_of(config.model, tokens))
    shapes = {shape for ways in products for way in ways for shape in way}
    alone = {shape: _product_seconds(shape, dtype, device) for shape in shapes}
    of_products = sum(
        count * min(sum(alone[shape] for shape in way) for way in ways) for ways, count in products.items()
    )
    attention = config.model.num_layers * _attention_seconds(config, dtype, device)
    return {"matrix products": of_products, "attention": attention, "adamw": _adamw_seconds(config, device)}


def products_of(model: ModelConfig, tokens: int) -> Iterable[tuple[tuple[Shape, ...], ...]]:
    """A step's products by a weight, the head's included, each as the ways to compute it: one by one, or fused.

    A token's products with its experts are those of dense weights on as many more rows: no grouping of them is faster.
    """
    D, h = model.hidden_size, model.head_size
    q, kv = model.num_heads * h, model.num_kv_heads * h
    for layer in range(model.num_layers):
        yield ((tokens, D, q), (tokens, D, kv), (tokens, D, kv)), ((tokens, D, q + 2 * kv),)
        yield (((tokens, q, D),),)
        if not has_experts(model, layer):
            yield from _mlp(tokens, D, model.ffn_size)
            continue
        assert model.moe is not None
        yield (((tokens, D, model.moe.experts),),)  # the router's, which the step computes in fp32
        yield from _mlp(tokens * model.moe.experts_per_token, D, model.moe.expert_ffn_size)
        if model.moe.shared_experts:
            yield from _mlp(tokens, D, model.moe.shared_experts * model.moe.expert_ffn_size)
    yield (((tokens, D, padded_vocab_size(model.vocab_size)),),)


def _mlp(tokens: int, D: int, ffn_size: int) -> Iterable[tuple[tuple[Shape, ...], ...]]:
    yield ((tokens, D, ffn_size), (tokens, D, ffn_size)), ((tokens, D, 2 * ffn_size),)
    yield (((tokens, ffn_size, D),),)


def _product_seconds(shape: Shape, dtype: torch.dtype, device: torch.device) -> float:
    """Of a linear map forward, and of the gradients of its input and of its weight: as it lies or transposed, whichever
    is faster."""
    N, D, R = shape
    x_ND, grad_NR, weight_RD = (torch.randn(size, dtype=dtype, device=device) for size in ((N, D), (N, R), (R, D)))
    forward, of_input = _mm_seconds(x_ND, weight_RD.T), _mm_seconds(grad_NR, weight_RD)
    return forward + of_input + min(_mm_seconds(grad_NR.T, x_ND), _mm_seconds(x_ND.T.contiguous(), grad_NR))


def _mm_seconds(a: Tensor, b: Tensor) -> float:
    out = a.new_empty(len(a), b.size(1))
    return best_seconds(lambda: torch.mm(a, b, out=out))


def _attention_seconds(config: RunConfig, dtype: torch.dtype, device: torch.device) -> float:
    """Forward and backward of one layer, by whichever is faster: ours (`BlockwiseAttention`), or torch's."""
    model, B, T = config.model, config.batch.micro_batch_size, config.data.sequence_length

    def heads(count: int) -> Tensor:
        return torch.randn(B, T, count, model.head_size, dtype=dtype, device=device, requires_grad=True)

    q, k, v = heads(model.num_heads), heads(model.num_kv_heads), heads(model.num_kv_heads)
    grad = torch.randn_like(q)
    cores: list[nn.Module] = [CausalAttention(), BlockwiseAttention()]
    return min(best_seconds(lambda core=core: torch.autograd.grad(core(q, k, v), (q, k, v), grad)[0]) for core in cores)  # type: ignore[misc]


def _adamw_seconds(config: RunConfig, device: torch.device) -> float:
    """One fused update of all parameters, as one flat tensor in fp32."""
    count = sum(torch.Size(shape).numel() for shape in parameter_shapes(config.model).values())
    parameter = nn.Parameter(torch.zeros(count, device=device))
    parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer = torch.optim.AdamW([parameter], lr=config.optimizer.lr, weight_decay=0.1, fused=True)

    def step() -> Tensor:
        optimizer.step()
        return parameter

    return best_seconds(step)


def best_seconds(run: Callable[[], Tensor]) -> float:
    """The shortest of several runs after one unmeasured, to the moment when its result is there."""
    best, spent, runs = float("inf"), 0.0, 0
    _wait_for(run())
    while runs < LEAST_RUNS or spent < LEAST_SECONDS:
        started = time.perf_counter()
        _wait_for(run())
        seconds = time.perf_counter() - started
        best, spent, runs = min(best, seconds), spent + seconds, runs + 1
    return best


def _wait_for(result: Tensor) -> None:
    """Read one element of it, for which the host waits whatever the device."""
    result.detach()[(0,) * result.dim()].item()
