"""A run that was never trained: a config, a tokenizer, and checkpoints of initial weights."""

from pathlib import Path

import torch

from data_pipeline.tokenizer_training import train_tokenizer
from model.parameters import buffer_shapes
from pretrain.checkpoint.save import save_checkpoint
from pretrain.config import RunConfig
from pretrain.engine import build_decoder
from pretrain.engine_torch import TorchEngine
from pretrain.recipe import dump_config
from pretrain.run_dir import RunDir
from pretrain.state import TrainState
from tests.tiny_hf import TEXTS, VOCAB_SIZE

MOE = {"experts": 4, "experts_per_token": 2, "expert_ffn_size": 16, "balance": "bias", "first_layer": 1}


def write_run(path: Path, steps: tuple[int, ...] = (10, 20), moe: dict[str, object] | None = None) -> RunDir:
    """A run folder whose checkpoint of step N holds the initial weights of seed N; a router's biases are N too."""
    run = RunDir(path)
    train_tokenizer(TEXTS, VOCAB_SIZE, run.tokenizer_path)
    shape = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "ffn_size": 64, "vocab_size": VOCAB_SIZE, "moe": moe}
    config = RunConfig.model_validate(
        {
            "name": "tiny",
            "model": shape,
            "data": {"sequence_length": 48, "sources": [{"name": "a", "path": "nowhere"}]},
            "batch": {"global_batch_size": 2, "micro_batch_size": 2},
            "optimizer": {"lr": 1e-3},
            "schedule": {"name": "constant", "total_steps": 30},
        }
    )
    dump_config(config, run.config_path)
    device = torch.device("cpu")
    for step in steps:
        decoder = build_decoder(config.model_copy(update={"seed": step}), device, torch.float32)
        for name in buffer_shapes(config.model):
            decoder.get_buffer(name).fill_(step)
        engine = TorchEngine(decoder, config, device)
        save_checkpoint(run.checkpoints, engine, TrainState(step=step), config, run.tokenizer_path, None)
    return run
