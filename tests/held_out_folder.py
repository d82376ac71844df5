"""A small data folder of short and long documents, as `steppe data prepare` makes it, for what is held out."""

import json
import random
from pathlib import Path

from data_pipeline.preparation.job import prepare
from data_pipeline.tokenizer_training import train_tokenizer

VOCABULARY = 400
PROGRAM = Path(json.__file__).read_text(encoding="utf-8")


def held_out_texts(count: int = 40, seed: int = 0) -> list[str]:
    """Pieces of a program of 1 to some 300 characters, an empty one before them, and one with letters of many bytes."""
    pick = random.Random(seed)
    starts = [pick.randrange(len(PROGRAM) - 300) for _ in range(count - 2)]
    return ["", "Zürich, 草原は広い。 😀", *(PROGRAM[at : at + int(2 ** pick.uniform(0, 8.2))] for at in starts)]


def write_held_out(folder: Path, texts: list[str], shard_bytes: int = 1 << 20) -> Path:
    """Prepare the texts with a tokenizer of their own below a folder; returns the data folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train_tokenizer([PROGRAM], VOCABULARY, folder / "tokenizer.model")
    prepare([folder / "texts.jsonl"], folder / "tokenizer.model", folder / "tokens", workers=1, shard_bytes=shard_bytes)
    return folder / "tokens"
