"""Which architectures smoothq knows: one short file a family, one line here."""

from transformers import PretrainedConfig

from ..errors import UnsupportedModelError
from . import llama, mixtral, phi3
from .graph import BlockGraph, Edge, Family, Heads, Norm, Rows, Site, WeightRef

__all__ = [
    "BlockGraph",
    "Edge",
    "Family",
    "Heads",
    "Norm",
    "Rows",
    "Site",
    "WeightRef",
    "family_of",
    "supported_model_types",
]

_FAMILIES = (llama.FAMILY, phi3.FAMILY, mixtral.FAMILY)
_BY_MODEL_TYPE = {name: family for family in _FAMILIES for name in family.model_types}


def supported_model_types() -> list[str]:
    """The `model_type` values that can be quantized, sorted."""
    return sorted(name for name, family in _BY_MODEL_TYPE.items() if not family.unquantizable)


def family_of(config: PretrainedConfig) -> Family:
    """The family of a model's config.

    Raises UnsupportedModelError, with the list of what is supported, for any other.
    """
    family = _BY_MODEL_TYPE.get(config.model_type)
    if family is None:
        raise UnsupportedModelError(
            f"architecture '{config.model_type}' is not supported; "
            f"supported: {', '.join(supported_model_types())}"
        )
    return family
