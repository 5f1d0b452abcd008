"""Put the quantized modules of a plan into a model, and turn it back into a float model."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..architectures.graph import text_config
from ..architectures.linearize import linearize_block, restore_block
from ..compat import remove_tie, tied_weights
from ..errors import UnsupportedModelError
from ..modules import (
    InputQuantizer,
    InputSpec,
    QuantizedEmbedding,
    QuantizedLinear,
    SequenceContext,
    TiedHead,
    TracedInputs,
    WeightSpec,
    quantize_attention,
    rotate_ends,
    stop_quantizing_attention,
    stop_rotating,
)
from ..modules.quantized_embedding import EMBEDDING_BITS, row_grid
from ..recipe.recipe import FLOAT_BITS
from ..runtime.offload import is_offloaded
from ..transforms.rotation import rotate_residual
from .plan import BlockPlan, Plan, SitePlan


def install_inputs(
    block: nn.Module, plan: BlockPlan, context: SequenceContext, name: str
) -> dict[str, InputQuantizer]:
    """Put the InputQuantizers of a plan into a block, in place.

    Args:
        block: the decoder block, linearized.
        plan: the block's plan.
        context: carries the padding mask of a forward to the InputQuantizers that need it.
        name: the block's full name, for messages.

    Returns: the InputQuantizers by site name.
    """
    inputs, traced = {}, TracedInputs()
    traced.attach(block)
    for site in plan.sites:
        full = f"{name}.{site.input_name}"
        readers = max(len(token_group) for token_group in site.site.token_groups)
        inputs[site.site.name] = InputQuantizer(full, site.input, readers, context, traced)
        block.set_submodule(site.input_name, inputs[site.site.name])
    return inputs


def install_linear(
    block: nn.Module, module: str, plan: SitePlan, site_input: InputQuantizer
) -> QuantizedLinear:
    """Replace one linear of a linearized block by an empty QuantizedLinear, and return the latter.

    Args:
        block: the decoder block, linearized.
        module: the linear's name within the block.
        plan: the plan of the site that the linear reads.
        site_input: the site's InputQuantizer.
    """
    linear = block.get_submodule(module)
    assert isinstance(linear, nn.Linear)
    bias: Tensor | None = linear.bias
    if bias is None and plan.adds_bias:
        bias = linear.weight
    dtype = None if bias is None else bias.dtype
    quantized = QuantizedLinear(plan.modules[module], site_input, linear.weight.dtype, dtype)
    block.set_submodule(module, quantized)
    return quantized


def install(model: PreTrainedModel, plan: Plan) -> None:
    """Replace the modules of a float model, on any device, by the quantized ones of a plan.

    The new modules are empty: a checkpoint is to be loaded into the model next.
    """
    context = SequenceContext()
    _untie_blocks(model, plan)
    for name, layer, block in plan.named_blocks(model):
        linearize_block(layer)
        inputs = install_inputs(layer, block, context, name)
        for site in block.sites:
            for module in site.modules:
                install_linear(layer, module, site, inputs[site.site.name])
        for module in block.new_biases:
            kept = layer.get_submodule(module)
            assert isinstance(kept, nn.Linear)
            kept.bias = nn.Parameter(kept.weight.data.new_empty(kept.out_features))
    for name in plan.towers:
        model.set_submodule(name, tower_linear(name, model, plan))
    install_ends(model, plan)
    if any(site.input.mode == "smooth_live" for site in plan.sites):
        context.attach(model.get_submodule(plan.parts.decoder))
    if plan.residual_rotation is not None:
        rotate_ends(model, plan.parts, plan.residual_rotation)
    install_attention(model, plan)


def tower_linear(name: str, model: nn.Module, plan: Plan) -> QuantizedLinear:
    """An empty QuantizedLinear for a linear of a tower.

    Args:
        name: its full name.
        model: which has the float linear there, on any device.
        plan: of the model.
    """
    linear, planned = model.get_submodule(name), plan.towers[name]
    assert isinstance(linear, nn.Linear)
    site_input = InputQuantizer(f"{name}.input", planned.input)
    bias: Tensor | None = linear.bias
    dtype = None if bias is None else bias.dtype
    quantized = QuantizedLinear(planned.weight, site_input, linear.weight.dtype, dtype)
    quantized.add_module("input", site_input)
    return quantized


def _untie_blocks(model: PreTrainedModel, plan: Plan) -> None:
    """Give every block weights of its own where a model ties some of several blocks.

    They are quantized with the statistics of each block.
    """
    for target in [name for name in tied_weights(model) if name.startswith(plan.parts.layers)]:
        remove_tie(model, target)


def install_attention(model: PreTrainedModel, plan: Plan) -> None:
    """Quantize a model's attention and KV cache as planned, in place; no weight changes."""
    if plan.attention is not None:
        blocks = plan.named_blocks(model)
        attentions = [layer.get_submodule(block.attention) for _, layer, block in blocks]
        quantize_attention(attentions, plan.attention, text_config(model))


