"""Discovery of the wiring of a model type without a registered family.

Experiments run on a tiny model, built from the same config with small widths and random weights.
Their result is a Python file like those in `architectures.families`. It is used once every
transform that it allows has been tested on the tiny model (see `equivalence`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ..architectures import BlockGraph, Family
from ..architectures.graph import decoder_of, final_output, text_config
from ..architectures.linearize import linearize_block
from ..checkpoint.model_class import class_of
from ..checkpoint.skeleton import empty_model, fill
from ..compat import build_model, use_eager_experts
from ..errors import UnsupportedModelError
from ..transforms.hadamard import Hadamard
from ..transforms.rotation import rotate_input
from . import equivalence as equivalence
from .experiments import (
    EXACT,
    EXPERT_COUNTS,
    TINY_EXPERTS,
    TINY_WIDTHS,
    BlockExperiments,
    Call,
    NormFacts,
    Unexplained,
    keep,
    own_weight,
    restored,
    text,
)
from .weight_watch import read_weights

TOKENS = torch.tensor(
    [[3, 1, 4, 15, 9, 2, 6, 5, 35, 8, 9, 7], [2, 7, 18, 28, 1, 8, 2, 8, 4, 5, 9, 0]], device="cpu"
)
_HEADS, _HEAD_DIM, _HIDDEN, _VOCABULARY = 4, 16, 64, 64
_LARGEST = 20_000_000  # parameters of a tiny model


_families: dict[str, tuple[Family, str]] = {}  # by the config, as JSON


def discover_family(config: PretrainedConfig) -> tuple[Family, str]:
    """The family of a causal LM, found by experiments, and its file's Python source.

    Args:
        config: of the real model; results are cached by it.

    Raises:
        UnsupportedModelError: a part of the wiring cannot be explained; says which.
    """
    key = config.to_json_string(use_diff=False)
    if key not in _families:
        _families[key] = _infer(config)
    return _families[key]


def _infer(config: PretrainedConfig) -> tuple[Family, str]:
    name = config.get_text_config(decoder=True).model_type
    try:
        return _experiment(config, name)
    except UnsupportedModelError:
        raise
    except Exception as error:  # the model's own code may raise anything
        raise UnsupportedModelError(
            f"architecture '{name}' has no file, and the experiments that look for its wiring "
            f"failed: {type(error).__name__}: {error}"
        ) from error


def prove_family(family: Family, config: PretrainedConfig) -> dict[str, float]:
    """Test every transform that a family's graphs allow, on a tiny float64 model.

    Args:
        family: whose wiring is tested.
        config: of the real model; the tiny one has small widths and random weights.

    Returns:
        Name of the transform → largest change of a logit, as a share of the largest logit.

    Raises:
        UnsupportedModelError: a transform changes logits by more than 1e-9 of the largest.
    """
    with torch.no_grad():
        model = example(config, _kinds_of_blocks(config))
        return _prove(model, family, f"the wiring given for '{config.model_type}'")


def example(config: PretrainedConfig, kinds: list[int]) -> PreTrainedModel:
    """A tiny float64 model with every kind of block that the real one has.

    Raises whatever the model's own code raises for small widths.

    Args:
        config: of the real model.
        kinds: of the real model's blocks, by `kinds_of`.
    """
    last = max(kinds.index(kind) for kind in set(kinds))
    return _tiny_model(config, max(2, last + 1))


def _experiment(config: PretrainedConfig, name: str) -> tuple[Family, str]:
    kinds = _kinds_of_blocks(config)
    with torch.no_grad():
        model = example(config, kinds)
        read = read_weights(model, TOKENS)
        try:
            return _proven(model, kinds, read, False, name)
        except UnsupportedModelError:
            if not read:
                raise
        return _proven(model, kinds, read, True, name)


def _proven(
    model: PreTrainedModel, kinds: list[int], read: frozenset[str], cautious: bool, name: str
) -> tuple[Family, str]:
    """The family that the experiments find, once it passes the tests, and its source."""
    try:
        with equivalence.InFloat64():
            written = _Writer(model, kinds, read, cautious).file()
    except Unexplained as error:
        raise _unexplained(model, str(error)) from error
    family = _load(written)
    _prove(model, family, f"architecture '{name}' has no file, and the wiring found for it")
    return family, written


def _load(written: str) -> Family:
    """The FAMILY of a file's Python source."""
    namespace: dict[str, Any] = {"__package__": "smoothq.architectures", "__name__": "inferred"}
    exec(compile(written, "inferred family", "exec"), namespace)
    family: Family = namespace["FAMILY"]
    values = {field.name: getattr(family, field.name) for field in fields(family)}
    return InferredFamily(**values, written=written)


