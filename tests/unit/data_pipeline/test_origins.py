"""The list of a corpus's files, as it is kept and as it may be damaged."""

import pytest

from data_pipeline.origins import ORIGIN_DTYPE, OriginFile, parse_origin_files, serialized_origins


def test_the_list_of_files_comes_back() -> None:
    files = [OriginFile("/a/b c.jsonl", "web"), OriginFile("s3://bucket/é.gz", "books")]
    assert parse_origin_files(serialized_origins(files), "origins.json") == files
    assert ORIGIN_DTYPE.itemsize == 16


@pytest.mark.parametrize("content", [b"", b"[]", b'{"files": [{"path": "a"}]}', b'{"files": 1}', b"\xff"])
def test_a_damaged_list_is_told(content: bytes) -> None:
    with pytest.raises(ValueError, match="d/origins.json is damaged .*: copy it again or run `steppe data prepare`"):
        parse_origin_files(content, "d/origins.json")
