"""Who takes part in `steppe bench train`, in words; how each is built is `train_contender.py`. No torch here."""

from typing import TYPE_CHECKING

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
