"""The same initial weights and batches through transformers' Llama, in a plain torch loop, give the same loss curve."""

import math
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from pretrain.engine import build_decoder
from pretrain.hf import config_to_hf
from pretrain.hf_weights import weights_to_hf
from tests.dist.convergence_cases import CYCLE, STEPS, convergence_config
from tests.dist.harness import run_cases
from tests.small_run import global_batch

pytestmark = pytest.mark.slow


def plain_curve(tied: bool) -> list[list[float]]:
    """[loss, gradient norm] of each step; every formula of the step is written out here once more."""
    config = convergence_config(tied)
    model = LlamaForCausalLM(LlamaConfig(**config_to_hf(config.model)))
    weights = build_decoder(config, torch.device("cpu"), torch.float32).state_dict()
    missing = model.load_state_dict(weights_to_hf(weights, config.model), strict=not tied).missing_keys
    assert missing == (["lm_head.weight"] if tied else [])
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed_tokens" not in name]
    others = [p for name, p in model.named_parameters() if p.dim() != 2 or "embed_tokens" in name]
    groups = [{"params": matrices, "weight_decay": 0.3}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    curve = []
    for step in range(STEPS):
        tokens, targets = (torch.from_numpy(array) for array in global_batch(step % CYCLE))
        loss = cross_entropy(model(tokens).logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        cosine = 0.5 * (1 + math.cos(math.pi * (step - 4) / (STEPS - 4)))
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * ((step + 1) / 4 if step < 4 else 0.1 + 0.9 * cosine)
        optimizer.step()
        optimizer.zero_grad()
        curve.append([loss.item(), grad_norm.item()])
    return curve


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_cases("tests.dist.convergence_cases", 1, tmp_path_factory.mktemp("convergence"))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("engine", ["torch", "zero1"])
def test_the_curve_is_transformers_curve(ours: dict[str, Any], engine: str, tied: bool) -> None:
    found, expected = torch.tensor(ours[f"{engine}-{'tied' if tied else 'untied'}"]), torch.tensor(plain_curve(tied))
    assert expected[-1, 0] < expected[0, 0] - 0.5  # it learns, so the curves have had room to part
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=0)
