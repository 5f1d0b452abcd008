"""Whether the quantized attention can replace that of a model."""

from transformers import PretrainedConfig, PreTrainedModel

from ..compat import takes_attention_functions


def unquantizable_attention(
    config: PretrainedConfig, model_class: type[PreTrainedModel]
) -> str | None:
    """Why a decoder's attention cannot be replaced by the quantized one, or None where it can.

    Quantized attention computes scaled dot products, a boolean mask and a softmax, nothing else.

    Args:
        config: of the decoder.
        model_class: the class of the model.
    """
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "it caps its scores (attn_logit_softcapping)"
    if config.model_type == "gpt_oss":
        return "its softmax has sinks"
    if getattr(config, "alibi", False) or config.model_type in ("bloom", "mpt"):
        return "it adds a bias to its scores (ALiBi)"
    if not takes_attention_functions(model_class):
        return "transformers does not let it be replaced"
    return None
