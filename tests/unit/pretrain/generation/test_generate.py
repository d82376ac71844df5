"""Prompts in, text out: what ends it, what is said while it is written, and what is refused."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from pretrain.generation.generate import Generation, generate
from pretrain.generation.options import GenerationOptions
from pretrain.load_model import LoadedModel, load_model
from tests.smollm2 import smollm2, smollm2_tokenizer
from tests.tiny_hf import TEXTS, tiny_hf_folder, tokenizer_without

PROMPT = TEXTS[0][:60]


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_hf_folder(tmp_path_factory.mktemp("hf"), tie=request.param)


@pytest.fixture(scope="module")
def model(folder: Path) -> LoadedModel:
    return load_model(folder)


class Scripted:
    """A model that writes given tokens, a list of them for each prompt, whatever it reads."""

    device = torch.device("cpu")

    def __init__(self, vocab_size: int, rows: list[list[int]]) -> None:
        self.vocab_size, self.rows = vocab_size, rows

    def new_cache(self, prompt_lengths: Sequence[int], max_tokens: int) -> "ScriptedCache":
        return ScriptedCache(len(prompt_lengths))

    def next_logits(self, tokens_BT: Tensor, cache: "ScriptedCache") -> Tensor:
        tokens = [self.rows[row][cache.written] for row in cache.rows]
        cache.written += 1
        return 100 * torch.nn.functional.one_hot(torch.tensor(tokens), self.vocab_size).float()


class ScriptedCache:
    def __init__(self, rows: int) -> None:
        self.rows, self.written = list(range(rows)), 0

    def select(self, rows: Sequence[int]) -> None:
        self.rows = [self.rows[row] for row in rows]


def scripted(model: LoadedModel, *rows: list[int]) -> LoadedModel:
    return replace(model, model=Scripted(model.tokenizer.vocab_size, list(rows)))  # type: ignore[arg-type]


def only(model: LoadedModel, prompt: str = PROMPT, **options: object) -> Generation:
    (generation,) = generate(model, [prompt], GenerationOptions(**options))  # type: ignore[arg-type]
    return generation


@pytest.mark.parametrize("beams", [1, 3])
def test_the_text_is_transformers(folder: Path, model: LoadedModel, beams: int) -> None:
    hf = LlamaForCausalLM.from_pretrained(folder)
    ids = [1, *model.tokenizer.encode(PROMPT)]
    options = {"max_new_tokens": 30, "num_beams": beams, "do_sample": False, "eos_token_id": 2, "pad_token_id": 0}
    expected = hf.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist()
    generation = only(model, max_new_tokens=30, beams=beams)
    assert list(generation.tokens) == expected
    assert generation.start_token == "bos"


def test_stops_at_eos_and_leaves_it_out(model: LoadedModel) -> None:
    tokens = [*model.tokenizer.encode("print(i)\n"), 2]
    for beams in (1, 2):
        generation = only(scripted(model, [*tokens, *[9] * 200]), beams=beams)
        assert generation.tokens == tuple(tokens)
        assert (generation.text, generation.stopped_by) == ("print(i)\n", "eos")


def test_stops_at_the_length(model: LoadedModel) -> None:
    generation = only(scripted(model, [5] * 20), max_new_tokens=7)
    assert (len(generation.tokens), generation.stopped_by) == (7, "length")


@pytest.mark.parametrize("beams", [1, 2])
def test_stops_at_a_string_and_leaves_it_out(model: LoadedModel, beams: int) -> None:
    tokens = model.tokenizer.encode("print(i)\n\nprint(j)\n")
    generation = only(scripted(model, tokens), stop=("\n\n", "Q"), max_new_tokens=len(tokens), beams=beams)
    assert (generation.text, generation.stopped_by) == ("print(i)", "stop")
    assert len(generation.tokens) < len(tokens)


@pytest.mark.parametrize("beams", [1, 2])
def test_text_is_given_out_by_prompt_and_adds_up(model: LoadedModel, beams: int) -> None:
    texts = ["草原は広い 🙂", "def f():\n\treturn 1\n", ""]
    rows = [[*model.tokenizer.encode(text), 2, *[9] * 50] for text in texts]
    said = dict.fromkeys(range(3), "")

    def on_text(index: int, text: str) -> None:
        assert text
        said[index] += text

    options = GenerationOptions(max_new_tokens=50, beams=beams)
    # Of one length, so that the script's rows are in the order of the prompts.
    generations = generate(scripted(model, *rows), ["a", "b", "c"], options, on_text)
    assert list(said.values()) == [generation.text for generation in generations] == texts
    assert [generation.prompt for generation in generations] == ["a", "b", "c"]


def test_text_comes_while_it_is_written(model: LoadedModel) -> None:
    tokens = [*model.tokenizer.encode("one two three four five"), 2]
    said: list[str] = []
    generate(scripted(model, tokens), [PROMPT], GenerationOptions(), lambda _, text: said.append(text))
    assert len(said) > 3


def test_a_prompts_text_is_the_same_whatever_stands_beside_it(model: LoadedModel) -> None:
    prompts = [PROMPT, "", TEXTS[3][:20], TEXTS[1][:200]]
    for options in (GenerationOptions(max_new_tokens=15), GenerationOptions(max_new_tokens=15, beams=2)):
        together = generate(model, prompts, options)
        assert [generation.prompt for generation in together] == prompts
        assert together == [generate(model, [prompt], options)[0] for prompt in prompts]


def test_a_tokenizer_without_bos_starts_from_eos(model: LoadedModel, tmp_path: Path) -> None:
    other = replace(model, tokenizer=tokenizer_without(tmp_path / "t.model", bos_id=-1))
    eos = other.tokenizer.eos_id
    assert eos is not None
    generation = only(other, max_new_tokens=1)
    ids = torch.tensor([[eos, *other.tokenizer.encode(PROMPT)]])
    last = torch.zeros_like(ids, dtype=torch.bool)
    last[:, -1] = True
    assert generation.start_token == "eos"
    assert generation.tokens == (int(other.model.logits_at(ids, last).argmax()),)


def test_what_is_longer_than_the_model_can_see_is_refused(model: LoadedModel) -> None:
    short = replace(model, longest_context=len(model.tokenizer.encode(PROMPT)) + 5)
    assert len(only(short, max_new_tokens=5).tokens) <= 5
    with pytest.raises(ValueError, match=r"and max_new_tokens=6 are more than .* set --max-new-tokens to 5 at most"):
        only(short, max_new_tokens=6)
    with pytest.raises(ValueError, match="shorten the prompt"):
        only(short, prompt=PROMPT * 2)


@pytest.mark.slow
def test_a_real_model_writes_what_transformers_does(tmp_path: Path) -> None:
    """SmolLM2-135M: a batch of different lengths, greedy and by beams."""
    config, weights = smollm2()
    hf = LlamaForCausalLM.from_pretrained(
        None, config=LlamaForCausalLM.config_class(**config), state_dict=weights, dtype=torch.float32
    )
    hf.save_pretrained(tmp_path)
    tokenizer = smollm2_tokenizer()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    names = {"bos_token": tokenizer.id_to_token(1), "eos_token": tokenizer.id_to_token(2)}
    (tmp_path / "tokenizer_config.json").write_text(str(names).replace("'", '"'))
    ours = load_model(tmp_path)
    prompts = ["The capital of France is", "def fibonacci(n):\n", "One, two, three, four, five, six, seven,"]
    ids = [[1, *ours.tokenizer.encode(prompt)] for prompt in prompts]
    longest = max(map(len, ids))
    tokens = torch.tensor([[2] * (longest - len(row)) + row for row in ids])
    is_text = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids])
    for beams in (1, 3):
        options = {"max_new_tokens": 16, "num_beams": beams, "do_sample": False, "eos_token_id": 2, "pad_token_id": 2}
        expected = hf.generate(tokens, attention_mask=is_text, **options)[:, longest:].tolist()
        written = generate(ours, prompts, GenerationOptions(max_new_tokens=16, beams=beams))
        assert [list(each.tokens) for each in written] == [
            row[: row.index(2) + 1] if 2 in row else row for row in expected
        ]
