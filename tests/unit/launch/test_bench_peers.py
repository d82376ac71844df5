"""Peers of `steppe bench train`: who can take part, and that what they compute is what they are said to."""

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._inductor import config as inductor

from launch.bench import contenders
from launch.bench.bare_loop import bare_step
from launch.bench.contenders import CONTENDERS, FAMILIES, check_transformers, peers_of
from launch.bench.nanogpt_peer import load_module, nanogpt_step, nearest_width
from launch.bench.train_contender import BUILDERS
from model.accounting import parameter_counts
from model.config import ModelConfig
from pretrain.config import RunConfig
from pretrain.engine import build_decoder, decoder_inputs
from pretrain.engine_torch import TorchEngine
from pretrain.random_batch import random_batch
from pretrain.recipe import validated

CPU = torch.device("cpu")
DENSE = ModelConfig.model_validate({"preset": "tiny-10m"})
SPARSE = ModelConfig.model_validate({"preset": "tiny-moe"})
EXPERTS_OF_OUR_OWN = SPARSE.moe.model_copy(update={"shared_experts": 1}) if SPARSE.moe else None
# What nanoGPT's module offers, as small as it can be: a clone of it is no package that a test could have.
MODULE = """
from dataclasses import dataclass
import torch

@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.wte = torch.nn.Embedding(config.vocab_size, config.n_embd)
        self.ln = torch.nn.LayerNorm(config.n_embd, bias=config.bias)

    def forward(self, idx, targets):
        logits = self.ln(self.wte(idx)) @ self.wte.weight.T
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    (tmp_path / "model.py").write_text(MODULE)
    return tmp_path


def config_of(model: dict[str, object], precision: str = "fp32") -> RunConfig:
    shape = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "ffn_size": 64, "vocab_size": 130}
    return validated(
        {
            "name": "small",
            "precision": precision,
            "model": {**shape, **model},
            "data": {"sequence_length": 16, "sources": [{"name": "random", "path": "none"}]},
            "batch": {"global_batch_size": 4, "micro_batch_size": 4},
            "optimizer": {"lr": 1e-2},
            "schedule": {"name": "constant", "total_steps": 100},
        }
    )


def test_each_contender_can_be_asked_for_and_built() -> None:
    assert BUILDERS.keys() == CONTENDERS.keys()
    assert sorted(name for family in FAMILIES.values() for name in family) == sorted(CONTENDERS.keys() - {"steppe"})


def test_a_family_stands_for_its_variants(clone: Path) -> None:
    assert peers_of(DENSE, "nanogpt", clone) == (["nanogpt-mixed", "nanogpt-mixed-compiled"], {})
    assert peers_of(DENSE, "transformers")[0] == [name for name in CONTENDERS if name.startswith("transformers-")]
    assert peers_of(DENSE, " transformers-bf16, bare,bare,")[0] == ["transformers-bf16", "bare"]
    # What cannot be for such a model is left out of a family, but not if it is asked for by name.
    assert peers_of(SPARSE, "transformers")[0] == ["transformers-mixed", "transformers-bf16"]
    with pytest.raises(ValueError, match="--peers transformers-bf16-compiled: its experts are not compiled here"):
        peers_of(SPARSE, "transformers-bf16-compiled")


def test_all_that_there_are_take_part_by_default(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders, "LITGPT_NEEDS", ("no_such_package",))
    names, left_out = peers_of(DENSE)
    assert names == ["steppe-compiled", "bare", *FAMILIES["transformers"]]
    assert left_out.keys() == {"steppe-dense", *FAMILIES["litgpt"], *FAMILIES["nanogpt"]}
    assert left_out["litgpt-mixed"].startswith("litgpt is not installed here: pip install --no-deps litgpt ")
    monkeypatch.setattr(contenders, "LITGPT_NEEDS", ("torch",))
    assert peers_of(DENSE, nanogpt=clone)[1].keys() == {"steppe-dense"}
    names, left_out = peers_of(SPARSE, nanogpt=clone)
    assert names == ["steppe-compiled", "bare", "steppe-dense", "transformers-mixed", "transformers-bf16"]
    assert left_out["nanogpt-mixed"] == "it has no experts: leave it out"


@pytest.mark.parametrize(
    ("asked", "model", "needed"),
    [
        (" ,", DENSE, "--peers ' ,' names nobody: choose from .*, or leave it out for all that are here"),
        ("megatron", DENSE, "--peers megatron is not known: choose from steppe-compiled, bare, "),
        ("steppe-dense", DENSE, "--peers steppe-dense: it is for a recipe with experts, and this one has none"),
        ("nanogpt", DENSE, "--peers nanogpt: it is not a package: clone karpathy/nanoGPT .* --nanogpt FOLDER"),
        ("nanogpt", SPARSE, "--peers nanogpt: it has no experts: leave it out"),
        ("litgpt", SPARSE, "--peers litgpt: its part is written for Llama's dense shape"),
        (
            "transformers",
            SPARSE.model_copy(update={"moe": EXPERTS_OF_OUR_OWN}),
            "shared_experts 1 has no counterpart .*; compare with --peers bare,steppe-dense",
        ),
    ],
)
def test_a_peer_that_cannot_take_part_is_refused(
    asked: str, model: ModelConfig, needed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contenders, "LITGPT_NEEDS", ("torch",))
    with pytest.raises(ValueError, match=needed):
        peers_of(model, asked)


def test_a_peer_that_is_not_there_is_refused_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders, "LITGPT_NEEDS", ("no_such_package",))
    with pytest.raises(ValueError, match="--peers litgpt: litgpt is not installed here: pip install --no-deps litgpt"):
        peers_of(DENSE, "bare,litgpt")
    for asked in ("nanogpt", "bare", ""):
        with pytest.raises(ValueError, match="--nanogpt .* has no model.py: name the folder of a clone"):
            peers_of(DENSE, asked, tmp_path)


def test_without_a_compiler_nothing_is_compiled(clone: Path) -> None:
    with inductor.patch({"cpp.cxx": ("no-such-compiler",)}):
        names, left_out = peers_of(DENSE, "bare,transformers,nanogpt", clone)[0], peers_of(DENSE)[1]
        with pytest.raises(ValueError, match=r"--peers steppe-compiled: it needs a C\+\+ compiler, .*: install g\+\+"):
            peers_of(DENSE, "steppe-compiled")
    assert names == ["bare", "transformers-mixed", "transformers-bf16", "nanogpt-mixed"]
    assert "steppe-compiled" in left_out


def test_a_shape_that_transformers_has_not_is_refused() -> None:
    check_transformers(SPARSE, "leave it")
    with pytest.raises(ValueError, match="transformers has no model to compare with: .*shared_experts 1.*; leave it"):
        check_transformers(SPARSE.model_copy(update={"moe": EXPERTS_OF_OUR_OWN}), "leave it")


@pytest.mark.parametrize("tied", [False, True])
def test_litgpt_starts_from_our_weights(tied: bool) -> None:
    """In fp32, where a wrong weight shows. With grouped heads, whose fused order is litgpt's own."""
    lightning = pytest.importorskip("lightning")
    pytest.importorskip("litgpt")
    from launch.bench.litgpt_peer import build_model, litgpt_step

    config = config_of({"num_kv_heads": 2, "tie_embeddings": tied, "rope_theta": 5000.0, "norm_eps": 1e-4})
    inputs = decoder_inputs(random_batch(config, 0), CPU)
    tokens = inputs["tokens_BT"]
    assert tokens is not None
    model = build_model(config, CPU, lightning.Fabric(accelerator="cpu", devices=1, precision="32-true"))
    decoder = build_decoder(config, CPU, torch.float32)
    torch.testing.assert_close(model(tokens), decoder.logits(decoder.hidden(tokens)), rtol=1e-5, atol=1e-6)
    assert sum(p.numel() for p in model.parameters()) == parameter_counts(config.model)["total"]
    for pure_bf16 in (False, True):
        step, about = litgpt_step(config, CPU, pure_bf16, compiled=False)
        losses = [step(random_batch(config, 0)) for _ in range(5)]
        assert losses[0] == pytest.approx(float(decoder(**inputs).nll / tokens.numel()), rel=2e-3)
        assert losses[-1] < losses[0]
        assert about["class"].startswith("GPT of litgpt ")


