"""Every use of private or unstable internals of transformers, behind one function each.

An upgrade of transformers that moves or renames one of them then breaks this file alone. Written
against transformers 5. Its modules are imported inside the functions, for two modules that use this
one (`integrations.transformers`, `plan.config`) are imported while transformers still is.

What its documentation lists is used where it is needed: configs and models, cache layers,
`AttentionInterface`, `HfQuantizer`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import Cache, PretrainedConfig, PreTrainedModel

_INITIALIZED = "_is_hf_initialized"
_T = TypeVar("_T")


# Weights: ties and initialisation


def tied_weights(model: PreTrainedModel) -> dict[str, str]:
    """The parameters that a model ties: full name of the tied one → full name of its source.

    The model's own mapping, not a copy; empty for a module that is no transformers model.
    """
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    return ties


def remove_tie(model: PreTrainedModel, target: str) -> None:
    """Have a model no longer tie the parameter `target`; its tensor stays as it is."""
    del model.all_tied_weights_keys[target]


def remove_ties(model: PreTrainedModel) -> None:
    """Have a model no longer tie any parameter; the tensors stay as they are."""
    model.all_tied_weights_keys = {}


def mark_initialized(target: _T) -> _T:
    """Keep transformers from initialising a tensor or a module; returns it.

    Args:
        target: a tensor, a module, or a class of either: then all its instances are meant.
    """
    setattr(target, _INITIALIZED, True)
    return target


def is_initialized(tensor: object) -> bool:
    """Whether transformers has loaded or initialised a tensor."""
    return bool(getattr(tensor, _INITIALIZED, False))


def initialize_unmarked(model: PreTrainedModel) -> None:
    """Initialise what is not marked as initialised, buffers included, as `from_pretrained` does."""
    model.initialize_weights()


# Checkpoints: names of tensors, conversions, files


class WeightConversions:
    """The renamings and conversions by which transformers loads a checkpoint into a model."""

    def __init__(self, model: PreTrainedModel) -> None:
        """model: may be on the meta device; its names and its class count."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter

        transforms = get_model_conversion_mapping(model)
        self._renamings = renamings_among(transforms)
        self._converters = [one for one in transforms if isinstance(one, WeightConverter)]
        self._by_pattern = {
            pattern: converter
            for converter in self._converters
            for pattern in converter.source_patterns
        }
        self._prefix, self._expected = model.base_model_prefix, model.state_dict()

    def rename(self, stored: str) -> tuple[str, str | None]:
        """The name that transformers gives a stored tensor.

        Returns:
            The name in the model, and the pattern of the conversion that the tensor goes through,
            None where it is loaded as it is.
        """
        return self._rename(stored, self._renamings, self._converters)

    def rename_alone(self, stored: str) -> str:
        """The name that a stored tensor has in the model if it goes through no conversion."""
        return self._rename(stored, self._renamings, [])[0]

    def add_prefix(self, stored: str) -> tuple[str, str | None]:
        """As `rename`, by the prefix of the base model alone."""
        return self._rename(stored, [], [])

    def _rename(
        self, stored: str, renamings: list[Any], converters: list[Any]
    ) -> tuple[str, str | None]:
        from transformers.core_model_loading import rename_source_key

        return rename_source_key(stored, renamings, converters, self._prefix, self._expected)

    def converter(self, pattern: str) -> Any:
        """The conversion of a pattern that `rename` returned, for `run_converter`."""
        return self._by_pattern[pattern]


def renamings_among(conversions: Iterable[Any]) -> list[Any]:
    """Those of a model's weight conversions that only rename tensors."""
    from transformers.core_model_loading import WeightRenaming

    return [one for one in conversions if isinstance(one, WeightRenaming)]


def run_converter(
    converter: Any,
    name: str,
    parts: Iterable[tuple[str, str, Callable[[], Tensor]]],
    model: PreTrainedModel,
) -> dict[str, Tensor]:
    """Parameters that transformers computes from several stored tensors, or several from one.

    Args:
        converter: of `WeightConversions.converter`; it is left as it is.
        name: of the first parameter that it computes.
        parts: of each stored tensor: the pattern that its name matches, that name, and a function
            that reads it.
        model: the model that they are for.

    Returns:
        Full name → tensor. Raises whatever transformers makes of foreign tensors.
    """
    filled = copy.deepcopy(converter)
    for pattern, stored, read in parts:
        filled.add_tensor(name, stored, pattern, read)
    computed = filled.convert(name, model=model, config=model.config)
    return {
        full: tensor[0] if isinstance(tensor, list) else tensor for full, tensor in computed.items()
    }


