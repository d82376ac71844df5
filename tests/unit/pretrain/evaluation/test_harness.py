"""Benchmarks through lm-eval: the same tasks asked of our model and of lm-eval's own `hf`, on the same weights."""

import json
import multiprocessing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from safetensors.torch import load_file, save_file
from torch import Tensor

from pretrain.evaluation.harness import SteppeLM
from pretrain.evaluation.harness_job import TasksJob, run_tasks_job
from pretrain.evaluation.harness_rows import Row, batches
from pretrain.evaluation.harness_tasks import ONE_PROCESS, find_tasks, load_tasks, run_tasks
from pretrain.load_model import load_model
from tests.benchmark_tasks import CONTEXT, KINDS, trained_gpt2, trained_llama, write_tasks
from tests.smollm2 import smollm2, smollm2_tokenizer


@pytest.fixture(autouse=True)
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """None is forked off one that has threads."""

    def refuse(*_: Any) -> None:
        raise AssertionError("a pool of processes")

    monkeypatch.setattr(multiprocessing, "Pool", refuse)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("benchmarks") / "tasks")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_gpt2(tmp_path_factory.mktemp("gpt2"))


def assert_equals_hf(
    model: Path, folder: Path, names: tuple[str, ...], num_fewshot: int | None, **options: Any
) -> dict[str, Any]:
    """Every answer and every metric; returns what ours are."""
    ours = SteppeLM(load_model(model), **options)
    found = run_tasks(ours, load_tasks(*find_tasks(names, folder), num_fewshot), samples=True)
    theirs = HFLM(pretrained=str(model), batch_size=3, dtype="float32", device="cpu", **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ONE_PROCESS, "1")
        expected = evaluate(theirs, load_tasks(*find_tasks(names, folder), num_fewshot))
    for name in expected["results"]:
        for sample, reference in zip(found["samples"][name], expected["samples"][name], strict=True):
            assert sample["arguments"] == json.loads(json.dumps(reference["arguments"]))
            for (answer,), (other,) in zip(sample["resps"], reference["resps"], strict=True):
                if isinstance(other, tuple):
                    assert answer[1] == other[1]
                    answer, other = answer[0], other[0]
                assert answer == (other if isinstance(other, str) else pytest.approx(other, rel=1e-5, abs=3e-5))
        for metric, value in expected["results"][name].items():
            # A perplexity is e to a loss: its relative error is the absolute one of the loss.
            exact = isinstance(value, str) or metric.startswith(("acc", "exact_match"))
            assert found["results"][name][metric] == (value if exact else pytest.approx(float(value), rel=1e-4))
    for counted in ("n-shot", "versions", "n-samples"):
        assert found[counted] == json.loads(json.dumps(expected[counted]))
    return found


@pytest.mark.parametrize("num_fewshot", [pytest.param(None, marks=pytest.mark.slow), 2])
def test_llama_equals_hf(llama: Path, folder: Path, num_fewshot: int | None) -> None:
    found = assert_equals_hf(llama, folder, KINDS, num_fewshot)
    assert found["n-shot"] == dict.fromkeys(KINDS, num_fewshot or 0)
    assert found["harness"]["max_length"] == CONTEXT
    assert found["harness"]["add_bos_token"] is False
    assert found["harness"]["cut_contexts"] > 0
    # Neither all right nor all wrong, and text, or equality would say little.
    assert 0 < found["results"]["tiny_choice"]["acc,none"] < 1
    assert any(sample["resps"][0][0].strip() for sample in found["samples"]["tiny_writing"])


@pytest.mark.slow
def test_bos_where_it_is_asked_for(llama: Path, folder: Path) -> None:
    assert assert_equals_hf(llama, folder, KINDS, 1, add_bos_token=True)["harness"]["add_bos_token"] is True


def test_a_tokenizer_that_adds_bos_and_a_model_of_transformers(gpt2: Path, folder: Path) -> None:
    found = assert_equals_hf(gpt2, folder, KINDS, 1)
    assert found["harness"]["add_bos_token"] is True


@pytest.mark.slow
def test_a_shorter_window(llama: Path, folder: Path) -> None:
    found = assert_equals_hf(llama, folder, KINDS, 0, max_length=24)
    assert found["harness"]["max_length"] == 24


@pytest.mark.slow
def test_a_real_model_equals_hf(tmp_path: Path) -> None:
    config, weights = smollm2()
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    smollm2_tokenizer().save(str(tmp_path / "tokenizer.json"))
    special = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(special))
    assert_equals_hf(tmp_path, write_tasks(tmp_path / "tasks", documents=2), KINDS, 1, max_length=96)


def test_the_size_of_batches_changes_nothing(llama: Path, folder: Path) -> None:
    model, tasks = load_model(llama), find_tasks(("tiny_choice", "tiny_text"), folder)
    whole = run_tasks(SteppeLM(model), load_tasks(*tasks, 2), samples=True)
    single = run_tasks(SteppeLM(model, batch_tokens=1), load_tasks(*tasks, 2), samples=True)
    for name in whole["results"]:
        for one, other in zip(whole["samples"][name], single["samples"][name], strict=True):
            assert np.ravel(one["resps"]).astype(float) == pytest.approx(
                np.ravel(other["resps"]).astype(float), rel=1e-5
            )


