"""Hugging Face's names for our parameters, one parameter at a time or all at once.

A file has a layer's experts one by one, where ours are stacked, and the vocabulary without the padding of ours; a tied
head is in neither.
"""

from collections.abc import Callable, Iterable, Mapping

from torch import Tensor
from torch.nn import functional

from model.config import ModelConfig, padded_vocab_size
from model.parameters import VOCABULARY_PARAMETERS, is_expert, parameter_shapes
from pretrain.hf import model_type_of
from pretrain.hf_moe import stored_names


def stored_shapes(name: str, shape: tuple[int, ...], config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Under which names, and in which shapes, a file has our parameter `name` of `shape`; experts in their order."""
    names = stored_names(name, model_type_of(config), config.moe.experts if config.moe is not None else 0)
    if is_expert(name):
        shape = shape[1:]
    elif name in VOCABULARY_PARAMETERS:
        shape = (config.vocab_size, *shape[1:])
    prefix = "" if name.startswith("lm_head.") else "model."
    return {prefix + stored: shape for stored in names}


def parameter_to_hf(name: str, weight: Tensor, config: ModelConfig) -> dict[str, Tensor]:
    """What a file has of our parameter: views of it."""
    tensors = weight.unbind() if is_expert(name) else (weight,)
    stored = stored_shapes(name, tuple(weight.shape), config)
    return {their: tensor[: shape[0]] for (their, shape), tensor in zip(stored.items(), tensors, strict=True)}


def parameter_from_hf(name: str, read: Callable[[str], Tensor], config: ModelConfig) -> Tensor:
    """Our parameter from the tensors of files, which are read by the names of `stored_shapes`; the vocabulary padded
    with zero rows. Of stacked experts only the stack and one expert are held at a time.

    Raises ValueError if a tensor is of another shape than `config` says.
    """
    stored = stored_shapes(name, parameter_shapes(config)[name], config)
    if is_expert(name):
        stack = None
        for at, (their, shape) in enumerate(stored.items()):
            tensor = _checked(their, read(their), shape)
            stack = tensor.new_empty((len(stored), *shape)) if stack is None else stack
            assert stack.dtype == tensor.dtype, f"{their} is of another dtype than the experts before it"
            stack[at] = tensor
        assert stack is not None
        return stack
    ((their, shape),) = stored.items()
    tensor = _checked(their, read(their), shape)
    if name not in VOCABULARY_PARAMETERS:
        return tensor
    return functional.pad(tensor, (0, 0, 0, padded_vocab_size(len(tensor)) - len(tensor)))


def known_names(names: Iterable[str], config: ModelConfig) -> dict[str, str]:
    """{the name as `stored_shapes` has it: the name among those given}. Files of a bare decoder lack the `model.`, some
    repeat a tied head or carry RoPE's frequencies, which nobody needs.

    Raises ValueError if a name is missing or unknown.
    """
    given = {}
    for name in names:
        if not name.endswith(".inv_freq") and not (config.tie_embeddings and name == "lm_head.weight"):
            bare = not name.startswith(("model.", "lm_head."))
            given[f"model.{name}" if bare else name] = name
    shapes = parameter_shapes(config)
    expected = {stored for name, shape in shapes.items() for stored in stored_shapes(name, shape, config)}
    missing, unknown = sorted(expected - given.keys()), sorted(given.keys() - expected)
    if missing or unknown:
        lacks = f"lacks {_some(missing)}" if missing else f"has {_some(unknown)}, which its config does not mention"
        raise ValueError(f"the checkpoint {lacks}: its config and its tensors do not belong together")
    return given


def weights_from_hf(hf: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our names, in the decoder's order; the vocabulary padded with zero rows, the experts of a layer stacked.

    Raises ValueError if a tensor is missing, unknown, or of another shape than `config` says.
    """
    given = known_names(hf, config)
    return {name: parameter_from_hf(name, lambda their: hf[given[their]], config) for name in parameter_shapes(config)}


def weights_to_hf(weights: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """transformers' names in files, the vocabulary without its padding, each expert by itself; a tied head is left to
    the config to say."""
    theirs: dict[str, Tensor] = {}
    for name, weight in weights.items():
        theirs |= parameter_to_hf(name, weight, config)
    return theirs


def _checked(name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, but the checkpoint's config says {shape}")
    return tensor


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
