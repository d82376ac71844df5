"""DeepSpeed behind the Engine protocol: ZeRO 0 to 3, in fp32, bf16 and fp16, with fp32 masters and fp32 gradients.

DeepSpeed 0.19.8 is pinned exactly, because the checkpoint reaches into where it keeps a rank's share of the state:
stages 1 and 2 through `_hp_mapping`, stage 3 through `grad_position`. Its JSON is derived here and never written by a
user. It never saves or loads a checkpoint.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import logger as deepspeed_logger
from torch import Tensor, nn

from data_pipeline.batch import Batch
from model.decoder import Decoder
from pretrain.boxes import Piece, boxes_of_range
from pretrain.config import RunConfig, micro_batches
from pretrain.device import prepare_deepspeed
from pretrain.engine import StepStats, decoder_inputs, global_valid_tokens
from pretrain.optimizers import build_optimizer, parameter_groups
from pretrain.parallel_dims import ParallelDims


def deepspeed_config(config: RunConfig, data_world: int) -> dict[str, Any]:
    """DeepSpeed's JSON for a run. Accumulation boundaries are set by the engine, so a batch ramp needs nothing here."""
    derived: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.batch.micro_batch_size,
        "gradient_accumulation_steps": micro_batches(config, config.batch.global_batch_size, data_world),
        "gradient_clipping": config.optimizer.grad_clip,
        "zero_optimization": {"stage": config.parallel.zero_stage},
        "zero_allow_untested_optimizer": True,  # torch's fused AdamW; DeepSpeed's own would be compiled at start
        "communication_data_type": "fp32",  # its default for bf16 reduces gradients in bf16
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": 10**9,
    }
    if config.precision == "bf16":
        derived["bf16"] = {"enabled": True}
    if config.precision == "fp16":
        derived["fp16"] = {"enabled": True, "initial_scale_power": 16, "loss_scale_window": 1000, "hysteresis": 2}
    return derived


