"""A model's tokenizer for transformers, with the same ids for every text: a `tokenizer.json` is one already, a
sentencepiece model becomes one.

Byte-pair encoding merges the best piece first, whatever its parts (sentencepiece scores the piece); `tokenizers` ranks
pairs. So each pair of pieces that makes a piece becomes a merge, ranked by the score of what it makes. A space stays a
space here, where sentencepiece writes U+2581: that character can then be spelled in bytes, as ours does.
"""

import random
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, decoders, models, normalizers
from tokenizers import Tokenizer as FastTokenizer

from data_pipeline.sentencepiece_codec import SPACE
from data_pipeline.tokenizer import Tokenizer
from data_pipeline.tokenizer_files import (
    JSON_CONFIG_NAME,
    JSON_NAME,
    JSON_SPECIAL_NAME,
    TokenizerFiles,
    tokenizer_in,
)
from pretrain.run_dir import write_durably, write_json

_SAMPLE = (
    "The steppe,  from the Danube to Manchuria:\r\n\tdef f(x):\n\n        return {x ** 2}  # 1,234.5 %\n"
    f"<s>not a start</s><unk><0x41> {SPACE}{SPACE} naïve e\u0301 Ελλάδα степь 草原 😀👩\u200d🌾 \x00\x7f\u00a0\ufeff"
    + " " * 19
    + "end "
)

_Piece = sentencepiece_model_pb2.ModelProto.SentencePiece


