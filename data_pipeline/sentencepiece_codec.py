"""Ids by a sentencepiece model, for documents of any length.

sentencepiece's time and memory a byte grow with its input, so a long document is encoded in segments that overlap.
That no id comes out other than in one piece rests on a property of byte-pair encoding: pieces are the encoding of
their text exactly if each two neighbours are the encoding of theirs (van Antwerpen & Neubeck, "So many tokens, so
little time", github.blog 2024; see also Berglund & van der Merwe 2023, "Formalizing BPE tokenization", section 4).
Why: merges are made best first, so up to the first one that would cross the border of two neighbours, those within
them come in the same order as in their text alone, where it would be made, too.
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from data_pipeline.tokenizer_files import TokenizerFiles

SPACE = "\u2581"
"""sentencepiece writes a space as this character, so the character itself needs care (see SentencepieceCodec)."""

SEGMENT_BYTES = 8192
"""Above it, time a byte grows noticeably; far below it, what is encoded twice does."""

OVERLAP_PIECES = 16
"""The last pieces of a segment are encoded again with the next one: what follows may change them."""

_Piece = sentencepiece_model_pb2.ModelProto.SentencePiece


class SentencepieceCodec:
    """See `Codec`.

    A model that leaves its text as it is, as those of `train_tokenizer` do, spells the character U+2581 in bytes;
    sentencepiece alone would read it as a space.
    """

    def __init__(self, files: TokenizerFiles) -> None:
        """Raises ValueError if the content is no sentencepiece model."""
        spec = sentencepiece_model_pb2.ModelProto()
        try:
            spec.ParseFromString(files.content)
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=files.content)
        except Exception as error:
            raise ValueError(f"tokenizer {files.path} is not a sentencepiece model ({error})") from error
        self.vocab_size: int = self._processor.get_piece_size()
        self.bos_id = _none_if_negative(self._processor.bos_id())
        self.eos_id = _none_if_negative(self._processor.eos_id())
        normalizer = spec.normalizer_spec
        self._rewrites = bool(
            normalizer.precompiled_charsmap or normalizer.add_dummy_prefix or normalizer.remove_extra_whitespaces
        )
        self._spells_space = not self._rewrites and _spells_bytes(spec)
        self._space_ids = np.array(
            [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()], dtype=np.int32
        )
        plain = _without_rewriting(spec) if self._rewrites else self._processor
        self._segments = _Segments(spec, plain) if _can_be_cut(spec) else None

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text; all that need no care in one call."""
        awkward = [
            (self._segments is not None and len(text) > SEGMENT_BYTES) or (self._spells_space and SPACE in text)
            for text in texts
        ]
        ids = iter(self._processor.encode([t for t, a in zip(texts, awkward, strict=True) if not a], out_type="numpy"))
        return [self._encode(text) if a else next(ids) for text, a in zip(texts, awkward, strict=True)]

    def decode(self, ids: list[int]) -> str:
        """The text of the ids."""
        return self._processor.decode(ids)

    def _encode(self, text: str) -> np.ndarray:
        if self._rewrites:
            return self._encode_part(self._processor.normalize(text).replace(SPACE, " "))
        ids = bytearray()
        for match in re.finditer(f"{SPACE}+|[^{SPACE}]+", text):
            part = match[0]
            ids += (np.tile(self._space_ids, len(part)) if part[0] == SPACE else self._encode_part(part)).tobytes()
        return np.frombuffer(ids, dtype=np.int32)

    def _encode_part(self, text: str) -> np.ndarray:
        if self._segments is None:
            return self._processor.encode(text, out_type="numpy")
        return self._segments.encode(text.encode())