def loading_order(stored: str) -> Any:
    """A sort key for names of stored tensors: transformers loads them in this order."""
    from transformers.core_model_loading import dot_natural_key

    return dot_natural_key(stored)


def convert_when_loading_alone(model: PreTrainedModel) -> None:
    """Have a loaded model convert stored tensors when more are loaded, but none when it is saved.

    More are loaded for layers that predict several tokens; what smoothq stores has the model's
    names already.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping

    loaded: Any = model
    loaded._weight_conversions = _NotReversible(get_model_conversion_mapping(model))


class _NotReversible(list[Any]):
    """Conversions that are empty in reverse, which is how saving asks for them."""

    def __getitem__(self, index: Any) -> Any:
        return [] if index == slice(None, None, -1) else super().__getitem__(index)


def save_custom_code(config: PretrainedConfig, directory: Path) -> None:
    """Copy the Python files of a config class that `register_for_auto_class` registered.

    Writes their names into `config`. Does nothing for a class of transformers.
    """
    from transformers.dynamic_module_utils import custom_object_save

    if config._auto_class is not None:
        custom_object_save(config, directory, config=config)  # type: ignore[arg-type]


def forget_weights_file(config: PretrainedConfig) -> None:
    """Remove the name of a weights file from a config that is written beside others."""
    if hasattr(config, "transformers_weights"):
        del config.transformers_weights


# Classes of models


def auto_classes(config: PretrainedConfig, auto: str) -> tuple[type[PreTrainedModel], ...]:
    """The classes that an auto class takes for a config; none where it knows none.

    Args:
        config: of the model.
        auto: name of the auto class, which an older transformers need not have.
    """
    import transformers

    mapping: Any = getattr(getattr(transformers, auto, None), "_model_mapping", None)
    try:
        classes = mapping[type(config)]
    except (KeyError, TypeError):
        return ()
    return tuple(classes) if isinstance(classes, tuple | list) else (classes,)


def class_of_architecture(name: str) -> type[PreTrainedModel] | None:
    """The model class that transformers has under a name, or None."""
    import transformers

    kind = getattr(transformers, name, None)
    is_model = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
    return kind if is_model else None


def build_model(
    kind: type[PreTrainedModel], config: PretrainedConfig, dtype: Any = None
) -> PreTrainedModel:
    """A new model of a class, as `AutoModel.from_config` builds it.

    Args:
        kind: of the model.
        config: of the model, which is changed.
        dtype: of its floats; None for the config's.
    """
    options = {} if dtype is None else {"dtype": dtype}
    built: PreTrainedModel = kind._from_config(config, **options)
    return built


def is_custom_class(kind: type[PreTrainedModel]) -> bool:
    """Whether a class is of code beside a model, which the user had transformers run."""
    return kind.__module__.startswith("transformers_modules.")


def import_custom_class(reference: str, directory: Path) -> type[PreTrainedModel]:
    """Import a class of code beside a model. This runs that code.

    Args:
        reference: as in a config's `auto_map`: `file.Class`, or `repo--file.Class`.
        directory: of the model.
    """
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    kind: type[PreTrainedModel] = get_class_from_dynamic_module(reference, str(directory))
    return kind


def with_generation(kind: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """A class of code beside a model with `generate`, which transformers adds when it loads one."""
    if not is_custom_class(kind):
        return kind
    from transformers.models.auto.auto_factory import add_generation_mixin_to_remote_model

    generating: type[PreTrainedModel] = add_generation_mixin_to_remote_model(kind)
    return generating


def tensor_parallel_size(model: PreTrainedModel) -> int:
    """How many processes share a model's weights; 1 where they are whole."""
    return getattr(model, "_tp_size", None) or 1


# Attention and caches


def attention_implementation(config: PretrainedConfig) -> str | None:
    """The name under which a model's attention function is registered, or None."""
    name: str | None = config._attn_implementation
    return name


def set_attention_implementation(config: PretrainedConfig, name: str | None) -> None:
    """Have the models of a config call the attention function of that name, without a check."""
    config._attn_implementation = name


