"""What is known of a model before any recipe: family, wiring of its blocks, shapes of tensors."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ..architectures import BlockGraph, Family, Parts, family_of
from ..architectures.graph import is_tied, takes_rotation, text_config
from ..architectures.linearize import linearize_block
from ..checkpoint.model_class import config_naming_class
from ..checkpoint.weight_files import Spec
from ..compat import tied_weights
from ..discovery.infer import discover_family
from ..discovery.weight_reads import weights_read

log = logging.getLogger("smoothq")


@dataclass(frozen=True)
class Wiring:
    """A float model as `make_plan` sees it, whatever the recipe. It holds no weights.

    Attributes:
        model_class: the model's class.
        config: the config of its decoder.
        family: its architecture.
        parts: the full names of its decoder, layers, embedding, head and norms.
        layers: every block, linearized, on the meta device. Equal blocks are one object, as are
            equal graphs, for those of a block with many experts are large.
        graphs: the wiring of every block.
        linears: the full names of the linears that a recipe may quantize, of head and embedding.
        towers: the full names of the linears of vision and audio towers and their projections.
        read: those of `linears` whose weights the model's own code reads. Empty for a quantized
            checkpoint, whose recipe keeps them already, so that it is not traced again.
        tensors: shape and dtype of its parameters and persistent buffers by full name; of tied
            tensors one.
        dtype: the dtype of most of its float parameters.
        tied: whether its head is tied to the embedding.
        embedding_class: the class of its embedding.
    """

    model_class: type[PreTrainedModel]
    config: PretrainedConfig
    family: Family
    parts: Parts
    layers: tuple[nn.Module, ...]
    graphs: tuple[BlockGraph, ...]
    linears: tuple[str, ...]
    towers: tuple[str, ...]
    read: tuple[str, ...]
    tensors: dict[str, Spec]
    dtype: torch.dtype
    tied: bool
    embedding_class: type[nn.Module]

    @classmethod
    def of(cls, model: PreTrainedModel) -> Wiring:
        """The wiring of a float model; it may be on the meta device, as only shapes are read.

        Raises:
            UnsupportedModelError: the model cannot be quantized.
        """
        config = text_config(model)
        family = family_of(config) or _discovered(model)
        parts = family.parts(model)
        layers = _linearized(model.get_submodule(parts.layers))
        graphs = _graphs(family, config, layers)
        linears = (
            *(
                f"{parts.block_name(index)}.{module}"
                for index, graph in enumerate(graphs)
                for site in graph.sites
                for module in site.modules
            ),
            *([] if parts.head is None else [parts.head]),
            parts.embedding,
        )
        quantized = getattr(model.config, "quantization_config", None) is not None
        return cls(
            model_class=type(model),
            config=config,
            family=family,
            parts=parts,
            layers=layers,
            graphs=graphs,
            linears=linears,
            towers=tuple(_tower_linears(model, parts)),
            read=() if quantized else tuple(filter(weights_read(model, parts), linears)),
            tensors={
                name: Spec(tuple(tensor.shape), tensor.dtype)
                for name, tensor in stored_tensors(model, parts.layers).items()
            },
            dtype=_float_dtype(model),
            tied=is_tied(model),
            embedding_class=type(model.get_submodule(parts.embedding)),
        )

    @property
    def rotatable(self) -> bool:
        """Whether a rotation of the residual stream can be folded into all blocks."""
        return takes_rotation(self.graphs)

    @property
    def head_dim(self) -> int:
        """Channels of a head, by the shapes of the first value projection."""
        sites = (graph.value_output for graph in self.graphs)
        return next(site.heads.dim for site in sites if site is not None and site.heads)

    @property
    def float_matrices(self) -> list[str]:
        """The full names of modules with a matrix outside of the text model, as in its towers."""
        decoder = f"{self.parts.decoder}." if self.parts.decoder else ""
        return [
            name.removesuffix(".weight")
            for name, spec in self.tensors.items()
            if name.endswith(".weight") and len(spec.shape) == 2 and not name.startswith(decoder)
        ]

    @property
    def tower_elements(self) -> int:
        """Numbers in the tensors outside of the text model."""
        ends = tuple(f"{name}." for name in (self.parts.decoder, *self.parts.ends))
        outside = (spec for name, spec in self.tensors.items() if not name.startswith(ends))
        return sum(spec.elements for spec in outside)

    @property
    def nbytes(self) -> int:
        """Bytes of the model's checkpoint."""
        return sum(spec.nbytes for spec in self.tensors.values())


def stored_tensors(model: PreTrainedModel, blocks: str | None = None) -> dict[str, Tensor]:
    """A model's parameters and persistent buffers by full name; tied tensors appear once.

    Args:
        model: on any device.
        blocks: the name of its list of blocks, whose tensors are listed even if they are tied: a
            quantized checkpoint has all of every block.
    """
    tied = {name for name in tied_weights(model) if not name.startswith(f"{blocks}.")}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def _tower_linears(model: PreTrainedModel, parts: Parts) -> Iterator[str]:
    """Yield the linears outside of the decoder of a model that has other parts than text.

    Not those of a subclass, whose weight another module reads, nor heads beside the model.
    """
    if text_config(model) is model.config:
        return
    for name, module in model.named_modules():
        inside = name.startswith(f"{parts.decoder}.") or name in parts.ends or "." not in name
        if type(module) is nn.Linear and not inside:
            yield name


def _discovered(model: PreTrainedModel) -> Family:
    """The discovered family of a model without an architecture file; logs a warning."""
    family, _ = discover_family(config_naming_class(model))
    log.warning(
        "architecture '%s' has no file: its wiring was found by experiments on a tiny model and "
        "proven there; smoothq models MODEL shows it",
        text_config(model).model_type,
    )
    return family


def _linearized(layers: nn.Module) -> tuple[nn.Module, ...]:
    """Every block, linearized, on the meta device; blocks of equal modules and shapes share one."""
    forms: dict[object, nn.Module] = {}

    def linearized(layer: nn.Module) -> nn.Module:
        modules = tuple((name, type(module)) for name, module in layer.named_modules())
        tensors = layer.state_dict().items()
        shapes = tuple((name, tensor.shape, tensor.dtype) for name, tensor in tensors)
        if (modules, shapes) not in forms:
            form = copy.deepcopy(layer).to("meta")
            linearize_block(form)
            forms[modules, shapes] = form
        return forms[modules, shapes]

    return tuple(map(linearized, layers.children()))


def _graphs(
    family: Family, config: PretrainedConfig, layers: tuple[nn.Module, ...]
) -> tuple[BlockGraph, ...]:
    """The wiring of every block; equal blocks share one object."""
    known: list[tuple[nn.Module, BlockGraph, BlockGraph]] = []
    graphs = []
    for index, layer in enumerate(layers):
        stock = family.block(config, index)
        same = (graph for form, other, graph in known if form is layer and other == stock)
        graph = next(same, None)
        if graph is None:
            graph = family.graph(config, index, layer)
            known.append((layer, stock, graph))
        graphs.append(graph)
    return tuple(graphs)


def _float_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of most of a model's float parameters."""
    elements: Counter[torch.dtype] = Counter()
    for parameter in model.parameters():
        if parameter.is_floating_point():
            elements[parameter.dtype] += parameter.numel()
    return elements.most_common(1)[0][0]
