"""Token ids after prompts of different lengths: transformers' own, and each prompt's whatever stands beside it."""

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM as AutoModel
from transformers import GPT2Config, GPTNeoXConfig, OPTConfig, PreTrainedConfig, PreTrainedModel

from model.kv_cache import KVCache
from pretrain.generation.ids import generate_ids
from pretrain.generation.options import GenerationOptions
from pretrain.language_model import Cache, LanguageModel, OwnModel
from pretrain.transformers_model import TransformersModel
from tests.hf_parity import MIXTRAL, build, config, theirs

VOCABULARY = 200
OWN: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"qk_norm": True, "tie_embeddings": True},
    "mixtral": MIXTRAL,
    "yarn": {"rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16}},
}
SMALL = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0, "initializer_range": 0.2}
OTHER: dict[str, PreTrainedConfig] = {
    "gpt2": GPT2Config(n_embd=48, n_layer=2, n_head=4, n_positions=64, **SMALL),
    "gpt_neox": GPTNeoXConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, **SMALL
    ),
    "opt": OPTConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=4, ffn_dim=96, word_embed_proj_dim=48,
        max_position_embeddings=64, **SMALL,
    ),
}  # fmt: skip


@functools.cache
def model(name: str) -> tuple[LanguageModel, PreTrainedModel]:
    """A tiny random model, ours and transformers'."""
    if name in OWN:
        decoder = build(config(vocab_size=VOCABULARY, **OWN[name])).eval()
        return OwnModel(decoder), theirs(decoder).eval()
    torch.manual_seed(0)
    other = AutoModel.from_config(OTHER[name]).eval()
    return TransformersModel(other, torch.device("cpu")), other


def prompts(seed: int = 0, lengths: Sequence[int] = (9, 1, 17, 4, 17)) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def generate_by_transformers(
    hf: PreTrainedModel, rows: list[list[int]], eos_id: int, **options: Any
) -> list[list[int]]:
    """What is new in each row, without the padding after it."""
    longest = max(map(len, rows))
    tokens = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    is_text = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    found = hf.generate(tokens, attention_mask=is_text, do_sample=False, eos_token_id=eos_id, pad_token_id=0, **options)
    written = [row[longest:].tolist() for row in found]
    return [row[: row.index(eos_id) + 1] if eos_id in row else row for row in written]


def an_eos_id(name: str, rows: list[list[int]], count: int = 12) -> int:
    """A token that ends some of the rows: what the model writes in the middle of the first."""
    ours, _ = model(name)
    return generate_ids(ours, rows[:1], GenerationOptions(max_new_tokens=count), None, VOCABULARY)[0][count // 2]


@pytest.mark.parametrize("name", [*OWN, *OTHER])
@pytest.mark.parametrize("seed", [0, 1])
def test_greedy_is_transformers(name: str, seed: int) -> None:
    ours, hf = model(name)
    rows = prompts(seed)
    eos_id = an_eos_id(name, rows)
    expected = generate_by_transformers(hf, rows, eos_id, max_new_tokens=24)
    assert generate_ids(ours, rows, GenerationOptions(max_new_tokens=24), eos_id, VOCABULARY) == expected
    assert expected[0][-1] == eos_id


@pytest.mark.parametrize(
    ("name", "beams", "length_penalty"),
    [
        *(("llama", beams, penalty) for beams in (2, 5) for penalty in (1.0, 0.0, 2.0, -1.0)),
        ("mixtral", 3, 1.0),
        ("gpt2", 3, 1.0),
    ],
)
@pytest.mark.parametrize("early_stopping", [False, True])
def test_beam_search_is_transformers(name: str, beams: int, length_penalty: float, early_stopping: bool) -> None:
    ours, hf = model(name)
    rows = prompts(2, lengths=(7, 2, 12))
    eos_id = an_eos_id(name, rows)
    options = GenerationOptions(
        max_new_tokens=16, beams=beams, length_penalty=length_penalty, early_stopping=early_stopping
    )
    expected = generate_by_transformers(
        hf,
        rows,
        eos_id,
        max_new_tokens=16,
        num_beams=beams,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
    )
    assert generate_ids(ours, rows, options, eos_id, VOCABULARY, batch_size=2) == expected


@pytest.mark.parametrize("max_new_tokens", [1, 2, 40])
def test_beam_search_of_any_length(max_new_tokens: int) -> None:
    ours, hf = model("llama")
    rows = prompts(3)
    eos_id = an_eos_id("llama", rows)
    expected = generate_by_transformers(hf, rows, eos_id, max_new_tokens=max_new_tokens, num_beams=4)
    options = GenerationOptions(max_new_tokens=max_new_tokens, beams=4)
    assert generate_ids(ours, rows, options, eos_id, VOCABULARY) == expected


@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 2.0])
@pytest.mark.parametrize("early_stopping", [False, True])
def test_a_beam_search_stops_when_transformers_does(length_penalty: float, early_stopping: bool) -> None:
    ours, hf = model("llama")
    rows, eos_id = prompts(0, lengths=[6]), 108  # both beams end before the limit, one rule's later than the other's
    options = GenerationOptions(50, beams=2, length_penalty=length_penalty, early_stopping=early_stopping)
    counting, passes = Counting(ours), list[int]()
    hook = hf.register_forward_hook(lambda *_: passes.append(2))
    expected = generate_by_transformers(
        hf, rows, eos_id, max_new_tokens=50, num_beams=2, length_penalty=length_penalty, early_stopping=early_stopping
    )
    hook.remove()
    assert generate_ids(counting, rows, options, eos_id, VOCABULARY) == expected  # type: ignore[arg-type]
    assert len(counting.rows) == len(passes) < 50