def takes_attention_functions(model_class: type[PreTrainedModel]) -> bool:
    """Whether attention of a model class can be replaced through `AttentionInterface`."""
    return bool(getattr(model_class, "_supports_attention_backend", False))


def boolean_mask_function() -> Callable[..., Tensor | None]:
    """A mask function for `AttentionMaskInterface`: bool (B, 1, L, T), never left out.

    That of `sdpa`, which may leave a causal mask to a flag of the attention function.
    """
    from transformers.masking_utils import sdpa_mask

    def mask(*args: Any, **kwargs: Any) -> Tensor | None:
        written: Tensor | None = sdpa_mask(*args, **(kwargs | {"allow_is_causal_skip": False}))
        return written

    return mask


def add_cache_layers(cache: Cache, index: int) -> None:
    """Append layers to a cache that grows by them, until it has one of that index."""
    while cache.layer_class_to_replicate is not None and len(cache.layers) <= index:
        cache.layers.append(cache.layer_class_to_replicate())


# Mixtures of experts


def use_eager_experts(model: PreTrainedModel) -> None:
    """Have a model compute its experts one after another, in plain tensor code."""
    model.set_experts_implementation("eager")


def stock_experts(experts: nn.Module, *args: Tensor) -> Tensor:
    """What a stock experts module computes by itself, one expert after the other.

    Args:
        experts: the stock module.
        args: of its forward.
    """
    result: Tensor = type(experts).forward.__wrapped__(experts, *args)  # type: ignore[attr-defined]
    return result


def runs_experts_one_by_one(experts: nn.Module) -> bool:
    """Whether an experts module's config asks for one expert after the other."""
    config = getattr(experts, "config", None)
    return getattr(config, "_experts_implementation", None) == "eager"


def experts_are_gated(experts: nn.Module) -> bool | None:
    """Whether a stock experts module fuses gate and up in one stack of matrices.

    None for a module without the marks of transformers' experts interface.
    """
    if not hasattr(experts, "is_transposed") or not hasattr(experts, "has_gate"):
        return None
    return bool(experts.has_gate)


def activated(experts: nn.Module, first: Tensor) -> Tensor:
    """The activation of experts, as a stock experts module computes it.

    Args:
        experts: the stock module.
        first: float (tokens, 2 · width), the product of its fused gate and up matrices, or
            (tokens, width) for experts without a gate.

    Returns:
        float (tokens, width).
    """
    inner: Tensor
    module: Any = experts
    if not getattr(module, "has_gate", True):
        inner = module.act_fn(first)
    elif hasattr(module, "_apply_gate"):
        inner = module._apply_gate(first)
    else:
        gate, up = first.chunk(2, -1)
        child = getattr(module, "mlp", module)  # DBRX has it in a module of its own
        activation = getattr(child, "activation_fn", None) or child.act_fn
        inner = activation(gate) * up
    return inner


def experts_are_transposed(experts: nn.Module) -> bool:
    """Whether a stock experts module stores its matrices as (in_features, out_features)."""
    return bool(experts.is_transposed)


def expert_count(experts: nn.Module) -> int:
    """The experts of a stock module that stores their matrices one below the other."""
    return int(experts.num_experts)  # type: ignore[arg-type]


def passes_identities(experts: nn.Module) -> bool:
    """Whether numbers beyond the experts' stand for the identity, not for no expert."""
    return hasattr(experts, "identity_expert")


def experts_sum_dtype(experts: nn.Module, hidden_states: Tensor, weights: Tensor) -> torch.dtype:
    """The dtype in which a stock experts module adds up its experts.

    Args:
        experts: the stock module.
        hidden_states: its input.
        weights: of the tokens' experts.
    """
    import torch

    names = {base.__name__ for base in type(experts).__mro__}
    if "NemotronHExperts" in names:
        return weights.dtype
    if names & {"Inkling2Experts", "Inkling2LoopExperts"}:
        return torch.float32
    return hidden_states.dtype


def drop_layer_values(config: PretrainedConfig, layers: int) -> None:
    """Drop the values by layer that a config has for layers from number `layers` on, in place."""
    spec = vars(config).get("_heterogeneity_spec")
    if spec is not None:
        values = spec.per_layer_overrides.items()
        kept = {index: fields for index, fields in values if index < layers}
        config.per_layer_config = kept or None