class DeepSpeedEngine:
    """The product's engine."""

    def __init__(self, decoder: Decoder, config: RunConfig, device: torch.device, dims: ParallelDims) -> None:
        self.config, self.device, self.dims = config, device, dims
        deepspeed_logger.setLevel(logging.ERROR)
        prepare_deepspeed()
        groups = parameter_groups(decoder.named_parameters(), config.optimizer.weight_decay)
        self.engine, *_ = deepspeed.initialize(
            model=decoder,
            optimizer=build_optimizer(groups, config.optimizer),
            config=deepspeed_config(config, dims.data_world),
            dist_init_required=False,
        )
        # Some of DeepSpeed's optimizers make a step at start to allocate their state. Ours has a learning rate of 0
        # then, so the weights are untouched; the state is put back to before the first step.
        for state in self._basic_optimizer.state.values():
            for value in state.values():
                value.zero_()

    @property
    def _basic_optimizer(self) -> torch.optim.Optimizer:
        return self.engine.basic_optimizer

    def train_step(self, batches: Sequence[Batch], lr: float) -> StepStats:
        """See Engine."""
        valid_tokens = global_valid_tokens(batches, self.device)
        nll = torch.zeros((), dtype=torch.float64, device=self.device)
        for index, batch in enumerate(batches):
            self.engine.set_gradient_accumulation_boundary(index == len(batches) - 1)
            sums = self.engine(**decoder_inputs(batch, self.device), z_loss=self.config.optimizer.z_loss)
            # DeepSpeed averages gradients over data-parallel ranks: times their number, it is the sum.
            objective = sums.total * (self.dims.data_world / valid_tokens)
            self.engine.backward(objective.float(), scale_wrt_gas=False)
            nll += sums.nll
        grad_norm = self._stage_0_grad_norm()
        for group in self._basic_optimizer.param_groups:
            group["lr"] = lr
        self.engine.step()
        if grad_norm is None:
            grad_norm = torch.as_tensor(self.engine.get_global_grad_norm(), device=self.device)
        return StepStats(nll, valid_tokens, grad_norm)

    def _stage_0_grad_norm(self) -> Tensor | None:
        """The norm before clipping at stage 0, where DeepSpeed reports none; the gradients are reduced by now."""
        if self.config.parallel.zero_stage:
            return None
        return nn.utils.get_total_norm([p.grad for p in self.engine.module.parameters() if p.grad is not None])

    @torch.no_grad()
    def validation_nll(self, batch: Batch) -> Tensor:
        """See Engine."""
        self.engine.eval()
        nll = self.engine(**decoder_inputs(batch, self.device)).nll
        self.engine.train()
        return nll

    # ------------------------------------------------------------------------------------------- its state

    def _fragments(self) -> Iterator[tuple[str, nn.Parameter, Tensor, int, int, int]]:
        """(name, parameter, flat master, position in it, position in the parameter, count) that this rank owns."""
        zero = self.engine.optimizer
        for name, parameter in self.engine.module.named_parameters():
            if self.config.parallel.zero_stage == 0:
                yield name, parameter, parameter, 0, 0, parameter.numel()
            elif self.config.parallel.zero_stage == 3:
                group, at, count = zero.grad_position[zero.get_param_id(parameter)]
                begin = parameter.partition_numel() * dist.get_rank(parameter.ds_process_group)
                owned = max(0, min(count, parameter.ds_numel - begin))  # the last shares are padded
                yield name, parameter, zero.fp32_partitioned_groups_flat[group], at, begin, owned
            elif parameter._hp_mapping is not None:  # None: other ranks own all of this parameter
                mapping = parameter._hp_mapping
                master, local = mapping.hp_fragment_address, mapping.lp_fragment_address
                flat = self._basic_optimizer.param_groups[mapping.param_group_index]["params"][0]
                yield name, parameter, flat, master.start, local.start, master.numel

    def _adam_state(self, flat: Tensor) -> dict[str, Tensor]:
        """The optimizer state of one flat tensor, made as AdamW would if no step has been taken yet."""
        state = self._basic_optimizer.state[flat]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(flat), torch.zeros_like(flat)
        return state

    def pieces(self) -> list[Piece]:
        """See Engine. At stage 0 every rank holds everything, and the first one writes it."""
        writer = self.config.parallel.zero_stage > 0 or self.dims.data_rank == 0
        found = []
        for name, parameter, flat, at, begin, count in self._fragments():
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
            state = self._adam_state(flat)
            sources = {"fp32": flat.detach(), "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
            for box in boxes_of_range(shape, begin, begin + count):
                size = math.prod(box.size)
                views = {kind: whole.view(-1)[at : at + size].view(box.size) for kind, whole in sources.items()}
                found.append(Piece(name, shape, box, writer, views))
                at += size
        return found

    def scalars(self) -> dict[str, Any]:
        """See Engine."""
        steps = {int(state["step"]) for state in self._basic_optimizer.state.values() if "step" in state}
        assert len(steps) <= 1, f"parameter groups are at different steps: {steps}"
        counters = {key: getattr(self.engine, key) for key in ("global_steps", "global_samples", "skipped_steps")}
        return {"optimizer_steps": max(steps, default=0), "counters": counters, "loss_scaler": self._loss_scaler()}

    def _loss_scaler(self) -> dict[str, Any]:
        scaler = getattr(self.engine.optimizer, "loss_scaler", None) if self.config.precision == "fp16" else None
        return (
            {key: value for key, value in vars(scaler).items() if type(value) in (int, float, bool)} if scaler else {}
        )

    def restored(self, scalars: dict[str, Any]) -> None:
        """See Engine."""
        for state in self._basic_optimizer.state.values():
            state["step"].fill_(scalars["optimizer_steps"])
        for key, value in scalars.get("counters", {}).items():
            setattr(self.engine, key, value)
        if self.config.precision == "fp16":
            vars(self.engine.optimizer.loss_scaler).update(scalars.get("loss_scaler", {}))
        zero = self.engine.optimizer
        if self.config.parallel.zero_stage == 3:
            zero.checkpoint_event_prologue()  # drops gathered copies, of small persistent parameters too
            for group in range(len(zero.fp16_groups)):
                zero._reassign_or_swap_out_partitioned_parameters(group)
            zero.checkpoint_event_epilogue()
        elif self.config.parallel.zero_stage:
            zero.update_lp_params()
