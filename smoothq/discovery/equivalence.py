"""Tests of a family's wiring: a transform that it allows must not change a model's logits.

They run on a tiny model of the family with random weights, in float64 throughout. Norms of
transformers, and the softmax of some families, ask for float32 even there; `InFloat64` overrides
that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from ..architectures import (
    BlockGraph,
    Edge,
    Family,
    Norm,
    Site,
    WeightRef,
)
from ..architectures.graph import (
    final_output,
    is_tied,
    norm_offset,
    takes_rotation,
    text_config,
)
from ..architectures.linearize import linearize_block
from ..modules import rotate_ends
from ..transforms.hadamard import Hadamard
from ..transforms.norm_fusion import fuse_norms
from ..transforms.rotation import (
    head_fold,
    rotate_entry,
    rotate_input,
    rotate_residual,
    rotate_value_output,
)
from ..transforms.smoothing import smooth

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}  # of a logit, as a share of the largest

Rewrite = Callable[[PreTrainedModel, Family], None]
Chosen = Callable[[int, Site], bool]  # (number of a block, site of it) → whether it is rewritten


def every_site(_index: int, _site: Site) -> bool:
    """Choose all sites of all blocks."""
    return True


class InFloat64(TorchFunctionMode):
    """A context in which torch functions that are asked for float32 compute in float64."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call `func` with float64 in place of float32 in its arguments."""
        if func is Tensor.float:
            func = Tensor.double
        args = tuple(torch.float64 if value is torch.float32 else value for value in args)
        widened = {
            name: torch.float64 if value is torch.float32 else value
            for name, value in (kwargs or {}).items()
        }
        return func(*args, **widened)


def logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """What `final_output` says of a model; all in float64 for a float64 model.

    Args:
        model: any class of model around a decoder.
        tokens: int64 (batch, length).
    """
    with torch.no_grad():
        # Not the model's dtype, which may be that of a tower beside the decoder.
        embedding: Any = model.get_input_embeddings()
        if embedding.weight.dtype != torch.float64:
            return final_output(model, tokens, use_cache=False)
        with InFloat64():
            return final_output(model, tokens, use_cache=False)


def deviation(logits_now: Tensor, logits_before: Tensor) -> float:
    """The largest change of a logit, as a share of the largest logit before."""
    return float((logits_now - logits_before).abs().max() / logits_before.abs().max())


def graphs(model: PreTrainedModel, family: Family) -> Iterator[tuple[nn.Module, BlockGraph]]:
    """Every block of a model, linearized, with its graph."""
    layers = model.get_submodule(family.parts(model).layers)
    config = text_config(model)
    for index, block in enumerate(layers.children()):
        yield block, family.graph(config, index, block)


def open_blocks(model: PreTrainedModel, family: Family) -> None:
    """Linearize every block of a model, in place (`linearize_block`)."""
    for block in model.get_submodule(family.parts(model).layers).children():
        linearize_block(block)


def fuse(model: PreTrainedModel, family: Family) -> None:
    """Fold norms into the weights that read them, in every block."""
    for block, graph in graphs(model, family):
        fuse_norms(block, graph)


def rotate_stream(model: PreTrainedModel, family: Family) -> None:
    """Fuse norms and rotate the residual stream (R1), with online rotations at both ends."""
    rotate_ends(model, family.parts(model), _rotate_blocks(model, family))


def rotate_stream_offline(model: PreTrainedModel, family: Family) -> None:
    """Fuse norms and rotate the residual stream (R1), folded into embeddings and an untied head.

    As in checkpoints that are exported for other engines.
    """
    parts = family.parts(model)
    assert parts.head is not None
    if is_tied(model):
        weight = model.get_submodule(parts.head).get_parameter("weight")
        untied = nn.Parameter(weight.clone(), requires_grad=False)
        model.get_submodule(parts.head).register_parameter("weight", untied)
    rotation = _rotate_blocks(model, family)
    rotate_entry(model, parts, rotation)
    offset = norm_offset(graph for _, graph in graphs(model, family))
    fold = head_fold(model, parts, rotation, offset)
    fold(WeightRef(f"{parts.head}.weight").view(model))


