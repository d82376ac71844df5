"""Generation: transformers' greedy text, the cache that changes nothing, whitespace that survives."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from model.config import ModelConfig
from pretrain.generation.generate import continue_ids, generate
from pretrain.language_model import OwnModel
from pretrain.load_model import LoadedModel, load_model
from tests.tiny_hf import TEXTS, tiny_hf_folder, tokenizer_without

PROMPT = TEXTS[0][:60]


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_hf_folder(tmp_path_factory.mktemp("hf"), tie=request.param)


@pytest.fixture(scope="module")
def model(folder: Path) -> LoadedModel:
    return load_model(folder)


@torch.no_grad()
def without_cache(model: LoadedModel, ids: list[int], count: int) -> list[int]:
    written: list[int] = []
    for _ in range(count):
        hidden = model.model.decoder.hidden(torch.tensor([[*ids, *written]]))
        written.append(int(model.model.decoder.logits(hidden[0, -1]).argmax()))
    return written


class Scripted(torch.nn.Module):
    """A decoder that writes given tokens, whatever it reads: what matters here is what becomes of them."""

    def __init__(self, config: ModelConfig, tokens: list[int]) -> None:
        super().__init__()
        self.config, self.embed_tokens = config, torch.nn.Embedding(1, 1)
        self.logits_of = iter(torch.nn.functional.one_hot(torch.tensor(tokens), config.vocab_size).float())

    def hidden(self, tokens_BT: torch.Tensor, cache: object = None) -> torch.Tensor:
        return torch.zeros(*tokens_BT.shape, 1)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return next(self.logits_of)


def scripted(model: LoadedModel, tokens: list[int]) -> LoadedModel:
    return replace(model, model=OwnModel(Scripted(model.model.decoder.config, tokens)))  # type: ignore[arg-type]


def test_greedy_equals_transformers(folder: Path, model: LoadedModel) -> None:
    hf = LlamaForCausalLM.from_pretrained(folder)
    ids = [1, *model.tokenizer.encode(PROMPT)]
    whole = hf.generate(torch.tensor([ids]), max_new_tokens=60, do_sample=False, eos_token_id=2, pad_token_id=0)
    generation = generate(model, PROMPT, 60)
    assert list(generation.tokens) == whole[0, len(ids) :].tolist()


def test_the_cache_changes_nothing(model: LoadedModel) -> None:
    ids = [1, *model.tokenizer.encode(PROMPT)]
    found = continue_ids(model, ids, 40)
    assert found == without_cache(model, ids, len(found))


def test_stops_at_eos_and_leaves_it_out(model: LoadedModel) -> None:
    tokens = [*model.tokenizer.encode("print(i)\n"), 2]
    generation = generate(scripted(model, [*tokens, 9, 9]), PROMPT, 100)
    assert generation.tokens == tuple(tokens)
    assert (generation.text, generation.stopped_by) == ("print(i)\n", "eos")


def test_stops_at_the_length(model: LoadedModel) -> None:
    generation = generate(scripted(model, [5] * 20), PROMPT, 7)
    assert (len(generation.tokens), generation.stopped_by) == (7, "length")


@pytest.mark.parametrize(
    "text",
    [
        "\n    return a\n\n\n\tif x:\n        y",
        " leading space",
        "  two ",
        "草原は広い naïve",
        "in bytes: 🙂 żółć",
        "",
        "\n",
    ],
)
@pytest.mark.parametrize("prompt", [PROMPT, "", "x  ", "def f():\n    "])
def test_text_comes_out_as_it_was_written(model: LoadedModel, prompt: str, text: str) -> None:
    tokens = model.tokenizer.encode(text)
    generation = generate(scripted(model, [*tokens, 2]), prompt)
    assert (generation.prompt, generation.text) == (prompt, text)


def test_a_seed_decides_the_draws(model: LoadedModel) -> None:
    first, again, other = (generate(model, PROMPT, 30, temperature=1.0, seed=seed).tokens for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert generate(model, PROMPT, 30, temperature=1e-4).tokens == generate(model, PROMPT, 30).tokens


def test_draws_follow_the_distribution(model: LoadedModel) -> None:
    ids = [1, *model.tokenizer.encode(PROMPT)]
    with torch.no_grad():
        logits = model.model.decoder.logits(model.model.decoder.hidden(torch.tensor([ids]))[0, -1])
    expected = (logits / 2.0).softmax(-1)
    draws = torch.tensor([continue_ids(model, ids, 1, temperature=2.0, seed=seed)[0] for seed in range(1500)])
    frequency = torch.bincount(draws, minlength=len(expected)) / len(draws)
    assert (frequency - expected).abs().max() < 0.04


def test_a_tokenizer_without_bos_starts_from_eos(model: LoadedModel, tmp_path: Path) -> None:
    other = replace(model, tokenizer=tokenizer_without(tmp_path / "t.model", bos_id=-1))
    eos = other.tokenizer.eos_id
    assert eos is not None
    generation = generate(other, PROMPT, 10)
    assert generation.start_token == "eos"
    assert list(generation.tokens) == without_cache(
        other, [eos, *other.tokenizer.encode(PROMPT)], len(generation.tokens)
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
    ],
)
def test_bad_options_are_refused(model: LoadedModel, options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(model, PROMPT, **options)  # type: ignore[arg-type]
