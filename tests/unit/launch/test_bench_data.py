"""`steppe bench data`: contenders that do the same work, in turn, and what is said of them."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from typer.testing import CliRunner

from data_pipeline.shards import read_index
from data_pipeline.token_source import TokenSource
from data_pipeline.verify import verify
from launch.bench import data_loader, data_prepare
from launch.bench.app import app
from launch.bench.data import worker_counts
from launch.bench.data_loader_contender import turn
from launch.bench.data_loaders import BUILDERS, Work
from launch.bench.data_prepare_contender import sentencepiece, steppe
from launch.bench.data_tables import at_least, below, without_missing
from launch.bench.data_text import read_texts, train, write_text
from launch.bench.data_tokens import BOS_ID, EOS_ID, write_tokens
from launch.bench.data_vast import write_vast
from launch.bench.turns import Spread

SENTENCES = (
    "The steppe is wide, and the wind that comes over it has nothing to stop it.",
    "In the morning the riders went to the river with their horses, as they did on every day.",
    "Nobody of those who were there could say how long they had waited for the others.",
    "It was the year of the great drought, and they had to take what grass there was.",
)


@pytest.fixture(scope="module")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 300 documents, 220 kB, of which the rules for prose keep some."""
    random = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("prose")
    texts = [
        "\n".join(f"{SENTENCES[i]} {number * 7919} and {i}." for i in random.integers(0, 4, random.integers(4, 12)))
        for number in range(300)
    ]
    (folder / "prose.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder / "prose.jsonl"


def bench(*words: object) -> dict:
    found = CliRunner().invoke(app, ["data", *map(str, words), "--json"])
    assert found.exit_code == 0, found.output
    return json.loads(found.stdout)


def test_every_contender_is_described() -> None:
    assert list(data_loader.CONTENDERS) == list(BUILDERS)
    for part in (data_loader, data_prepare):
        assert part.NEEDED.keys() < part.CONTENDERS.keys()


@pytest.mark.slow
def test_all_prepare_the_same_tokens(prose: Path, tmp_path: Path) -> None:
    words = ("--input", prose, "--text-mb", 1, "--vocab-size", 400, "--workers", 1, "--workers", 2, "--rounds", 2)
    result = bench("--part", "prepare", *words, "--dir", tmp_path)["prepare"]
    assert result["copies"] > 1
    assert result["documents"] == result["copies"] * 300
    assert 0.5e6 < result["text_bytes"] < 1.5e6
    contenders = result["contenders"]
    expected = [f"{kind} x {number}" for number in (1, 2) for kind in data_prepare.CONTENDERS]
    left_out = {name for name in expected if name.partition(" x ")[0] in result["left_out"]}
    assert set(contenders) == set(expected) - {"steppe-curated x 1"} - left_out
    ours = contenders["steppe x 1"]
    assert ours["tokens"] == contenders["sentencepiece x 2"]["tokens"] + 2 * result["documents"]
    assert ours["tokens"] == contenders["steppe x 2"]["tokens"]
    if "steppe-curated" not in result["left_out"]:
        assert 0 < contenders["steppe-curated x 2"]["documents"] <= 300
    for name, contender in contenders.items():
        assert len(contender["seconds_by_round"]) == len(contender["cpu_seconds_by_round"]) == 2
        speed = contender["mb_per_second"]
        assert 0 < speed["min"] <= speed["median"] <= speed["max"]
        assert speed["max"] == pytest.approx(result["text_bytes"] / 1e6 / min(contender["seconds_by_round"]))
        if not name.startswith("steppe x"):
            raced = contenders[f"steppe x {contender['workers']}"]["seconds_by_round"]
            ratio = result["ratios"][f"steppe x {contender['workers']} / {name}"]
            pairs = [b / a for a, b in zip(raced, contender["seconds_by_round"], strict=True)]
            assert (ratio["min"], ratio["max"]) == (pytest.approx(min(pairs)), pytest.approx(max(pairs)))
    assert [target["at least"] for target in result["targets"]][:2] == [0.9, 0.9]
    assert not list(tmp_path.iterdir())


def test_our_turn_is_the_whole_command(prose: Path, tmp_path: Path) -> None:
    what, texts = read_texts([str(prose)])
    text = write_text(what, texts, tmp_path / "text", files=3, least_bytes=1)
    assert text.copies == 1
    stored = [
        json.loads(line)["text"] for path in text.files for line in gzip.decompress(path.read_bytes()).splitlines()
    ]
    assert sorted(stored) == sorted(texts)
    train(texts, 400, tmp_path / "small.model")
    job = {"tokenizer": str(tmp_path / "small.model"), "scratch": str(tmp_path), "unit_bytes": 1}
    made = steppe(job, list(text.files), 1)()
    assert made == (300, sentencepiece(job, list(text.files), 2)().tokens + 2 * 300, 2)
    (written,) = tmp_path.glob("made-*/data")
    assert verify(written).tokens == made.tokens
    # Rules for prose that leave nothing of it.
    assert steppe(job, list(text.files), 1, {"length": {"min_characters": 10**6}})() == (0, 0, 0)


def test_pythons_sources_are_the_text_if_none_is_named() -> None:
    what, texts = read_texts([])
    assert "standard library" in what
    assert len(texts) > 100
    assert all(text.strip() for text in texts)
    assert any("def json" in text or "import json" in text for text in texts)


def test_other_work_is_not_reported() -> None:
    ours = {"documents": 10, "tokens": 1020, "added_to_each": 2}
    curated = {"documents": 5, "tokens": 400, "added_to_each": 2}
    raw = {"documents": 10, "tokens": 1000, "added_to_each": 0}
    data_prepare.check_same_work({"steppe x 1": [ours], "raw": [raw], "steppe-curated x 1": [curated]}, 10)
    for other in ({"tokens": 990}, {"documents": 9}):
        with pytest.raises(RuntimeError, match="raw made .* it is not the same work"):
            data_prepare.check_same_work({"steppe x 1": [ours], "raw": [{**raw, **other}]}, 10)


@pytest.mark.slow
def test_all_load_the_same_tokens(tmp_path: Path) -> None:
    words = ("--tokens", 300_000, "--sequence-length", 64, "--micro-batch-size", 2, "--seconds", 0.05, "--rounds", 2)
    result = bench("--part", "loader", *words, "--dir", tmp_path)["loader"]
    assert list(result["contenders"]) == [name for name in BUILDERS if name not in result["left_out"]]
    assert {"limit", "memmap", "steppe", "steppe-best-fit-mask", "datasets"} <= result["contenders"].keys()
    for name, contender in result["contenders"].items():
        assert len(contender["tokens_per_second_by_round"]) == 2
        assert contender["tokens_per_second"]["min"] > 0
        assert contender["first_batch_seconds"]["min"] > 0
        assert name == "steppe" or f"steppe / {name}" in result["ratios"]
    assert 0 < result["best_fit_padding"] < 0.1
    assert result["targets"][0]["what"] == "tokens/s of steppe / memmap"
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    folder = tmp_path_factory.mktemp("loader")
    write_tokens(folder / "tokens", 100_000, 64)
    return Work(folder / "tokens", folder, sequence_length=64, micro_batch_size=2)


def test_random_documents_are_a_data_folder(work: Work) -> None:
    source = TokenSource(str(work.data))
    tokens = source.read_tokens(0, source.tokens)
    source.close()
    assert 100_000 <= len(tokens) < 130_000
    (shard,) = source.manifest.shards
    assert np.count_nonzero(tokens == BOS_ID) == np.count_nonzero(tokens == EOS_ID) == shard.documents
    lengths, _ = read_index(work.data / f"{shard.name}.idx")
    assert (tokens[np.cumsum(lengths) - 1] == EOS_ID).all()
    assert 400 < lengths.mean() < 1600


def test_our_loader_is_read_for_an_epoch(work: Work) -> None:
    source = TokenSource(str(work.data))
    stream = source.read_tokens(0, source.tokens - 1).astype(np.int64)  # nothing follows the last token
    inputs = np.pad(stream, (0, -len(stream) % 64), constant_values=EOS_ID).reshape(-1, 64)
    source.close()
    for name in ("steppe", "steppe-8"):
        rows = np.concatenate([batch.tokens for batch in BUILDERS[name](work)()])
        # Each window at most once, in another order; the last ones do not fill a step.
        known = {row.tobytes() for row in inputs}
        assert len(inputs) - 17 <= len({row.tobytes() for row in rows} & known) == len(rows)
        assert not np.array_equal(rows[:20], inputs[:20])
    masked = next(BUILDERS["steppe-best-fit-mask"](work)())
    assert masked.document_ids is not None
    assert masked.positions is not None


@pytest.mark.parametrize("name", ["memmap", "datasets"])
def test_peers_hand_over_inputs_and_targets(work: Work, name: str) -> None:
    tokens, targets = next(BUILDERS[name](work)())
    assert tokens.shape == targets.shape == (2, 64)
    assert tokens.dtype == targets.dtype == np.int64
    np.testing.assert_array_equal(tokens[:, 1:], targets[:, :-1])
    assert next(BUILDERS["limit"](work)()).shape == (2, 65)


def test_a_turn_ends_with_its_time_or_the_epoch(work: Work) -> None:
    opened = BUILDERS["steppe"](work)
    whole = turn(opened, 128, seconds=60)
    assert 100_000 - 3 * 128 < whole["tokens"] + 128 < 130_000
    part = turn(opened, 128, seconds=1e-9)
    assert part["tokens"] == 128
    assert part["first_batch_seconds"] > 0


@pytest.mark.slow
def test_a_start_on_very_many_tokens(tmp_path: Path) -> None:
    words = ("--described-tokens", 10**12, "--sequence-length", 64, "--micro-batch-size", 2, "--rounds", 1)
    result = bench("--part", "start", *words, "--dir", tmp_path)["start"]
    assert result["tokens"]["large"] == pytest.approx(1e12, rel=1e-3)
    assert result["shards"] == {"large": 1863, "small": 2}
    for start in result["contenders"].values():
        seconds = start["manifest_seconds"]["median"] + start["loader_seconds"]["median"]
        assert start["seconds"]["median"] == pytest.approx(seconds)
        assert start["peak_bytes"] >= start["manifest_held_bytes"] + start["loader_peak_bytes"] > 0
    assert [target["what"] for target in result["targets"]][:2] == [
        "seconds to the first batch, large",
        "MB at the peak, large",
    ]
    assert not list(tmp_path.iterdir())


def test_a_vast_folder_can_be_read_anywhere(tmp_path: Path) -> None:
    manifest = write_vast(tmp_path / "vast", 3 * 10**9)
    assert len(manifest.shards) == 6
    assert sum(path.lstat().st_blocks for path in (tmp_path / "vast").iterdir()) * 512 < 1 << 20
    source = TokenSource(str(tmp_path / "vast"))
    assert source.tokens == manifest.tokens
    assert not source.read_tokens(manifest.tokens - 70_000, 70_000).any()
    source.close()


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    for words, message in {
        ("--part", "train"): "--part train is not known: choose from prepare, loader, start",
        ("--dir", tmp_path / "none"): "is no folder: make it first",
        ("--part", "loader", "--tokens", 1000, "--dir", tmp_path): "--tokens 1000 are too few .* at least 524288",
        ("--part", "prepare", "--input", tmp_path / "none", "--dir", tmp_path): "does not exist",
        ("--part", "prepare", "--tokenizer", tmp_path / "none", "--dir", tmp_path): "tokenizer .* does not exist",
    }.items():
        with pytest.raises(ValueError, match=message):
            CliRunner().invoke(app, ["data", *map(str, words)], catch_exceptions=False)
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_that_raw_encoding_cannot_use_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    Tokenizer(WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")).save(str(path))
    with pytest.raises(ValueError, match="tokenizer.json is no sentencepiece model, which raw encoding needs"):
        data_prepare.check_tokenizer(path)


def test_peers_that_are_not_there_are_named() -> None:
    here, left_out = without_missing({"ours": (), "numpy": ("numpy",), "other": ("numpy", "no_such_package")})
    assert here == ["ours", "numpy"]
    assert left_out == {"other": "not installed here: pip install no_such_package"}


def test_targets_are_of_medians() -> None:
    spread = Spread(0.9, 0.1, 2.0)
    assert at_least("speed", 0.9, spread)["met"]
    assert not at_least("speed", 0.91, spread)["met"]
    assert below("stall", 0.91, spread) == {"what": "stall", "below": 0.91, **spread.as_dict(), "met": True}
    assert not below("stall", 0.9, spread)["met"]


def test_workers_double_up_to_all_cores() -> None:
    assert [worker_counts(cores) for cores in (1, 2, 3, 8)] == [[1], [1, 2], [1, 2, 3], [1, 2, 4, 8]]