def _rotate_blocks(model: PreTrainedModel, family: Family) -> Hadamard:
    fuse(model, family)
    rotation = Hadamard.of(text_config(model).hidden_size, 5, family.centred)
    for block, graph in graphs(model, family):
        rotate_residual(block, graph, rotation)
    return rotation


def rotate_values(model: PreTrainedModel, family: Family, chosen: Chosen = every_site) -> None:
    """Rotate attention values (R2) in every block."""
    for index, (block, graph) in enumerate(graphs(model, family)):
        site = graph.turned_values
        if site is not None and site.heads is not None and chosen(index, site):
            rotate_value_output(block, site, Hadamard.of(site.heads.dim, index))


def rotate_inputs(model: PreTrainedModel, family: Family, chosen: Chosen = every_site) -> None:
    """Rotate inputs online, by hooks: inside MLPs, and inputs that R1 cannot rotate offline."""
    wiring = list(graphs(model, family))
    rotatable = takes_rotation([graph for _, graph in wiring])
    for index, (block, graph) in enumerate(wiring):
        for site in graph.sites:
            online = site.reads == "mlp" or (site.reads == "residual" and not rotatable)
            if online and site.readers and chosen(index, site):
                rotation = Hadamard.of(site.readers[0].view(block).shape[1], 7)
                for reader in site.readers:
                    rotate_input(reader.view(block), rotation)
                for module in site.modules:
                    block.get_submodule(module).register_forward_pre_hook(_rotating(rotation))


def smoothing(*edges: Edge, chosen: Chosen = every_site) -> Rewrite:
    """A rewrite that smooths some kinds of edges with random maxima, mostly in 0.1 … 10."""

    def rewrite(model: PreTrainedModel, family: Family) -> None:
        generator = torch.Generator().manual_seed(3)
        for index, (block, graph) in enumerate(graphs(model, family)):
            for site in graph.sites:
                if site.edge in edges and site.readers and chosen(index, site):
                    width = site.readers[0].view(block).shape[1]
                    spread = torch.randn(width, generator=generator, dtype=torch.float64)
                    smooth(block, site, torch.exp(spread), alpha=0.5)

    return rewrite


def everything(model: PreTrainedModel, family: Family) -> None:
    """Apply every transform that the family's graphs allow, in the pipeline's order."""
    claimed = claims(model, family)
    if rotate_stream in claimed.values():
        rotate_stream(model, family)
    smoothing("norms", "up_down", "value_output")(model, family)
    rotate_values(model, family)
    rotate_inputs(model, family)


def claims(model: PreTrainedModel, family: Family) -> dict[str, Rewrite]:
    """The transforms that a family's graphs allow on a linearized model, by name."""
    wiring = [graph for _, graph in graphs(model, family)]
    sites = [site for graph in wiring for site in graph.sites]
    edges = {site.edge for site in sites}
    possible: dict[str, tuple[Rewrite, bool]] = {
        "norm fusion": (fuse, any(isinstance(site.producer, Norm) for site in sites)),
        "stream rotation": (rotate_stream, takes_rotation(wiring)),
        "stream rotation, folded": (
            rotate_stream_offline,
            takes_rotation(wiring) and family.folds_offline(model),
        ),
        "value rotation": (rotate_values, any(graph.turned_values for graph in wiring)),
        "input rotation": (rotate_inputs, True),
        "smoothing of norms": (smoothing("norms"), "norms" in edges),
        "smoothing of up_down": (smoothing("up_down"), "up_down" in edges),
        "smoothing of value_output": (smoothing("value_output"), "value_output" in edges),
    }
    return {name: rewrite for name, (rewrite, claimed) in possible.items() if claimed}


def _rotating(rotation: Hadamard) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    return lambda module, args: (rotation.apply(args[0]), *args[1:])