def write_fast_tokenizer(tokenizer: Path, out: Path, context_length: int) -> None:
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json into the folder `out`, with a copy of a
    sentencepiece file, for `AutoTokenizer.from_pretrained(out)`.

    As our own encoding it takes a control piece spelled in a text, such as `<s>`, for ordinary text, and made of a
    sentencepiece model adds neither BOS nor EOS. Who loads it may ask for the other: `add_bos_token=True`,
    `split_special_tokens=False`. A tokenizer.json stays as it is, and adds what it always added.
    context_length: tokens that the model was trained to see at once.
    Raises ValueError for a sentencepiece model of a kind whose ids would not be equal.
    """
    files = TokenizerFiles.read(tokenizer)
    files.write(out)
    if files.name == JSON_NAME:
        named = {"bos_token": files.bos_token, "eos_token": files.eos_token}
        special, adds = {role: token for role, token in named.items() if token is not None}, {}
    else:
        special, adds = _write_json_of(tokenizer, files.content, out), {"add_bos_token": False, "add_eos_token": False}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # the name that versions 4 and 5 both know
        **special,
        **adds,
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context_length,
    }
    write_json(out / JSON_CONFIG_NAME, config)
    write_json(out / JSON_SPECIAL_NAME, special)


def _write_json_of(path: Path, sentencepiece_model: bytes, out: Path) -> dict[str, str]:
    """Write tokenizer.json; returns its special tokens by their role."""
    spec = sentencepiece_model_pb2.ModelProto()
    spec.ParseFromString(sentencepiece_model)
    _check_kind(path, spec)
    write_durably(out / JSON_NAME, _build(spec).to_str(pretty=True))
    ids = {"bos": spec.trainer_spec.bos_id, "eos": spec.trainer_spec.eos_id, "unk": spec.trainer_spec.unk_id}
    return {f"{role}_token": spec.pieces[at].piece for role, at in ids.items() if at >= 0}


def check_fast_tokenizer(folder: Path) -> None:
    """Encode a sample with transformers' tokenizer of a folder and with ours: a text of odd characters, and one that
    holds every piece. Raises RuntimeError if any id differs."""
    from transformers import AutoTokenizer

    ours, theirs = Tokenizer(tokenizer_in(folder)), AutoTokenizer.from_pretrained(folder, model_max_length=1 << 30)
    adds = ours.files.name != JSON_NAME  # a tokenizer.json may add what it likes, ours must add nothing
    shuffled = list(range(ours.vocab_size))
    random.Random(0).shuffle(shuffled)
    for text in (_SAMPLE, ours.decode(shuffled)):
        expected, found = ours.encode(text), theirs.encode(text, add_special_tokens=adds)
        if found != expected:
            at = next((i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), len(found))
            before = ours.decode(expected[max(0, at - 8) : at])
            raise RuntimeError(
                f"the fast tokenizer differs from {ours.path.name}: after {before!r} it has {found[at : at + 4]} where "
                f"ours has {expected[at : at + 4]}"
            )


def _check_kind(path: Path, spec: Any) -> None:
    """Raise ValueError unless a fast tokenizer can give the same ids for every text."""
    trainer, normalizer = spec.trainer_spec, spec.normalizer_spec
    of_type = _by_type(spec)
    merged = [piece for piece in of_type[_Piece.NORMAL] if len(piece.piece) > 1]
    bytes_spelled = {f"<0x{byte:02X}>" for byte in range(256)}
    characters = {character for piece in merged for character in piece.piece}
    problem = None
    if trainer.model_type != trainer.BPE:
        problem = "its model_type is not bpe"
    elif bytes_spelled - {piece.piece for piece in of_type[_Piece.BYTE]}:
        problem = "it has no byte_fallback"
    elif normalizer.precompiled_charsmap or spec.denormalizer_spec.precompiled_charsmap:
        problem = f"it rewrites its text (normalization rule {normalizer.name})"
    elif normalizer.remove_extra_whitespaces or not normalizer.escape_whitespaces:
        problem = "it removes spaces (remove_extra_whitespaces), or keeps them unescaped"
    elif trainer.treat_whitespace_as_suffix:
        problem = "it takes a space for a suffix (treat_whitespace_as_suffix)"
    elif normalizer.add_dummy_prefix and of_type[_Piece.USER_DEFINED]:
        problem = "it has both add_dummy_prefix and user_defined_symbols"
    elif of_type[_Piece.UNUSED]:
        problem = "some of its pieces are marked as unused"
    elif len({_text(piece) for piece in spec.pieces}) < len(spec.pieces):
        problem = "two of its pieces differ only in how they spell a space"
    elif len({piece.score for piece in merged}) < len(merged):
        problem = "some of its pieces have equal scores"
    elif characters - {piece.piece for piece in of_type[_Piece.NORMAL]}:
        problem = "some characters of its pieces are no pieces themselves"
    elif _overlapping(of_type):
        problem = "one of its user_defined_symbols begins with the end of a control piece, or within one"
    if problem is not None:
        raise ValueError(
            f"{path} cannot become a fast tokenizer with the same ids: {problem}; "
            "export the weights with --no-tokenizer and pass the sentencepiece file along"
        )


def _overlapping(of_type: dict[int, list[Any]]) -> bool:
    """Whether a search for control pieces from left to right could hide a user-defined piece: sentencepiece does not
    look for the former in a text."""
    control = [piece.piece for piece in of_type[_Piece.CONTROL] + of_type[_Piece.UNKNOWN]]
    return any(
        tail.startswith(piece.piece) or piece.piece.startswith(tail)
        for piece in of_type[_Piece.USER_DEFINED]
        for text in control
        for tail in (text[start:] for start in range(1, len(text)))
    )


def _build(spec: Any) -> FastTokenizer:
    of_type = _by_type(spec)
    # A piece that stands for itself, such as a run of spaces, is never part of a merge in sentencepiece either.
    scores = {_text(piece): piece.score for piece in of_type[_Piece.NORMAL] if " " not in piece.piece}
    best_first = sorted((text for text in scores if len(text) > 1), key=lambda text: -scores[text])
    merges = [
        (text[:cut], text[cut:])
        for text in best_first
        for cut in range(1, len(text))
        if text[:cut] in scores and text[cut:] in scores
    ]
    vocabulary = {_text(piece): index for index, piece in enumerate(spec.pieces)}
    fast = FastTokenizer(
        models.BPE(vocabulary, merges, unk_token=spec.trainer_spec.unk_piece, fuse_unk=True, byte_fallback=True)
    )
    decode = [decoders.ByteFallback(), decoders.Fuse()]
    if spec.normalizer_spec.add_dummy_prefix:
        fast.normalizer = normalizers.Sequence([normalizers.Replace(SPACE, " "), normalizers.Prepend(" ")])
        decode.append(decoders.Strip(" ", left=1, right=0))
    fast.decoder = decoders.Sequence(decode)
    fast.add_special_tokens(
        [
            AddedToken(piece.piece, special=True, normalized=False)
            for piece in of_type[_Piece.UNKNOWN] + of_type[_Piece.CONTROL]
        ]
    )
    # One with a plain space is never found in sentencepiece, whose text has none.
    found = [_text(piece) for piece in of_type[_Piece.USER_DEFINED] if " " not in piece.piece]
    fast.add_tokens([AddedToken(text, normalized=False) for text in found])
    return fast


def _text(piece: Any) -> str:
    return piece.piece.replace(SPACE, " ")


def _by_type(spec: Any) -> dict[int, list[Any]]:
    of_type: dict[int, list[Any]] = {kind: [] for kind in _Piece.Type.values()}
    for piece in spec.pieces:
        of_type[piece.type].append(piece)
    return of_type
