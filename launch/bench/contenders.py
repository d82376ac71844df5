"""Who takes part in `steppe bench train` and `steppe bench checkpoint`, in words. No torch here.

How each is built is `train_contender.py`; how each saves and loads is `checkpoint_formats.py`.
"""

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from model.config import ModelConfig

CONTENDERS = {
    "steppe": "this package: DeepSpeed, ZeRO 1; bf16 weights and gradients, fp32 masters and AdamW states (fused)",
    "steppe-dense": "the same without experts, as wide in each layer as what a token meets",
    "transformers": "its model of the same shape, sdpa; fp32 weights, torch autocast to bf16; fused AdamW",
    "transformers-bf16": "the same, everything in bf16: the weights, the router's too, and AdamW's states",
}
DENSE = "steppe-dense"
PEERS = tuple(name for name in CONTENDERS if name != "steppe")


def peers_of(model: "ModelConfig", asked: list[str]) -> list[str]:
    """Whom to compare with: those asked for, each once, or all that there are for such a model.

    Raises ValueError for one that there is not.
    """
    for peer in asked:
        if peer not in PEERS:
            raise ValueError(f"--peer {peer} is not known: choose from {', '.join(PEERS)}")
        if peer == DENSE and model.moe is None:
            raise ValueError(f"--peer {DENSE} is for a recipe with experts, and this one has none: leave it out")
    return list(dict.fromkeys(asked)) or [peer for peer in PEERS if peer != DENSE or model.moe is not None]


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
