"""Each rule of the options, by an input that breaks it."""

import pytest

from pretrain.generation.options import GenerationOptions


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"temperature": 1e-40}, "temperature=1e-40 must be 0, .* or at least 1e-06"),
        ({"top_k": 0, "temperature": 1.0}, "top_k=0"),
        ({"top_p": 0.0, "temperature": 1.0}, "top_p=0.0"),
        ({"top_p": 1.1, "temperature": 1.0}, "top_p=1.1"),
        ({"top_p": float("nan"), "temperature": 1.0}, "top_p=nan"),
        ({"beams": 0}, "beams=0"),
        ({"beams": 2, "length_penalty": float("nan")}, "length_penalty=nan"),
        ({"beams": 2, "length_penalty": 11.0}, "length_penalty=11.0"),
        ({"seed": -1}, "seed=-1"),
        ({"stop": ("a", "")}, "stop=''"),
        ({"beams": 2, "temperature": 0.5}, "beams=2 with temperature=0.5"),
        ({"top_k": 5}, "top_k=5 has no effect at temperature=0"),
        ({"top_p": 0.5}, "top_p=0.5 has no effect at temperature=0"),
        ({"length_penalty": 2.0}, "length_penalty=2.0 has no effect without beam search"),
        ({"early_stopping": True}, "early_stopping=True has no effect without beam search"),
    ],
)
def test_a_wrong_option_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GenerationOptions(**options)  # type: ignore[arg-type]


def test_what_has_an_effect_is_taken() -> None:
    GenerationOptions()
    GenerationOptions(temperature=0.7, top_k=50, top_p=1.0, seed=1 << 70, stop=("\n\n", "###"))
    GenerationOptions(beams=4, length_penalty=-1.0, early_stopping=True)
