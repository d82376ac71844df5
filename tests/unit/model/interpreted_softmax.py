"""The head's Triton kernels in Triton's interpreter, against torch's operations: see `test_fused_softmax.py`."""

import pytest
import torch
from torch import Tensor

from model.fused_softmax import fused_softmax_loss
from model.loss import IGNORED_TARGET, WHOLE, SoftmaxLoss, VocabularyPart, linear_cross_entropy, softmax_loss

V, D = 128, 16
# More columns than a block of the kernel, not a multiple of it, and a few that only pad.
WIDE, WIDE_VOCABULARY = 4096 + 384, 4096 + 300


def losses(softmax: SoftmaxLoss, columns: int, vocabulary: int, dtype: torch.dtype, z_loss: float) -> list[Tensor]:
    """Of 7 tokens in chunks of 4, one of them ignored: total, nll, and the gradients of hidden states and weight."""
    generator = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(7, D, generator=generator).to(dtype).requires_grad_()
    weight_VD = torch.randn(columns, D, generator=generator).to(dtype).requires_grad_()
    targets_N = torch.randint(0, vocabulary, (7,), generator=generator)
    targets_N[0], targets_N[3], targets_N[6] = vocabulary - 1, IGNORED_TARGET, 0
    sums = linear_cross_entropy(hidden_ND, weight_VD, targets_N, vocabulary, z_loss, 4, softmax=softmax)
    (sums.total / 6).backward()
    assert hidden_ND.grad is not None
    assert weight_VD.grad is not None
    assert not weight_VD.grad[vocabulary:].any()
    return [sums.total.detach(), sums.nll, hidden_ND.grad, weight_VD.grad]


@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize(("columns", "vocabulary"), [(V, V), (WIDE, WIDE_VOCABULARY)])
def test_losses_and_gradients_are_those_of_torchs_operations(columns: int, vocabulary: int, z_loss: float) -> None:
    ours, plain = (
        losses(kind, columns, vocabulary, torch.float32, z_loss) for kind in (fused_softmax_loss, softmax_loss)
    )
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_in_bf16_the_sums_are_fp32() -> None:
    ours, plain = (
        losses(kind, WIDE, WIDE_VOCABULARY, torch.bfloat16, 0.01) for kind in (fused_softmax_loss, softmax_loss)
    )
    for a, b in zip(ours[:2], plain[:2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)
    for a, b in zip(ours[2:], plain[2:], strict=True):
        assert (a - b).norm() < 2**-7 * b.norm()  # the interpreter cuts off what a GPU would round


def test_without_gradients_the_logits_stay() -> None:
    logits_CV = torch.randn(3, V, generator=torch.Generator().manual_seed(0))
    before, targets_C, (nll_C, log_partition_C) = logits_CV.clone(), torch.tensor([0, 5, 7]), torch.empty(2, 3)
    fused_softmax_loss(logits_CV, targets_C, 0.0, nll_C, log_partition_C, False, WHOLE)
    assert torch.equal(logits_CV, before)
    torch.testing.assert_close(nll_C, torch.nn.functional.cross_entropy(before, targets_C, reduction="none"))
    torch.testing.assert_close(log_partition_C, before.logsumexp(1))


def test_what_is_not_finite_is_not_hidden() -> None:
    logits_CV, (nll_C, log_partition_C) = torch.zeros(2, V), torch.empty(2, 2)
    logits_CV[0, 3] = torch.nan
    fused_softmax_loss(logits_CV, torch.tensor([0, 1]), 0.0, nll_C, log_partition_C, True, WHOLE)
    assert nll_C.isnan().tolist() == [True, False]


@pytest.mark.parametrize("vocabulary", [2 * V, V + 5, V])  # the last leaves the second part nothing but padding
def test_parts_of_the_vocabulary_sum_to_the_whole(vocabulary: int) -> None:
    """Two ranks' calls in turn: maxima and sums over both are known beforehand from the whole."""
    logits_CV = torch.randn(4, 2 * V, generator=torch.Generator().manual_seed(0))
    logits_CV[:, vocabulary:] = -torch.inf
    targets_C = torch.tensor([3, vocabulary - 1, IGNORED_TARGET, 60])
    whole, (nll_C, log_partition_C) = logits_CV.clone(), torch.empty(2, 4)
    softmax_loss(whole, targets_C, 0.01, nll_C, log_partition_C, True, WHOLE)
    largest_C = logits_CV.amax(1)
    valid_C = targets_C != IGNORED_TARGET
    target_logit_C = logits_CV.gather(1, targets_C.clamp(min=0)[:, None])[:, 0] * valid_C
    sums_2C = torch.stack([(logits_CV - largest_C[:, None]).exp().sum(1), target_logit_C])
    own_sums = []
    for rank in range(2):

        def total(own_2C: Tensor) -> Tensor:
            own_sums.append(own_2C)
            return sums_2C

        part = VocabularyPart(rank * V, maximum=lambda _: largest_C, total=total)
        logits_Cv, (own_nll_C, own_log_C) = logits_CV[:, rank * V : (rank + 1) * V].clone(), torch.empty(2, 4)
        fused_softmax_loss(logits_Cv, targets_C, 0.01, own_nll_C, own_log_C, True, part)
        torch.testing.assert_close(own_nll_C, nll_C)
        torch.testing.assert_close(own_log_C, log_partition_C)
        torch.testing.assert_close(logits_Cv, whole[:, rank * V : (rank + 1) * V], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(own_sums[0] + own_sums[1], sums_2C)