class _Segments:
    """Encodes a text that needs no more rewriting, segment by segment."""

    def __init__(self, spec: Any, processor: Any) -> None:
        """processor: of the model, with the text as it is."""
        self._processor = processor
        self._piece_bytes = [
            1 if piece.type == _Piece.BYTE else len(piece.piece.replace(SPACE, " ").encode()) for piece in spec.pieces
        ]
        # Pieces of the user are found before anything is merged, from left to right, the longest first. What is found
        # depends on no more than so many bytes before and after.
        self._reach_bytes = max(
            (self._piece_bytes[at] for at, piece in enumerate(spec.pieces) if piece.type == _Piece.USER_DEFINED),
            default=1,
        )

    def encode(self, text: bytes) -> np.ndarray:
        """Ids of a text in UTF-8."""
        settled: list[np.ndarray] = []  # the encoding of text[:start], in parts
        starts: list[int] = []  # of each part
        start, length = 0, SEGMENT_BYTES
        while True:
            end = _character_start(text, min(start + length, len(text)))
            ids = self._encode(text[start:end])
            if settled and not self._joins(text, start, settled[-1], ids):
                # What was settled is not how the longer text begins: again from further back, with more text.
                length = 2 * (end - starts[-1])
                start = starts.pop()
                settled.pop()
                continue
            if end == len(text):
                return np.concatenate([*settled, ids])
            kept, kept_bytes = self._without_overlap(text, start, end, ids)
            # A part as long as that grows whenever it is encoded anew, so this comes to an end.
            if kept_bytes < max(length // 2, self._reach_bytes):
                length *= 2
                continue
            settled.append(ids[:kept])
            starts.append(start)
            start, length = start + kept_bytes, SEGMENT_BYTES

    def _encode(self, text: bytes) -> np.ndarray:
        return self._processor.encode(text, out_type="numpy")

    def _without_overlap(self, text: bytes, start: int, end: int, ids: np.ndarray) -> tuple[int, int]:
        """How many of the ids of text[start:end] to keep, and their bytes: whole characters, without the overlap."""
        kept, cut = len(ids), end
        while kept and (len(ids) - kept < OVERLAP_PIECES or not _begins_character(text, cut)):
            kept -= 1
            cut -= self._piece_bytes[ids[kept]]
        return kept, cut - start

    def _joins(self, text: bytes, cut: int, before: np.ndarray, after: np.ndarray) -> bool:
        """Whether ids that end at a byte, and ids that begin there, are next to each other in the encoding of both.

        Looks at as many of them as the pieces of the user reach: their borders are then those of the whole, and the
        pair on either side of the cut is among what is compared.
        """
        first, start = len(before), cut
        while first and (cut - start < self._reach_bytes or not _begins_character(text, start)):
            first -= 1
            start -= self._piece_bytes[before[first]]
        last, end = 0, cut
        while last < len(after) and (end - cut < self._reach_bytes or not _begins_character(text, end)):
            end += self._piece_bytes[after[last]]
            last += 1
        return np.array_equal(self._encode(text[start:end]), np.concatenate([before[first:], after[:last]]))


def _can_be_cut(spec: Any) -> bool:
    """Whether the segments' argument holds: merges best first, nothing undone, and ids that tell their bytes."""
    return (
        spec.trainer_spec.model_type == spec.trainer_spec.BPE
        and spec.normalizer_spec.escape_whitespaces
        and _spells_bytes(spec)
        and not any(piece.type == _Piece.UNUSED for piece in spec.pieces)
    )


def _without_rewriting(spec: Any) -> Any:
    plain = sentencepiece_model_pb2.ModelProto()
    plain.CopyFrom(spec)
    plain.normalizer_spec.precompiled_charsmap = b""
    plain.normalizer_spec.add_dummy_prefix = False
    plain.normalizer_spec.remove_extra_whitespaces = False
    return sentencepiece.SentencePieceProcessor(model_proto=plain.SerializeToString())


def _spells_bytes(spec: Any) -> bool:
    return sum(piece.type == _Piece.BYTE for piece in spec.pieces) == 256


def _character_start(text: bytes, at: int) -> int:
    while not _begins_character(text, at):
        at -= 1
    return at


def _begins_character(text: bytes, at: int) -> bool:
    return at == len(text) or text[at] & 0xC0 != 0x80


def _none_if_negative(token_id: int) -> int | None:
    return None if token_id < 0 else token_id
