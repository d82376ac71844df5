"""index.json: sealed, strict, and checked against the files beside it."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from data_pipeline.tokenizer_files import fingerprint_of
from pretrain.boxes import Box
from pretrain.checkpoint.index import (
    CheckpointIndex,
    DamagedError,
    OtherVersionError,
    checked_index,
    packed_boxes,
    parse_index,
    read_index,
    stored_parameters,
    write_index,
)
from pretrain.engine_torch import TorchEngine
from tests.checkpoint_edit import edit_index
from tests.unit.pretrain.checkpoint.made import RANK_FILE, new_engine, save


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that no test changes."""
    folder = tmp_path_factory.mktemp("saved")
    (folder / "tokenizer").write_bytes(b"a tokenizer")
    return save(folder, new_engine("precision=fp32"), 7, folder / "tokenizer")


@pytest.fixture
def checkpoint(saved: Path, tmp_path: Path) -> Path:
    """A copy of it, to change."""
    return shutil.copytree(saved, tmp_path / saved.name)


def seal(checkpoint: Path, body: str) -> None:
    """Write this body as the index, under its hash."""
    text = f'{{"xxh3": "{xxhash.xxh3_64_hexdigest(body.encode())}", "index": {body}}}'
    (checkpoint / "index.json").write_text(text)


def test_what_is_written_is_what_is_read(engine: TorchEngine, checkpoint: Path, tokenizer: Path) -> None:
    index = read_index(checkpoint)
    assert (index.format, index.step, index.model, index.sequence_length) == (2, 7, engine.config.model, 24)
    assert index.config == engine.config
    assert index.tokenizer_fingerprint == fingerprint_of(tokenizer)
    assert index.size_bytes == (checkpoint / RANK_FILE).stat().st_size
    assert index.parameters["norm.weight"].boxes == [0, 0, 32]
    weights_alone = index.model_copy(update={"trainer": None, "engine": None, "config": None})
    for each in (index, weights_alone):
        write_index(checkpoint, each)
        found, raw = checked_index(checkpoint)
        assert found.model_dump() == each.model_dump()
        assert raw == (checkpoint / "index.json").read_bytes()


def test_boxes_are_gathered_by_parameter() -> None:
    first = packed_boxes(0, [("a", (4, 6), Box((0, 0), (4, 2))), ("b", (3,), Box((0,), (3,)))])
    second = packed_boxes(1, [("a", (4, 6), Box((0, 2), (1, 4))), ("a", (4, 6), Box((1, 2), (3, 4)))])
    a, b = stored_parameters([first, packed_boxes(2, []), second]).values()
    assert (a.shape, b.shape) == ((4, 6), (3,))
    assert a.boxes == [0, 0, 0, 4, 2, 1, 0, 2, 1, 4, 1, 1, 2, 3, 4]
    assert np.array_equal(a.ranks, [0, 1, 1])
    assert np.array_equal(a.offsets, [[0, 0], [0, 2], [1, 2]])
    assert np.array_equal(a.sizes, [[4, 2], [1, 4], [3, 4]])
    assert [a.box(row) for row in range(3)] == [Box((0, 0), (4, 2)), Box((0, 2), (1, 4)), Box((1, 2), (3, 4))]
    assert b.table.tolist() == [[0, 0, 3]]


def test_every_changed_byte_is_found(saved: Path) -> None:
    path = saved / "index.json"
    raw = path.read_bytes()
    parse_index(raw, path)
    changed = bytearray(raw)
    for at in range(len(raw)):
        changed[at] ^= 1 << at % 8
        with pytest.raises(DamagedError, match="index.json is damaged"):
            parse_index(bytes(changed), path)
        changed[at] = raw[at]
        with pytest.raises(DamagedError, match="index.json is damaged"):
            parse_index(raw[:at], path)
    with pytest.raises(DamagedError, match="index.json is damaged"):
        parse_index(raw + b"\n", path)


def norm(**values: Any) -> Callable[[dict[str, Any]], None]:
    """What the index says of the final norm, shape [32], changed."""
    return lambda index: index["parameters"]["norm.weight"].update(values)


def file(**values: Any) -> Callable[[dict[str, Any]], None]:
    """What the index says of the only file, changed."""
    return lambda index: index["files"][0].update(values)


