"""What must hold before ranks start: each check raises ValueError with the value, the rule and the remedy."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipeline.config import DataConfig
from data_pipeline.manifest import Manifest
from data_pipeline.mixture import effective_weights, shares
from data_pipeline.remote import is_local
from data_pipeline.token_source import check_same_tokenizer
from data_pipeline.tokenizer_files import fingerprint_of
from pretrain.config import RunConfig
from pretrain.deepspeed_config import deepspeed_config
from pretrain.layout import check_layout, sequence_lengths
from pretrain.resume_policy import flat
from pretrain.run_dir import RunDir, read_events


def check_ranks(config: RunConfig, ranks: int) -> None:
    """Raise ValueError unless the model and the batch divide over the ranks."""
    if ranks < 1:
        raise ValueError(f"--nproc {ranks}: give a number of ranks, 1 or more")
    check_layout(config, ranks)
    deepspeed_config(config, ranks // config.parallel.ranks_per_sample)


def check_device(config: RunConfig, nproc: int) -> None:
    """Raise ValueError unless this machine can hold so many ranks, and compute as they are to."""
    from pretrain import device

    device.check_device(nproc, config.precision)


def check_stop_after(stop_after: int | None) -> None:
    if stop_after is not None and stop_after < 1:
        raise ValueError(f"--stop-after {stop_after}: give the number of a step, 1 or later")


def check_checkpoints_are_there(run: RunDir) -> None:
    """Raise ValueError if the run has saved checkpoints and has none now: it is not to start over unasked."""
    if any(run.checkpoints.glob("step_*")) or not run.events_path.is_file():
        return
    saved = read_events(run.events_path, "checkpoint")
    if saved:
        raise ValueError(
            f"{run.checkpoints} holds no checkpoint, though the run has saved one at step {saved[-1]['step']}: "
            "bring it back (is its disk mounted?), or start a new run"
        )


def check_data(config: RunConfig) -> dict[str, Manifest]:
    """Read every manifest, once, and check that it goes with its tokenizer, with the others and with the model.

    Returns them by path.
    """
    manifests = {}
    held_out = config.evaluation.sources if config.evaluation.every_steps else ()
    for source in (*config.data.sources, *held_out):
        manifests[source.path] = manifest = Manifest.load(source.path)
        if manifest.vocab_size > config.model.vocab_size:
            raise ValueError(
                f"{source.path} was written with a vocabulary of {manifest.vocab_size}, the model has "
                f"model.vocab_size={config.model.vocab_size}: set it to {manifest.vocab_size}"
            )
        if manifest.tokens <= config.data.sequence_length:
            raise ValueError(
                f"{source.path} holds {manifest.tokens} tokens, not one window of data.sequence_length="
                f"{config.data.sequence_length} and its next token: add text, or shorten the sequence"
            )
        copy = fingerprint_of(f"{source.path}/{manifest.tokenizer_file}")
        if copy != manifest.tokenizer_fingerprint:
            found = "missing or damaged" if copy is None else f"not the tokenizer that {source.path} was written with"
            raise ValueError(
                f"{source.path}/{manifest.tokenizer_file} is {found} ({copy}, its manifest says "
                f"{manifest.tokenizer_fingerprint}): restore it, or prepare the data again"
            )
    check_same_tokenizer(manifests)
    _check_shares(config, {source.name: manifests[source.path].tokens for source in config.data.sources})
    if (shortage := cache_shortage(config.data, manifests)) is not None:
        print(f"steppe: {shortage}", file=sys.stderr)
    return manifests


def fingerprints(config: RunConfig, manifests: Mapping[str, Manifest]) -> dict[str, Any]:
    """What a run records of its data, by which `check_same_data` knows it again. manifests: by path."""
    training = {source.name: manifests[source.path] for source in config.data.sources}
    return {
        "tokenizer": manifests[config.data.sources[0].path].tokenizer_fingerprint,
        "manifests": {name: manifest.stream_fingerprint for name, manifest in training.items()},
        "packs": {name: _packs(manifest, config) for name, manifest in training.items()},
    }


def cache_shortage(data: DataConfig, manifests: Mapping[str, Manifest]) -> str | None:
    """A warning if the cache cannot hold what is read at a time: two groups of shuffle blocks of each source in it."""
    group_bytes = data.shuffle_group_blocks * data.shuffle_block_bytes
    cached = [s.path for s in data.sources if data.cache.folder and (data.cache.local_sources or not is_local(s.path))]
    needed = sum(min(2 * group_bytes, sum(shard.bin_bytes for shard in manifests[path].shards)) for path in cached)
    if needed <= data.cache.max_bytes:
        return None
    return (
        f"data.cache.max_bytes={data.cache.max_bytes} is less than two groups of shuffle blocks of each source "
        f"({needed} bytes): what was fetched will be fetched again; raise it, or lower data.shuffle_group_blocks in a "
        "new run"
    )


def _packs(manifest: Manifest, config: RunConfig) -> dict[str, str]:
    """By sequence length, the fingerprint of the bins that the run reads; bins for other lengths may come and go."""
    if config.data.packing != "best_fit":
        return {}
    lengths = set(sequence_lengths(config))
    return {str(pack.sequence_length): pack.fingerprint for pack in manifest.packs if pack.sequence_length in lengths}


def _check_shares(config: RunConfig, tokens: dict[str, int]) -> None:
    """Raise ValueError if a source is served too seldom in any stage."""
    data = config.data
    base = {source.name: source.weight for source in data.sources}
    for weights in (base, *(stage.weights for stage in data.stages if stage.weights)):
        shares(effective_weights(weights, tokens, data.temperature), [])


# What a model is trained with, and not what it computes.
OF_TRAINING = {"document_mask", "moe.balance_coefficient", "moe.bias_update_rate", "moe.z_loss"}


def with_checked_init(config: RunConfig, tokenizer: str) -> RunConfig:
    """The config with the very checkpoint to start from, if it names one: the run which that is of may go on.

    Raises ValueError unless its weights are of this model and this tokenizer.
    """
    if config.init_from is None:
        return config
    from pretrain.checkpoint.index import read_index
    from pretrain.choose_checkpoint import checkpoint_of

    problems: list[Exception] = []
    try:
        checkpoint = checkpoint_of(Path(config.init_from), None, problems).resolve()
    except ValueError as error:
        raise ValueError(f"init_from: {error}") from None
    for problem in problems:
        print(f"steppe: passed over: {problem}", file=sys.stderr)
    index = read_index(checkpoint)
    theirs, ours = flat(index.model.model_dump(mode="json")), flat(config.model.model_dump(mode="json"))
    for key in sorted((theirs.keys() | ours.keys()) - OF_TRAINING):
        if theirs.get(key) != ours.get(key):
            raise ValueError(
                f"init_from={config.init_from} is of a model with {key}={theirs.get(key)!r}, this run's model has "
                f"{ours.get(key)!r}: set model.{key} to what the weights are of"
            )
    if index.tokenizer_fingerprint not in (None, tokenizer):
        raise ValueError(
            f"init_from={config.init_from} was trained with another tokenizer ({index.tokenizer_fingerprint}, the "
            f"data's is {tokenizer}), so that token ids mean something else: prepare the data with its tokenizer"
        )
    return config.model_copy(update={"init_from": str(checkpoint)})


def check_same_data(old: dict[str, Any], new: dict[str, Any], allowed: list[str]) -> None:
    """A resumed run reads with the same tokenizer, and the same bytes under the same source name."""
    if old["tokenizer"] != new["tokenizer"] and "tokenizer" not in allowed:
        raise ValueError(
            f"tokenizer was {old['tokenizer']} and would become {new['tokenizer']}: the model's token ids would change "
            "meaning; prepare the data with the run's own tokenizer, or insist with --allow tokenizer"
        )
    for name, fingerprint in new["manifests"].items():
        before = old["manifests"].get(name, fingerprint)
        if before != fingerprint and "manifest" not in allowed:
            raise ValueError(
                f"data source {name} is not what this run has read so far (manifest {before}, now {fingerprint}): "
                "restore it, add the new data under another name, or insist with --allow manifest"
            )
        bins = old["packs"].get(name, {})
        for length, fingerprint in new["packs"][name].items():
            if bins.get(length, fingerprint) != fingerprint and "manifest" not in allowed:
                raise ValueError(
                    f"data source {name} was packed anew for {length} tokens since this run has read it: restore "
                    "its bins, or insist with --allow manifest"
                )