SEARCHES = {
    "greedy": GenerationOptions(max_new_tokens=20),
    "sampled": GenerationOptions(max_new_tokens=20, temperature=1.0, top_k=50, top_p=0.9, seed=3),
    "beams": GenerationOptions(max_new_tokens=20, beams=3),
}


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
@pytest.mark.parametrize("options", SEARCHES.values(), ids=SEARCHES.keys())
def test_batches_change_nothing(name: str, options: GenerationOptions) -> None:
    ours, _ = model(name)
    rows = prompts()
    eos_id = an_eos_id(name, rows)
    together = generate_ids(ours, rows, options, eos_id, VOCABULARY, batch_size=5)
    assert options.beams > 1 or len({len(row) for row in together}) > 1
    for batch_size in (1, 2):
        assert generate_ids(ours, rows, options, eos_id, VOCABULARY, batch_size=batch_size) == together


def test_a_seed_decides_the_draws_and_a_prompts_place_which() -> None:
    ours, _ = model("llama")
    rows = [prompts()[0]] * 3

    def drawn(seed: int) -> list[list[int]]:
        options = GenerationOptions(max_new_tokens=15, temperature=1.5, seed=seed)
        return generate_ids(ours, rows, options, None, VOCABULARY)

    assert drawn(0) == drawn(0)
    assert len({tuple(row) for seed in (0, 1) for row in drawn(seed)}) == 6


class Counting:
    """A model that notes how many rows it is given."""

    def __init__(self, inner: LanguageModel) -> None:
        self.inner, self.device, self.rows = inner, inner.device, list[int]()

    def new_cache(self, prompt_lengths: Sequence[int], max_tokens: int) -> Cache:
        return self.inner.new_cache(prompt_lengths, max_tokens)

    def next_logits(self, tokens_BT: Tensor, cache: Cache) -> Tensor:
        self.rows.append(len(tokens_BT))
        return self.inner.next_logits(tokens_BT, cache)


def test_rows_that_have_ended_cost_nothing() -> None:
    counting = Counting(model("llama")[0])
    limits = [3, 8, 5, 1]

    def ended(prompt: int, ids: list[int]) -> bool:
        return len(ids) == limits[prompt]

    options = GenerationOptions(max_new_tokens=50)
    written = generate_ids(counting, prompts()[:4], options, None, VOCABULARY, ended)  # type: ignore[arg-type]
    assert [len(row) for row in written] == limits
    assert counting.rows == [4, 3, 3, 2, 2, 1, 1, 1]


def test_ended_is_asked_once_a_token_in_order() -> None:
    asked: list[tuple[int, int]] = []

    def ended(prompt: int, ids: list[int]) -> bool:
        asked.append((prompt, len(ids)))
        return False

    generate_ids(model("llama")[0], prompts()[:2], GenerationOptions(max_new_tokens=3), None, VOCABULARY, ended)
    assert sorted(asked) == [(prompt, count) for prompt in (0, 1) for count in (1, 2, 3)]
    assert [count for _, count in asked] == [1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("beams", [1, 3])
def test_ids_beyond_the_limit_are_never_written(beams: int) -> None:
    options = GenerationOptions(max_new_tokens=30, beams=beams)
    written = generate_ids(model("llama")[0], prompts(), options, None, 20)
    assert max(max(row) for row in written) < 20


def test_a_beam_search_ends_where_every_beam_has_ended() -> None:
    """`ended` may end all candidates of a step, or all but fewer than there are beams."""
    ours, _ = model("llama")
    options = GenerationOptions(max_new_tokens=9, beams=3)
    for limit in (1, 4):
        written = generate_ids(ours, prompts(), options, None, VOCABULARY, lambda _, ids, n=limit: len(ids) >= n)
        assert [len(row) for row in written] == [limit] * 5
    survivor = generate_ids(ours, prompts(), options, None, VOCABULARY)[0][0]
    written = generate_ids(ours, prompts()[:1], options, None, VOCABULARY, lambda _, ids: ids[0] != survivor)
    assert len(written[0]) in (1, 9)


def test_a_model_that_cannot_say_what_comes_next_is_refused() -> None:
    decoder = build(config(vocab_size=VOCABULARY))
    decoder.norm.weight.data[0] = torch.inf
    with pytest.raises(ValueError, match="logits are not finite"):
        generate_ids(OwnModel(decoder), prompts(), GenerationOptions(), None, VOCABULARY)


def test_wrong_numbers_are_refused() -> None:
    ours, _ = model("llama")
    with pytest.raises(ValueError, match="beams=11 must be at most half of the vocabulary, which has 20 tokens"):
        generate_ids(ours, prompts(), GenerationOptions(beams=11), None, 20)
    with pytest.raises(ValueError, match="batch_size=0"):
        generate_ids(ours, prompts(), GenerationOptions(), None, VOCABULARY, batch_size=0)


def test_no_prompts_are_no_work() -> None:
    assert generate_ids(model("llama")[0], [], GenerationOptions(), None, VOCABULARY) == []


def test_the_cache_is_as_large_as_it_must_be() -> None:
    """Every token but the last is read; one more would not fit, and room for one more would be unused."""
    made: list[KVCache] = []

    class Watched(Counting):
        def new_cache(self, prompt_lengths: Sequence[int], max_tokens: int) -> Cache:
            cache = self.inner.new_cache(prompt_lengths, max_tokens)
            assert isinstance(cache, KVCache)
            made.append(cache)
            return cache

    watched = Watched(model("llama")[0])
    generate_ids(watched, prompts(), GenerationOptions(max_new_tokens=6), None, VOCABULARY)  # type: ignore[arg-type]
    assert [(cache.length, cache.max_tokens) for cache in made] == [(22, 22)]