MALFORMED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "format": (lambda index: index.update(format="2"), "format: Input should be 2"),
    "unknown-key": (lambda index: index.update(more=1), "more: Extra inputs are not permitted"),
    "no-files": (lambda index: index.pop("files"), "files: Field required"),
    "nothing": (lambda index: index.clear(), "Field required"),
    "path": (file(path="../../elsewhere"), "files.0.path: Extra inputs are not permitted"),
    "files-by-name": (lambda index: index.update(files={"../x": index["files"][0]}), "files: Input should be a valid"),
    "hash": (file(xxh3="../../etc/passwd"), "files.0.xxh3: String should match pattern"),
    "short-hash": (file(xxh3="0" * 15), "files.0.xxh3: String should match pattern"),
    "file-size": (file(size_bytes=-1), "files.0.size_bytes: Input should be greater than or equal to 0"),
    "step": (lambda index: index.update(step=-1), "step: Input should be greater than or equal to 0"),
    "length": (lambda index: index.update(sequence_length=0), "sequence_length: Input should be greater than 0"),
    "block": (lambda index: index.update(block_bytes=0), "block_bytes: Input should be greater than 0"),
    "model": (lambda index: index["model"].update(num_layers="two"), "model.num_layers: Input should be a valid"),
    "config": (lambda index: index["config"].update(sead=1), "config.sead: Extra inputs are not permitted"),
    "parameters": (lambda index: index.update(parameters=[]), "parameters: Input should be an object"),
    "key-of-parameter": (norm(file="../x"), "parameters.norm.weight.file: Extra inputs are not permitted"),
    "numbers": (norm(boxes=[0, 0]), "norm.weight: 2 numbers are no list of boxes of shape (32,)"),
    "fraction": (norm(boxes=[0, 0, 32.5]), "parameters.norm.weight.boxes.2: Input should be a valid integer"),
    "outside": (norm(boxes=[0, 1, 32]), "norm.weight: a box lies outside of its shape (32,)"),
    "offset": (norm(boxes=[0, -1, 32]), "norm.weight: a box lies outside"),
    "no-size": (norm(boxes=[0, 0, 0]), "norm.weight: a box lies outside"),
    "size": (norm(boxes=[0, 0, -1]), "norm.weight: a box lies outside"),
    "rank": (norm(boxes=[1, 0, 32]), "norm.weight: a box lies outside of its shape (32,), or in a file that is none"),
    "negative-rank": (norm(boxes=[-1, 0, 32]), "norm.weight: a box lies outside"),
    "large": (norm(boxes=[0, 0, 10**30]), "norm.weight: a number in its shape or boxes is larger than any tensor"),
    "large-shape": (norm(shape=[10**30]), "norm.weight: a number in its shape or boxes is larger than any tensor"),
    "large-sum": (norm(boxes=[0, 2**62, 2**62]), "norm.weight: a box lies outside"),
    "no-dimension": (norm(shape=[]), "parameters.norm.weight.shape: Tuple should have at least 1 item"),
    "negative-shape": (norm(shape=[-32]), "parameters.norm.weight.shape.0: Input should be greater than 0"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_sealed_index_is_not_believed_for_that(case: str, checkpoint: Path) -> None:
    change, words = MALFORMED[case]
    edit_index(checkpoint, change)
    with pytest.raises(DamagedError) as caught:
        read_index(checkpoint)
    assert words in str(caught.value)
    assert str(caught.value).startswith(f"{checkpoint / 'index.json'} is no index of a checkpoint: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("number", [1, 3])
def test_another_version_is_no_damage(number: int, checkpoint: Path) -> None:
    edit_index(checkpoint, lambda index: index.update(format=number))
    with pytest.raises(OtherVersionError, match=f"format {number}, this version of Steppe reads 2: use the version"):
        read_index(checkpoint)


@pytest.mark.parametrize("body", ["", "{", "[]", "null", "3", "{]"])
def test_a_sealed_body_may_be_anything(body: str, checkpoint: Path) -> None:
    seal(checkpoint, body)
    with pytest.raises(
        DamagedError, match="is no index of a checkpoint: it: Invalid JSON|is no index of a checkpoint: it: Input"
    ) as caught:
        read_index(checkpoint)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1}', '{"format": 1, "step": 3', "\0" * 5000])
def test_what_is_not_sealed_is_refused(text: str, checkpoint: Path) -> None:
    (checkpoint / "index.json").write_text(text)
    with pytest.raises(DamagedError, match="index.json is damaged, or of another version of Steppe"):
        read_index(checkpoint)


def test_the_files_are_there_as_they_were_written(checkpoint: Path) -> None:
    size = (checkpoint / RANK_FILE).stat().st_size
    with (checkpoint / RANK_FILE).open("ab") as longer:
        longer.write(b"\0")
    with pytest.raises(DamagedError, match=f"{RANK_FILE} has {size + 1} bytes, expected {size} bytes"):
        read_index(checkpoint)
    (checkpoint / RANK_FILE).unlink()
    with pytest.raises(DamagedError, match=f"{RANK_FILE} is missing, expected {size} bytes"):
        read_index(checkpoint)
    (checkpoint / RANK_FILE).mkdir()
    with pytest.raises(DamagedError, match=f"{RANK_FILE} is missing"):
        read_index(checkpoint)
    (checkpoint / "index.json").unlink()
    with pytest.raises(DamagedError, match="index.json is missing"):
        read_index(checkpoint)
    with pytest.raises(DamagedError, match="index.json is missing"):
        read_index(checkpoint / "nowhere")


def test_a_second_file_is_counted(checkpoint: Path) -> None:
    edit_index(checkpoint, lambda index: index["files"].append({"size_bytes": 3, "xxh3": "0" * 16}))
    with pytest.raises(DamagedError, match="rank-00001.safetensors is missing, expected 3 bytes"):
        read_index(checkpoint)
    (checkpoint / "rank-00001.safetensors").write_bytes(b"abc")
    assert len(read_index(checkpoint).files) == 2


def test_the_tokenizer_is_the_one_that_was_saved(checkpoint: Path) -> None:
    tokenizer = checkpoint / "tokenizer.model"
    tokenizer.write_bytes(b"another one")
    with pytest.raises(DamagedError, match="tokenizer.model is missing, or not the one that was saved") as caught:
        read_index(checkpoint)
    tokenizer.unlink()
    with pytest.raises(DamagedError) as missing:
        read_index(checkpoint)
    assert str(missing.value) == str(caught.value)
    edit_index(checkpoint, lambda index: index.update(tokenizer_fingerprint=None))
    assert isinstance(read_index(checkpoint), CheckpointIndex)


def test_a_name_that_is_not_its_step_is_damage(checkpoint: Path) -> None:
    """A copy under a later name would be taken for the newest at every resume."""
    copy = shutil.copytree(checkpoint, checkpoint.with_name("step_00000040"))
    with pytest.raises(DamagedError, match="index.json is of step 7, not of that in its folder"):
        read_index(copy)
    assert read_index(copy.rename(copy.with_name("a-copy"))).step == 7
