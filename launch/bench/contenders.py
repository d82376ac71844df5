"""Who takes part in `steppe bench train` and `steppe bench checkpoint`, in words. No torch here.

How each is built is `train_contender.py`; how each saves and loads is `checkpoint_formats.py`.
"""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from model.config import ModelConfig

CONTENDERS = {
    "steppe": "this package: DeepSpeed; bf16 weights, fp32 sums of gradients, masters and AdamW states (fused)",
    "steppe-compiled": "steppe with parallel.compile",
    "bare": "steppe's own model, kernels and optimizer in a plain loop without DeepSpeed",
    "steppe-dense": "steppe without experts, as wide in each layer as what a token meets",
    "transformers-mixed": "its model of the same shape, sdpa; fp32 weights, torch autocast to bf16; fused AdamW",
    "transformers-bf16": "transformers-mixed with all in bf16: the weights, the router's too, and AdamW's states",
    "transformers-mixed-compiled": "transformers-mixed, its model compiled",
    "transformers-bf16-compiled": "transformers-bf16, its model compiled",
    "litgpt-mixed": "its model of the same shape and its chunked loss under Fabric, bf16-mixed; fused AdamW",
    "litgpt-bf16": "litgpt-mixed, but bf16-true: the weights and AdamW's states too",
    "litgpt-mixed-compiled": "litgpt-mixed, its model compiled, as its pretraining does",
    "litgpt-bf16-compiled": "litgpt-bf16, its model compiled, as its pretraining does",
    "nanogpt-mixed": "its own model (GPT-2's: tied head, learned positions), as many layers, the width that comes "
    "nearest in parameters; fp32 weights, torch autocast to bf16; fused AdamW",
    "nanogpt-mixed-compiled": "nanogpt-mixed, compiled, as its training does",
}
COMPILED = "steppe-compiled"
DENSE = "steppe-dense"
EAGER = "transformers-mixed"  # whose memory is the measure
# What a user calls them: a name stands for all of its variants.
FAMILIES = {
    COMPILED: (COMPILED,),
    "bare": ("bare",),
    "steppe-dense": (DENSE,),
    **{
        peer: tuple(name for name in CONTENDERS if name.startswith(f"{peer}-"))
        for peer in ("transformers", "litgpt", "nanogpt")
    },
}
# Steppe, whole or in part.
OURS = ("steppe", COMPILED, "bare", DENSE)
# A model of its own: other weights, so its loss is compared with nobody's.
OWN_WEIGHTS = (DENSE, *FAMILIES["nanogpt"])
# Besides what Steppe has installed. Without what litgpt asks for beyond these, which would replace torch.
LITGPT_NEEDS = ("litgpt", "lightning", "lightning_utilities", "torchmetrics")
GET_LITGPT = "pip install --no-deps litgpt lightning lightning-utilities torchmetrics"


def keeps_memory(name: str, peers_too: bool) -> bool:
    """Whether a contender keeps the memory that it frees, and starts as one that will (`pretrain.host_memory`)."""
    return peers_too or name in OURS


def peers_of(
    model: "ModelConfig", asked: str | None = None, nanogpt: Path | None = None
) -> tuple[list[str], dict[str, str]]:
    """Whom to compare with, and why others are left out, by name.

    asked: families or contenders, separated by commas; None: all that there are here for such a model.
    nanogpt: a clone of it.

    Raises ValueError for one that there is not, or that is asked for and cannot take part, with the remedy; and for a
    folder that is no clone.
    """
    if nanogpt is not None and not (nanogpt / "model.py").is_file():
        raise ValueError(f"--nanogpt {nanogpt} has no model.py: name the folder of a clone of karpathy/nanoGPT")
    if asked is None:
        obstacles = {name: _obstacle(name, model, nanogpt) for family in FAMILIES.values() for name in family}
        left_out = {name: obstacle for name, obstacle in obstacles.items() if obstacle is not None}
        return [name for name in obstacles if name not in left_out], left_out
    words = [word.strip() for word in asked.split(",") if word.strip()]
    if not words:
        raise ValueError(
            f"--peers {asked!r} names nobody: choose from {', '.join(FAMILIES)}, or leave it out for all that are here"
        )
    names: list[str] = []
    for word in words:
        if word not in FAMILIES and word not in sum(FAMILIES.values(), ()):
            raise ValueError(
                f"--peers {word} is not known: choose from {', '.join(FAMILIES)}, or a variant "
                f"({', '.join(name for family in FAMILIES.values() if len(family) > 1 for name in family)})"
            )
        variants = [name for name in FAMILIES.get(word, (word,)) if _obstacle(name, model, nanogpt) is None]
        if not variants:
            raise ValueError(f"--peers {word}: {_obstacle(FAMILIES.get(word, (word,))[0], model, nanogpt)}")
        names += variants
    return list(dict.fromkeys(names)), {}


