"""Whose attention the quantized one can stand in for."""

from transformers import PretrainedConfig, PreTrainedModel

from ..compat import takes_attention_functions


def unquantizable_attention(
    config: PretrainedConfig, model_class: type[PreTrainedModel]
) -> str | None:
    """Why a decoder's attention cannot be replaced by the quantized one, or None.

    Quantized attention is the plain one: scaled scores, a boolean mask, a softmax.
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
