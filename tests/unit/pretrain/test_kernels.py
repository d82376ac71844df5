"""Which kernels a device gets; and the ones for GPUs, as far as other devices carry them."""

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import flex_attention as torch_flex
from torch.nn.attention.flex_attention import flex_attention

from model.attention import CausalAttention, causal_document_mask
from model.blockwise_attention import BlockwiseAttention, document_spans
from model.decoder import Decoder
from model.document_attention import FlexAttention, document_blocks
from model.init import initialise
from model.loss import softmax_loss
from model.norm import rms_norm, rms_norm_in_pieces
from model.opaque_attention import OpaqueBlockwiseAttention
from model.rope import rotate, rotate_in_pieces
from pretrain.kernels import apply_kernels, softmax_kernel
from pretrain.parallel_dims import ParallelDims
from pretrain.parallelize import parallelize
from tests.small_run import VOCABULARY, small_config

PROCESSOR, GPU, META = torch.device("cpu"), torch.device("cuda"), torch.device("meta")


@pytest.mark.parametrize(
    ("device", "masked", "core", "mask"),
    [
        (PROCESSOR, False, BlockwiseAttention, document_spans),
        (PROCESSOR, True, BlockwiseAttention, document_spans),
        (GPU, False, CausalAttention, causal_document_mask),
        (GPU, True, FlexAttention, document_blocks),
    ],
)
def test_the_table(device: torch.device, masked: bool, core: type, mask: Any) -> None:
    with META:
        decoder = Decoder(small_config(f"model.document_mask={masked}").model)
    apply_kernels(decoder, device)
    blocks: Any = decoder.layers
    assert [type(block.self_attn.core) for block in blocks] == [core] * 2
    assert decoder.document_mask is mask
    elementwise = {block.self_attn.rotate for block in blocks} | {decoder.norm.function}
    assert elementwise == ({rotate_in_pieces, rms_norm_in_pieces} if device is PROCESSOR else {rotate, rms_norm})
    if core is FlexAttention:
        assert len({id(block.self_attn.core.kernel) for block in blocks}) == 1, "compiled for each layer anew"


@pytest.mark.parametrize(("word", "in_pieces"), [("compile=true", False), ("activation_checkpointing=selective", True)])
def test_who_looks_at_operations_sees_a_processors_attention_as_one(word: str, in_pieces: bool) -> None:
    config = small_config(f"parallel.{word}")
    with META:
        decoder = Decoder(config.model)
    apply_kernels(decoder, PROCESSOR, config.parallel)
    blocks: Any = decoder.layers
    assert [type(block.self_attn.core) for block in blocks] == [OpaqueBlockwiseAttention] * 2
    elementwise = {block.self_attn.rotate for block in blocks} | {decoder.norm.function}
    assert elementwise == ({rotate_in_pieces, rms_norm_in_pieces} if in_pieces else {rotate, rms_norm})


def test_the_heads_softmax() -> None:
    assert softmax_kernel(PROCESSOR) is softmax_loss
    name = "softmax_loss" if find_spec("triton") is None else "fused_softmax_loss"
    assert softmax_kernel(GPU).__name__ == name  # type: ignore[attr-defined]


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch refuses FlexAttention's backward off a GPU for want of a kernel; its reference computes it all the same."""
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_decoder_for_gpus_has_its_shapes_without_one(reference: None, recompute: str) -> None:
    """Forward and backward of all layers on the meta device, which takes a GPU's row of the table."""
    config = small_config("model.document_mask=true", f"parallel.activation_checkpointing={recompute}")
    decoder = parallelize(config, META, torch.bfloat16, ParallelDims.of_this_rank(config))
    layer: Any
    for layer in decoder.layers:
        assert isinstance(layer.self_attn.core, FlexAttention)
        layer.self_attn.core.kernel = flex_attention
    tokens_BT = torch.zeros(2, 300, dtype=torch.long, device=META)
    hidden_BTD = decoder.hidden(tokens_BT, document_ids_BT=tokens_BT)
    assert hidden_BTD.shape == (2, 300, config.model.hidden_size)
    hidden_BTD.sum().backward()
    grads = {name: p.grad for name, p in decoder.named_parameters() if name != "lm_head.weight"}
    assert all(grad is not None and grad.dtype == torch.bfloat16 for grad in grads.values())


@pytest.mark.slow
def test_recomputation_keeps_flex_attention_compiled(reference: None) -> None:
    """A mode that watches operations would else make it fall back to scores of all pairs."""
    tokens_BT = torch.randint(0, VOCABULARY, (2, 150), generator=torch.Generator().manual_seed(0))
    ids_BT = (torch.arange(150) > 70).long().expand(2, -1)

    def gradients(recompute: str) -> list[Tensor]:
        torch._dynamo.reset()
        config = small_config("model.document_mask=true", f"parallel.activation_checkpointing={recompute}")
        decoder = parallelize(config, PROCESSOR, torch.float32, ParallelDims.of_this_rank(config))
        initialise(decoder, 0)
        counter = CompileCounterWithBackend("aot_eager")
        kernel = torch.compile(flex_attention, backend=counter, dynamic=False)
        decoder.document_mask = document_blocks
        layer: Any
        for layer in decoder.layers:
            layer.self_attn.core = FlexAttention(kernel)
        for _ in range(2):
            decoder.zero_grad()
            decoder(tokens_BT, tokens_BT.roll(-1, 1), document_ids_BT=ids_BT).total.backward()
        assert counter.frame_count == 1
        grads = [parameter.grad for parameter in decoder.parameters()]
        return [grad for grad in grads if grad is not None]

    plain = gradients("none")
    assert len(plain) == len(list(Decoder(small_config().model).parameters()))
    for recompute in ("selective", "full"):
        assert all(torch.equal(a, b) for a, b in zip(gradients(recompute), plain, strict=True)), recompute
