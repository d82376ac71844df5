"""What a resume may change of a run's config, and what it would break. Free of torch."""

from typing import Any, Literal

from pretrain.config import RunConfig

# What a resume may change. free: how the run is laid out or watched. recorded: what it learns from here on, noted in
# events.jsonl. refused: what it has learnt so far would no longer mean the same; `--allow KEY` insists. fixed: the
# checkpoints have nothing to go on with.
# The longest matching prefix decides; a test asserts that every key of the tree is covered.
ResumePolicy = Literal["free", "recorded", "refused", "fixed"]
RESUME_POLICY: dict[str, ResumePolicy] = {
    "name": "free",
    "seed": "refused",
    "init_from": "refused",
    "model": "refused",
    "data": "refused",
    "data.sources": "recorded",
    "data.temperature": "recorded",
    "data.sequence_length": "recorded",
    "data.stages": "recorded",
    "data.cache": "free",
    "batch": "recorded",
    "batch.micro_batch_size": "free",
    "optimizer": "recorded",
    "optimizer.name": "fixed",
    "schedule": "recorded",
    "schedule.total_steps": "free",
    "schedule.total_tokens": "free",
    "precision": "recorded",
    "deterministic": "recorded",
    "parallel": "free",
    "parallel.reduce_dtype": "recorded",
    "checkpoint": "free",
    "evaluation": "free",
    "health": "free",
    "health.max_skipped_steps": "recorded",
    "health.spike_zscore": "recorded",
    "health.spike_window": "recorded",
    "health.spike_skip_steps": "recorded",
    "skips": "recorded",
    "deepspeed": "free",
}


def resume_policy(key: str) -> ResumePolicy:
    """The policy of a dotted key such as `optimizer.lr`."""
    prefixes = (key.rsplit(".", cut)[0] for cut in range(key.count(".") + 1))
    return next(RESUME_POLICY[prefix] for prefix in prefixes if prefix in RESUME_POLICY)


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping as {dotted key: leaf}; lists are leaves."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            leaves |= flat(value, f"{prefix}{key}.")
        else:
            leaves[prefix + key] = value
    return leaves


def changes(old: RunConfig, new: RunConfig) -> dict[str, tuple[Any, Any]]:
    """What differs between two trees, as {dotted key: (old value, new value)}."""
    before, after = flat(old.model_dump(mode="json")), flat(new.model_dump(mode="json"))
    return {
        key: (before.get(key), after.get(key)) for key in sorted(before | after) if before.get(key) != after.get(key)
    }


def check_allowed(allowed: list[str]) -> None:
    """Raise ValueError for an `--allow KEY` that names nothing a resume refuses."""
    refused = {"tokenizer", "manifest"} | {key for key, policy in RESUME_POLICY.items() if policy == "refused"}
    for key in allowed:
        if not any(key == known or key.startswith(known + ".") for known in refused):
            raise ValueError(f"--allow {key}: nothing of that name is refused; what is: {', '.join(sorted(refused))}")


def check_resume(differences: dict[str, tuple[Any, Any]], allowed: list[str]) -> None:
    """Raise ValueError for the first change that cannot be, or that no `--allow KEY` (or a prefix of it) covers."""
    for key, (old, new) in differences.items():
        if resume_policy(key) == "fixed":
            raise ValueError(
                f"{key} was {old!r} and would become {new!r}, for which this run's checkpoints have no state: "
                "start a new run"
            )
        covered = any(key == allow or key.startswith(allow + ".") for allow in allowed)
        if resume_policy(key) == "refused" and not covered:
            raise ValueError(
                f"{key} was {old!r} and would become {new!r}: a resumed run keeps it, since what was learnt so far "
                f"depends on it; start a new run, or insist with --allow {key}"
            )
