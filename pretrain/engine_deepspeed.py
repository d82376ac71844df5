"""DeepSpeed behind the Engine protocol: ZeRO 0 to 3, any layout, fp32, bf16 and fp16, with fp32 masters and gradients.

What DeepSpeed is left to do is to reduce, partition, offload, clip and step. The model comes to it already laid out
(`pretrain/parallelize.py`), the gradient's norm is computed here, and it never saves or loads a checkpoint.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import logger as deepspeed_logger
from torch import Tensor, nn

from data_pipeline.batch import Batch
from model.parameters import buffer_shapes
from pretrain import deepspeed_reduction, deepspeed_zero
from pretrain.boxes import Box, Piece, boxes_of_range
from pretrain.config import RunConfig
from pretrain.deepspeed_config import deepspeed_config
from pretrain.device import Stopwatch, overlaps_communication, prepare_deepspeed
from pretrain.engine import (
    DTYPES,
    StepStats,
    balance_experts,
    decoder_inputs,
    global_valid_tokens,
    write_initial_values,
)
from pretrain.muon import Muon
from pretrain.muon_sharded import HeldBox, ShardedOrthogonalizer
from pretrain.optimizers import build_optimizer, ensure_state, parameter_groups
from pretrain.parallel_dims import ParallelDims
from pretrain.parallelize import parallelize, placements
from pretrain.placement import Placement, holders, kept_beside_zero
from pretrain.regions import Region, RegionClock, untimed
from pretrain.replicas import Replica, differing_replicas
from pretrain.whole_parameters import WholeParameters


class DeepSpeedEngine:
    """The product's engine, over a model that starts from the run's seed."""

    def __init__(self, config: RunConfig, device: torch.device, dims: ParallelDims) -> None:
        self.config, self.device, self.dims = config, device, dims
        self._at: Callable[[Region], None] = untimed
        self.forward_watch = Stopwatch(device)
        self.places = placements(config.model, dims)
        deepspeed_logger.setLevel(logging.ERROR)
        prepare_deepspeed()
        settings = deepspeed_config(config, dims.data_world, overlaps_communication(device))
        unit = deepspeed_zero.ModelParallelUnit(dims)
        unit.announce_experts()
        init = deepspeed_zero.zero_init(settings, unit) if config.parallel.zero_stage == 3 else None

        def made(name: str, parameter: nn.Parameter) -> None:
            deepspeed_zero.mark(parameter, self.places[name], unit)
            if init is not None and not kept_beside_zero(name, config):
                deepspeed_zero.partition(parameter, init)

        decoder = parallelize(config, device, DTYPES[config.precision], dims, made)
        if config.parallel.compile:
            deepspeed_zero.gather_by_block(decoder)
        self.apart = WholeParameters(decoder, config, dims)
        optimizer = build_optimizer(parameter_groups(decoder.named_parameters(), config.optimizer), config)
        self.engine = deepspeed_zero.build(decoder, optimizer, settings, unit)
        self._names = {parameter: name for name, parameter in decoder.named_parameters()}
        deepspeed_zero.replace_clipping(
            self.engine, self._scaled_grad_norm, lambda: self._shrink, self._skips_sound_gradient
        )
        deepspeed_reduction.stage_in_fp32(self.engine)
        deepspeed_reduction.sum_where_alone(self.engine)
        deepspeed_zero.forget_first_step(self.engine)
        if isinstance(optimizer, Muon):
            optimizer.orthogonalizer = self._sharded_orthogonalizer()
        write_initial_values(self, config)
        deepspeed_zero.renew_parameters(self.engine)

    @property
    def _basic_optimizer(self) -> torch.optim.Optimizer:
        return self.engine.basic_optimizer

    def train_step(
        self,
        batches: Sequence[Batch],
        lr: float,
        before_update: Callable[[], None] = lambda: None,
        skip: bool = False,
    ) -> StepStats:
        """See Engine."""
        self._at("agreement")
        valid_tokens = global_valid_tokens(batches, self.device, self.config.parallel.ranks_per_sample)
        sequences = sum(len(batch.tokens) for batch in batches) * self.dims.data_world
        nll = torch.zeros((), dtype=torch.float64, device=self.device)
        for index, batch in enumerate(batches):
            self._at("forward")
            self.engine.set_gradient_accumulation_boundary(index == len(batches) - 1)
            inputs = decoder_inputs(batch, self.device, self.dims)
            if index == 0:
                self.forward_watch.start()
            sums = self.engine(**inputs, z_loss=self.config.optimizer.z_loss)
            if index == 0:
                self.forward_watch.stop()
            objective = sums.total / valid_tokens + sums.auxiliary / sequences
            self._at("backward")
            # DeepSpeed averages gradients over the ranks with other tokens: times their number, it is the sum.
            self.engine.backward((objective * self.dims.size("token")).float(), scale_wrt_gas=False)
            nll += sums.nll
        self._nll, self._skip = nll, skip
        self._at("reduction")
        self.apart.reduce_gradients()
        for group in self._basic_optimizer.param_groups:
            group["lr"] = lr
        self._at("checkpoint")
        before_update()
        self._at("optimizer")
        self.engine.step()
        updated = self.engine.was_step_applied()
        self.apart.step(lr, self._shrink, updated)
        expert_load = balance_experts(self.engine.module, updated)
        return StepStats(self._share(nll), valid_tokens, self._grad_norm, expert_load)

    @contextmanager
    def timed(self, clock: RegionClock) -> Iterator[None]:
        """See Engine."""
        self._at = clock.at
        with deepspeed_reduction.around_reductions(self.engine, lambda: clock.inside("reduction")):
            yield
        self._at = untimed

    def _share(self, nll: Tensor) -> Tensor:
        """A loss that tensor-parallel ranks all have, counted once; but not a number where any of them has none."""
        return nll * (self.dims.index("tensor") == 0)

    def _scaled_grad_norm(self) -> Tensor:
        """The norm of the global gradient times the loss scale, each element of the model counted once; not finite
        where the step is not to be made.

        Every copy of an element, and the loss, takes part, if only times 0: which is 0 if they are finite, and not a
        number if they are not. So what one rank alone has computed wrongly stops the update of all.

        Sets what goes with it: the norm itself, and the factor that unscales and clips the gradient.
        """
        sharded = self.config.parallel.zero_stage > 0
        total = self._nll * 0
        for parameter, squared in deepspeed_zero.squared_gradient_norms(self.engine):
            total += squared.to(self.device) * self._is_writer(self.places[self._names[parameter]], sharded)
        for name, squared in self.apart.squared_gradient_norms():
            total += squared * self._is_writer(self.places[name], sharded=False)
        dist.all_reduce(total)
        scaled, scale = total.sqrt().float(), deepspeed_zero.loss_scale(self.engine)
        self._grad_norm = scaled / scale
        limit = self.config.optimizer.grad_clip
        excess = ((self._grad_norm + 1e-6) / limit).clamp(min=1) if limit else torch.ones_like(scaled)
        self._shrink = 1 / (excess * scale)
        return torch.full_like(scaled, torch.nan) if self._skip else scaled

    def _skips_sound_gradient(self) -> bool:
        """Whether an update is left out only because it was asked for; such a step alone costs another host read."""
        return self._skip and bool(self._grad_norm.isfinite())

    @torch.no_grad()
    def validation_nll(self, batch: Batch) -> Tensor:
        """See Engine."""
        self.engine.eval()
        nll = self.engine(**decoder_inputs(batch, self.device, self.dims)).nll
        self.engine.train()
        return self._share(nll)

    @torch.no_grad()
    def differing_replicas(self) -> list[tuple[str, list[int]]]:
        """See Engine."""
        return differing_replicas(list(self._replicas()), self.device)

    def _replicas(self) -> Iterator[Replica]:
        """What ranks hold alike: parameters and buffers but for ZeRO 3's shares of them; and of parameters that
        several ranks hold for each other, their shares of the masters."""
        stage, layout = self.config.parallel.zero_stage, self.dims.layout
        whole = dict(self.engine.module.named_parameters()) if stage < 3 else dict(self.apart.parameters)
        whole |= {name: self.engine.module.get_buffer(name) for name in buffer_shapes(self.config.model)}
        for name, tensor in whole.items():
            yield Replica(name, holders(name, self.places[name].shape, layout), [tensor])
        shares: dict[str, list[Tensor]] = {name: [] for name in self._names.values()}
        for part in deepspeed_zero.fragments(self.engine) if stage else ():
            shares[part.name].append(part.master.view(-1)[part.at : part.at + part.numel])
        for name, masters in shares.items():
            if stage and (copies := self.places[name].copies) is not None:
                yield Replica(name, list(layout.groups(copies)), masters)

    # ------------------------------------------------------------------------------------------- its state

    def _is_writer(self, place: Placement, sharded: bool) -> bool:
        """Whether of several ranks that hold the same values this is the one that counts.

        sharded: whether ZeRO shares the values out among the replicas.
        """
        first_copy = place.copies is None or self.dims.index(place.copies) == 0
        return first_copy and (sharded or self.dims.index(place.replicas) == 0)

    def pieces(self) -> list[Piece]:
        """See Engine. At stage 0 every rank holds everything, and the first one writes it."""
        found, sharded = [], self.config.parallel.zero_stage > 0
        for part, box, at in self._owned_boxes():
            place, state = self.places[part.name], ensure_state(self._basic_optimizer, part.master, part.group)
            views = {
                kind: whole.view(-1)[at : at + box.numel].view(box.size)
                for kind, whole in {"fp32": part.master.detach(), **state}.items()
            }
            found.append(Piece(part.name, place.shape, box, self._is_writer(place, sharded), views))
        for name, views in self.apart.views():
            place = self.places[name]
            found.append(Piece(name, place.shape, place.box, self._is_writer(place, sharded=False), views))
        for name in buffer_shapes(self.config.model):
            place, buffer = self.places[name], self.engine.module.get_buffer(name)
            found.append(Piece(name, place.shape, place.box, self.dims.rank == 0, {"fp32": buffer}))
        return found

    def _owned_boxes(self) -> Iterator[tuple[deepspeed_zero.Fragment, Box, int]]:
        """(fragment, box of the logical parameter, where it begins in the fragment's master) of what this rank owns."""
        for part in deepspeed_zero.fragments(self.engine):
            place, at = self.places[part.name], part.at
            for local in boxes_of_range(place.box.size, part.begin, part.begin + part.numel):
                box = Box(tuple(i + j for i, j in zip(local.offset, place.box.offset, strict=True)), local.size)
                yield part, box, at
                at += box.numel

    def _sharded_orthogonalizer(self) -> ShardedOrthogonalizer:
        """Muon's view of this rank's masters: which boxes of which matrices they hold."""
        held: dict[Tensor, list[HeldBox]] = defaultdict(list)
        for part, box, at in self._owned_boxes():
            held[part.master].append(HeldBox(part.name, self.places[part.name].shape, box, at))
        return ShardedOrthogonalizer(held, dist.group.WORLD)

    def scalars(self) -> dict[str, Any]:
        """See Engine."""
        return deepspeed_zero.scalars(self.engine)

    def restored(self, scalars: dict[str, Any]) -> None:
        """See Engine."""
        self.apart.restored(scalars["optimizer_steps"])
        deepspeed_zero.restore_scalars(self.engine, scalars)
        deepspeed_zero.renew_parameters(self.engine)
