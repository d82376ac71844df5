"""Text from a model: prompts in, continuations out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from pretrain.generation.ids import BATCH_SIZE, generate_ids
from pretrain.generation.options import GenerationOptions
from pretrain.generation.text_stream import TextStream
from pretrain.load_model import LoadedModel


@dataclass(frozen=True)
class Generation:
    """What was written after a prompt. `text` is the continuation alone, without control tokens and without a stop
    string; `tokens` are all that were written."""

    prompt: str
    text: str
    tokens: tuple[int, ...]
    stopped_by: Literal["eos", "stop", "length"]
    start_token: str


def generate(
    model: LoadedModel,
    prompts: Sequence[str],
    options: GenerationOptions,
    on_text: Callable[[int, str], None] | None = None,
    batch_size: int = BATCH_SIZE,
) -> list[Generation]:
    """Continue each prompt until EOS, until a stop string, or for `options.max_new_tokens`.

    on_text: given the place of a prompt and what has been written after it since the last call, whole characters only;
        a beam search writes all at its end. batch_size: see `generate_ids`.
    Raises ValueError if a prompt leaves no room for its continuation in what the model can see at once.
    """
    start, start_token = model.start_token
    texts = [model.tokenizer.encode(prompt) for prompt in prompts]
    rows = [[start, *ids] for ids in texts]
    _check_lengths(model, rows, options)
    streams = [TextStream(model.tokenizer, ids, options.stop) for ids in texts]
    eos_id = model.tokenizer.eos_id

    def say(index: int, text: str) -> None:
        if text and on_text is not None:
            on_text(index, text)

    def ended(index: int, ids: list[int]) -> bool:
        if options.beams > 1:
            candidate = TextStream(model.tokenizer, texts[index], options.stop)
            candidate.add(ids if options.stop else ())
            return candidate.stopped
        say(index, streams[index].add(ids[-1:]))
        return streams[index].stopped

    written = generate_ids(model.model, rows, options, eos_id, model.tokenizer.vocab_size, ended, batch_size)
    generations = []
    for index, (ids, stream) in enumerate(zip(written, streams, strict=True)):
        by_eos = ids[-1] == eos_id
        if options.beams > 1:
            say(index, stream.add(ids[:-1] if by_eos else ids))
        say(index, stream.finish())
        stopped_by: Literal["eos", "stop", "length"] = "eos" if by_eos else "stop" if stream.stopped else "length"
        generations.append(Generation(prompts[index], stream.text, tuple(ids), stopped_by, start_token))
    return generations


def _check_lengths(model: LoadedModel, rows: Sequence[Sequence[int]], options: GenerationOptions) -> None:
    longest = max(map(len, rows), default=0)
    if model.longest_context is None:
        return
    room = model.longest_context - longest + 1  # for the last token is written, and not read
    if options.max_new_tokens <= room:
        return
    remedy = f"set --max-new-tokens to {room} at most" if room > 0 else "shorten the prompt"
    raise ValueError(
        f"a prompt of {longest:,} tokens and max_new_tokens={options.max_new_tokens:,} are more than {model.name} can "
        f"see at once, which is {model.longest_context:,} tokens: {remedy}"
    )
