"""What a mixture of experts is compared with. No torch here."""

from model.config import GROUPED_MULTIPLE, ModelConfig, has_experts


def dense_counterpart(model: ModelConfig) -> ModelConfig:
    """A model without experts that has as many active parameters, but for the routers'.

    All but the MLPs is the same. They are as wide in each layer as the experts that a token takes there together, the
    shared ones too; where only some layers have experts, as wide as the layers are on the mean, to a multiple of 8.
    """
    assert model.moe is not None, "it is dense"
    active = (model.moe.experts_per_token + model.moe.shared_experts) * model.moe.expert_ffn_size
    widths = [active if has_experts(model, layer) else model.ffn_size for layer in range(model.num_layers)]
    mean = sum(widths) / len(widths)
    ffn_size = max(1, round(mean / GROUPED_MULTIPLE)) * GROUPED_MULTIPLE
    return model.model_copy(update={"ffn_size": ffn_size, "moe": None})