@dataclass(frozen=True)
class InferredFamily(Family):
    """A family that was found by experiments.

    Attributes:
        written: the Python source of its file.
    """

    written: str = ""

    def __reduce__(self) -> tuple[Any, ...]:
        """What pickle stores: the source, for its functions belong to no importable module."""
        return _load, (self.written,)


def _prove(model: PreTrainedModel, family: Family, wiring: str) -> dict[str, float]:
    """The change of the tiny model's logits by every transform, as `prove_family` returns it.

    wiring: names what is tested, for the message of UnsupportedModelError.
    """
    family = _without_read(family, read_weights(model, TOKENS))
    changes = {}
    before = equivalence.logits(model, TOKENS)
    opened = copy.deepcopy(model)
    equivalence.open_blocks(opened, family)
    rewrites = equivalence.claims(opened, family) | {
        "all transforms together": equivalence.everything
    }
    for claim, rewrite in rewrites.items():
        tried = copy.deepcopy(opened)
        rewrite(tried, family)
        changes[claim] = equivalence.deviation(equivalence.logits(tried, TOKENS), before)
        if not changes[claim] <= EXACT:
            raise UnsupportedModelError(
                f"{wiring} is wrong: {claim} changes the logits of a tiny model by "
                f"{changes[claim]:.1e}"
            )
    return changes


def _without_read(family: Family, read: frozenset[str]) -> Family:
    """A family whose graphs leave modules in float whose weights the model's own code reads."""

    def block(config: PretrainedConfig, index: int) -> BlockGraph:
        within = f".{family.layers}.{index}."
        names = {f".{name}".partition(within)[2] for name in read}
        return family.block(config, index).keeping(lambda module: module in names)

    return replace(family, block=block) if read else family


def _kinds_of_blocks(config: PretrainedConfig) -> list[int]:
    """The kind of each block of the real model, as `kinds_of`."""
    try:
        model = empty_model(config)
    except ValueError as error:
        raise UnsupportedModelError(
            f"'{config.model_type}' is no causal LM that transformers knows: "
            f"{str(error).splitlines()[0]}"
        ) from error
    return kinds_of(_layers(model)[1])


def kinds_of(blocks: nn.ModuleList) -> list[int]:
    """The kind of each block: a number from 0, equal for blocks with the same parameter names."""
    seen: dict[tuple[str, ...], int] = {}
    signatures = [tuple(name for name, _ in block.named_parameters()) for block in blocks]
    return [seen.setdefault(signature, len(seen)) for signature in signatures]


