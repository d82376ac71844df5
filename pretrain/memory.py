"""Memory of the rank that holds most, by item, from the config alone: what `steppe plan` says. No torch here.

P parameters of a rank (its share under tensor and expert parallelism), N ranks that ZeRO shares them out to (see
`Layout`: `token` for dense parameters, `expert_data` for experts that are split), b bytes of a weight, bytes of each:

    weights      b P; stage 3: b P / N, and the small parameters that DeepSpeed keeps whole
    optimizer    AdamW's two moments, 8, or Muon's one, 4; and from stage 1 on fp32 masters, 4 (in fp32 too: DeepSpeed
                 copies): P of them at stage 0, P / N otherwise
    gradients    fp32: 4 P at stages 0 and 1, 4 P / N at stages 2 and 3
    activations  see `pretrain/activations.py`
    buffers      what DeepSpeed reduces gradients through, ZeRO 3's gathered parameters, the head's loss

(Rajbhandari et al. 2020, ZeRO, arXiv 1910.02054, section 3, has 2 + 2 + 12 bytes a parameter; here gradients are fp32.)

They do not peak together: gradients grow as activations go. So the moments of a step are added up one by one, and the
fullest is reported. What is counted is what torch's allocator is asked for; the device's context, the communication
library and fragmentation come on top (`launch/gpus.py`). DeepSpeed's part is read from version 0.19.8, its
`runtime/zero/stage_1_and_2.py` and `stage3.py`, and held against measurements by `steppe bench memory`.
"""

from dataclasses import dataclass
from math import ceil
from typing import Any, NamedTuple

from model.config import padded_vocab_size
from model.parameters import is_block_matrix, keeps_fp32, parameter_shapes
from pretrain.activations import Work, activation_bytes, loss_bytes
from pretrain.config import RunConfig
from pretrain.deepspeed_config import deepspeed_config
from pretrain.layout import Layout, micro_batches, sequence_lengths
from pretrain.placement import kept_beside_zero, placement

FP32 = 4
ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
# What DeepSpeed takes where its config says nothing, in elements; a test compares them with its own.
DEEPSPEED_DEFAULTS = {
    "reduce_bucket_size": 500_000_000,
    "sub_group_size": 1_000_000_000,
    "stage3_max_reuse_distance": 1_000_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_param_persistence_threshold": 100_000,
}


@dataclass(frozen=True)
class RankMemory:
    """Bytes of a rank at one moment of a step; `host`: what it offloads, and what a checkpoint is staged in.

    The moments are those at which a step can be fullest, in its last micro-batch: `loss`, which holds its buffers while
    every activation is there; `backward`, as the first block is worked on; `reduction` of gradients, when a bucket of
    them is full, the activations before it being gone, or at the end; and the optimizer's `step`.
    """

    moment: str
    weights: int
    gradients: int
    optimizer: int
    activations: int
    buffers: int
    host: int

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.buffers


def rank_memory(config: RunConfig, world: int, fused: bool = True) -> RankMemory:
    """The fullest moment of the rank that holds most of `world`. Raises ValueError if the layout is impossible."""
    return max(moments(config, world, fused), key=lambda moment: moment.total)


def moments(config: RunConfig, world: int, fused: bool = True) -> list[RankMemory]:
    """A rank's memory through a step. Raises ValueError if the layout is impossible.

    fused: as on a GPU, which also overlaps communication; see `pretrain.activations.Work`.
    """
    layout, parallel = Layout.of(config, world), config.parallel
    zero = DEEPSPEED_DEFAULTS | deepspeed_config(config, layout.data, overlaps=fused)["zero_optimization"]
    held = _held(config, layout, zero)
    weights, optimizer, host = held.weights, held.optimizer, 0
    if config.checkpoint.asynchronous:  # a copy of masters and optimizer state
        host += optimizer + (weights if parallel.zero_stage == 0 else FP32 * held.apart)
    if parallel.offload_optimizer == "cpu":
        # The fp32 gradients of the share wait beside the masters; stages 1 and 2 go through a copy of the weights, too.
        host += (
            optimizer - 2 * FP32 * held.apart + FP32 * held.share + (held.share_bytes if parallel.zero_stage < 3 else 0)
        )
        optimizer = 2 * FP32 * held.apart
    if parallel.offload_parameters == "cpu":
        host, weights = host + held.share_bytes, weights - held.share_bytes
    return [
        RankMemory(name, weights, gradients, optimizer, activations, buffers, host)
        for name, gradients, activations, buffers in _comings_and_goings(config, layout, held, zero, fused)
    ]


class _Held(NamedTuple):
    """What a rank holds all the time. Elements: `parameters` of its tensor and expert shards, `share` its ZeRO share of
    them, `largest` of one parameter, `head` of the head's weight. Bytes: `weights`, `share_bytes` of the share's
    weights, `optimizer`. `apart`: elements of what is held whole beside ZeRO 3."""

    parameters: int
    share: int
    largest: int
    head: int
    weights: int
    share_bytes: int
    optimizer: int
    apart: int


