"""The chunked cross-entropy: its value and gradients against the plain formula, and what it never allocates."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import loss
from model.loss import LossSums, linear_cross_entropy, linear_cross_entropy_tokens

N, V, D, VOCAB = 101, 256, 64, 200


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of 7 rows, and of the weight's gradient of 48 columns and 5 rows, so that all end unevenly."""
    monkeypatch.setattr(loss, "SOFTMAX_ELEMENTS", 7 * V)
    monkeypatch.setattr(loss, "GRADIENT_COLUMNS", 48)
    monkeypatch.setattr(loss, "GRADIENT_ROWS", 5)


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(V, D, generator=generator) * 0.3).to(dtype).requires_grad_()
    targets = torch.randint(0, VOCAB, (N,), generator=generator)
    targets[::7] = -100
    return hidden, weight, targets


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float = 0.0) -> LossSums:
    """The formula as it is written, in fp32 over all logits at once."""
    logits = (hidden.float() @ weight.float().T)[:, :VOCAB]
    nll = functional.cross_entropy(logits, targets, reduction="sum")
    log_partition = logits.logsumexp(dim=1)[targets != -100]
    return LossSums(nll + z_loss * (log_partition**2).sum(), nll.detach())


def grads(sums: LossSums, hidden: Tensor, weight: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """A scaled loss checks that the incoming gradient reaches both gradients."""
    return torch.autograd.grad(sums.total * scale, (hidden, weight))


def assert_close(actual: Tensor, expected: Tensor, relative: float) -> None:
    """Error measured against the largest entry: single entries near zero carry the rounding of their neighbours."""
    assert (actual.float() - expected.float()).abs().max() <= relative * expected.abs().max()


@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize("chunk_tokens", [1, 32, 1000])
def test_fp32_equals_the_plain_formula(z_loss: float, chunk_tokens: int) -> None:
    hidden, weight, targets = inputs()
    expected = plain(hidden, weight, targets, z_loss)
    actual = linear_cross_entropy(hidden, weight, targets, VOCAB, z_loss, chunk_tokens)
    assert actual.total.item() == pytest.approx(expected.total.item(), rel=1e-6)
    assert actual.nll.item() == pytest.approx(expected.nll.item(), rel=1e-6)
    assert not actual.nll.requires_grad
    for ours, theirs in zip(grads(actual, hidden, weight, 0.37), grads(expected, hidden, weight, 0.37), strict=True):
        assert_close(ours, theirs, 1e-6)


def test_bf16_is_within_its_rounding() -> None:
    """Against fp32 on the same bf16 inputs: logits and their gradients are rounded to bf16, 2^-9 = 0.002 each time."""
    hidden, weight, targets = inputs(torch.bfloat16)
    expected = plain(hidden, weight, targets, 0.01)
    actual = linear_cross_entropy(hidden, weight, targets, VOCAB, 0.01, chunk_tokens=8)
    assert actual.total.dtype == torch.float32
    assert actual.total.item() == pytest.approx(expected.total.item(), rel=1e-3)
    ours, theirs = grads(actual, hidden, weight), grads(expected, hidden, weight)
    assert [g.dtype for g in ours] == [torch.bfloat16] * 2
    for got, want in zip(ours, theirs, strict=True):
        assert_close(got, want, 0.01)


def test_many_chunks_do_not_wear_the_weight_gradient_down() -> None:
    """Summed in bf16, 2,048 equal contributions would stop growing at 256 times the first."""
    hidden = torch.ones(2048, 8, dtype=torch.bfloat16)
    weight = torch.zeros(128, 8, dtype=torch.bfloat16, requires_grad=True)
    sums = linear_cross_entropy(hidden, weight, torch.zeros(2048, dtype=torch.int64), 128, chunk_tokens=1)
    (grad,) = torch.autograd.grad(sums.total, (weight,))
    assert grad[0, 0].item() == pytest.approx(-2048 * 127 / 128, rel=0.01)


def test_padding_has_no_probability_and_no_gradient() -> None:
    hidden, weight, targets = inputs()
    with torch.no_grad():
        weight[VOCAB:] = 1e3  # would win every softmax
    sums = linear_cross_entropy(hidden, weight, targets, VOCAB)
    assert sums.nll.item() == pytest.approx(plain(hidden, weight, targets).nll.item(), rel=1e-6)
    grad_hidden, grad_weight = grads(sums, hidden, weight)
    assert grad_hidden.isfinite().all()
    assert grad_weight[VOCAB:].count_nonzero() == 0


def test_tokens_that_do_not_count_have_neither_loss_nor_gradient() -> None:
    hidden, weight, targets = inputs()
    sums = linear_cross_entropy(hidden, weight, targets, VOCAB, z_loss=0.1)
    grad_hidden, _ = grads(sums, hidden, weight)
    ignored = targets == -100
    assert grad_hidden[ignored].count_nonzero() == 0
    assert grad_hidden[~ignored].abs().amax(dim=1).min() > 0
    kept = linear_cross_entropy(hidden[~ignored], weight, targets[~ignored], VOCAB, z_loss=0.1)
    assert sums.total.item() == pytest.approx(kept.total.item(), rel=1e-6)
    none = linear_cross_entropy(hidden, weight, torch.full_like(targets, -100), VOCAB, z_loss=0.1)
    assert none == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("trained", ["hidden", "weight"])
def test_only_the_asked_gradient_is_made(trained: str) -> None:
    hidden, weight, targets = inputs()
    expected = dict(zip(("hidden", "weight"), grads(plain(hidden, weight, targets), hidden, weight), strict=True))
    given = {"hidden": hidden.detach(), "weight": weight.detach()}
    given[trained].requires_grad_()
    linear_cross_entropy(given["hidden"], given["weight"], targets, VOCAB).total.backward()
    for name, tensor in given.items():
        assert (tensor.grad is not None) == (name == trained)
    trained_grad = given[trained].grad
    assert trained_grad is not None
    assert_close(trained_grad, expected[trained], 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_logits_are_as_exact_as_small_ones(dtype: torch.dtype) -> None:
    """The softmax is at its ends: of each row one probability is 1, the others underflow, the target's too."""
    hidden, weight, targets = inputs(dtype)
    with torch.no_grad():
        hidden *= 100
    actual, expected = linear_cross_entropy(hidden, weight, targets, VOCAB), plain(hidden, weight, targets)
    assert actual.nll.item() == pytest.approx(expected.nll.item(), rel=1e-6 if dtype == torch.float32 else 1e-3)
    for grad in grads(actual, hidden, weight):
        assert grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
def test_parts_of_the_vocabulary_are_the_whole(z_loss: float, dtype: torch.dtype) -> None:
    """4 ranks, as threads, of which the last holds padding alone."""
    hidden, weight, targets = inputs(dtype)
    vocab_size, ranks = 3 * V // 4, 4
    targets = targets.clamp(max=vocab_size - 1)
    expected = linear_cross_entropy(hidden, weight, targets, vocab_size, z_loss)
    expected_hidden, expected_weight = grads(expected, hidden, weight)
    barrier, shown = threading.Barrier(ranks, timeout=60), {}

    def combined(rank: int, reduce: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        shown[rank] = x.clone()
        barrier.wait()
        whole = reduce(torch.stack([shown[index] for index in range(ranks)]))
        barrier.wait()
        return x.copy_(whole)  # in place, as torch.distributed's all-reduce

    def of_rank(rank: int) -> tuple[float, float, Tensor, Tensor]:
        rows = slice(rank * V // ranks, (rank + 1) * V // ranks)
        part = loss.VocabularyPart(
            rows.start,
            maximum=lambda x: combined(rank, lambda parts: parts.amax(dim=0), x),
            total=lambda x: combined(rank, lambda parts: parts.sum(dim=0), x),
        )
        own_hidden, own_weight = (x.detach().requires_grad_() for x in (hidden, weight[rows]))
        sums = linear_cross_entropy(own_hidden, own_weight, targets, vocab_size, z_loss, 32, part)
        return sums.total.item(), sums.nll.item(), *grads(sums, own_hidden, own_weight)

    with ThreadPoolExecutor(ranks) as pool:
        totals, nlls, of_hidden, of_weight = zip(*pool.map(of_rank, range(ranks)), strict=True)
    rounding = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    assert totals == pytest.approx([expected.total.item()] * ranks, rel=1e-6)
    assert nlls == pytest.approx([expected.nll.item()] * ranks, rel=1e-6)
    assert_close(sum(grad.float() for grad in of_hidden), expected_hidden, rounding)
    assert_close(torch.cat(of_weight), expected_weight, rounding)


def test_losses_by_token() -> None:
    hidden, weight, targets = inputs()
    expected = functional.cross_entropy((hidden @ weight.T)[:, :VOCAB], targets, reduction="none")
    actual = linear_cross_entropy_tokens(hidden, weight, targets, VOCAB, chunk_tokens=32)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert actual[targets == -100].count_nonzero() == 0
    assert not actual.requires_grad


def test_autocast_multiplies_in_its_own_dtype() -> None:
    """fp32 parameters under autocast take the bf16 path, and their gradients come back in fp32."""
    hidden, weight, targets = inputs()
    low = [tensor.detach().bfloat16().requires_grad_() for tensor in (hidden, weight)]
    expected = linear_cross_entropy(low[0], low[1], targets, VOCAB)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = linear_cross_entropy(hidden, weight, targets, VOCAB)
    assert actual.total.item() == expected.total.item()
    for ours, theirs in zip(grads(actual, hidden, weight), grads(expected, *low), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs.float(), rtol=0, atol=0)


def test_no_tokens_have_no_gradient() -> None:
    _, weight, _ = inputs()
    hidden = torch.empty(0, D, requires_grad=True)
    sums = linear_cross_entropy(hidden, weight, torch.empty(0, dtype=torch.int64), VOCAB)
    assert not grads(sums, hidden, weight)[1].any()


def test_a_target_that_is_nearly_sure_has_an_exact_gradient() -> None:
    """The target's entry is p - 1, and the row adds up to nothing, also where log Z is large."""
    weight = torch.zeros(V, D)
    weight[0, 0], weight[1, 0] = 1.0, 0.993
    hidden = torch.zeros(1, D)
    hidden[0, 0] = 1000.0
    gradient = torch.autograd.grad(
        linear_cross_entropy(hidden, weight.requires_grad_(), torch.zeros(1, dtype=torch.int64), V).total, weight
    )[0][:, 0]
    exact = (hidden.double() @ weight.detach().double().T).softmax(1)[0]
    exact[0] -= 1
    assert_close(gradient / 1000, exact, 1e-4)
    assert abs(gradient.sum()) < 1e-3 * gradient.abs().max()


class _Largest(TorchDispatchMode):
    """Largest number of elements of any fp32 tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(out) if isinstance(t, Tensor) and t.dtype == torch.float32]
        self.elements = max([self.elements, *sizes])
        return out


def test_no_fp32_tensor_of_all_logits_is_ever_made() -> None:
    tokens, vocabulary, width = 512, 1024, 16
    hidden = torch.randn(tokens, width, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocabulary, width, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(0, vocabulary, (tokens,))
    with _Largest() as ours:
        linear_cross_entropy(hidden, weight, targets, vocabulary, 1e-4, chunk_tokens=128).total.backward()
    with _Largest() as theirs:  # the recorder sees what the plain formula allocates
        functional.cross_entropy((hidden @ weight.T).float(), targets).backward()
    assert theirs.elements == tokens * vocabulary
    assert ours.elements <= max(vocabulary * width, loss.SOFTMAX_ELEMENTS)