def test_nanogpt_is_loaded_beside_a_package_of_the_same_name(clone: Path) -> None:
    ours = sys.modules["model"]
    module = load_module(clone)
    assert module.GPTConfig(8, 100, 1, 1, 64, 0.0, False).n_embd == 64
    assert sys.modules["model"] is ours
    config = config_of({})
    step, about = nanogpt_step(config, CPU, clone, compiled=False)
    losses = [step(random_batch(config, 0)) for _ in range(5)]
    assert losses[-1] < losses[0]
    assert about["hidden_size"] == 64
    assert about["total_parameters"] == 130 * 64 + 64


@settings(max_examples=25)
@given(layers=st.integers(1, 8), width=st.integers(1, 64), vocab=st.integers(100, 200_000), T=st.integers(8, 8192))
def test_nanogpt_is_as_wide_as_comes_nearest_in_parameters(layers: int, width: int, vocab: int, T: int) -> None:
    shape = {"hidden_size": 64 * width, "num_layers": layers, "num_heads": width, "ffn_size": 128 * width}
    model = ModelConfig.model_validate({**shape, "vocab_size": vocab})

    ours = parameter_counts(model)["total"]

    def distance(D: int) -> int:
        of_a_layer = 12 * D * D + 2 * D  # attention's and the MLP's matrices, two norms without biases
        return abs(vocab * D + T * D + layers * of_a_layer + D - ours)

    assert distance(nearest_width(model, T)) == min(distance(D) for D in range(64, 64 * 256, 64))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("experts", [False, True])
def test_the_bare_loop_is_the_engine_s_arithmetic(precision: str, experts: bool) -> None:
    moe = {"moe": {"experts": 4, "experts_per_token": 2, "expert_ffn_size": 24}} if experts else {}
    config = config_of(moe, precision)
    step, oracle = bare_step(config, CPU), TorchEngine(build_decoder(config, CPU, torch.float32), config, CPU)
    for number in range(4):
        batch = random_batch(config, number)
        stats = oracle.train_step([batch], config.optimizer.lr)
        expected = float(stats.nll / stats.tokens)
        assert step(batch) == pytest.approx(expected, rel=1e-6 if precision == "fp32" else 1e-3)
