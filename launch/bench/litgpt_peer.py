"""litgpt's model as a contender of `steppe bench train`, in the loop of its own pretraining: Fabric, its chunked loss.

litgpt and lightning are imported here, when a model is built, and nowhere else.
"""

from collections.abc import Callable
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch

from data_pipeline.batch import Batch
from pretrain.config import RunConfig
from pretrain.engine import build_decoder, decoder_inputs
from pretrain.hf_weights import weights_to_hf

if TYPE_CHECKING:
    from lightning import Fabric
    from torch import Tensor, nn


def build_model(config: RunConfig, device: torch.device, fabric: "Fabric") -> "nn.Module":
    """Its model of the same shape in Fabric's precision, with the weights that ours starts from, by its own converter
    of Llama's. The vocabulary is not padded: its loss would count the padding."""
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama

    model = config.model
    assert (model.moe, model.qk_norm, model.rope_scaling) == (None, False, None), "not Llama's dense shape"
    theirs = Config(
        name=config.name,
        block_size=config.data.sequence_length,
        n_layer=model.num_layers,
        n_embd=model.hidden_size,
        vocab_size=model.vocab_size,
        padded_vocab_size=model.vocab_size,
        n_head=model.num_heads,
        n_query_groups=model.num_kv_heads,
        head_size=model.head_size,
        rotary_percentage=1.0,
        rope_base=model.rope_theta,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        norm_eps=model.norm_eps,
        mlp_class_name="LLaMAMLP",
        intermediate_size=model.ffn_size,
    )
    with fabric.init_module(empty_init=False):
        decoder = GPT(theirs)
    weights: dict[str, Tensor] = {}
    copy_weights_hf_llama(
        theirs, {}, weights, weights_to_hf(build_decoder(config, device, torch.float32).state_dict(), model)
    )
    decoder.load_state_dict(weights)
    if model.tie_embeddings:
        decoder.transformer.wte.weight = decoder.lm_head.weight
    return decoder.train()


def litgpt_step(
    config: RunConfig, device: torch.device, pure_bf16: bool, compiled: bool
) -> tuple[Callable[[Batch], float], dict[str, Any]]:
    """A training step as in its `pretrain.py`, but for AdamW, which it fuses on GPUs alone; and what it is, in words.

    Weight decay is its own: of every parameter.
    """
    import lightning
    from litgpt.utils import chunked_cross_entropy

    fabric = lightning.Fabric(accelerator=device.type, devices=1, precision="bf16-true" if pure_bf16 else "bf16-mixed")
    decoder = build_model(config, device, fabric)
    model = fabric.setup(torch.compile(decoder) if compiled else decoder)
    optimizer = fabric.setup_optimizers(
        torch.optim.AdamW(
            model.parameters(),
            lr=config.optimizer.lr,
            betas=config.optimizer.betas,
            eps=config.optimizer.eps,
            weight_decay=config.optimizer.weight_decay,
            fused=True,
        )
    )

    def step(batch: Batch) -> float:
        inputs = decoder_inputs(batch, device)
        loss = chunked_cross_entropy(model(inputs["tokens_BT"]), inputs["targets_BT"])
        fabric.backward(loss)
        if config.optimizer.grad_clip:
            fabric.clip_gradients(model, optimizer, max_norm=config.optimizer.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step, {"class": f"GPT of litgpt {version('litgpt')}, lightning {lightning.__version__}"}