def _layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The name of the list of blocks within the decoder, and the list."""
    count = text_config(model).num_hidden_layers
    stacks = [
        (name, module)
        for name, module in decoder_of(model).named_children()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if len(stacks) != 1:
        raise _unexplained(model, f"{len(stacks)} lists of {count} blocks in its decoder")
    return stacks[0]


def _unexplained(model: PreTrainedModel, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"architecture '{text_config(model).model_type}' has no file, and its wiring cannot be "
        f"found: {what}"
    )


def _tiny_model(config: PretrainedConfig, layers: int) -> PreTrainedModel:
    """A float64 model of the same wiring with small widths and random weights."""
    tiny = copy.deepcopy(config)
    tiny.dtype = torch.float64
    if hasattr(tiny, "quantization_config"):
        del tiny.quantization_config
    decoder = tiny.get_text_config(decoder=True)
    _shrink(decoder, layers)
    empty = empty_model(tiny)
    towers = _towers(empty)
    whole = sum(parameter.numel() for parameter in empty.parameters())
    numbers = whole - sum(parameter.numel() for parameter in towers.values())
    if numbers > _LARGEST:
        raise UnsupportedModelError(
            f"architecture '{decoder.model_type}' has no file, and no small model of its wiring "
            f"can be made: with the widths that are known it still has {numbers:,} parameters"
        )
    model: Any = empty
    if whole <= _LARGEST:
        model = build_model(class_of(tiny), tiny)
    else:
        fill(model, without=towers)
    model.to(torch.float64).eval()
    use_eager_experts(model)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if parameter.dim() == 1:
            parameter.copy_(0.8 + 0.2 * noise)
        else:
            parameter.copy_(noise * parameter.shape[-1] ** -0.5)
    tiny_model: PreTrainedModel = model
    return tiny_model


def _towers(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """The parameters of a model outside of decoder, embedding and head, which text never meets."""
    ends = (decoder_of(model), model.get_input_embeddings(), model.get_output_embeddings())
    text = {id(p) for module in ends if module is not None for p in module.parameters()}
    return {name: p for name, p in model.named_parameters() if id(p) not in text}


def _shrink(decoder: PretrainedConfig, layers: int) -> None:
    """Set the widths and counts of a decoder's config to small ones, in place."""
    real_heads = decoder.num_attention_heads
    changes: dict[str, Any] = {
        "num_hidden_layers": layers,
        "hidden_size": _HIDDEN,
        "num_attention_heads": _HEADS,
        "head_dim": _HEAD_DIM,
        "word_embed_proj_dim": _HIDDEN,
        "vocab_size": _VOCABULARY,
        "rotary_dim": _HEAD_DIM,
        **dict.fromkeys(EXPERT_COUNTS, TINY_EXPERTS),
        **TINY_WIDTHS,
    }
    rope = getattr(decoder, "rope_parameters", None)
    real_dim = getattr(decoder, "head_dim", None) or decoder.hidden_size // real_heads
    if isinstance(rope, dict) and rope.get("mrope_section"):
        decoder.rope_parameters = rope | {
            "mrope_section": _scaled(rope["mrope_section"], _HEAD_DIM / real_dim)
        }
    shared = {real_heads: _HEADS, 1: 1}
    for counted in ("num_key_value_heads", "num_kv_heads"):
        if isinstance(getattr(decoder, counted, None), int):
            changes[counted] = shared.get(getattr(decoder, counted), _HEADS // 2)
    for key, value in changes.items():
        settable = not isinstance(getattr(type(decoder), key, None), property)
        if settable and getattr(decoder, key, None) is not None:
            setattr(decoder, key, value)
    if (getattr(decoder, "pad_token_id", None) or 0) >= _VOCABULARY:
        decoder.pad_token_id = 0
    if getattr(decoder, "num_experts_per_tok", None):
        decoder.num_experts_per_tok = min(decoder.num_experts_per_tok, 2)
    if getattr(decoder, "layer_types", None):
        decoder.layer_types = decoder.layer_types[:layers]


def _scaled(sections: Sequence[int], ratio: float) -> list[int]:
    """Sections of rotary channels times a ratio, rounded so that their sum is too."""
    scaled = [int(section * ratio) for section in sections]
    for index in range(round(sum(sections) * ratio) - sum(scaled)):
        scaled[index % len(scaled)] += 1
    return scaled


class _Writer:
    """Writes the Python source of a family from experiments on a tiny model."""

    def __init__(
        self, model: PreTrainedModel, kinds: list[int], read: frozenset[str], cautious: bool
    ) -> None:
        """Run the model once and prepare experiments on its blocks.

        Args:
            model: the tiny model.
            kinds: of the real model's blocks.
            read: as of `BlockExperiments`, by full names.
            cautious: as of `BlockExperiments`.
        """
        self.model, self.kinds = model, kinds
        self._read, self._cautious = read, cautious
        self.config = text_config(model)
        self.attribute, self.layers = _layers(model)
        self.blocks: list[BlockExperiments] = []
        self.ends: list[Call] = []
        self._record()

    def _record(self) -> None:
        """Run the model once and record the arguments of blocks, and calls around the blocks."""
        opened = copy.deepcopy(self.layers)
        with ExitStack() as hooks:
            for name, child in decoder_of(self.model).named_children():
                if child is not self.layers and isinstance(own_weight(child), Tensor):
                    hooks.enter_context(child.register_forward_hook(keep(self.ends, name)))
            for index, (layer, copied) in enumerate(zip(self.layers, opened, strict=True)):
                linearize_block(copied)
                within = f".{self.attribute}.{index}."
                read = {f".{name}".partition(within)[2] for name in self._read}
                entering = self._entering(copied, read)
                hooks.enter_context(layer.register_forward_pre_hook(entering, with_kwargs=True))
            final_output(self.model, TOKENS, use_cache=False)

    def _entering(self, opened: nn.Module, read: set[str]) -> Callable[..., None]:
        def embed_tokens(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self.blocks:
                self.before_blocks = len(self.ends)
            self.blocks.append(
                BlockExperiments(
                    self.config, opened, args[0].clone(), args[1:], kwargs, read, self._cautious
                )
            )

        return embed_tokens

    def file(self) -> str:
        """Run the experiments and return the file's Python source. Raises Unexplained."""
        firsts = [self.kinds.index(kind) for kind in sorted(set(self.kinds))]
        wirings = [self.blocks[first] for first in firsts]
        for block in wirings:
            block.find()
        rotatable = all(block.writes_stream for block in wirings)
        final = self._final_norm()
        centred = {norm.centred for block in wirings for norm in block.stream_norms} | {
            NormFacts.of(final).centred
        }
        rotatable = rotatable and len(centred) == 1
        bodies = "\n\n".join(
            f"def _kind_{kind}(config: PretrainedConfig) -> BlockGraph:\n{block.body(rotatable)}"
            for kind, block in enumerate(wirings)
        )
        return _FILE.format(
            model_type=self.config.model_type,
            bodies=bodies,
            choice=self._choice(),
            fields="".join(f", {field}" for field in self._fields(final, centred == {True})),
        )

    def _choice(self) -> str:
        lines = []
        for kind in sorted(set(self.kinds) - {0}):
            indices = {index for index, other in enumerate(self.kinds) if other == kind}
            lines.append(f"    if index in {indices}:\n        return _kind_{kind}(config)\n")
        return "".join(lines) + "    return _kind_0(config)"

    def _final_norm(self) -> Call:
        after = [
            call for call in self.ends[self.before_blocks :] if own_weight(call.module).dim() == 1
        ]
        if len(after) != 1:
            raise Unexplained(f"{len(after)} norms behind its blocks")
        return after[0]

    def _fields(self, final: Call, centred: bool) -> Iterator[str]:
        yield f"layers={text(self.attribute)}"
        yield f"final_norm={text(final.name)}"
        embedding = self.model.get_input_embeddings()
        tables: list[Any] = [embedding]
        for call in self.ends[: self.before_blocks]:
            if call.module is embedding:
                continue
            if isinstance(call.module, nn.Embedding):
                tables.append(call.module)
                yield f"positions={text(call.name)}"
            elif own_weight(call.module).dim() == 1:
                yield f"entry_norm={text(call.name)}"
            else:
                raise Unexplained(f"'{call.name}' before its blocks")
        if not self._sums_at_entry([table.weight for table in tables]):
            yield "sums_at_entry=False"
        if centred:
            yield "centred=True"
        if self.blocks[0].returns_tuple:
            yield "returns_tuple=True"
        if any(block.flattens for block in self.blocks):
            yield "flattens=True"

    def _sums_at_entry(self, tables: list[Tensor]) -> bool:
        """Whether rotating the rows of embeddings rotates what enters the first block."""
        rotation = Hadamard.of(self.config.hidden_size, seed=0)
        entering: list[Tensor] = []
        hook = self.layers[0].register_forward_pre_hook(lambda _, args: entering.append(args[0]))
        with hook, restored(tables):
            for table in tables:
                rotate_input(table, rotation)
            final_output(self.model, TOKENS, use_cache=False)
        return equivalence.deviation(entering[0], rotation.apply(self.blocks[0].hidden)) <= EXACT


_FILE = '''"""{model_type}: wiring found by experiments on a tiny model."""

from dataclasses import replace

from transformers import PretrainedConfig

from .graph import BlockGraph, Family, Norm, Rows, Site, WeightRef, attention_heads
from .parts import concatenated_values, experts, interleaved_values, weights, writers


{bodies}

def _block(config: PretrainedConfig, index: int) -> BlockGraph:
{choice}


FAMILY = Family(("{model_type}",), _block{fields})
'''
