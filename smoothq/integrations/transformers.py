"""Loading through transformers: `from_pretrained` understands `quant_method: smoothq`.

Importing smoothq registers a config and an HfQuantizer. The quantizer makes the plan again from
the recipe in `config.json`, puts the empty modules of that plan in the place of the dense ones
before any weight is read, and compares the checkpoint's tensors with them by name, shape and
dtype: a missing, extra or foreign tensor is an error, never random weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..architectures.graph import is_tied, text_config
from ..architectures.layout import close_block
from ..checkpoint.stream import Spec, tensor_shapes
from ..errors import CheckpointError, UnsupportedModelError
from ..modules import (
    InputQuantizer,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizesAttention,
    rotated_ends,
    stop_quantizing_attention,
    stop_rotating,
)
from ..plan import Plan, install, make_plan
from ..recipe import Recipe, recipe_from_dict
from ..transforms.hadamard import Hadamard
from ..transforms.rotation import rotate_residual

METHOD = "smoothq"
FORMAT = 3  # of the tensors: the residual rotation is in none outside the blocks
READABLE = (2, FORMAT)  # in 2 it was in the ends of some models: see `SmoothqConfig.plan_for`


@register_quantization_config(METHOD)
class SmoothqConfig(QuantizationConfigMixin):
    """The `quantization_config` of a checkpoint.

    recipe: the whole Recipe as a mapping. version: of smoothq that wrote it. rotations: the
    construction and hash of every matrix that runs online. format: how the tensors are laid out.
    """

    def __init__(
        self,
        recipe: dict[str, Any] | None = None,
        version: str = "",
        rotations: Iterable[dict[str, Any]] = (),
        format: int = 1,
        **unknown: Any,
    ) -> None:
        self.quant_method: Any = METHOD
        self.recipe = recipe or {}
        self.version = version
        self.rotations = list(rotations)
        self.format = format
        # Kept, so that a newer writer's fields survive being loaded and saved again.
        unknown.pop("quant_method", None)
        for name, value in unknown.items():
            setattr(self, name, value)

    @classmethod
    def of(cls, plan: Plan, version: str) -> SmoothqConfig:
        """The config that a plan's checkpoint carries."""
        rotations = [rotation.to_dict() for rotation in plan.online_rotations]
        return cls(plan.recipe.model_dump(mode="json"), version, rotations, FORMAT)

    def check_format(self) -> None:
        """Raise CheckpointError where the tensors lie as another version has them."""
        if self.format not in READABLE:
            raise self._foreign()

    def plan_for(self, model: PreTrainedModel) -> Plan:
        """The plan that a checkpoint of this config was made by, for its float model's skeleton.

        Raises CheckpointError where the checkpoint's tensors are not those of that plan.
        """
        self.check_format()
        plan = make_plan(model, self.parsed_recipe())
        parts, tied = plan.parts, is_tied(model)
        folded = not tied and parts.entry_norm is None and parts.folds_head(model)
        moved = plan.residual_rotation is not None and (folded or parts.positions is not None)
        if self.format < FORMAT and moved:
            raise self._foreign()
        return plan

    def _foreign(self) -> CheckpointError:
        return CheckpointError(
            f"the checkpoint has format {self.format} (smoothq {self.version}), this one "
            f"reads format {FORMAT}; quantize the model again, or load it with that version"
        )

    def parsed_recipe(self) -> Recipe:
        """The recipe. Raises RecipeError naming the field at fault."""
        return recipe_from_dict(self.recipe)


def quantization_of(config: PretrainedConfig, name: str) -> SmoothqConfig:
    """How a checkpoint's config says it is quantized.

    Raises CheckpointError where it is none of ours, or one that is read no more.
    """
    quantization = getattr(config, "quantization_config", None)
    if not isinstance(quantization, dict) or quantization.get("quant_method") != METHOD:
        raise CheckpointError(f"{name} is not quantized by smoothq")
    stored = SmoothqConfig(**quantization)
    stored.check_format()
    return stored


