"""A model as EleutherAI's lm-eval asks for one: log-likelihoods of continuations and of texts, and generated text.

What is computed is what lm-eval's own `hf` model computes of the same weights, and so are the conventions: a context
and its continuation are encoded as one string, spaces at the end of a context belong to the continuation, what does not
fit is cut from the left. How it is computed differs: requests of equal inputs share a row, batches hold rows of like
length, only continuations go through the head, and batches, not documents, are dealt to the ranks. A batch is the same
on any number of ranks, so the results are, too; each rank has all of them, and to lm-eval each is alone.

    python -m pretrain.evaluation.harness run --model steppe --model_args pretrained=RUN,precision=bf16 --tasks ...

is lm-eval's own command line with this model.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np
import tokenizers
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, simple_parse_args_string

from data_pipeline.tokenizer_files import JSON_NAME, TokenizerFiles
from pretrain.engine import DTYPES
from pretrain.evaluation.harness_rows import Row, batches, likelihoods, log_probabilities, padded_tokens
from pretrain.evaluation.ranks import Ranks
from pretrain.evaluation.windows import DEFAULT_BATCH_TOKENS
from pretrain.generation.ids import BATCH_SIZE, generate_ids
from pretrain.generation.options import GenerationOptions
from pretrain.generation.text_stream import TextStream
from pretrain.load_model import LoadedModel, load_model

LOGITS = 1 << 26  # of a batch that asks for them, 256 MiB in fp32
ENCODED_STRINGS = 1024  # in one call of the tokenizer
MODEL_ARGUMENTS = (
    "pretrained",
    "step",
    "tokenizer",
    "precision",
    "offload",
    "max_length",
    "add_bos_token",
    "batch_tokens",
)
OPTIONS = {
    "top_k": "top_k",
    "top_p": "top_p",
    "num_beams": "beams",
    "length_penalty": "length_penalty",
    "early_stopping": "early_stopping",
}
"""What a task may say of how to write, beside when to end and a temperature, and what it is called here."""

A = TypeVar("A")
B = TypeVar("B")
OnProgress = Callable[[str, float], None]
"""Told after each batch what is being asked for, and which share of it this rank has answered."""


class _Writing(NamedTuple):
    """Requests whose continuations are written side by side: (request, ids of its prompt)."""

    options: GenerationOptions
    prompts: list[tuple[int, np.ndarray]]


@register_model("steppe")
class SteppeLM(LM):
    """`--model steppe` of lm-eval, once this module is imported.

    max_length: tokens that the model sees at once. cut_contexts: requests so far whose context did not fit into it.
    """

    def __init__(
        self,
        model: LoadedModel,
        ranks: Ranks | None = None,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        batch_tokens: int | None = None,
        on_progress: OnProgress = lambda _what, _share: None,
    ) -> None:
        """max_length: None for what the model was trained to see. add_bos_token: whether each string that is encoded
        begins with BOS; None for what transformers does with the tokenizer: a tokenizer.json says so itself, and a
        sentencepiece model adds none, as that of an export. batch_tokens: that go through the model at once.

        Raises ValueError for a length that the model cannot see, or BOS of a tokenizer that has none.
        """
        super().__init__()
        self.model, self.ranks, self.on_progress = model, ranks or Ranks(), on_progress
        self.max_length = model.context_length if max_length is None else max_length
        longest = math.inf if model.longest_context is None else model.longest_context
        if not 1 <= self.max_length <= longest:
            raise ValueError(f"max_length={self.max_length}: {model.name} sees 1 to {longest} tokens at once")
        self.start_id, self.start_token = model.start_token
        self.add_bos_token = _adds_bos(model.tokenizer.files) if add_bos_token is None else add_bos_token
        if self.add_bos_token and model.tokenizer.bos_id is None:
            raise ValueError(f"add_bos_token={add_bos_token}: {model.tokenizer.path} has no BOS; leave it out")
        self.batch_tokens = max(self.max_length, DEFAULT_BATCH_TOKENS if batch_tokens is None else batch_tokens)
        self.cut_contexts = 0

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> Self:
        """As `create_from_arg_obj`, from `--model_args pretrained=RUN,precision=bf16`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> Self:
        """From `MODEL_ARGUMENTS` by name. additional_config: lm-eval's batch size and device, which are chosen here.

        Raises ValueError for an argument that is not one of these, and as `load_model`.
        """
        arguments = dict(arg_dict)
        unknown = sorted(arguments.keys() - set(MODEL_ARGUMENTS))
        if unknown or "pretrained" not in arguments:
            problem = f"there is no {unknown[0]}" if unknown else "pretrained=MODEL is missing"
            raise ValueError(f"--model_args: {problem}; they are {', '.join(MODEL_ARGUMENTS)}")
        target, step, tokenizer, precision, offload = (arguments.pop(name, None) for name in MODEL_ARGUMENTS[:5])
        if precision not in (None, *DTYPES):
            raise ValueError(f"--model_args: precision={precision} is none of {', '.join(DTYPES)}")
        dtype = DTYPES[precision or "fp32"]
        model = load_model(Path(str(target)), step, Path(tokenizer) if tokenizer else None, dtype, offload)
        return cls(model, **arguments)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-probability in nats, whether greedy decoding would write it) of the continuation in each request, which
        is (context, continuation). An empty context is the start token.

        Raises ValueError for a continuation of no tokens or of more than `max_length`, and for logits that are not
        finite.
        """
        rows: dict[bytes, Row] = {}
        for request, (context, continuation) in enumerate(self._pairs([instance.args for instance in requests])):
            if not 1 <= len(continuation) <= self.max_length:
                raise ValueError(
                    f"{requests[request].task_name}: a continuation of {len(continuation)} tokens, where 1 to "
                    f"max_length={self.max_length} can be scored: {requests[request].args[1][:40]!r}"
                )
            sequence = np.concatenate([context, continuation])
            self.cut_contexts += len(sequence) > self.max_length + 1
            inputs = sequence[-(self.max_length + 1) : -1]
            rows.setdefault(inputs.tobytes(), Row(inputs, [])).asked.append((request, continuation))
        targets = LOGITS // self.model.model.vocab_size
        return self._answers(
            "log-likelihoods",
            batches(rows.values(), self.batch_tokens, targets),
            padded_tokens,
            lambda batch: likelihoods(self.model.model, batch),
        )

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-probability in nats of the whole text in each request, after the start token.

        It is read through windows of `max_length` side by side; the last one is as long, and counts what is left.
        Raises ValueError for a loss that is not finite.
        """
        rows = list[Row]()
        request_of = list[int]()  # of each window
        for request, ids in enumerate(self._encoded([instance.args[0] for instance in requests])):
            for inputs, targets in get_rolling_token_windows(ids.tolist(), self.start_id, self.max_length, 1):
                rows.append(Row(np.array(inputs), [(len(rows), np.array(targets))]))
                request_of.append(request)
        of_windows = self._answers(
            "texts",
            batches(rows, self.batch_tokens, self.batch_tokens),
            padded_tokens,
            lambda batch: log_probabilities(self.model.model, batch),
        )
        sums = [0.0] * len(requests)
        for request, log_probability in zip(request_of, of_windows, strict=True):
            sums[request] += log_probability
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What is written after the context in each request, until EOS, a stop string or so many tokens.

        Raises ValueError for a way of writing that is not ours, for one that leaves a context no room, and for logits
        that are not finite.
        """
        alike: dict[GenerationOptions, list[tuple[int, np.ndarray]]] = {}
        for request, ids in enumerate(self._encoded([instance.args[0] for instance in requests])):
            options = _options(requests[request].task_name, requests[request].args[1])
            room = self.max_length - options.max_new_tokens
            if room < 1:
                raise ValueError(
                    f"{requests[request].task_name} asks for {options.max_new_tokens} new tokens, which leaves none of "
                    f"max_length={self.max_length} for what comes before them: raise it, or leave the task out"
                )
            self.cut_contexts += len(ids) > room
            prompt = ids[-room:] if len(ids) else np.array([self.start_id])
            alike.setdefault(options, []).append((request, prompt))
        writings = list[_Writing]()
        for options, prompts in alike.items():
            prompts.sort(key=lambda prompt: len(prompt[1]), reverse=True)
            for start in range(0, len(prompts), BATCH_SIZE):
                # Draws are named by the batch, which is the same on any number of ranks.
                numbered = replace(options, seed=len(writings))
                writings.append(_Writing(numbered, prompts[start : start + BATCH_SIZE]))
        return self._answers("continuations", writings, _writing_cost, self._written)

    def _pairs(self, requests: Sequence[tuple[str, str]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Ids of each context, at least the start token, and of its continuation."""
        bare = [context.rstrip() for context, _ in requests]
        whole = [context + continuation for context, continuation in requests]
        strings = dict.fromkeys([*bare, *whole])  # a context has several continuations
        encoded = dict(zip(strings, self._encoded(list(strings)), strict=True))
        start = np.array([self.start_id])
        for (context, _), before, both in zip(requests, bare, whole, strict=True):
            context_ids, ids = encoded[before], encoded[both]
            if context:
                yield context_ids if len(context_ids) else start, ids[len(context_ids) :]
            else:
                ids = ids[int(self.add_bos_token) :]
                yield start, ids[1:] if len(ids) and ids[0] == self.start_id else ids

    def _encoded(self, strings: Sequence[str]) -> list[np.ndarray]:
        """Ids of each string, after BOS if that is to be added."""
        ids = list[np.ndarray]()
        for start in range(0, len(strings), ENCODED_STRINGS):
            ids += self.model.tokenizer.encode_batch(strings[start : start + ENCODED_STRINGS])
        if not self.add_bos_token:
            return ids
        bos = np.array([self.model.tokenizer.bos_id], dtype=np.int32)
        return [np.concatenate([bos, each]) for each in ids]

    def _answers(
        self,
        what: str,
        work: Sequence[B],
        cost: Callable[[B], int],
        answer: Callable[[B], Iterator[tuple[int, A]]],
    ) -> list[A]:
        """The answers in the order of requests, on every rank; each piece of work goes to the rank that was dealt least
        so far."""
        load, mine = [0] * self.ranks.world, list[B]()
        for piece in work:
            owner = load.index(min(load))
            load[owner] += cost(piece)
            if owner == self.ranks.rank:
                mine.append(piece)

        def act() -> list[tuple[int, A]]:
            found, done = list[tuple[int, A]](), 0
            for piece in mine:
                found += answer(piece)
                done += cost(piece)
                self.on_progress(what, done / load[self.ranks.rank])
            return found

        shares = self.ranks.gather(self.ranks.together(act))
        return [found for _, found in sorted((pair for share in shares for pair in share), key=lambda pair: pair[0])]

    def _written(self, writing: _Writing) -> Iterator[tuple[int, str]]:
        tokenizer, options = self.model.tokenizer, writing.options
        streams = [TextStream(tokenizer, (), options.stop) for _ in writing.prompts]

        def ended(place: int, ids: list[int]) -> bool:
            if options.beams == 1:
                streams[place].add(ids[-1:])
            else:  # any candidate may be asked about
                streams[place] = TextStream(tokenizer, (), options.stop)
                streams[place].add(ids)
            return streams[place].stopped

        prompts = [ids.tolist() for _, ids in writing.prompts]
        limit = tokenizer.vocab_size
        written = generate_ids(self.model.model, prompts, options, tokenizer.eos_id, limit, ended, len(prompts))
        for (request, _), ids in zip(writing.prompts, written, strict=True):
            # Decoded by itself, as lm-eval does, not as what goes on after the prompt.
            stream = TextStream(tokenizer, (), options.stop)
            stream.add([token for token in ids if token != tokenizer.eos_id])
            stream.finish()
            yield request, stream.text


