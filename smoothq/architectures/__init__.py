"""The registry of model families: `model_type` → `Family`, one file each in `families`."""

from transformers import PretrainedConfig

from .families import (
    bloom,
    cohere,
    falcon,
    gemma,
    glm,
    gpt2,
    gpt_neox,
    gpt_oss,
    llama,
    mixtral,
    olmo2,
    opt,
    phi3,
    qwen_moe,
)
from .graph import (
    BlockGraph,
    Edge,
    Family,
    Heads,
    Norm,
    Parts,
    Rows,
    Site,
    WeightRef,
)

__all__ = [
    "BlockGraph",
    "Edge",
    "Family",
    "Heads",
    "Norm",
    "Parts",
    "Rows",
    "Site",
    "WeightRef",
    "family_of",
    "register_family",
    "supported_model_types",
]

_FAMILIES = (
    llama.FAMILY,
    phi3.FAMILY,
    glm.FAMILY,
    gemma.FAMILY,
    olmo2.FAMILY,
    cohere.FAMILY,
    opt.FAMILY,
    bloom.FAMILY,
    gpt2.FAMILY,
    gpt_neox.FAMILY,
    falcon.FAMILY,
    mixtral.FAMILY,
    qwen_moe.FAMILY,
    gpt_oss.FAMILY,
)
_BY_MODEL_TYPE = {name: family for family in _FAMILIES for name in family.model_types}


def register_family(family: Family) -> None:
    """Register a family, for this process.

    `discovery.infer.prove_family` tests whether its wiring is right.

    Args:
        family: known from now on under each of its `model_types`.

    Raises:
        ValueError: a model type has a family already.
    """
    for name in family.model_types:
        if name in _BY_MODEL_TYPE:
            raise ValueError(f"model type '{name}' has a family already")
    _BY_MODEL_TYPE.update(dict.fromkeys(family.model_types, family))


def supported_model_types() -> list[str]:
    """The `model_type` values that have a registered family, sorted."""
    return sorted(_BY_MODEL_TYPE)


def family_of(config: PretrainedConfig) -> Family | None:
    """The registered family of a model, or None where none has its wiring.

    Args:
        config: of the decoder (`get_text_config(decoder=True)`).
    """
    family = _BY_MODEL_TYPE.get(config.model_type)
    return None if family is None or family.refuses(config) is not None else family