class Counting:
    """A model that notes what it is given; otherwise the one inside."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.shapes = inner, list[tuple[int, int]]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def logits_at(self, tokens_BT: Tensor, at_BT: Tensor) -> Tensor:
        self.shapes.append((len(tokens_BT), int(at_BT.sum())))
        return self.inner.logits_at(tokens_BT, at_BT)


def test_equal_inputs_are_computed_once_and_only_continuations_reach_the_head(llama: Path) -> None:
    loaded = load_model(llama)
    counting = Counting(loaded.model)
    model = SteppeLM(replace(loaded, model=counting))
    context = "The same context before"
    tokens = [len(loaded.tokenizer.encode(context + text)) for text in ("", " q", " z", " q z q")]
    assert tokens[1] == tokens[2] < tokens[3]
    asked = [Instance("loglikelihood", {}, (context, text), 0) for text in (" q", " z", " q", " q z q")]
    answers = model.loglikelihood(asked)
    assert answers[0] == answers[2] != answers[1]
    # One row for the three that differ at most in their last token, one for the long one.
    assert counting.shapes == [(2, (tokens[1] - tokens[0]) + (tokens[3] - tokens[0]))]


def test_batches_hold_rows_of_like_length_within_their_bounds() -> None:
    rows = [Row(np.arange(length), [(length, np.arange(min(length, 3)))]) for length in (1, 9, 4, 4, 9, 2, 7)]
    cut = batches(rows, tokens=18, targets=7)
    assert [[len(row.inputs) for row in batch] for batch in cut] == [[9, 9], [7, 4], [4, 2, 1]]
    assert [[len(row.inputs) for row in batch] for batch in batches(rows[1:3], tokens=1, targets=1)] == [[9], [4]]
    assert batches([], 10, 10) == []


def test_an_empty_context_is_the_start_token(llama: Path) -> None:
    model = SteppeLM(load_model(llama))
    for text in ("import", "   import"):
        pair, rolling = (Instance("loglikelihood", {}, args, 0) for args in (("", text), (text,)))
        assert model.loglikelihood([pair])[0][0] == pytest.approx(model.loglikelihood_rolling([rolling])[0], rel=1e-6)
    assert model.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("",), 0)]) == [0.0]
    assert model.loglikelihood([]) == model.loglikelihood_rolling([]) == model.generate_until([]) == []


def test_ways_of_writing(llama: Path) -> None:
    """Beam search, sampling, and stop strings over several tokens."""
    model = SteppeLM(load_model(llama))
    asked = {"max_gen_toks": 8, "until": ["\n\n"]}

    def write(**more: Any) -> list[str]:
        requests = [Instance("generate_until", {}, (text, {**asked, **more}), 0) for text in ("import ", "", "def ")]
        return model.generate_until(requests)

    greedy = write()
    assert write(do_sample=False, temperature=0.7, top_k=3) == greedy
    assert write(do_sample=True, temperature=1.0, top_k=1) == greedy
    assert write(do_sample=True, temperature=1.5) == write(do_sample=True, temperature=1.5) != greedy
    assert len(write(num_beams=3, early_stopping=True)) == 3
    whole = greedy[0]
    assert len(whole) > 4
    assert write(until=whole[2:4])[0] == whole[: whole.index(whole[2:4])]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((("a", "b" * 900),), r"a continuation of \d+ tokens, where 1 to max_length=64 can be scored: 'bbb"),
        ((("a", ""),), "a continuation of 0 tokens"),
        (("a", {"max_gen_toks": 64}), "asks for 64 new tokens, which leaves none of max_length=64"),
        (("a", {"max_gen_toks": 4, "repetition_penalty": 2.0}), "repetition_penalty=2.0 when writing, which steppe"),
        (("a", {"max_gen_toks": 4, "num_beams": 0}), "beams=0 must be at least 1"),
    ],
)
def test_what_cannot_be_asked(llama: Path, args: tuple[Any, ...], message: str) -> None:
    model = SteppeLM(load_model(llama))
    writes = len(args) == 2
    request = Instance("generate_until" if writes else "loglikelihood", {}, args if writes else args[0], 0)
    with pytest.raises(ValueError, match=message):
        (model.generate_until if writes else model.loglikelihood)([request])


def test_a_model_that_overflows_is_no_result(llama: Path, folder: Path, tmp_path: Path) -> None:
    for file in llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(llama / "model.safetensors")
    save_file(
        {**weights, "lm_head.weight": weights["lm_head.weight"] * 1e38},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    for task in ("tiny_choice", "tiny_text"):
        with pytest.raises(ValueError, match="log-probabilities are not finite.*--precision fp32"):
            run_tasks_job(TasksJob(str(tmp_path), (task,), str(folder)))


def test_by_lm_evals_own_names(llama: Path) -> None:
    model = get_model("steppe").create_from_arg_string(f"pretrained={llama},max_length=32", {"batch_size": 1})
    assert (type(model), model.max_length, model.rank, model.world_size) == (SteppeLM, 32, 0, 1)
    for wrong, message in (
        (f"pretrained={llama},dtype=float", "there is no dtype; they are pretrained, step"),
        ("step=3", "pretrained=MODEL is missing"),
        (f"pretrained={llama},precision=fp8", "precision=fp8 is none of fp32"),
    ):
        with pytest.raises(ValueError, match=message):
            get_model("steppe").create_from_arg_string(wrong)


def test_limits_of_a_model(llama: Path, gpt2: Path) -> None:
    with pytest.raises(ValueError, match="max_length=65: .* sees 1 to 64 tokens at once"):
        SteppeLM(load_model(gpt2), max_length=65)
    assert SteppeLM(load_model(llama), max_length=65).max_length == 65
    with pytest.raises(ValueError, match="max_length=0"):
        SteppeLM(load_model(llama), max_length=0)
    loaded = load_model(gpt2)
    loaded.tokenizer.bos_id = None
    with pytest.raises(ValueError, match="add_bos_token=True: .* has no BOS; leave it out"):
        SteppeLM(loaded, add_bos_token=True)
