"""A folder that transformers loads as it is, with the same logits and ids; or none at all."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from data_pipeline.tokenizer import Tokenizer
from pretrain import hf_export
from pretrain.checkpoint.commit import write_weights
from pretrain.hf_export import export
from pretrain.hf_weights import weights_to_hf
from tests.exported import SEQUENCE_LENGTH, VARIANTS, write_checkpoint
from tests.hf_parity import MOE, relative_error
from tests.tiny_hf import TEXTS
from tests.unit.pretrain.test_hf_tokenizer import trained

SHARD_BYTES = 60_000


@pytest.mark.parametrize("memory_bytes", [None, 0], ids=["whole", "layer by layer"])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_transformers_loads_it(variant: str, memory_bytes: int | None, tmp_path: Path) -> None:
    decoder = write_checkpoint(tmp_path / "checkpoint", with_tokenizer=True, **VARIANTS[variant])
    out = tmp_path / "out"
    reached: dict[str, list[tuple[int, int]]] = {}
    summary = export(
        tmp_path / "checkpoint",
        out,
        max_shard_bytes=SHARD_BYTES,
        memory_bytes=memory_bytes,
        progress=lambda stage, done, total: reached.setdefault(stage, []).append((done, total)),
    )
    assert summary["comparison"]["mode"] == ("whole" if memory_bytes is None else "layer by layer")
    assert 0 < summary["comparison"]["difference"] < 1e-5
    assert list(reached) == ["writing", "comparing"]
    assert all(steps[-1][0] == steps[-1][1] and steps == sorted(steps) for steps in reached.values())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "out", "trained.model"]

    theirs, report = AutoModelForCausalLM.from_pretrained(out, dtype="auto", output_loading_info=True)
    assert not any(report.values())
    assert (theirs.dtype, theirs.config.max_position_embeddings) == (torch.float32, SEQUENCE_LENGTH)
    tokens = torch.randint(0, 400, (2, 150), generator=torch.Generator().manual_seed(1))
    assert relative_error(decoder.logits(decoder.hidden(tokens)), theirs(tokens).logits) < 1e-5
    tokenizer, ours = AutoTokenizer.from_pretrained(out), Tokenizer(tmp_path / "trained.model")
    assert all(tokenizer.encode(text) == ours.encode(text) for text in TEXTS)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (ours.bos_id, ours.eos_id)
    generation = GenerationConfig.from_pretrained(out)
    assert (generation.bos_token_id, generation.eos_token_id) == (theirs.config.bos_token_id, 2) == (1, 2)


def test_shards(tmp_path: Path) -> None:
    """None is over the size, but of one tensor; each tensor is in one file, where the index says."""
    decoder = write_checkpoint(tmp_path / "checkpoint", **VARIANTS["mixtral"])
    summary = export(tmp_path / "checkpoint", tmp_path / "out", max_shard_bytes=SHARD_BYTES)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) == summary["shards"] > 5
    assert [file.name for file in files][-1] == f"model-{len(files):05d}-of-{len(files):05d}.safetensors"
    expected, found = weights_to_hf(decoder.state_dict(), decoder.config), {}
    for file in files:
        tensors = load_file(file)
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= SHARD_BYTES
        assert all(index["weight_map"][name] == file.name for name in tensors)
        with safe_open(file, framework="pt") as stored:
            assert stored.metadata() == {"format": "pt"}
        found.update(tensors)
    assert index["weight_map"].keys() == found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert index["metadata"]["total_size"] == summary["bytes"] == sum(tensor.nbytes for tensor in found.values())
    assert summary["parameters"] == sum(tensor.numel() for tensor in found.values())

    single = export(tmp_path / "checkpoint", tmp_path / "single")
    assert single["shards"] == 1
    assert not (tmp_path / "single" / "model.safetensors.index.json").exists()
    assert load_file(tmp_path / "single" / "model.safetensors").keys() == expected.keys()


@pytest.mark.parametrize("memory_bytes", [None, 0])
@torch.no_grad()
def test_bf16_rounds_all_but_the_routers(memory_bytes: int | None, tmp_path: Path) -> None:
    decoder = write_checkpoint(tmp_path / "checkpoint", **VARIANTS["mixtral"])
    export(tmp_path / "checkpoint", tmp_path / "out", dtype="bf16", memory_bytes=memory_bytes)
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, weight in weights_to_hf(decoder.state_dict(), decoder.config).items():
        assert torch.equal(found[name], weight if ".gate.weight" in name else weight.bfloat16()), name
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert theirs.dtype == torch.bfloat16


def test_without_a_tokenizer(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "with", with_tokenizer=True)
    write_checkpoint(tmp_path / "without")
    assert export(tmp_path / "with", tmp_path / "a", with_tokenizer=False)["tokenizer"] is False
    assert export(tmp_path / "without", tmp_path / "b")["tokenizer"] is False
    for folder in (tmp_path / "a", tmp_path / "b"):
        names = {path.name for path in folder.iterdir()}
        assert names == {"config.json", "generation_config.json", "model.safetensors"}
        assert json.loads((folder / "config.json").read_text())["bos_token_id"] is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"moe": {**MOE, "router": "sigmoid", "balance": "bias"}}, "moe.router 'sigmoid' has no counterpart"),
        ({"moe": {**MOE, "balance": "bias"}, "qk_norm": True}, "moe.balance 'bias' has no counterpart"),
        ({"moe": {**MOE, "shared_experts": 1}}, "moe.shared_experts 1 has no counterpart"),
        ({"num_heads": 5, "num_kv_heads": 5, "head_size": 16}, "not divisible by num_heads 5"),
    ],
)
def test_models_without_a_counterpart(fields: dict[str, object], message: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint", **fields)
    with pytest.raises(ValueError, match=message):
        export(tmp_path / "checkpoint", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_what_the_caller_got_wrong(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint")
    (tmp_path / "taken").mkdir()
    with pytest.raises(FileExistsError, match="taken exists: choose another --out"):
        export(tmp_path / "checkpoint", tmp_path / "taken")
    with pytest.raises(ValueError, match="dtype=fp16: a model is exported in fp32 or bf16"):
        export(tmp_path / "checkpoint", tmp_path / "out", dtype="fp16")
    with pytest.raises(ValueError, match="--max-shard-size 0: give a size of 1 byte or more"):
        export(tmp_path / "checkpoint", tmp_path / "out", max_shard_bytes=0)
    with pytest.raises(ValueError, match="neither a run .* nor a checkpoint"):
        export(tmp_path / "taken", tmp_path / "out")
    with pytest.raises(ValueError, match="--step 3: only a run has several steps"):
        export(tmp_path / "checkpoint", tmp_path / "out", step=3)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_cannot_be_a_fast_one(tmp_path: Path) -> None:
    """Refused before any weight is written."""
    decoder = write_checkpoint(tmp_path / "first", vocab_size=800)
    other = trained(tmp_path / "other.model", byte_fallback=False)
    state = decoder.state_dict()
    write_weights(tmp_path / "checkpoint", decoder.config, SEQUENCE_LENGTH, other, lambda name: state[name])
    with pytest.raises(ValueError, match="no byte_fallback; export the weights with --no-tokenizer"):
        export(tmp_path / "checkpoint", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.tmp").exists()


@pytest.mark.parametrize("memory_bytes", [None, 0])
@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("model.embed_tokens.weight", "the embedding"),
        ("model.layers.1.self_attn.k_proj.weight", "layer 1"),
        ("model.layers.2.post_attention_layernorm.weight", "layer 2"),
        ("model.layers.0.block_sparse_moe.gate.weight", "layer 0"),
        ("model.layers.2.block_sparse_moe.experts.3.w2.weight", "layer 2"),
        ("model.norm.weight", "the final norm"),
        ("lm_head.weight", "the logits"),
    ],
)
def test_a_weight_that_was_damaged_on_the_way(
    name: str, where: str, memory_bytes: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One value in the file, of a row of the embedding that is always looked up, is changed after it was written."""
    write_checkpoint(tmp_path / "checkpoint", **VARIANTS["mixtral"])
    write = hf_export.write_shards

    def damage_one(folder: Path, *rest: object) -> None:
        write(folder, *rest)  # type: ignore[arg-type]
        flip_sign(folder / "model.safetensors", name)

    monkeypatch.setattr(hf_export, "write_shards", damage_one)
    with pytest.raises(RuntimeError, match=f"the exported model computes something else: {where} differs by"):
        export(tmp_path / "checkpoint", tmp_path / "out", memory_bytes=memory_bytes)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def flip_sign(file: Path, name: str) -> None:
    """Of a tensor's first value."""
    raw = bytearray(file.read_bytes())
    length = int.from_bytes(raw[:8], "little")
    start = 8 + length + json.loads(raw[8 : 8 + length])[name]["data_offsets"][0]
    raw[start + 3] ^= 0x80
    file.write_bytes(raw)


def test_a_killed_export_is_begun_anew(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint")
    (tmp_path / "out.tmp").mkdir()
    (tmp_path / "out.tmp" / "model-00009-of-00009.safetensors").write_text("of another plan")
    export(tmp_path / "checkpoint", tmp_path / "out")
    assert not list((tmp_path / "out").glob("model-*"))
