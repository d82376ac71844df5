"""A model whose tokenizer is a tokenizer.json and nothing else, as most that are published today."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from data_pipeline.tokenizer import Tokenizer
from pretrain.generation.generate import generate
from pretrain.generation.options import GenerationOptions
from pretrain.hf_export import export
from pretrain.hf_import import import_model
from pretrain.load_model import load_model
from tests.json_tokenizers import BOS, SPLITS, trained, write
from tests.tiny_hf import TEXTS, VOCAB_SIZE, tiny_hf_folder


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    folder = tiny_hf_folder(tmp_path / "hf")
    (folder / "tokenizer.model").unlink()
    write(folder, trained(TEXTS * 9, SPLITS["llama 3"], vocab_size=VOCAB_SIZE - 5))
    return folder


def test_a_hugging_face_folder_writes_text(hf: Path) -> None:
    model = load_model(hf)
    assert model.tokenizer.vocab_size == VOCAB_SIZE - 5
    assert model.start_token == (0, "bos")
    assert model.tokenizer.encode(BOS) != [0]
    assert generate(model, ["The steppe"], GenerationOptions(max_new_tokens=4))[0].tokens


def test_it_goes_through_a_checkpoint_and_comes_back(hf: Path, tmp_path: Path) -> None:
    """The file itself, byte for byte; transformers gives ours' ids, and adds the BOS that it always added."""
    assert import_model(hf, tmp_path / "checkpoint")["tokenizer"] is True
    ours = load_model(tmp_path / "checkpoint").tokenizer
    assert ours.fingerprint == Tokenizer(hf / "tokenizer.json").fingerprint
    export(tmp_path / "checkpoint", tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (hf / "tokenizer.json").read_bytes()
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id) == (0, 1)
    for text in [*TEXTS, f"{BOS} literal"]:
        assert theirs.encode(text) == [0, *ours.encode(text)]
    assert load_model(tmp_path / "out").tokenizer.fingerprint == ours.fingerprint


def test_a_tokenizer_of_another_model(hf: Path, tmp_path: Path) -> None:
    write(hf, trained(TEXTS * 9, SPLITS["llama 3"], vocab_size=VOCAB_SIZE + 1))
    with pytest.raises(ValueError, match=f"has {VOCAB_SIZE + 1} pieces, but the model's vocabulary {VOCAB_SIZE}"):
        import_model(hf, tmp_path / "checkpoint")


def test_damage_to_either_file_is_found(hf: Path, tmp_path: Path) -> None:
    import_model(hf, tmp_path / "checkpoint")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        file = tmp_path / "checkpoint" / name
        whole = file.read_bytes()
        file.write_bytes(whole.replace(b"end", b"eat"))
        with pytest.raises(ValueError, match=r"tokenizer.json is missing, or not the one that was saved"):
            load_model(tmp_path / "checkpoint")
        file.write_bytes(whole)
    load_model(tmp_path / "checkpoint")
