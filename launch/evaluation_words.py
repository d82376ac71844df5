"""An evaluation's result in words and numbers as people read them, the same at a terminal and on a page.

A result is the object that `steppe eval --json` prints.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from launch.status_view import duration
from pretrain.evaluation.conventions import FEW_DOCUMENTS
from pretrain.evaluation.score import LEVEL

INTERVAL = f"{100 * LEVEL:g} % interval"
FEW = ", of few documents"
DIGITS = 4  # of an interval's bounds, after the point


def title(result: Mapping[str, Any]) -> str:
    """The model, and where a run stood."""
    return result["model"] if result["step"] is None else f"{result['model']} at step {result['step']:,}"


def whole_name(by_domain: Collection[str]) -> str:
    """What all domains together are called: no domain is."""
    name = "all"
    while name in by_domain:
        name = f"({name})"
    return name


def scores_of(result: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The scores of a result by domain, and of several domains that of all together, last."""
    by_domain = result["by_domain"]
    return {**by_domain, whole_name(by_domain): result} if len(by_domain) > 1 else by_domain


def differences_of(compared: Mapping[str, Any], measure: str) -> dict[str, Mapping[str, Any]]:
    """Of a comparison the differences in one measure with the number of documents, by domain as `scores_of`."""
    return {
        name: {**score["measures"][measure], "documents": score["documents"]}
        for name, score in scores_of(compared).items()
    }


def number(value: float | None) -> str:
    """A perplexity, which may be anything from 1 upwards, in at most eight characters; a dash where there is none."""
    if value is None:
        return "-"
    if value >= 1e5:
        return f"{value:.2e}"
    return f"{value:.3f}" if value < 1000 else f"{value:,.1f}"


def span(interval: Sequence[float] | None, sign: str = "") -> str:
    """An interval; a dash where there is none."""
    return "-" if interval is None else " to ".join(f"{bound:{sign}.{DIGITS}f}" for bound in interval)


def context(bucket: Mapping[str, Any]) -> str:
    """How many tokens a target has before it in its window."""
    first, last = bucket["from"], bucket["to"]
    return f"{first:,}" if first == last else f"{first:,} to {last:,}"


def verdict(difference: Mapping[str, Any]) -> str:
    """What a difference (this model less the other, so that less is better) says of this model.

    Bounds count as `span` shows them: what is below that is the rounding of a forward pass. Of few documents it says
    so, for their interval is too narrow: two that differ at random are both on one side of 0 every other time.
    """
    if difference["interval"] is None:
        return "one document tells nothing"
    low, high = (round(bound, DIGITS) for bound in difference["interval"])
    if low <= 0 <= high:
        return "no difference shown"
    return ("better" if high < 0 else "worse") + (FEW if difference["documents"] < FEW_DOCUMENTS else "")


def computed(result: Mapping[str, Any]) -> str:
    """What the model computed in, and where its weights were."""
    return f"{result['precision']}, weights on {result['offload']}" if result["offload"] else result["precision"]


def cost(result: Mapping[str, Any]) -> str:
    """What the evaluation took."""
    spent = result["cost"]
    ranks = f" on {spent['ranks']} ranks" if spent["ranks"] > 1 else ""
    speed = f", {spent['tokens_per_second']:,.0f} tokens/s" if spent["tokens_per_second"] else ""
    of = " of a rank" if spent["ranks"] > 1 else ""
    memory = f", peak memory{of} {spent['peak_memory_bytes'] / 1e9:.2f} GB" if spent["peak_memory_bytes"] else ""
    return f"{duration(spent['seconds'])}{ranks}{speed}{memory}"


def task_rows(tasks: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str, str, str]]:
    """Of benchmarks, each metric of each task: (task, metric, value, standard error, shots, version). A value that is
    no number is a dash: a metric that failed is not passed over."""
    for task, found in tasks["results"].items():
        shots, version = (str(tasks[about].get(task, "-")) for about in ("n-shot", "versions"))
        for key, value in found.items():
            name, comma, kind = key.partition(",")
            if not comma or name.endswith("_stderr"):
                continue
            error = found.get(f"{name}_stderr,{kind}")
            metric = name if kind == "none" else f"{name} ({kind})"
            yield task, metric, _measured(value), _measured(error), shots, version


def _measured(value: Any) -> str:
    """A metric of any size: some are perplexities, of words even."""
    if not isinstance(value, int | float):
        return "-"
    return f"{value:.4f}" if abs(value) < 1e5 else f"{value:.4e}"
