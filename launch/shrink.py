"""A recipe for many GPUs made small enough for this machine, every relation that a layout depends on kept. No torch."""

from itertools import product
from math import ceil, gcd, lcm
from typing import Any

from model.config import VOCAB_MULTIPLE, ModelConfig, MoEConfig, padded_vocab_size
from pretrain.config import BatchConfig, RunConfig
from pretrain.deepspeed_config import INSTEAD
from pretrain.layout import Layout, micro_batches
from pretrain.recipe import merged, validated

MOST_RANKS = 8
STEPS, STOP_AFTER = 6, 3
PHASE_STEPS = 2  # of warm-up, of decay, of a ramp's first stage
VOCABULARY = 512  # pieces of the tokenizer that a rehearsal makes
HIDDEN_SIZE, HEAD_SIZE, SEQUENCE_LENGTH = 64, 8, 64
WIDTH_OF_A_RANK = 16  # of what tensor parallelism splits


def rehearsal_config(config: RunConfig, world: int, keep_vocabulary: bool = False) -> tuple[RunConfig, int]:
    """The run that rehearses `config` on `world` ranks, and how many ranks it takes, at most MOST_RANKS.

    Kept is every choice of a kind (optimizer, schedule, precision, ZeRO stage, checkpointing, offload, routing, RoPE
    scaling, document mask, tied embeddings, norms), every rate and every coefficient. Shrunk are

    degrees     not at all if MOST_RANKS can hold them, otherwise as `rehearsal_layout` says
    ranks       to the fewest that hold the degrees, with two data-parallel ranks if the run has several
    heads       query heads to a key and value head stay; key and value heads to the fewest that fall on tensor-parallel
                ranks as before (several on one, one on one, or one on several), and on sequence-parallel ranks too
    layers      to two, one with an MLP and one with experts if the run has both, in its order
    experts     to the fewest that leave a choice to the router and to each group; two a rank if there were several
    widths      to 16 a rank where a layout splits them, otherwise to 64, and 8 of a head
    sequence    to 64 tokens, or the next multiple of the ranks that split it
    vocabulary  to 512 and as many padded rows as before, unless `keep_vocabulary`
    batch       to micro-batches of 2 sequences at most, and as few of them as keep accumulation and the order of the
                sizes of a ramp, of which the first stage is left
    schedule    to 6 steps, 2 of them warm-up and 2 decay where there are such
    validation  to few windows, unequal on ranks; made on the training data if the recipe makes none

    Nothing is compiled: that would be for another device. Raises ValueError if the full layout is impossible.
    """
    small = rehearsal_layout(config, world)
    return _shrunk(config, Layout.of(config, world), small, keep_vocabulary), small.world


def full_layout_config(config: RunConfig, world: int) -> RunConfig:
    """The model as small as at a rehearsal, at the full layout, for `pretrain/rehearse.py` to make a step with. Muon
    would need the other ranks' parts of each matrix there, so AdamW takes its place.

    Raises ValueError if the layout is impossible.
    """
    full = Layout.of(config, world)
    small = _shrunk(config, full, full, keep_vocabulary=False)
    return small.model_copy(update={"optimizer": small.optimizer.model_copy(update={"name": "adamw"})})


def plain_config(rehearsed: RunConfig) -> RunConfig:
    """What a rehearsed run must learn the same as: its model on one rank, with nothing that only lays it out."""
    return validated({**rehearsed.model_dump(mode="json"), "parallel": {"zero_stage": 1}, "deepspeed": {}})


def rehearsal_layout(config: RunConfig, world: int) -> Layout:
    """The run's own degrees if MOST_RANKS can hold them. Otherwise divisors of them: with as many axes in use as can be
    (data parallelism and shared key and value heads are axes, too), and of those the largest.

    Raises ValueError if the full layout is impossible.
    """
    full = Layout.of(config, world)
    exact = _on_fewest_ranks(full, full.tensor, full.sequence, full.expert)
    if exact.world <= MOST_RANKS:
        return exact
    degrees = product(_divisors(full.tensor), _divisors(full.sequence), _divisors(full.expert))
    layouts = (_on_fewest_ranks(full, *choice) for choice in degrees)
    return max((layout for layout in layouts if layout.world <= MOST_RANKS), key=_worth)


def fewest_ranks(config: RunConfig) -> int:
    """The smallest world that holds the recipe's degrees."""
    return lcm(config.parallel.ranks_per_sample, config.parallel.expert)


def _on_fewest_ranks(full: Layout, tensor: int, sequence: int, expert: int) -> Layout:
    world = lcm(tensor * sequence, expert)
    if world == tensor * sequence and full.data > 1 and 2 * world <= MOST_RANKS:
        world *= 2
    return Layout(world, tensor, sequence, expert, gcd(full.kv_copies, tensor))


