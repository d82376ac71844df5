"""Ids by a Hugging Face `tokenizer.json`, for documents of any length.

What such a file does to a text is open-ended, so a long document is cut only where its own steps are known to begin
anew, and is encoded whole otherwise.
"""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer as JsonTokenizer

from data_pipeline.tokenizer_files import JSON_CONFIG_NAME, TokenizerFiles

SEGMENT_CHARACTERS = 1 << 16
"""Longer texts are cut, if they can be."""
CALL_SEGMENTS = 32
"""Segments of one library call, which keeps some 100 bytes a token until it returns."""

# Letters that Unicode has had from the start, that no normalization below touches, and that every pattern below takes
# for letters; and characters that none of these takes for a letter, a digit, a mark, or part of a contraction. Brackets
# and bars are left out, since added tokens have them.
_LETTER = r"[A-Za-zА-Яа-яぁ-ゖァ-ヺ一-龥가-힣]"
_SEPARATOR = r"[ !-&(-/:;=?@\\^`~\u3001\u3002\u300c-\u3011\uff01\uff0c\uff1a\uff1b\uff1f]"
_CUT = re.compile(f"(?<={_LETTER})(?={_SEPARATOR}{_LETTER})")

_CONTRACTIONS = r"'s|'t|'re|'ve|'m|'ll|'d"
_SPACES = r"\s+(?!\S)|\s+"
_CL100K = (
    rf"(?i:{_CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|DIGITS| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|{_SPACES}"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
KNOWN_PATTERNS = {
    # GPT-2
    rf"{_CONTRACTIONS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|{_SPACES}",
    # GPT-4 and Llama 3; Qwen 2
    _CL100K.replace("DIGITS", r"\p{N}{1,3}"),
    _CL100K.replace("DIGITS", r"\p{N}"),
    # GPT-4o
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+(?i:{_CONTRACTIONS})?|"
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*(?i:{_CONTRACTIONS})?|"
    rf"\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|{_SPACES}",
}
"""Each ends a word before a separator that follows a letter, whatever comes after, and begins anew there."""
DIGIT_PATTERNS = {r"\d", r"\d+", r"\d{1,3}", r"\p{N}", r"\p{N}+", r"\p{N}{1,3}"}
"""These cut digits off and leave the rest as it is."""
KEPT_NORMALIZERS = {"NFC", "NFKC", "Lowercase"}
"""They change neither a letter's neighbours nor what kind of character it is."""


class JsonCodec:
    """See `Codec`."""

    def __init__(self, files: TokenizerFiles) -> None:
        """Raises ValueError if the content is no `tokenizer.json`, or its BOS or EOS is not one of its tokens."""
        try:
            spec = json.loads(files.content)
            self._tokenizer = JsonTokenizer.from_str(files.content.decode())
        except Exception as error:  # the library's own are plain Exceptions
            reason = " ".join(str(error).split())
            raise ValueError(f"tokenizer {files.path} is not a Hugging Face tokenizer.json ({reason})") from error
        if spec["model"].get("dropout"):
            raise ValueError(
                f"tokenizer {files.path} chooses pieces by chance (dropout {spec['model']['dropout']}), but a text has "
                "one encoding here: set model.dropout to null in it"
            )
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # as ordinary text, that is
        self.vocab_size = max(self._tokenizer.get_vocab().values(), default=-1) + 1
        self.bos_id = self._special_id(files, "bos_token", files.bos_token)
        self.eos_id = self._special_id(files, "eos_token", files.eos_token)
        self._may_cut = can_be_cut(spec)

    def _special_id(self, files: TokenizerFiles, role: str, token: str | None) -> int | None:
        if token is None:
            return None
        token_id = self._tokenizer.token_to_id(token)
        if token_id is None:
            raise ValueError(
                f"tokenizer {files.path} has no token {token!r}, but {JSON_CONFIG_NAME} beside it names that as its "
                f"{role}: take both files from one model"
            )
        return token_id

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, in pieces where that is known to change nothing."""
        parts: list[list[np.ndarray]] = [[] for _ in texts]
        batch: list[tuple[int, str]] = []
        for index, text in enumerate(texts):
            for segment in self._segments(text):
                batch.append((index, segment))
                if len(batch) == CALL_SEGMENTS:
                    self._encode(batch, parts)
                    batch = []
        self._encode(batch, parts)
        return [ids[0] if len(ids) == 1 else np.concatenate(ids) for ids in parts]

    def _encode(self, batch: list[tuple[int, str]], parts: list[list[np.ndarray]]) -> None:
        """Encode segments in one call, and add the ids of each to those of its text."""
        encodings = self._tokenizer.encode_batch_fast([segment for _, segment in batch], add_special_tokens=False)
        for (index, _), encoding in zip(batch, encodings, strict=True):
            parts[index].append(np.array(encoding.ids, dtype=np.int32))

    def decode(self, ids: list[int]) -> str:
        """The text of the ids."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def _segments(self, text: str) -> Iterator[str]:
        start = 0
        while self._may_cut and len(text) - start > SEGMENT_CHARACTERS:
            cut = _CUT.search(text, start + SEGMENT_CHARACTERS)
            if cut is None:
                break
            yield text[start : cut.start()]
            start = cut.start()
        yield text[start:]


def can_be_cut(spec: dict[str, Any]) -> bool:
    """Whether a text may be cut before a separator between two letters, by what a `tokenizer.json` says it does."""
    normalizers = _steps(spec.get("normalizer"), "normalizers")
    splits = _steps(spec.get("pre_tokenizer"), "pretokenizers")
    first = next((at for at, step in enumerate(splits) if _separates(step)), None)
    return (
        first is not None
        and all(map(_takes_digits, splits[:first]))
        and all(_takes_digits(step) or _writes_bytes(step) for step in splits[first + 1 :])
        and all(step["type"] in KEPT_NORMALIZERS for step in normalizers)
        # The other tokens that are found in a text must not reach over a cut.
        and not any(
            token["rstrip"] or re.search(_LETTER + _SEPARATOR, token["content"])
            for token in spec.get("added_tokens", ())
            if not token["special"]
        )
    )


def _steps(step: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    """The steps of a sequence, itself perhaps of sequences, or of a single one."""
    if step is None:
        return []
    if step["type"] == "Sequence":
        return [each for part in step[inner] for each in _steps(part, inner)]
    return [step]


def _separates(step: dict[str, Any]) -> bool:
    """Whether a step of pre-tokenization ends a word at a cut, and does the same on either side without the other."""
    if step["type"] == "ByteLevel":
        return step["use_regex"] and not step["add_prefix_space"]
    if step["type"] == "Split":
        isolated = step["behavior"] == "Isolated" or (step["behavior"] == "Removed" and step["invert"])
        return isolated and step["pattern"].get("Regex") in KNOWN_PATTERNS
    return step["type"] in {"Whitespace", "BertPreTokenizer"}


def _takes_digits(step: dict[str, Any]) -> bool:
    """Whether a step of pre-tokenization separates digits and leaves the rest as it is."""
    if step["type"] == "Split":
        return step["pattern"].get("Regex") in DIGIT_PATTERNS and step["behavior"] == "Isolated" and not step["invert"]
    return step["type"] == "Digits"


def _writes_bytes(step: dict[str, Any]) -> bool:
    """Whether a step of pre-tokenization looks at each word by itself, and writes its bytes as characters."""
    return step["type"] == "ByteLevel" and not step["add_prefix_space"]
