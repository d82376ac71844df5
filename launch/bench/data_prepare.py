"""Preparation in `steppe bench data`: MB/s of text by workers, in turn with raw encoding and a public pipeline."""

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.bench.data_tables import at_least, in_words, print_part, say, without_missing
from launch.bench.turns import Contender, Spread, ratios, take_turns

CONTENDERS = {
    "sentencepiece": "SentencePieceProcessor.encode, all documents in memory from the start, a batch of them for each "
    "task of a pool of so many threads, ids as arrays; nothing is read or written",
    "steppe": "`steppe data prepare`: decompresses, parses, tokenizes with BOS and EOS, hashes, writes and fsyncs "
    "shards, index and origins; starting its worker processes is part of it",
    "steppe-curated": "the same with the rules of Gopher and C4, exact and near duplicates (a sketch of each document, "
    "and a second pass over the shards)",
    "datatrove": "its JsonlReader and DocumentTokenizer (batches as by default, no shuffle), the exported "
    "tokenizer.json with EOS, one process a worker; nothing is hashed or fsynced",
}
NEEDED = {"datatrove": ("datatrove", "orjson"), "steppe-curated": ("datasketch",)}
CURATED = "steppe-curated"
CURATION = {"gopher": True, "c4": True, "exact_duplicates": True, "near_duplicates": True}
FILES_A_WORKER = 4
"""Each a unit of work, so that workers end at about the same time, as they do on a large corpus."""
OF_RAW = 0.9
SAME_TOKENS = 1e-3  # of all: a control piece that is spelled in a text may be read as one elsewhere


@dataclass(frozen=True)
class Setting:
    """A contender with a number of workers; those of different numbers share a process."""

    kind: str
    workers: int
    host: Contender

    @property
    def name(self) -> str:
        return f"{self.kind} x {self.workers}"

    def ask(self, **question: Any) -> dict[str, Any]:
        """One turn."""
        return self.host.ask(kind=self.kind, workers=self.workers, **question)


def run(
    inputs: Sequence[str],
    tokenizer: Path | None,
    vocab_size: int,
    least_bytes: int,
    workers: Sequence[int],
    rounds: int,
    scratch: Path,
) -> dict[str, Any]:
    """Measure; returns what `--json` prints.

    Args:
        inputs: files and folders of text; none: Python's standard library.
        tokenizer: a sentencepiece model; None: one of `vocab_size` is trained on the text.
        least_bytes: documents are repeated until there is about so much text.
        workers: numbers of them.
        rounds: turns of each contender.
        scratch: a folder to work in.

    Raises:
        ValueError: an input is not usable.
        RuntimeError: a contender did other work than ours.
    """
    from launch.bench.data_text import read_texts, train, write_text

    kinds, left_out = without_missing({kind: NEEDED.get(kind, ()) for kind in CONTENDERS})
    if tokenizer is not None:
        check_tokenizer(tokenizer)
    say("collecting text")
    what, texts = read_texts(inputs)
    text = write_text(what, texts, scratch / "text", FILES_A_WORKER * max(workers), least_bytes)
    if tokenizer is None:
        tokenizer = scratch / "tokenizer.model"
        say(f"training a tokenizer of {vocab_size:,} pieces")
        train(texts, vocab_size, tokenizer)
    job = {
        "files": [str(path) for path in text.files],
        "tokenizer": str(tokenizer.resolve()),
        "scratch": str(scratch),
        "unit_bytes": max(path.stat().st_size for path in text.files),
        "curation": CURATION,
    }
    with ExitStack() as stack:
        words = [json.dumps(job)]
        hosts = {
            kind: stack.enter_context(Contender(kind, "launch.bench.data_prepare_contender", [kind, *words], 1))
            for kind in kinds
            if kind != CURATED
        }
        for kind, host in hosts.items():
            say(f"building {kind}")
            host.built()
        hosts[CURATED] = hosts["steppe"]
        settings = [
            Setting(kind, number, hosts[kind])
            for number in workers
            for kind in kinds
            if kind != CURATED or number == max(workers)
        ]
        # Libraries are loaded when they are first used.
        take_turns(settings, 1, {"files": 1}, lambda name, number: say(f"warming up: {name}"))
        answers = take_turns(
            settings,
            rounds,
            {"files": len(text.files)},
            lambda name, number: say(f"round {number + 1}/{rounds}: {name}"),
        )
    check_same_work(answers, text.documents)
    contenders = {
        setting.name: {
            "what": CONTENDERS[setting.kind],
            "workers": setting.workers,
            "mb_per_second": Spread.of([text.text_bytes / 1e6 / turn["seconds"] for turn in turns]).as_dict(),
            "mb_per_cpu_second": Spread.of([text.text_bytes / 1e6 / turn["cpu_seconds"] for turn in turns]).as_dict(),
            "documents": turns[0]["documents"],
            "tokens": turns[0]["tokens"],
            "seconds_by_round": [turn["seconds"] for turn in turns],
            "cpu_seconds_by_round": [turn["cpu_seconds"] for turn in turns],
        }
        for setting, turns in ((setting, answers[setting.name]) for setting in settings)
    }
    # Seconds of theirs over ours is our speed over theirs.
    faster = {
        f"steppe x {setting.workers} / {setting.name}": ratios(
            [turn["seconds"] for turn in answers[setting.name]],
            [turn["seconds"] for turn in answers[f"steppe x {setting.workers}"]],
        )
        for setting in settings
        if setting.kind != "steppe"
    }
    return {
        "text": text.what,
        "documents": text.documents,
        "text_bytes": text.text_bytes,
        "copies": text.copies,
        "files": len(text.files),
        "tokenizer": tokenizer.name,
        "rounds": rounds,
        "contenders": contenders,
        "ratios": {name: spread.as_dict() for name, spread in faster.items()},
        "left_out": left_out,
        "targets": [
            *(
                at_least(f"MB/s of {name}", OF_RAW, spread)
                for name, spread in faster.items()
                if "sentencepiece" in name
            ),
            *(at_least(f"MB/s of {name}", 1.0, spread) for name, spread in faster.items() if "datatrove" in name),
        ],
    }