def _obstacle(name: str, model: "ModelConfig", nanogpt: Path | None) -> str | None:
    """Why a contender cannot take part, with the remedy; None if it can."""
    if name == DENSE:
        return None if model.moe is not None else "it is for a recipe with experts, and this one has none: leave it out"
    if name.endswith("-compiled") and _no_compiler():
        return "it needs a C++ compiler, and this machine has none: install g++ or name one in CXX"
    family = name.partition("-")[0]
    if family == "transformers":
        return _obstacle_to_transformers(name, model)
    if family == "litgpt":
        if model.moe is not None or model.qk_norm or model.rope_scaling is not None:
            return "its part is written for Llama's dense shape: leave it out for experts, qk_norm or rope_scaling"
        if [package for package in LITGPT_NEEDS if importlib.util.find_spec(package) is None]:
            return f"litgpt is not installed here: {GET_LITGPT}"
    if family == "nanogpt":
        if model.moe is not None:
            return "it has no experts: leave it out"
        if nanogpt is None:
            return "it is not a package: clone karpathy/nanoGPT and name the folder, --nanogpt FOLDER"
    return None


def _no_compiler() -> bool:
    from pretrain.compile import check_compiler

    try:
        check_compiler()
    except ValueError:
        return True
    return False


def _obstacle_to_transformers(name: str, model: "ModelConfig") -> str | None:
    remedy = f"compare with --peers bare,{DENSE}" if model.moe is not None else "choose another recipe"
    try:
        check_transformers(model, remedy)
    except ValueError as error:
        return str(error)
    if name.endswith("-compiled") and model.moe is not None:
        return "its experts are not compiled here: leave it out"
    return None


def check_transformers(model: "ModelConfig", remedy: str) -> None:
    """Raise ValueError, which ends with the remedy, unless transformers has a model of this shape."""
    from pretrain.hf import config_to_hf

    try:
        config_to_hf(model)
    except ValueError as error:
        raise ValueError(f"transformers has no model to compare with: {error}; {remedy}") from error


class Saver(NamedTuple):
    """A way to save. loader: what reads it back. peer: whether it can be left out."""

    what: str
    loader: str
    pickle: bool = False
    peer: bool = False


class Loader(NamedTuple):
    """A way to load what a saver wrote."""

    what: str
    saver: str


SAVERS = {
    "raw": Saver("the same bytes from one buffer, written and hashed (xxh3) 4 MiB at a time", "raw"),
    "raw-beside": Saver("the same in a thread beside training, with nothing to stage", "raw"),
    "steppe-blocking": Saver("checkpoint.asynchronous=false", "steppe"),
    "steppe-async": Saver("checkpoint.asynchronous=true, as the training loop uses it", "steppe"),
    "torch-save": Saver("torch.save as it comes, with a CRC that torch.load does not check", "torch-load", True, True),
    "torch-save-no-crc": Saver("torch.save, its CRC switched off", "torch-load", True, True),
    "torch-dcp": Saver("torch.distributed.checkpoint.save, one file", "torch-dcp", True, True),
    "torch-dcp-no-crc": Saver("the same, torch.save's CRC switched off", "torch-dcp", True, True),
    "torch-dcp-async": Saver(
        "torch.distributed.checkpoint.async_save, a DefaultStager reused, staging in its thread",
        "torch-dcp",
        True,
        True,
    ),
    "deepspeed": Saver(
        "DeepSpeed's save_checkpoint, and fsync of what it wrote: the bf16 weights too", "deepspeed", True, True
    ),
}
LOADERS = {
    "raw": Loader("read into one buffer and hashed, then copied", "raw"),
    "steppe": Loader("load_checkpoint: read, verified block by block, copied", "steppe-blocking"),
    "safetensors": Loader(
        "safetensors.torch.load_file of the same files, then copied; nothing is verified", "steppe-blocking"
    ),
    "torch-load": Loader("torch.load(weights_only=True), then copied", "torch-save"),
    "torch-load-mmap": Loader("the same with mmap=True", "torch-save"),
    "torch-dcp": Loader("torch.distributed.checkpoint.load, in place", "torch-dcp"),
    "deepspeed": Loader("DeepSpeed's load_checkpoint", "deepspeed"),
}


def savers_of(asked: list[str]) -> list[str]:
    """Which savers run: all that are no peers, and the peers asked for, or every one.

    Raises ValueError for a peer that there is not.
    """
    peers = [name for name, saver in SAVERS.items() if saver.peer]
    for peer in asked:
        if peer not in peers:
            raise ValueError(f"--peer {peer} is not known: choose from {', '.join(peers)}")
    return [name for name, saver in SAVERS.items() if not saver.peer or not asked or name in asked]