def install_ends(model: PreTrainedModel, plan: Plan) -> None:
    """Replace embedding and head by empty 8-bit modules, if the plan stores them in 8 bits.

    The head's input is quantized per token in 8 bits; it stays float if the recipe keeps
    activations in float.
    """
    if not plan.tables:
        return
    parts = plan.parts
    (rows, columns), *untied = plan.tables
    dtype = model.get_submodule(parts.embedding).get_parameter("weight").dtype
    embedding = QuantizedEmbedding(rows, columns, dtype)
    if parts.head is None:
        model.set_submodule(parts.embedding, embedding)
        return
    floats = plan.recipe.activations.bits == FLOAT_BITS
    spec = InputSpec(
        columns, FLOAT_BITS if floats else EMBEDDING_BITS, "float" if floats else "token"
    )
    site_input = InputQuantizer(f"{parts.head}.input", spec)
    if untied:
        head = model.get_submodule(parts.head)
        bias = dtype if isinstance(head.bias, nn.Parameter) else None
        rows_spec = WeightSpec(*untied[0], row_grid(columns))
        linear = QuantizedLinear(rows_spec, site_input, dtype, bias)
        linear.add_module("input", site_input)
        model.set_submodule(parts.head, linear)
    else:
        model.set_submodule(parts.head, TiedHead(embedding, site_input))
    model.set_submodule(parts.embedding, embedding)


def dequantize(model: PreTrainedModel, plan: Plan, dtype: torch.dtype) -> None:
    """Turn a quantized model into a float model of transformers' own modules, in place.

    Online rotations are folded back into the weights, which keep their rounded values. Input
    quantization, runtime smoothing and attention quantization have no float counterpart and are
    removed.

    Args:
        model: a loaded quantized model.
        plan: its plan.
        dtype: the dtype of the float weights.

    Raises:
        UnsupportedModelError: accelerate offloads a module; names it.
    """
    for name, module in model.named_modules():
        if is_offloaded(module):
            raise UnsupportedModelError(
                f"'{name}' is offloaded by accelerate: to dequantize the model, load it whole, on "
                "the CPU"
            )
    with torch.device("meta"):
        stock = type(model)(model.config)
    for name, block, block_plan in plan.named_blocks(model):
        for site in block_plan.sites:
            for module in site.modules:
                block.set_submodule(module, _dense(block.get_submodule(module), torch.float32))
            parent, _, attribute = site.input_name.rpartition(".")
            site_input = block.get_submodule(site.input_name)
            assert isinstance(site_input, InputQuantizer)
            site_input.context.detach()
            site_input.traced.detach()
            delattr(block.get_submodule(parent), attribute)
        if plan.residual_rotation is not None:
            rotate_residual(block, block_plan.graph, plan.residual_rotation, inverse=True)
        if plan.attention is not None:
            attention = block.get_submodule(block_plan.attention)
            stop_quantizing_attention(attention, text_config(model))
        restore_block(block, stock.get_submodule(name))
        block.to(dtype)
    stop_rotating(model)
    for name in plan.towers:
        model.set_submodule(name, _dense(model.get_submodule(name), dtype))
    if plan.tables:
        _dequantize_tables(model, plan, dtype)


def _dequantize_tables(model: PreTrainedModel, plan: Plan, dtype: torch.dtype) -> None:
    """Replace the 8-bit embedding and head by float modules."""
    quantized = model.get_submodule(plan.parts.embedding)
    assert isinstance(quantized, QuantizedEmbedding)
    weight = quantized.quantized_weight().dequantize(dtype)
    embedding = nn.Embedding.from_pretrained(weight)
    model.set_submodule(plan.parts.embedding, embedding)
    if plan.parts.head is None:
        return
    head = model.get_submodule(plan.parts.head)
    if isinstance(head, QuantizedLinear):
        stock = _dense(head, dtype)
    else:
        with torch.device("meta"):
            stock = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        stock.weight = embedding.weight
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