def _options(task: str | None, generation_kwargs: Mapping[str, Any]) -> GenerationOptions:
    """How a task wants its continuations written. Raises ValueError for what cannot be done."""
    asked = dict(normalize_gen_kwargs(dict(generation_kwargs)))
    until, sample, temperature = asked.pop("until"), asked.pop("do_sample"), asked.pop("temperature", 0.0)
    arguments: dict[str, Any] = {"max_new_tokens": asked.pop("max_gen_toks"), "stop": tuple(filter(None, until))}
    unknown = sorted(asked.keys() - OPTIONS.keys())
    if unknown:
        raise ValueError(
            f"{task} asks for {unknown[0]}={asked[unknown[0]]} when writing, which steppe does not do: leave it out of "
            f"its generation_kwargs, which may name {', '.join(OPTIONS)}"
        )
    if not sample:
        asked = {name: value for name, value in asked.items() if name not in ("top_k", "top_p")}
    named = {OPTIONS[name]: value for name, value in asked.items() if value is not None}
    if named.get("beams", 1) == 1:
        named = {name: value for name, value in named.items() if name not in ("length_penalty", "early_stopping")}
    return GenerationOptions(**arguments, **named, temperature=temperature if sample else 0.0)


def _writing_cost(writing: _Writing) -> int:
    return len(writing.prompts) * (len(writing.prompts[0][1]) + writing.options.max_new_tokens)


def _adds_bos(files: TokenizerFiles) -> bool:
    """Whether a tokenizer puts BOS before a text if nobody says otherwise."""
    if files.name != JSON_NAME or files.bos_token is None:
        return False
    tokenizer = tokenizers.Tokenizer.from_str(files.content.decode())
    return tokenizer.encode("").ids[:1] == [tokenizer.token_to_id(files.bos_token)]


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
