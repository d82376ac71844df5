"""From a Hugging Face folder to a checkpoint, and back again without a bit changed; what is refused on the way."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from model.config import ModelConfig
from pretrain.checkpoint.index import read_index
from pretrain.checkpoint.read import read_weights
from pretrain.hf_export import export
from pretrain.hf_import import import_model
from pretrain.hf_weights import weights_from_hf, weights_to_hf
from pretrain.load_model import load_model
from pretrain.recipe import load_config
from tests.exported import SEQUENCE_LENGTH, VARIANTS, write_checkpoint
from tests.hf_parity import build, config, theirs
from tests.small_run import RECIPE
from tests.tiny_hf import tiny_hf_folder

INDEX_NAME = "model.safetensors.index.json"


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_there_and_back(variant: str, dtype: str, tmp_path: Path) -> None:
    """Checkpoint, folder, checkpoint, folder: the folders are equal in every byte of every file, and in fp32 so are the
    weights, but for the vocabulary's padding."""
    decoder = write_checkpoint(tmp_path / "first", with_tokenizer=True, **VARIANTS[variant])
    export(tmp_path / "first", tmp_path / "there", dtype=dtype, max_shard_bytes=60_000)
    summary = import_model(tmp_path / "there", tmp_path / "second")
    export(tmp_path / "second", tmp_path / "back", dtype=dtype, max_shard_bytes=60_000)
    assert digests(tmp_path / "there") == digests(tmp_path / "back")
    before, after = read_index(tmp_path / "first"), read_index(tmp_path / "second")
    assert (after.model, after.sequence_length) == (before.model, before.sequence_length)
    assert after.tokenizer_fingerprint == before.tokenizer_fingerprint is not None
    assert summary["tokenizer"] is True
    if dtype == "fp32":
        found = weights_to_hf(read_weights(tmp_path / "second"), decoder.config)
        for name, weight in weights_to_hf(decoder.state_dict(), decoder.config).items():
            assert torch.equal(found[name], weight), name
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", ["llama, tied, yarn", "mixtral", "qwen3 moe"])
def test_what_transformers_wrote(variant: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Weights become fp32 without losing a bit, and the checkpoint loads."""
    decoder = build(config(**VARIANTS[variant]))
    theirs(decoder).to(dtype).save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
    reached: list[tuple[int, int]] = []
    import_model(tmp_path / "theirs", tmp_path / "ours", lambda done, total: reached.append((done, total)))
    assert reached == sorted(reached)
    assert reached[-1][0] == reached[-1][1]
    found = read_weights(tmp_path / "ours")
    stored = weights_from_hf(
        {n: w.to(dtype) for n, w in weights_to_hf(decoder.state_dict(), decoder.config).items()}, decoder.config
    )
    for name, weight in stored.items():
        assert torch.equal(found[name], weight.float()), name
    assert read_index(tmp_path / "ours").model == decoder.config


def test_what_it_is_good_for(tmp_path: Path) -> None:
    """It is a model with a tokenizer like any other; a run is told its architecture by what the import printed."""
    tiny_hf_folder(tmp_path / "theirs", max_positions=96)
    summary = import_model(tmp_path / "theirs", tmp_path / "ours")
    loaded, direct = load_model(tmp_path / "ours"), load_model(tmp_path / "theirs")
    assert loaded.context_length == direct.context_length == summary["sequence_length"] == 96
    assert loaded.tokenizer.fingerprint == direct.tokenizer.fingerprint
    tokens = torch.randint(0, 400, (1, 50))
    assert torch.equal(loaded.model.decoder.hidden(tokens), direct.model.decoder.hidden(tokens))
    model, start = summary["set"]
    assert start == f"init_from={tmp_path / 'ours'}"
    for base in ("model.preset=tiny-10m", "model.tie_embeddings=true", "model={qk_norm: true, rope_theta: 3}"):
        assert load_config(RECIPE, [base, model]).model == direct.model.decoder.config


def test_the_line_for_a_new_run_says_everything() -> None:
    from pretrain.hf_import import as_override

    for fields in VARIANTS.values():
        of = config(**fields)
        line = as_override(of)
        assert "\n" not in line
        assert "document_mask" not in line
        assert ModelConfig.model_validate(yaml.safe_load(line)) == of
        assert load_config(RECIPE, [f"model={line}", "model.document_mask=true"]).model.document_mask


def test_without_a_tokenizer(tmp_path: Path) -> None:
    tiny_hf_folder(tmp_path / "theirs")
    (tmp_path / "theirs" / "tokenizer.model").unlink()
    assert import_model(tmp_path / "theirs", tmp_path / "ours")["tokenizer"] is False
    assert read_index(tmp_path / "ours").tokenizer_fingerprint is None


def sharded(folder: Path) -> Path:
    """A folder of a small Llama in several files."""
    decoder = build(config())
    theirs(decoder).save_pretrained(folder, max_shard_size="100KB")
    return folder


def edit(file: Path, change: Any) -> None:
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "/etc/outside.safetensors",
        "a/../../outside.safetensors",
        "inner/model.safetensors",
        "..\\outside.safetensors",
        "..",
        ".hidden.safetensors",
        "model.safetensors\0",
        "pytorch_model.bin",
        7,
        None,
    ],
)
def test_a_file_name_never_leads_out_of_the_folder(name: Any, tmp_path: Path) -> None:
    folder = sharded(tmp_path / "theirs")
    save_file({"model.norm.weight": torch.ones(64)}, tmp_path / "outside.safetensors")
    edit(folder / INDEX_NAME, lambda index: index["weight_map"].update({"model.norm.weight": name}))
    with pytest.raises(ValueError, match="the weight_map has model.norm.weight in .* which is no "):
        import_model(folder, tmp_path / "ours")
    with pytest.raises(ValueError, match="the weight_map has model.norm.weight in"):
        load_model(folder)
    assert not (tmp_path / "ours").exists()


def test_pickle_is_never_loaded(tmp_path: Path) -> None:
    """A folder whose only weights would run a command if they were unpickled."""

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "sprung"),)

    folder = tiny_hf_folder(tmp_path / "theirs")
    (folder / "model.safetensors").unlink()
    torch.save(Trap(), folder / "pytorch_model.bin")
    for load in (lambda: import_model(folder, tmp_path / "ours"), lambda: load_model(folder)):
        with pytest.raises(ValueError, match="weights in pickle files only, .* convert them to safetensors first"):
            load()
    assert not (tmp_path / "sprung").exists()


def test_headers_that_do_not_fit(tmp_path: Path) -> None:
    folder = tiny_hf_folder(tmp_path / "theirs")
    file = folder / "model.safetensors"
    good, raw = load_file(file), file.read_bytes()
    norm = "model.norm.weight"
    cases = [
        ({**good, norm: torch.ones(48, dtype=torch.float64)}, "norm.weight is stored as F64, and only F32, BF16, F16"),
        ({**good, norm: torch.ones(48, dtype=torch.int8)}, "norm.weight is stored as I8"),
        ({**good, norm: torch.ones(47)}, r"norm.weight has shape \(47,\), but its config says \(48,\)"),
        ({name: good[name] for name in good if name != norm}, "lacks model.norm.weight"),
        ({**good, "model.layers.9.mlp.up_proj.weight": torch.ones(1)}, "has model.layers.9.mlp.up_proj.weight"),
        ({**good, norm: torch.full((48,), torch.nan)}, "norm.weight holds 48 values that are NaN or infinite"),
    ]
    for tensors, message in cases:
        save_file(tensors, file)
        with pytest.raises(ValueError, match=message):
            import_model(folder, tmp_path / "ours")
    for damaged in (raw[:-4], raw[:100], b"", b"\xff" * 64):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="model.safetensors is no whole safetensors file"):
            import_model(folder, tmp_path / "ours")
    file.write_bytes(raw)
    edit(folder / "config.json", lambda stated: stated.update(num_hidden_layers=10**9))
    with pytest.raises(ValueError, match="too few for the layers or experts of its config"):
        import_model(folder, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_experts_of_two_dtypes(tmp_path: Path) -> None:
    decoder = build(config(**VARIANTS["mixtral"]))
    theirs(decoder).save_pretrained(tmp_path / "theirs")
    file = tmp_path / "theirs" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("experts.2.w1.weight"))
    save_file({**tensors, name: tensors[name].half()}, file)
    with pytest.raises(ValueError, match=r"experts of layers.\d.mlp.experts.gate_proj are stored in different dtypes"):
        import_model(tmp_path / "theirs", tmp_path / "ours")


def test_an_index_that_is_none(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "theirs")
    good = json.loads((folder / INDEX_NAME).read_text())["weight_map"]
    elsewhere = next(file for file in good.values() if file != good["model.norm.weight"])
    for text, message in (
        ("[]", "it has no weight_map"),
        ('{"weight_map": {}}', "it has no weight_map"),
        ("{", "is damaged"),
        (
            json.dumps({"weight_map": {**good, "model.norm.weight": elsewhere}}),
            f"{elsewhere} lacks model.norm.weight, which the folder's index says it holds",
        ),
    ):
        (folder / INDEX_NAME).write_text(text)
        with pytest.raises(ValueError, match=message):
            import_model(folder, tmp_path / "ours")


def test_what_the_caller_got_wrong(tmp_path: Path) -> None:
    folder = tiny_hf_folder(tmp_path / "theirs")
    (tmp_path / "taken").mkdir()
    with pytest.raises(FileExistsError, match="taken exists: choose another --out"):
        import_model(folder, tmp_path / "taken")
    with pytest.raises(FileNotFoundError, match=r"is not a Hugging Face model folder: it has no config\.json"):
        import_model(tmp_path / "taken", tmp_path / "ours")
    for claimed in ("many", 0, 2.5):
        edit(folder / "config.json", lambda stated: stated.update(max_position_embeddings=claimed))  # noqa: B023
        with pytest.raises(ValueError, match=f"max_position_embeddings {claimed!r} is no number of tokens"):
            import_model(folder, tmp_path / "ours")
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="it holds no JSON object"):
        import_model(folder, tmp_path / "ours")


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "theirs")
    tiny_hf_folder(tmp_path / "other")
    (folder / "tokenizer.model").write_bytes((tmp_path / "other" / "tokenizer.model").read_bytes())
    with pytest.raises(ValueError, match="has 400 pieces, but the model's vocabulary 200: it is another's"):
        import_model(folder, tmp_path / "ours")


@torch.no_grad()
def test_a_published_model_comes_back_as_itself(tmp_path: Path) -> None:
    """What transformers wrote, imported and exported, is the same to transformers."""
    tiny_hf_folder(tmp_path / "theirs")
    import_model(tmp_path / "theirs", tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "again")
    first, again = (AutoModelForCausalLM.from_pretrained(tmp_path / name).eval() for name in ("theirs", "again"))
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name))
    differing = {key for key, value in first.config.to_diff_dict().items() if again.config.to_dict().get(key) != value}
    assert differing <= {"_name_or_path", "initializer_range", "use_cache"}
    assert SEQUENCE_LENGTH < again.config.max_position_embeddings == 64
