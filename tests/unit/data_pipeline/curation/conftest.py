"""Documents with duplicates among them, whole and edited."""

import random

import pytest

WORDS = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in ["", "n", "r", "st"]]


def written(generator: random.Random, words: int) -> list[str]:
    return [generator.choice(WORDS) for _ in range(words)]


def edited(generator: random.Random, words: list[str], edits: int) -> list[str]:
    """With so many single words replaced, far enough apart that each changes five 5-grams of its own."""
    copy = list(words)
    for place in generator.sample(range(5, len(words) - 5, 10), edits):
        copy[place] = "edited"
    return copy


@pytest.fixture(scope="session")
def documents() -> list[str]:
    """200: originals, exact copies, and copies of similarity 0.9 and above, in any order."""
    generator = random.Random(0)
    originals = [written(generator, 300) for _ in range(110)]
    copies = [generator.choice(originals) for _ in range(30)]
    near = [edited(generator, generator.choice(originals), generator.randint(1, 3)) for _ in range(60)]
    texts = [" ".join(words) for words in originals + copies + near]
    generator.shuffle(texts)
    return texts