def _worth(layout: Layout) -> tuple[int, int]:
    axes = (layout.tensor, layout.sequence, layout.expert, layout.data, layout.kv_copies)
    return sum(degree > 1 for degree in axes), layout.tensor * layout.sequence * layout.expert


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _shrunk(config: RunConfig, full: Layout, small: Layout, keep_vocabulary: bool) -> RunConfig:
    """The config of the full layout for the small one, by the rules of `rehearsal_config`."""
    length = min(config.data.sequence_length, _multiple(SEQUENCE_LENGTH, small.tensor * small.sequence))
    batch = _batch(config, full, small, length)
    windows = 2 * batch.micro_batch_size * small.data + 1
    sources = config.evaluation.sources if config.evaluation.every_steps else config.data.sources[:1]
    changed = {
        "model": _model(config.model, full, small),
        "data": {"sequence_length": length, "stages": ()},
        "batch": batch.model_dump(mode="json"),
        "parallel": {
            "tensor": small.tensor,
            "sequence": small.sequence,
            "expert": small.expert,
            "activation_checkpointing_every": min(2, config.parallel.activation_checkpointing_every),
            "compile": False,
        },
        "checkpoint": {
            "every_steps": STOP_AFTER if config.checkpoint.every_steps else 0,
            "keep_every_steps": 0,
            "keep_best": False,
        },
        "evaluation": {
            "every_steps": STOP_AFTER,
            "windows": min(config.evaluation.windows, windows),
            "sources": [source.model_dump(mode="json") for source in sources],
        },
    }
    if keep_vocabulary:
        changed["model"]["vocab_size"] = config.model.vocab_size
    tree = merged(config.model_dump(mode="json"), changed)
    tree["schedule"] |= _schedule(config, batch, length)
    tree["deepspeed"] = _without_repeats(config.deepspeed)
    return validated(tree)


def _model(model: ModelConfig, full: Layout, small: Layout) -> dict[str, Any]:
    # Of several on a rank so many that sequence-parallel ranks share or copy them as before, and several stay several.
    on_a_rank = gcd(max(1, model.num_kv_heads // full.tensor), 2 * small.sequence)
    kv_heads = small.tensor // small.kv_copies * on_a_rank
    padding = padded_vocab_size(model.vocab_size) - model.vocab_size
    changed: dict[str, Any] = {
        "hidden_size": min(model.hidden_size, HIDDEN_SIZE),
        "num_layers": min(model.num_layers, 2),
        "num_heads": kv_heads * (model.num_heads // model.num_kv_heads),
        "num_kv_heads": kv_heads,
        "head_size": min(model.head_size, HEAD_SIZE),
        "ffn_size": min(model.ffn_size, WIDTH_OF_A_RANK * small.tensor),
        "vocab_size": _multiple(VOCABULARY + padding, lcm(VOCAB_MULTIPLE, small.tensor)) - padding,
    }
    if model.moe is not None:
        changed["moe"] = _experts(model.moe, full, small)
    return changed


def _experts(moe: MoEConfig, full: Layout, small: Layout) -> dict[str, Any]:
    step = lcm(small.expert, moe.groups)
    fewest = max(
        min(moe.experts, moe.experts_per_token + 1),
        ceil(moe.experts_per_token / moe.groups_per_token) * moe.groups,
        min(2, moe.experts // full.expert) * small.expert,
        min(2, moe.experts // moe.groups) * moe.groups,
    )
    width = lcm(WIDTH_OF_A_RANK, small.tensor) if moe.shared_experts else WIDTH_OF_A_RANK
    return {
        "experts": _multiple(fewest, step),
        "expert_ffn_size": min(moe.expert_ffn_size, width),
        "first_layer": min(1, moe.first_layer),
        "layer_frequency": min(2, moe.layer_frequency),
    }


def _batch(config: RunConfig, full: Layout, small: Layout, length: int) -> BatchConfig:
    sizes = [*(size for _, size in config.batch.ramp[:1]), config.batch.global_batch_size]
    counts = [micro_batches(config, size, full.data) for size in sizes]
    fewest = min(2, *counts)
    micro_batch_size = min(2, config.batch.micro_batch_size)
    # In the order of the counts, equal ones staying equal: accumulation of 64 and then 128 becomes one of 2 and then 3.
    *first, last = ((fewest + sorted(set(counts)).index(n)) * micro_batch_size * small.data for n in counts)
    return BatchConfig(
        global_batch_size=last,
        micro_batch_size=micro_batch_size,
        ramp=tuple((PHASE_STEPS * size * length, size) for size in first),
    )


def _schedule(config: RunConfig, batch: BatchConfig, length: int) -> dict[str, int]:
    """The lengths that the full run has, for STEPS steps of `batch`, in its unit."""
    schedule = config.schedule
    unit = "tokens" if schedule.counts_tokens else "steps"
    sizes = [size for _, size in batch.ramp] * PHASE_STEPS
    sizes += [batch.global_batch_size] * (STEPS - len(sizes))

    def after(steps: int) -> int:
        return sum(sizes[:steps]) * length if schedule.counts_tokens else steps

    lengths = {f"total_{unit}": after(STEPS)}
    if schedule.warmup:
        lengths[f"warmup_{unit}"] = after(PHASE_STEPS)
    if schedule.decay is not None:
        lengths[f"decay_{unit}"] = after(STEPS) - after(STEPS - PHASE_STEPS)
    return lengths


def _without_repeats(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`deepspeed:` without what only repeats the recipe, of which the shrunk one would not be true."""
    return {
        key: _without_repeats(value, f"{prefix}{key}.") if isinstance(value, dict) else value
        for key, value in section.items()
        if prefix + key not in INSTEAD
    }


def _multiple(number: int, divisor: int) -> int:
    """The first multiple of `divisor` that is not below `number`."""
    return ceil(number / divisor) * divisor
