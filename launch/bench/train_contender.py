"""One contender of `steppe bench train`: `python -P -m launch.bench.train_contender NAME CONFIG.json`.

Each trains the same shape from the same initial weights on the same batches, one micro-batch a step, and reads its loss
at every step as a training loop does. The peer is imported here and nowhere else.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from torch import Tensor, nn

from data_pipeline.batch import Batch, make_batch
from launch.bench.contenders import CONTENDERS
from model.parameters import is_decayed
from pretrain.config import RunConfig
from pretrain.device import detect, init_process_group, peak_memory_bytes
from pretrain.engine import agree, build_decoder, build_engine, decoder_inputs
from pretrain.hf import config_to_hf, weights_to_hf
from pretrain.parallel_dims import ParallelDims

Step = Callable[[int], float]  # step number -> loss


def random_batch(config: RunConfig, step: int) -> Batch:
    """Random tokens of a step, the same for every contender; each target counts."""
    shape = (config.batch.micro_batch_size, config.data.sequence_length + 1)
    windows = np.random.default_rng((config.seed, step)).integers(0, config.model.vocab_size, shape)
    return make_batch(windows, bos_id=None, eos_id=-1, document_mask=False)


def steppe(config: RunConfig, device: torch.device) -> Step:
    """The product: the DeepSpeed engine, and the loop's one status read."""
    engine = build_engine(config, device, ParallelDims.of_this_rank(config))

    def step(number: int) -> float:
        return agree(engine.train_step([random_batch(config, number)], config.optimizer.lr)).loss

    return step


def transformers(config: RunConfig, device: torch.device, pure_bf16: bool = False) -> Step:
    """LlamaForCausalLM in a plain loop: its own loss, fused AdamW with the same groups, the same clipping."""
    from transformers import AutoConfig, AutoModelForCausalLM

    hf = config_to_hf(config.model)
    hf_config = AutoConfig.for_model(**hf)
    model = AutoModelForCausalLM.from_config(hf_config, attn_implementation="sdpa").to(device)
    weights = weights_to_hf(build_decoder(config, device, torch.float32).state_dict(), config.model)
    model.load_state_dict(weights, strict=not config.model.tie_embeddings)
    del weights
    model.to(torch.bfloat16 if pure_bf16 else torch.float32).train()
    optimizer = torch.optim.AdamW(
        decay_groups(model, config.optimizer.weight_decay),
        lr=config.optimizer.lr,
        betas=config.optimizer.betas,
        eps=config.optimizer.eps,
        fused=True,
    )

    def step(number: int) -> float:
        batch = decoder_inputs(random_batch(config, number), device)
        with torch.autocast(device.type, torch.bfloat16, enabled=not pure_bf16):
            loss: Tensor = model(
                input_ids=batch["tokens_BT"], labels=batch["targets_BT"], shift_labels=batch["targets_BT"]
            ).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The same parameters decayed and spared as ours."""
    named = [(name.removeprefix("model."), parameter) for name, parameter in model.named_parameters()]
    return [
        {"params": [parameter for name, parameter in named if is_decayed(name)], "weight_decay": weight_decay},
        {"params": [parameter for name, parameter in named if not is_decayed(name)], "weight_decay": 0.0},
    ]


def main() -> None:
    """Answer {"steps": n} with {"seconds": .., "loss": .., "peak_memory_bytes": ..} until stdin ends."""
    # What libraries print must not end up among the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    name, config = sys.argv[1], RunConfig.model_validate_json(Path(sys.argv[2]).read_text(encoding="utf-8"))
    device = detect()
    init_process_group(device)
    step = BUILDERS[name](config, device)
    done = 0
    _say(answers, threads=torch.get_num_threads(), torch=torch.__version__)
    for line in sys.stdin:
        steps = json.loads(line)["steps"]
        started = time.perf_counter()
        for number in range(done, done + steps):
            loss = step(number)
        seconds = time.perf_counter() - started
        done += steps
        _say(answers, seconds=seconds, loss=loss, peak_memory_bytes=peak_memory_bytes(device))
    torch.distributed.destroy_process_group()


def _say(answers: TextIO, **answer: Any) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


BUILDERS: dict[str, Callable[[RunConfig, torch.device], Step]] = {
    "steppe": steppe,
    "transformers": transformers,
    "transformers-bf16": lambda config, device: transformers(config, device, pure_bf16=True),
}
assert BUILDERS.keys() == CONTENDERS.keys()


if __name__ == "__main__":
    main()