@register_quantizer(METHOD)
class SmoothqHfQuantizer(HfQuantizer):
    """Builds the quantized modules for `from_pretrained`, and takes them apart to dequantize."""

    requires_calibration = True
    quantization_config: SmoothqConfig
    plan: Plan

    @property
    def is_trainable(self) -> bool:
        """Packed integers have no gradient."""
        return False

    @property
    def is_compileable(self) -> bool:
        """`torch.compile` and static caches work; not with experts, which run as tokens ask."""
        return not any(site.routed for block in self.plan.blocks for site in block.graph.sites)

    def is_serializable(self) -> bool:
        """`save_pretrained` writes what was loaded."""
        return True

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        _check_class(model)
        # transformers builds the model under a meta-device context; rotations must be real.
        with torch.device("cpu"):
            self.plan = self.quantization_config.plan_for(model)
            self._check_rotations(self.plan)
            install(model, self.plan)
        if self.plan.tables:
            # The head looks its codes up in the embedding: there is no parameter to tie.
            model.all_tied_weights_keys = {}
        if checkpoint_files:
            check_tensors(model, checkpoint_files)

    def update_weight_conversions(self, weight_conversions: Any, *model: Any) -> Any:
        """None: a checkpoint of ours has the names that the modules have."""
        return []

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        _check_filled(model)
        model.requires_grad_(False)  # its operators have none, and a compiler would ask for it
        prepare(model)
        loaded: Any = model
        loaded._weight_conversions = _OneWay(get_model_conversion_mapping(model))

    def _check_rotations(self, plan: Plan) -> None:
        stored = [Hadamard.from_dict(entry) for entry in self.quantization_config.rotations]
        if set(stored) != set(plan.online_rotations):
            raise CheckpointError(
                "the rotations in quantization_config are not those that its recipe asks for; "
                "the checkpoint was edited, or written by another version of smoothq "
                f"({self.quantization_config.version})"
            )

    def _dequantize(
        self, model: PreTrainedModel, dtype: torch.dtype | str | None = None
    ) -> PreTrainedModel:
        # A config that was written holds a name.
        wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        dequantize(model, self.plan, wanted or model.dtype)
        return model


class _OneWay(list[Any]):
    """Conversions from stored names, for what transformers loads later, as layers that predict
    several tokens; saving asks for them in reverse, and our tensors have their names already."""

    def __getitem__(self, index: Any) -> Any:
        return [] if index == slice(None, None, -1) else super().__getitem__(index)


def prepare(model: nn.Module) -> None:
    """Derive everything that is not stored, on each module's device, after loading."""
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            if module.site_input.rotation is not None:
                module.site_input.rotation.prepare(module.device)
            module.prepare()
        elif isinstance(module, QuantizesAttention):
            rotation = module.attention_quantizer.rotation
            if rotation is not None:
                rotation.prepare(module.device)
    for module, rotation in rotated_ends(model):
        rotation.prepare(next(iter(module.state_dict().values())).device)


def keep_packed(model: nn.Module) -> None:
    """Hold 4-bit weights packed alone, in place: a third of their memory, slower on long prompts.

    A layer whose operator multiplies int8 copies faster otherwise holds both forms.
    """
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.keeps_packed = True
            module.prepare()


def dequantize(model: PreTrainedModel, plan: Plan, dtype: torch.dtype) -> None:
    """Turn a quantized model into a float one of stock modules, in place.

    Online rotations are folded back into the weights; what stays of the quantization is its
    rounding. Input quantization, runtime smoothing and quantized attention have no float
    counterpart and vanish.
    """
    layers = model.get_submodule(plan.parts.layers)
    with torch.device("meta"):
        stock = type(model)(model.config).get_submodule(plan.parts.layers)
    for index, block_plan in enumerate(plan.blocks):
        block = layers.get_submodule(str(index))
        for site in block_plan.sites:
            for name in site.modules:
                block.set_submodule(name, _dense(block.get_submodule(name), torch.float32))
            parent, _, attribute = site.input_name.rpartition(".")
            site_input = block.get_submodule(site.input_name)
            assert isinstance(site_input, InputQuantizer)
            site_input.context.detach()
            delattr(block.get_submodule(parent), attribute)
        if plan.residual_rotation is not None:
            rotate_residual(block, block_plan.graph, plan.residual_rotation, inverse=True)
        if plan.attention is not None:
            attention = block.get_submodule(block_plan.attention)
            stop_quantizing_attention(attention, text_config(model))
        close_block(block, stock.get_submodule(str(index)))
        block.to(dtype)
    stop_rotating(model)
    if plan.tables:
        _dequantize_tables(model, plan, dtype)


