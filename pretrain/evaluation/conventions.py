"""What the numbers of an evaluation mean, in sentences: without them, no two can be compared."""

from collections.abc import Mapping

from pretrain.evaluation.bootstrap import REPLICATES, SEED
from pretrain.evaluation.folder import Facts
from pretrain.evaluation.score import LEVEL, Score

FEW_DOCUMENTS = 30  # of fewer, a percentile interval is known to be too narrow
DECIDING = ("window", "stride", "precision", "start_token", "eos_scored")


def conventions(facts: Facts, scores: Mapping[str, Score]) -> list[str]:
    """Those of one evaluation, with its scores by domain."""
    return [
        _scored(facts),
        _windows(facts),
        "The loss is the mean of -ln p over the scored tokens, p the probability that the model gives each; a "
        "perplexity is e to the sum of -ln p over the number of tokens, words or bytes; bits per byte are the sum of "
        "-log2 p over that of bytes.",
        "A word is what lies between white space (of Unicode), a byte one of the raw UTF-8 text.",
        *_no_number(scores),
        f"Loss by position counts the tokens of a document that the model sees before the one it predicts; the "
        f"{facts.start_token.upper()} that the document starts from is none of them.",
        *_interval(scores),
        *facts.notes,
    ]


def comparison_conventions(this: Facts, other: Facts) -> list[str]:
    """What is to be known of the differences between two evaluations of the same documents."""
    differing = [name for name in DECIDING if getattr(this, name) != getattr(other, name)]
    sentences = [
        f"A difference is this model's measure minus that of {titled(other)}, so below 0 this model is better. Its "
        "interval is paired: both models are resampled with the same documents."
    ]
    if this.tokenizer != other.tokenizer:
        sentences.append("The tokenizers differ, so the losses per token are not compared.")
    if differing:
        told = ", ".join(f"{name} {getattr(this, name)} here and {getattr(other, name)} there" for name in differing)
        sentences.append(f"The models were not scored alike, which is part of the difference: {told}.")
    return sentences


def titled(facts: Facts) -> str:
    """The model, and where its run stood."""
    return facts.model if facts.step is None else f"{facts.model} at step {facts.step:,}"


def _scored(facts: Facts) -> str:
    start = "BOS" if facts.start_token == "bos" else "EOS, since the tokenizer has no BOS"
    what = "Each token of a document and the EOS that ends it is" if facts.eos_scored else "Each token of a document is"
    end = "" if facts.eos_scored else "; no EOS is, since the tokenizer has none"
    return f"{what} scored once, given what its own document has before it; a document starts from {start}{end}."


def _windows(facts: Facts) -> str:
    if facts.window == "document":
        return (
            f"The model sees a whole document at once, however long; it was trained on {facts.context_length:,} tokens."
        )
    if facts.stride == facts.window:
        return f"Windows of {facts.window:,} tokens lie side by side (window = stride = {facts.window})."
    assert facts.stride is not None
    return (
        f"Windows of {facts.window:,} tokens begin every {facts.stride:,} (stride). A token counts in the first that "
        f"holds it, so that past the first window it is given at least {facts.window - facts.stride:,}."
    )


def _no_number(scores: Mapping[str, Score]) -> list[str]:
    if all(score.as_dict()["word_perplexity"] is not None for score in scores.values()):
        return []
    return ["No perplexity per word is given for text with so little white space that it is beyond floating point."]


def _interval(scores: Mapping[str, Score]) -> list[str]:
    sentences = [
        f"An interval holds the middle {100 * LEVEL:.0f} % of {REPLICATES:,} resamples of the documents (Poisson "
        f"bootstrap, seed {SEED}): it tells what other documents of their kind might have given, not what another "
        "training would."
    ]
    single = [name for name, score in scores.items() if score.documents == 1]
    few = [name for name, score in scores.items() if 1 < score.documents < FEW_DOCUMENTS]
    if single:
        sentences.append(f"{_listed(single)} a single document, of which there is no interval.")
    if few:
        sentences.append(
            f"{_listed(few)} fewer than {FEW_DOCUMENTS} documents, too few for the interval to be wide enough."
        )
    return sentences


def _listed(names: list[str]) -> str:
    """Names and the verb: at most three of them, for there may be hundreds."""
    if len(names) > 3:
        return f"{len(names)} domains hold"
    return f"{' and '.join(names)} {'holds' if len(names) == 1 else 'hold'}"
