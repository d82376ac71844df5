"""Loading: a run, a checkpoint, a Hugging Face folder; and every way in which one of them can be wrong."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from data_pipeline.tokenizer import Tokenizer
from data_pipeline.tokenizer_training import train_tokenizer
from model.decoder import Decoder
from pretrain.checkpoint.folder import checkpoint_path
from pretrain.engine import build_decoder
from pretrain.language_model import OwnModel
from pretrain.load_model import LoadedModel, load_model
from pretrain.run_dir import RunDir
from tests.checkpoint_edit import edit_index
from tests.tiny_hf import TEXTS, VOCAB_SIZE, tiny_hf_folder
from tests.tiny_run import MOE, write_run


def initial_weights(run: RunDir, seed: int) -> dict[str, torch.Tensor]:
    from pretrain.recipe import load_config

    config = load_config(run.config_path)
    return build_decoder(config.model_copy(update={"seed": seed}), torch.device("cpu"), torch.float32).state_dict()


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return write_run(tmp_path / "run")


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return tiny_hf_folder(tmp_path / "hf")


def decoder_of(loaded: LoadedModel) -> Decoder:
    assert isinstance(loaded.model, OwnModel)
    return loaded.model.decoder


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_a_run_is_its_newest_checkpoint(run: RunDir) -> None:
    model = load_model(run.path)
    assert (model.step, model.context_length, model.name) == (20, 48, str(run.path))
    assert same(decoder_of(model).state_dict(), initial_weights(run, 20))
    assert not any(parameter.requires_grad for parameter in decoder_of(model).parameters())


def test_a_run_at_a_step(run: RunDir) -> None:
    model = load_model(run.path, step=10)
    assert model.step == 10
    assert same(decoder_of(model).state_dict(), initial_weights(run, 10))


def test_a_checkpoint_folder_takes_its_runs_tokenizer(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(checkpoint_path(run.checkpoints, 10))
    assert (model.step, model.context_length) == (10, 48)
    assert model.tokenizer.fingerprint == Tokenizer(run.tokenizer_path).fingerprint
    monkeypatch.chdir(checkpoint_path(run.checkpoints, 10))
    assert load_model(Path(".")).step == 10


def test_a_moved_checkpoint_has_all_it_needs(run: RunDir, tmp_path: Path) -> None:
    alone = tmp_path / "elsewhere" / "deep" / "checkpoint"
    shutil.copytree(checkpoint_path(run.checkpoints, 20), alone)
    assert load_model(alone).step == 20
    edit_index(alone, lambda index: index.update(tokenizer_fingerprint=None))
    (alone / "tokenizer.model").unlink()
    with pytest.raises(ValueError, match="no tokenizer at .*--tokenizer FILE"):
        load_model(alone)
    assert load_model(alone, tokenizer=run.tokenizer_path).step == 20


def test_a_damaged_checkpoint_is_passed_over_aloud(run: RunDir) -> None:
    file = checkpoint_path(run.checkpoints, 20) / "rank-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    model = load_model(run.path)
    assert model.step == 10
    assert "rank-00000.safetensors is damaged: block" in model.passed_over[0]
    with pytest.raises(ValueError, match="fails its hash"):
        load_model(run.path, step=20)


def test_a_hugging_face_folder_gives_transformers_logits(hf: Path) -> None:
    model = load_model(hf)
    tokens = torch.tensor([[1, *model.tokenizer.encode(TEXTS[0])]])
    with torch.no_grad():
        expected = LlamaForCausalLM.from_pretrained(hf)(tokens).logits
        found = decoder_of(model).logits(decoder_of(model).hidden(tokens))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (model.step, model.context_length) == (None, 64)


@pytest.mark.parametrize(("claimed", "used"), [(131072, 4096), (None, 2048)])
def test_a_claimed_context_is_bounded(hf: Path, claimed: int | None, used: int) -> None:
    config = json.loads((hf / "config.json").read_text())
    config["max_position_embeddings"] = claimed
    (hf / "config.json").write_text(json.dumps(config))
    assert load_model(hf).context_length == used


def test_weights_take_the_asked_dtype(hf: Path) -> None:
    assert {p.dtype for p in decoder_of(load_model(hf, dtype=torch.bfloat16)).parameters()} == {torch.bfloat16}


def test_a_run_with_experts_has_its_routers_in_fp32(tmp_path: Path) -> None:
    """Their biases, which are no parameters, come with the weights; nothing of a router is rounded on the way."""
    run = write_run(tmp_path / "moe", moe=MOE)
    expected = initial_weights(run, 20)
    expected["layers.1.mlp.router.bias"] = torch.full((4,), 20.0)
    assert same(decoder_of(load_model(run.path)).state_dict(), expected)
    rough = decoder_of(load_model(run.path, dtype=torch.bfloat16)).state_dict()
    rounded = {name: tensor if ".router." in name else tensor.bfloat16() for name, tensor in expected.items()}
    assert same(rough, rounded)
    assert {name for name, tensor in rough.items() if tensor.dtype == torch.float32} == {
        "layers.1.mlp.router.weight",
        "layers.1.mlp.router.bias",
    }


def test_a_router_without_its_bias_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "moe", (20,), MOE)
    checkpoint = checkpoint_path(run.checkpoints, 20)
    edit_index(checkpoint, lambda index: index["parameters"].pop("layers.1.mlp.router.bias"))
    with pytest.raises(ValueError, match="lacks the tensor layers.1.mlp.router.bias"):
        load_model(run.path)


@torch.no_grad()
def test_a_folder_of_mixtral_gives_transformers_logits(hf: Path) -> None:
    config = MixtralConfig(
        **{key: value for key, value in json.loads((hf / "config.json").read_text()).items() if key != "model_type"},
        num_local_experts=4,
    )
    torch.manual_seed(0)
    theirs = MixtralForCausalLM(config).eval()
    theirs.save_pretrained(hf)
    model = load_model(hf)
    tokens = torch.tensor([[1, *model.tokenizer.encode(TEXTS[0])]])
    found = decoder_of(model).logits(decoder_of(model).hidden(tokens))
    torch.testing.assert_close(found, theirs(tokens).logits, rtol=1e-5, atol=1e-5)
    assert decoder_of(model).config.moe is not None
    rough = decoder_of(load_model(hf, dtype=torch.bfloat16))
    assert {p.dtype for name, p in rough.named_parameters() if ".router." in name} == {torch.float32}
    assert {p.dtype for name, p in rough.named_parameters() if ".router." not in name} == {torch.bfloat16}
    assert rough(tokens, tokens).total.isfinite()


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    for target in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ValueError, match=r"not a model: expected a run \(config.yaml\), a checkpoint"):
            load_model(target)


def test_a_run_without_a_checkpoint_is_refused(run: RunDir) -> None:
    shutil.rmtree(run.checkpoints)
    with pytest.raises(ValueError, match="a run without a checkpoint"):
        load_model(run.path)


def test_a_step_that_was_not_kept_is_refused(run: RunDir) -> None:
    with pytest.raises(ValueError, match="--step 15: .* it keeps 10, 20"):
        load_model(run.path, step=15)


def validated(run: RunDir, losses: dict[int, float]) -> None:
    """As the training loop records its validations, two sources each."""
    lines = [
        {"type": "evaluation", "time": 0.0, "step": step, "by_source": {name: {"loss": loss} for name in ("a", "b")}}
        for step, loss in losses.items()
    ]
    run.events_path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_best_is_the_checkpoint_of_the_lowest_validation_loss(run: RunDir) -> None:
    validated(run, {5: 1.0, 10: 2.0, 20: 3.0})
    assert load_model(run.path, step="best").step == 10  # of step 5 there is none
    validated(run, {10: 2.0, 20: 1.5})
    assert load_model(run.path, step="best").step == 20
    (checkpoint_path(run.checkpoints, 20) / "rank-00000.safetensors").unlink()
    assert load_model(run.path, step="best").step == 10


def test_without_a_validation_there_is_no_best(run: RunDir, hf: Path) -> None:
    with pytest.raises(ValueError, match="--step best: .* was never validated: name a step, it keeps 10, 20"):
        load_model(run.path, step="best")
    validated(run, {5: 1.0})
    with pytest.raises(
        ValueError, match="--step best: of the steps at which .* it keeps no whole checkpoint: .* 10, 20"
    ):
        load_model(run.path, step="best")
    with pytest.raises(ValueError, match="--step best: only a run has several steps"):
        load_model(hf, step="best")


def test_a_fingerprint_is_of_the_weights_wherever_they_lie(run: RunDir, tmp_path: Path) -> None:
    """One checkpoint, its copy and its bf16 load share it; another step does not."""
    alone = tmp_path / "alone"
    shutil.copytree(checkpoint_path(run.checkpoints, 20), alone)
    found = {load_model(run.path, dtype=dtype).fingerprint for dtype in (torch.float32, torch.bfloat16)}
    assert found == {load_model(alone).fingerprint}
    assert load_model(run.path, step=10).fingerprint not in found


def test_a_step_of_what_has_none_is_refused(run: RunDir, hf: Path) -> None:
    for target in (hf, checkpoint_path(run.checkpoints, 10)):
        with pytest.raises(ValueError, match="--step 10: only a run"):
            load_model(target, step=10)


def test_another_tokenizer_is_refused(run: RunDir, tmp_path: Path) -> None:
    train_tokenizer([*TEXTS, "another corpus"], VOCAB_SIZE, tmp_path / "other.model")
    with pytest.raises(ValueError, match="not the tokenizer that .* was trained with: its fingerprint"):
        load_model(run.path, tokenizer=tmp_path / "other.model")


@pytest.mark.parametrize("vocab_size", [VOCAB_SIZE + 10, 380])
def test_a_tokenizer_of_another_size_is_refused(hf: Path, tmp_path: Path, vocab_size: int) -> None:
    train_tokenizer(TEXTS, vocab_size, tmp_path / "other.model")
    with pytest.raises(ValueError, match=rf"has {vocab_size} tokens, but the vocabulary of .* has 400"):
        load_model(hf, tokenizer=tmp_path / "other.model")


def test_a_vocabulary_may_be_padded(hf: Path, tmp_path: Path) -> None:
    train_tokenizer(TEXTS, VOCAB_SIZE - 10, tmp_path / "other.model")
    assert load_model(hf, tokenizer=tmp_path / "other.model").tokenizer.vocab_size == VOCAB_SIZE - 10


def test_a_missing_tokenizer_is_refused(hf: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="check --tokenizer"):
        load_model(hf, tokenizer=tmp_path / "missing.model")
    (hf / "tokenizer.model").unlink()
    with pytest.raises(ValueError, match="name its tokenizer with --tokenizer"):
        load_model(hf)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(hf: Path, value: float) -> None:
    tensors = load_file(hf / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj.weight holds 1 values that are NaN or infinite"):
        load_model(hf)


def test_weights_of_another_shape_are_refused(run: RunDir) -> None:
    edit_index(checkpoint_path(run.checkpoints, 20), lambda index: index["model"].update(ffn_size=128))
    with pytest.raises(ValueError, match=r"has shape \[64, 32\], its config says \[128, 32\]"):
        load_model(run.path)


def test_weights_that_are_missing_are_refused(run: RunDir) -> None:
    edit_index(checkpoint_path(run.checkpoints, 20), lambda index: index["parameters"].pop("norm.weight"))
    with pytest.raises(ValueError, match="lacks the tensor norm.weight"):
        load_model(run.path)
