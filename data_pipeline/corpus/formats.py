"""Which format a file has, by its name."""

from typing import Literal

Format = Literal["jsonl", "parquet", "arrow", "text", "lines", "warc", "wet", "hub"]
"""jsonl: a JSON object a line. parquet, arrow: a row a document. text: a file is one document. lines: a line is one.
warc: the text of the web pages of a crawl. wet: a crawl's extracted text. hub: a dataset on the Hugging Face hub."""

SUFFIXES: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".warc": "warc",
    ".wet": "wet",
}
TEXT_SUFFIXES = (".txt", ".json", ".csv", ".md", ".py")
COMPRESSION_SUFFIXES = (".gz", ".zst", ".bz2", ".xz")


def split_compression(file: str) -> tuple[str, str]:
    """The file's name without the suffix of a compression, and that suffix or nothing."""
    for suffix in COMPRESSION_SUFFIXES:
        if file.endswith(suffix):
            return file.removesuffix(suffix), suffix
    return file, ""


def format_of(path: str) -> Format:
    """The format of a file in an input whose format is `auto`. What has no telling suffix is one text.

    `.json` is a text, too, like any other source, but `.json.gz` (or another compression) holds JSON lines: so C4 and
    many corpora since have named them, and nobody compresses a single object.
    """
    stem, compression = split_compression(path)
    if compression and stem.endswith(".json"):
        return "jsonl"
    return next((format_ for suffix, format_ in SUFFIXES.items() if stem.endswith(suffix)), "text")


def looks_like_file(path: str) -> bool:
    """Whether a path ends as a file's name does, though it may have the form of a hub name."""
    stem, compression = split_compression(path)
    return bool(compression) or stem.endswith((*SUFFIXES, *TEXT_SUFFIXES))
