"""One contender of `steppe bench eval`: `python -P -m launch.bench.evaluation_contender NAME JOB`.

Each has the same Hugging Face folder, and answers {"work": ..} with how long it took to score that text, from strings
to sums, and what came of it. What the others do is written as their own documentation shows it.
"""

import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from launch.bench.turns import Answers
from pretrain.device import detect, peak_memory_bytes
from pretrain.engine import DTYPES


class Scored(NamedTuple):
    """Sum of -ln p over so many targets."""

    nats: float
    targets: int


Score = Callable[[Sequence[str], int, int], Scored]  # of documents, by windows of so many tokens and a stride


def steppe(job: dict[str, Any]) -> Score:
    """The product, as the command runs it, its records included."""
    from pretrain.evaluation.evaluate import score_documents
    from pretrain.evaluation.record import RecordsWriter, read_scores
    from pretrain.evaluation.texts import EvaluationDocument
    from pretrain.evaluation.windows import Windowing
    from pretrain.host_memory import keep_freed_memory
    from pretrain.load_model import load_model

    model = load_model(Path(job["model"]), dtype=DTYPES[job["precision"]])
    keep_freed_memory()

    def score(texts: Sequence[str], window: int, stride: int) -> Scored:
        documents = (EvaluationDocument(index, "bench", text, None) for index, text in enumerate(texts))
        windowing = Windowing.of(model.context_length, window, stride)
        with tempfile.TemporaryDirectory(prefix="steppe-bench-") as folder:
            with RecordsWriter(Path(folder), 0) as records:
                score_documents(model, documents, windowing, records=records)
            scores = list(read_scores(Path(folder)))
        return Scored(sum(one.nats for one in scores), sum(one.tokens for one in scores))

    return score


def transformers_loop(job: dict[str, Any]) -> Score:
    """A document at a time, a window at a time, as transformers' guide to perplexity does it: labels of -100 where a
    target has been scored, the mean loss times how many were."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = detect()
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=DTYPES[job["precision"]]).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    start = eos if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]  # Qwen's has no BOS

    @torch.no_grad()
    def score(texts: Sequence[str], window: int, stride: int) -> Scored:
        nats, targets = 0.0, 0
        for text in texts:
            ids = [*start, *tokenizer(text, add_special_tokens=False)["input_ids"], *eos]
            scored = 1
            for begin in range(0, len(ids) - 1, stride):
                # A window sees `window` tokens, and is asked for as many targets: one more id than it sees.
                inputs = torch.tensor([ids[begin : begin + window + 1]], device=device)
                labels = inputs.clone()
                labels[:, : scored - begin] = -100
                counted = inputs.size(1) - (scored - begin)
                nats += model(inputs, labels=labels).loss.item() * counted
                targets, scored = targets + counted, begin + inputs.size(1)
                if scored == len(ids):
                    break
        return Scored(nats, targets)

    return score


def lm_eval(job: dict[str, Any], batch_size: int) -> Score:
    """lm-eval's model class `hf`, its rolling log-likelihood: windows side by side, no EOS."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    logging.disable(logging.WARNING)
    loaded: dict[int, Any] = {}

    def score(texts: Sequence[str], window: int, stride: int) -> Scored:
        assert stride == window
        if window not in loaded:
            dtype = DTYPES[job["precision"]]
            loaded[window] = HFLM(
                job["model"], max_length=window, batch_size=batch_size, dtype=dtype, device=str(detect())
            )
        lm = loaded[window]
        requests = [Instance("loglikelihood_rolling", {}, (text,), index) for index, text in enumerate(texts)]
        nats = -sum(lm.loglikelihood_rolling(requests, disable_tqdm=True))
        return Scored(nats, sum(len(lm.tok_encode(text)) for text in texts))

    return score


CONTENDERS: dict[str, Callable[[dict[str, Any]], Score]] = {
    "steppe": steppe,
    "transformers": transformers_loop,
    "lm-eval": lambda job: lm_eval(job, 1),
    "lm-eval-8": lambda job: lm_eval(job, 8),
}


def main() -> None:
    """Answer until stdin ends."""
    answers = Answers()
    job = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    score = CONTENDERS[sys.argv[1]](job)
    answers.say(torch=torch.__version__)
    for question in answers.questions():
        cut = job["works"][question["work"]]
        texts = json.loads(Path(job["texts"]).read_text(encoding="utf-8"))[question["work"]]
        began = time.perf_counter()
        scored = score(texts, cut["window"], cut["stride"])
        seconds = time.perf_counter() - began
        answers.say(seconds=seconds, peak_memory_bytes=peak_memory_bytes(detect()), **scored._asdict())


if __name__ == "__main__":
    main()
