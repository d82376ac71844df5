"""A checkpoint of a small decoder whose every weight is away from its initial value, to export."""

from pathlib import Path
from typing import Any

from data_pipeline.tokenizer_training import train_tokenizer
from model.decoder import Decoder
from pretrain.checkpoint.commit import write_weights
from tests.hf_parity import MIXTRAL, MOE, build, config
from tests.tiny_hf import TEXTS, VOCAB_SIZE

SEQUENCE_LENGTH = 48
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, tied, yarn": {
        "tie_embeddings": True,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    },
    "qwen3": {"qk_norm": True, "head_size": 32},
    "mixtral": MIXTRAL,
    "qwen3 moe": {"qk_norm": True, "moe": {**MOE, "first_layer": 1, "layer_frequency": 1}},
}


def write_checkpoint(path: Path, with_tokenizer: bool = False, **fields: Any) -> Decoder:
    """Write the checkpoint `path` of a decoder of `tests.hf_parity`; returns the decoder."""
    decoder = build(config(**{"vocab_size": VOCAB_SIZE, **fields}))
    tokenizer = path.parent / "trained.model" if with_tokenizer else None
    if tokenizer is not None:
        train_tokenizer(TEXTS, VOCAB_SIZE, tokenizer)
    state = decoder.state_dict()
    write_weights(path, decoder.config, SEQUENCE_LENGTH, tokenizer, lambda name: state[name])
    return decoder