def check_tokenizer(path: Path) -> None:
    """Raise ValueError unless it is a sentencepiece model, which all contenders can use."""
    from data_pipeline.tokenizer import Tokenizer
    from data_pipeline.tokenizer_files import SENTENCEPIECE_NAME

    if Tokenizer(path).files.name != SENTENCEPIECE_NAME:
        raise ValueError(f"--tokenizer {path} is no sentencepiece model, which raw encoding needs: name another")


def check_same_work(answers: dict[str, list[dict[str, Any]]], documents: int) -> None:
    """Raise RuntimeError unless all encoded all documents to the same tokens, but for BOS and EOS."""
    expected = None
    for name, turns in answers.items():
        if name.startswith(CURATED):
            continue
        for turn in turns:
            tokens = turn["tokens"] - turn["added_to_each"] * turn["documents"]
            expected = tokens if expected is None else expected
            if turn["documents"] != documents or abs(tokens - expected) > SAME_TOKENS * expected:
                raise RuntimeError(
                    f"{name} made {tokens:,} tokens of {turn['documents']:,} documents, where {expected:,} of "
                    f"{documents:,} were expected: it is not the same work, and its speed says nothing"
                )


def print_table(result: dict[str, Any]) -> None:
    """What `run` returned."""
    rows = []
    for name, contender in result["contenders"].items():
        ratio = result["ratios"].get(f"steppe x {contender['workers']} / {name}")
        rows.append(
            [
                name,
                in_words(contender["mb_per_second"], 2),
                in_words(contender["mb_per_cpu_second"], 2),
                in_words(ratio, 3) if ratio else "",
                f"{contender['documents']:,}",
                f"{contender['tokens']:,}",
            ]
        )
    copies = f", each {result['copies']} times" if result["copies"] > 1 else ""
    print_part(
        f"Preparation: {result['text_bytes'] / 1e6:.1f} MB in {result['documents']:,} documents{copies}, "
        f"{result['files']} files (jsonl.gz)",
        ("x workers", "MB/s of text", "MB a CPU second", "steppe / it", "documents", "tokens"),
        rows,
        {kind: what for kind, what in CONTENDERS.items() if kind not in result["left_out"]},
        f"Text: {result['text']}. {result['rounds']} rounds in alternating order; medians (min-max), ratios round "
        "by round, of equal numbers of workers. MB are of the text that goes in. With one worker, steppe reads in "
        "one thread while another tokenizes. The processes are there, their libraries loaded and the files in the "
        "page cache when a turn begins.",
        result,
    )