def _held(config: RunConfig, layout: Layout, zero: dict[str, Any]) -> _Held:
    stage, muon = config.parallel.zero_stage, config.optimizer.name == "muon"
    parameters = share = largest = weights = share_bytes = optimizer = apart = 0
    for name, shape in parameter_shapes(config.model).items():
        place = placement(name, shape, layout, rank=0)
        elements = place.box.numel
        if kept_beside_zero(name, config):  # its master is the weight itself
            apart += elements
            continue
        own = ceil(elements / len(layout.group_of(0, place.replicas))) if stage else elements
        b = FP32 if keeps_fp32(name) else ELEMENT_BYTES[config.precision]
        whole = stage < 3 or elements <= zero["stage3_param_persistence_threshold"]
        parameters, share, largest = parameters + elements, share + own, max(largest, elements)
        weights += b * ((elements if whole else 0) + (own if stage == 3 else 0))
        share_bytes += b * own
        optimizer += own * ((FP32 if stage else 0) + (FP32 if muon and is_block_matrix(name, len(shape)) else 2 * FP32))
    head = padded_vocab_size(config.model.vocab_size) // layout.tensor * config.model.hidden_size
    weights, optimizer = weights + FP32 * apart, optimizer + 2 * FP32 * apart
    return _Held(parameters, share, largest, head, weights, share_bytes, optimizer, apart)


def _comings_and_goings(
    config: RunConfig, layout: Layout, held: _Held, zero: dict[str, Any], fused: bool
) -> list[tuple[str, int, int, int]]:
    """(moment, gradients, activations, buffers), bytes."""
    parallel, batch, stage = config.parallel, config.batch, config.parallel.zero_stage
    b, on_the_way = ELEMENT_BYTES[config.precision], 2 if parallel.reduce_dtype == "bf16" else FP32
    length = max(sequence_lengths(config))
    work = Work(batch.micro_batch_size * length, length, b, layout.tensor, layout.sequence, layout.expert, fused)
    kept, recomputed = activation_bytes(
        config.model, work, parallel.activation_checkpointing, parallel.activation_checkpointing_every
    )
    gradients = FP32 * (held.share if stage >= 2 else held.parameters)
    if stage == 3 and parallel.offload_optimizer != "none":
        gradients = 0
    gradients += FP32 * held.apart
    accumulates = micro_batches(config, batch.global_batch_size, layout.data) > 1
    before = gradients if accumulates or stage == 3 else 0

    alone = all(len(layout.group_of(0, axis)) == 1 for axis in ("token", "expert_data"))
    if alone and stage in (1, 2) and b < FP32 and parallel.offload_optimizer == "none":
        # Nothing is reduced: `deepspeed_reduction.sum_where_alone`.
        return [
            ("loss", before, kept, loss_bytes(config.model, work)),
            ("backward", gradients, kept + recomputed, (b + FP32) * held.head),
            ("step", gradients, 0, 0),
        ]

    # Gradients are staged in a bucket, and flattened once more to be reduced, stage 1 converting them then if need be.
    staged_bytes = {0: FP32, 1: FP32, 2: max(b, on_the_way), 3: on_the_way}[stage]
    turns = 2 if stage in (1, 2) and zero["overlap_comm"] else 1  # stages 1 and 2 fill one bucket while one is reduced
    bucket = turns * staged_bytes * zero["reduce_bucket_size"] if stage else 0
    flushed = min(max(zero["reduce_bucket_size"], held.largest), held.parameters)
    copies = flushed * (staged_bytes + (on_the_way if stage in (1, 2) and on_the_way != staged_bytes else 0))
    if stage == 2 and b < on_the_way and held.largest > zero["reduce_bucket_size"]:
        copies += on_the_way * held.largest  # too large for the bucket: converted, and then flattened
    reuse = zero["stage3_max_reuse_distance"] // 2 + zero["stage3_prefetch_bucket_size"]
    gathered = b * min(held.parameters, reuse) if stage == 3 else 0
    # Stage 3 has the bucket always. Stages 1 and 2 make it as backward begins and let go of it once all is reduced:
    # stage 2 in each backward pass, stage 1 in a step's last one.
    always = gathered + (bucket if stage == 3 or (stage == 1 and accumulates) else 0)

    left = int(kept * (1 - flushed / held.parameters)) if stage >= 2 else 0
    shares = FP32 * held.share if stage == 1 else 0
    step = FP32 * min(held.share, zero["sub_group_size"]) if stage else 0
    return [
        ("loss", before, kept, always + loss_bytes(config.model, work)),
        ("backward", before, kept + recomputed, gathered + bucket + (b + FP32) * held.head),
        ("reduction", gradients + shares, left, gathered + bucket + copies),
        ("step", gradients, 0, step + (bucket if stage == 3 else 0)),
    ]