def _dequantize_tables(model: PreTrainedModel, plan: Plan, dtype: torch.dtype) -> None:
    """Stock embedding and head in the place of those in 8 bits."""
    quantized = model.get_submodule(plan.parts.embedding)
    assert isinstance(quantized, QuantizedEmbedding)
    weight = quantized.quantized_weight().dequantize(dtype)
    embedding = nn.Embedding.from_pretrained(weight)
    head = model.get_submodule(plan.parts.head)
    if isinstance(head, QuantizedLinear):
        stock = _dense(head, dtype)
    else:
        with torch.device("meta"):
            stock = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        stock.weight = embedding.weight
    model.set_submodule(plan.parts.embedding, embedding)
    model.set_submodule(plan.parts.head, stock)


def _dense(quantized: nn.Module, dtype: torch.dtype) -> nn.Linear:
    assert isinstance(quantized, QuantizedLinear)
    weight = quantized.quantized_weight().dequantize(torch.float64)
    rotation = quantized.site_input.spec.rotation
    if rotation is not None:
        weight = rotation.apply_transposed(weight)
    bias = quantized.bias
    linear = nn.Linear(
        quantized.in_features, quantized.out_features, bias is not None, weight.device, dtype
    )
    linear.weight.data.copy_(weight)
    if bias is not None:
        linear.bias.data.copy_(bias)
    return linear.requires_grad_(False)


def check_tensors(model: PreTrainedModel, files: list[str]) -> None:
    """Raise CheckpointError unless the files hold the tensors that the model needs.

    Beside them they may hold those of modules that the model's class does not have, never others of
    its own modules.
    """
    expected = dict(model.state_dict())
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    stored: dict[str, Spec] = {}
    for file in files:
        stored |= tensor_shapes(Path(file))
    missing = sorted(set(expected) - set(stored) - tied)
    modules = {name for name, _ in model.named_modules()}
    foreign = sorted(set(stored) - set(expected))
    extra = [name for name in foreign if name.rpartition(".")[0] in modules]
    if missing or extra:
        what, names = ("missing", missing) if missing else ("unknown", extra)
        raise CheckpointError(
            f"{len(names)} tensors are {what} in the checkpoint, the first '{names[0]}'; "
            "it is incomplete, edited, or of another version of smoothq"
        )
    for name in sorted(set(stored) & set(expected)):
        (shape, dtype), wanted = stored[name], expected[name]
        floats = dtype.is_floating_point and wanted.dtype.is_floating_point
        if shape != tuple(wanted.shape) or not (floats or dtype == wanted.dtype):
            raise CheckpointError(
                f"tensor '{name}' is {dtype} {shape} in the checkpoint, "
                f"its recipe asks for {wanted.dtype} {tuple(wanted.shape)}"
            )


def _check_class(model: PreTrainedModel) -> None:
    """Raise UnsupportedModelError for a class without the head that a checkpoint of ours has."""
    if model.get_decoder() is model or not isinstance(model.get_output_embeddings(), nn.Module):
        raise UnsupportedModelError(
            f"the checkpoint holds a causal LM, and {type(model).__name__} has no head for its "
            "tokens; load it with AutoModelForCausalLM.from_pretrained, whose get_decoder() is the "
            "model without a head"
        )


def _check_filled(model: nn.Module) -> None:
    """Raise CheckpointError for a quantized tensor that loading left uninitialised."""
    for name, module in model.named_modules():
        if not isinstance(module, QuantizedLinear | InputQuantizer | QuantizedEmbedding):
            continue
        persistent = [key for key in module.state_dict() if "." not in key]
        for key in persistent:
            if not getattr(module._buffers[key], "_is_hf_initialized", False):
                raise CheckpointError(f"tensor '{name}.{key}' is missing in the checkpoint")
