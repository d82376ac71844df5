"""Who takes part in `steppe bench train`, in words; how each is built is `train_contender.py`. No torch here."""

CONTENDERS = {
    "steppe": "this package: DeepSpeed, ZeRO 1; bf16 weights and gradients, fp32 masters and AdamW states (fused)",
    "transformers": "LlamaForCausalLM, sdpa; fp32 weights, torch autocast to bf16; fused AdamW",
    "transformers-bf16": "LlamaForCausalLM, sdpa; everything in bf16, the weights and AdamW's states too; fused AdamW",
}
PEERS = tuple(name for name in CONTENDERS if name != "steppe")
