"""A family that has no file: its wiring found by experiments on a tiny random model of it.

The tiny model is made from the same config with small widths. In each of its blocks, opened into
linears: what reads one tensor is a site; a norm whose output it is can absorb a divisor; rows of an
earlier matrix can, if scaling them scales the site's channels and nothing else (`_producer`);
a matrix writes the residual stream if a constant added to its output arrives there (`_writes`).
What is found is written down as the file that one would write by hand, and that file is used,
once every transform that it claims has left the tiny model's logits as they were (`proof`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from . import proof
from .architectures import Family, Heads
from .architectures.graph import attention_heads, text_config
from .architectures.layout import EXPERT_MATRICES, SeparateExperts, open_block
from .errors import UnsupportedModelError
from .transforms.smoothing import repeat_over_queries

TOKENS = torch.tensor(
    [[3, 1, 4, 15, 9, 2, 6, 5, 35, 8, 9, 7], [2, 7, 18, 28, 1, 8, 2, 8, 4, 5, 9, 0]]
)
EXACT = 1e-9  # relative; what an experiment may deviate in float64
_HEADS, _HEAD_DIM, _HIDDEN, _EXPERTS, _VOCABULARY = 4, 16, 64, 4, 64
_LARGEST = 20_000_000  # parameters of a tiny model
_WIDTHS = {
    "intermediate_size": 80,
    "ffn_dim": 80,
    "ffn_hidden_size": 80,
    "n_inner": 80,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 96,
}
_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_UP_ROWS: dict[
    str, Callable[[int], slice]
] = {  # layouts of up in a matrix of N rows, as they stand in a file
    "": lambda rows: slice(None),
    "slice({width}, None)": lambda rows: slice(rows // 2, None),
    "slice(0, {width})": lambda rows: slice(0, rows // 2),
    "slice(1, None, 2)": lambda rows: slice(1, None, 2),
    "slice(0, None, 2)": lambda rows: slice(0, None, 2),
}


@dataclass
class _Site:
    """A site as found. The texts are Python: what stands in the file."""

    modules: list[str]
    floats: list[str] = field(default_factory=list)
    norm: str | None = None
    reads: str = "inner"
    producer: str = "None"
    experts: str | None = None

    @property
    def name(self) -> str:
        """A name made of the modules' own."""
        if self.experts is not None:
            return "experts"
        leaves = [module.rpartition(".")[2].removesuffix("_proj") for module in self.modules]
        return "_".join(dict.fromkeys(leaves))


@dataclass(frozen=True)
class _Call:
    """One call of a module that has a weight: its name, and tensors in and out."""

    name: str
    module: nn.Module
    input: Tensor
    output: Tensor

    @property
    def key(self) -> tuple[int, int]:
        """The same for all who are given one tensor, in whatever shape."""
        return self.input.data_ptr(), self.input.numel()


_found: dict[str, tuple[Family, str]] = {}


def infer_family(config: PretrainedConfig) -> tuple[Family, str]:
    """The family of a causal LM's config, and the file that describes it.

    Raises UnsupportedModelError naming what could not be explained.
    """
    key = config.to_json_string(use_diff=False)
    if key not in _found:
        _found[key] = _infer(config)
    return _found[key]


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


def _experiment(config: PretrainedConfig, name: str) -> tuple[Family, str]:
    kinds = _kinds_of_blocks(config)
    last = max(kinds.index(kind) for kind in set(kinds))
    with torch.no_grad():
        model = _tiny_model(config, max(2, last + 1))
        with proof.InFloat64():
            text = _Writer(model, kinds).file()
        family = _load(text)
        _prove(model, family, name)
    return family, text


def _load(text: str) -> Family:
    """The FAMILY of a file's text."""
    namespace: dict[str, Any] = {"__package__": "smoothq.architectures", "__name__": "inferred"}
    exec(compile(text, "inferred family", "exec"), namespace)
    family: Family = namespace["FAMILY"]
    return family


def _prove(model: PreTrainedModel, family: Family, name: str) -> None:
    """Raise UnsupportedModelError unless every transform keeps the tiny model's logits."""
    before = proof.logits(model, TOKENS)
    opened = copy.deepcopy(model)
    proof.open_blocks(opened, family)
    rewrites = proof.claims(opened, family) | {"all transforms together": proof.everything}
    for claim, rewrite in rewrites.items():
        tried = copy.deepcopy(opened)
        rewrite(tried, family)
        change = proof.deviation(proof.logits(tried, TOKENS), before)
        if not change <= EXACT:
            raise UnsupportedModelError(
                f"architecture '{name}' has no file, and the wiring found for it is wrong: "
                f"{claim} changes the logits of a tiny model by {change:.1e}"
            )


def _kinds_of_blocks(config: PretrainedConfig) -> list[int]:
    """For each block of the real model a number; the same for blocks with the same parameters."""
    try:
        model = _skeleton(config)
    except ValueError as error:
        raise UnsupportedModelError(
            f"'{config.model_type}' is no causal LM that transformers knows: "
            f"{str(error).splitlines()[0]}"
        ) from error
    seen: dict[tuple[str, ...], int] = {}
    blocks = _layers(model)[1]
    signatures = [tuple(name for name, _ in block.named_parameters()) for block in blocks]
    return [seen.setdefault(signature, len(seen)) for signature in signatures]


def _skeleton(config: PretrainedConfig) -> PreTrainedModel:
    """A model without its weights."""
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    return model


def _layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The stack of blocks, and its name within the decoder."""
    count = text_config(model).num_hidden_layers
    found = [
        (name, module)
        for name, module in model.get_decoder().named_children()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if len(found) != 1:
        raise _unexplained(model, f"{len(found)} lists of {count} blocks in its decoder")
    return found[0]


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
    text = tiny.get_text_config(decoder=True)
    real_heads = text.num_attention_heads
    changes: dict[str, Any] = {
        "num_hidden_layers": layers,
        "hidden_size": _HIDDEN,
        "num_attention_heads": _HEADS,
        "head_dim": _HEAD_DIM,
        "word_embed_proj_dim": _HIDDEN,
        "vocab_size": _VOCABULARY,
        "rotary_dim": _HEAD_DIM,
        **dict.fromkeys(_EXPERT_COUNTS, _EXPERTS),
        **_WIDTHS,
    }
    shared = {real_heads: _HEADS, 1: 1}
    for counted in ("num_key_value_heads", "num_kv_heads"):
        if isinstance(getattr(text, counted, None), int):
            changes[counted] = shared.get(getattr(text, counted), _HEADS // 2)
    for key, value in changes.items():
        settable = not isinstance(getattr(type(text), key, None), property)
        if settable and getattr(text, key, None) is not None:
            setattr(text, key, value)
    if (getattr(text, "pad_token_id", None) or 0) >= _VOCABULARY:
        text.pad_token_id = 0
    if getattr(text, "num_experts_per_tok", None):
        text.num_experts_per_tok = min(text.num_experts_per_tok, 2)
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    numbers = sum(parameter.numel() for parameter in _skeleton(tiny).parameters())
    if numbers > _LARGEST:
        raise UnsupportedModelError(
            f"architecture '{text.model_type}' has no file, and no small model of its wiring can "
            f"be made: with the widths that are known it still has {numbers:,} parameters"
        )
    model: Any = AutoModelForCausalLM.from_config(tiny)
    model.to(torch.float64).eval()
    model.set_experts_implementation("eager")
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


class _Writer:
    """Writes a family's file from experiments on a tiny model."""

    def __init__(self, model: PreTrainedModel, kinds: list[int]) -> None:
        self.model, self.kinds = model, kinds
        self.config = text_config(model)
        self.attribute, self.layers = _layers(model)
        self.blocks: list[_Block] = []
        self.ends: list[_Call] = []
        self._record()

    def _record(self) -> None:
        """Run the model once: what each block is called with, what runs before and after them."""
        opened = copy.deepcopy(self.layers)
        handles = []
        for name, child in self.model.get_decoder().named_children():
            if child is not self.layers and isinstance(_weight(child), Tensor):
                handles.append(child.register_forward_hook(_keep(self.ends, name)))
        for layer, copied in zip(self.layers, opened, strict=True):
            open_block(copied)
            entering = self._entering(copied)
            handles.append(layer.register_forward_pre_hook(entering, with_kwargs=True))
        self.model(TOKENS, use_cache=False)
        for handle in handles:
            handle.remove()

    def _entering(self, opened: nn.Module) -> Callable[..., None]:
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self.blocks:
                self.before_blocks = len(self.ends)
            self.blocks.append(_Block(self, opened, args[0].clone(), args[1:], kwargs))

        return enter

    def unexplained(self, what: str) -> UnsupportedModelError:
        """The error that says what could not be explained."""
        return _unexplained(self.model, what)

    def file(self) -> str:
        """The file's text."""
        firsts = [self.kinds.index(kind) for kind in sorted(set(self.kinds))]
        wirings = [self.blocks[first] for first in firsts]
        for block in wirings:
            block.find()
        rotatable = all(block.writes_stream for block in wirings)
        final = self._final_norm()
        centred = {norm.centred for block in wirings for norm in block.stream_norms} | {
            _NormFacts.of(final).centred
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
            indices = {index for index, each in enumerate(self.kinds) if each == kind}
            lines.append(f"    if index in {indices}:\n        return _kind_{kind}(config)\n")
        return "".join(lines) + "    return _kind_0(config)"

    def _final_norm(self) -> _Call:
        after = [
            call for call in self.ends[self.before_blocks :] if _weight(call.module).dim() == 1
        ]
        if len(after) != 1:
            raise self.unexplained(f"{len(after)} norms behind its blocks")
        return after[0]

    def _fields(self, final: _Call, centred: bool) -> Iterator[str]:
        yield f"layers={_text(self.attribute)}"
        yield f"final_norm={_text(final.name)}"
        embedding = self.model.get_input_embeddings()
        for call in self.ends[: self.before_blocks]:
            if call.module is embedding:
                continue
            if isinstance(call.module, nn.Embedding):
                yield f"positions={_text(call.name)}"
            elif _weight(call.module).dim() == 1:
                yield f"entry_norm={_text(call.name)}"
            else:
                raise self.unexplained(f"'{call.name}' before its blocks")
        if centred:
            yield "centred=True"
        if self.blocks[0].returns_tuple:
            yield "returns_tuple=True"
        if any(block.flattens for block in self.blocks):
            yield "flattens=True"


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


def _weight(module: nn.Module) -> Any:
    """A module's own weight, or None."""
    weight = getattr(module, "weight", None)
    return weight.data if isinstance(weight, nn.Parameter) else None


def _keep(calls: list[_Call], name: str) -> Callable[..., None]:
    """A forward hook that keeps what it sees, so that no address is given out twice."""

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        given = args[0] if args and isinstance(args[0], Tensor) else output
        calls.append(_Call(name, module, given, output[0] if isinstance(output, tuple) else output))

    return hook


@dataclass(frozen=True)
class _NormFacts:
    """What a norm does beside multiplying by its weight."""

    offset: int
    centred: bool

    @classmethod
    def of(cls, call: _Call) -> _NormFacts:
        """Try a norm on the input that it had."""
        norm: Any = call.module
        bias, held = getattr(norm, "bias", None), norm.weight.clone()
        norm.weight.zero_()
        silent = norm(call.input) - (bias if isinstance(bias, Tensor) else 0.0)
        norm.weight.copy_(held)
        moved = norm(call.input + 3)
        return cls(int(bool(silent.abs().max() > EXACT)), _same(moved, norm(call.input)))


def _same(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors agree but for float64 rounding."""
    if left.numel() != right.numel():
        return False
    difference = (left.flatten() - right.flatten()).abs().max()
    return bool(difference <= EXACT * right.abs().max().clamp(min=EXACT))


class _Block:
    """One opened tiny block with what it was called with."""

    def __init__(
        self,
        writer: _Writer,
        module: nn.Module,
        hidden: Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        self.writer, self.module, self.hidden = writer, module, hidden
        self._args, self._kwargs = args, kwargs
        self.sites: list[_Site] = []
        self.stream_norms: list[_NormFacts] = []
        self.writes_stream = True
        self.returns_tuple = self.flattens = False

    def run(self) -> tuple[Tensor, list[_Call]]:
        """The block's output, and the calls of all modules that hold a weight."""
        calls: list[_Call] = []
        handles = [
            module.register_forward_hook(_keep(calls, name))
            for name, module in self.module.named_modules()
            if _weight(module) is not None or isinstance(module, SeparateExperts)
        ]
        output = self.module(self.hidden.clone(), *self._args, **self._kwargs)
        for handle in handles:
            handle.remove()
        self.returns_tuple = isinstance(output, tuple)
        return (output[0] if self.returns_tuple else output), calls

    def find(self) -> None:
        """Find sites, producers and writers."""
        _, calls = self.run()
        by_key: dict[tuple[int, int], _Site] = {}
        readers = [call for call in calls if self._is_reader(call)]
        self.flattens = any(call.input.dim() < self.hidden.dim() for call in readers)
        for call in readers:
            site = by_key.setdefault(call.key, _Site([]))
            if isinstance(call.module, SeparateExperts):
                site.experts = call.name
            else:
                site.modules.append(call.name)
        for call in calls:
            if not self._is_reader(call) and call.key in by_key and _weight(call.module).dim() == 2:
                by_key[call.key].floats.append(call.name)
        self.sites = list(by_key.values())
        self._check_explained(calls)
        for site in self.sites:
            if site.experts is not None:
                small = [name for name in site.modules if self._rows(name) in (1, _EXPERTS)]
                site.floats += small
                site.modules = [name for name in site.modules if name not in small]
        norms = {(call.output.data_ptr(), call.output.numel()): call for call in calls}
        silent = self._silent_inputs()
        for key, site in by_key.items():
            norm = norms.get(key)
            if norm is not None and _weight(norm.module).dim() == 1:
                self._behind_norm(site, norm, silent)
            elif _same(silent[self._first(site)], self.hidden):
                site.reads = "stream"
            elif site.experts is None:
                self._producer(site, [call.name for call in readers])
        self.writes_stream = all(
            self._writes(name)
            for site in self.sites
            if site.reads != "stream"
            for name in site.modules
        ) and all(self._writes(name) for name in self._routed_downs())

    def _is_reader(self, call: _Call) -> bool:
        routed = any(f".{matrix}." in call.name for matrix in EXPERT_MATRICES)
        return isinstance(call.module, SeparateExperts) or (
            isinstance(call.module, nn.Linear) and not routed
        )

    def _rows(self, module: str) -> int:
        return len(self.module.get_parameter(f"{module}.weight"))

    def _first(self, site: _Site) -> str:
        return site.modules[0] if site.modules else str(site.experts)

    def _routed_downs(self) -> list[str]:
        """The down matrices of experts that some token reached."""
        _, calls = self.run()
        names = {f"{site.experts}.down_proj." for site in self.sites if site.experts is not None}
        return [call.name for call in calls if call.name.startswith(tuple(names))] if names else []

    def _check_explained(self, calls: list[_Call]) -> None:
        """Refuse a block with matrices that no site accounts for."""
        known = {name for site in self.sites for name in site.modules + site.floats}
        known |= {call.name for call in calls if _weight(call.module) is not None}
        experts = tuple(f"{site.experts}." for site in self.sites if site.experts is not None)
        for name, parameter in self.module.named_parameters():
            owner = name.rpartition(".")[0]
            if experts and name.startswith(experts):
                continue
            if parameter.dim() > 2 or (parameter.dim() == 2 and owner not in known):
                raise self.writer.unexplained(f"what '{name}' of a block is for")

    def _silent_inputs(self) -> dict[str, Tensor]:
        """What each module is given when all matrices are zero: then the stream passes as it is."""
        with _zeroed(self.module):
            output, calls = self.run()
        if not _same(output, self.hidden):
            self.writes_stream = False
        return {call.name: call.input for call in calls}

    def _behind_norm(self, site: _Site, norm: _Call, silent: dict[str, Tensor]) -> None:
        facts = _NormFacts.of(norm)
        site.norm = f"Norm({_text(norm.name + '.weight')}{', offset=1' if facts.offset else ''})"
        site.producer = site.norm
        if _same(silent[norm.name], self.hidden):
            site.reads = "stream"
            self.stream_norms.append(facts)

    def _producer(self, site: _Site, readers: list[str]) -> None:
        """Find rows whose scale a site's channels follow, and whether tokens mix on the way."""
        module = site.modules[0]
        width = self.module.get_parameter(f"{module}.weight").shape[1]
        earlier = [name for name in readers[: readers.index(module)] if self._is_linear(name)]
        for name in earlier:
            for text, rows, heads in self._candidates(name, width):
                if self._follows(module, name, rows, heads):
                    mixes = self._mixes(name, module)
                    if mixes == (heads is not None):
                        site.producer, site.reads = text, "values" if mixes else "inner"
                        return
        # A matrix that acts on each token alone stands right before what is inside an MLP.
        alone = any(self._mixes(name, module) is False for name in earlier)
        site.reads = "inner" if alone else "values"

    def _is_linear(self, name: str) -> bool:
        return isinstance(self.module.get_submodule(name), nn.Linear)

    def _candidates(
        self, module: str, width: int
    ) -> Iterator[tuple[str, list[slice], Heads | None]]:
        """Layouts of a matrix under which some of its rows could make a site's channels."""
        rows, tensor = self._rows(module), f"{module}.weight"
        for text, heads in self._head_counts():
            values, fused = heads.key_value * heads.dim, heads.query + 2 * heads.key_value
            if heads.query * heads.dim != width:
                continue
            if rows == values:
                yield f"Rows({_weights([module])}, {text})", [slice(None)], heads
            if rows == fused * heads.dim:
                last = slice(rows - values, None)
                yield (
                    f"Rows((concatenated_values({_text(tensor)}, {text}),), {text})",
                    [last],
                    heads,
                )
                size = fused // heads.key_value
                starts = range((size - 1) * heads.dim, rows, size * heads.dim)
                call = f"interleaved_values({_text(tensor)}, {text})"
                each = [slice(start, start + heads.dim) for start in starts]
                yield f"Rows({call}, {text})", each, heads
        for text, chosen in self._up_layouts(rows, width):
            ref = f"WeightRef({_text(tensor)}{', ' + text if text else ''})"
            yield f"Rows(({ref},))", [chosen], None

    def _up_layouts(self, rows: int, width: int) -> Iterator[tuple[str, slice]]:
        sizes = [name for name in _WIDTHS if getattr(self.writer.config, name, None) == rows // 2]
        for text, layout in _UP_ROWS.items():
            chosen = layout(rows)
            named = "{width}" not in text or bool(sizes)
            if named and len(range(rows)[chosen]) == width:
                yield text.format(width=f"config.{sizes[0]}" if sizes else ""), chosen

    def _head_counts(self) -> Iterator[tuple[str, Heads]]:
        """Texts and values of the head counts that a block may have."""
        heads = attention_heads(self.writer.config)
        yield "attention_heads(config)", heads
        grouped = getattr(self.writer.config, "num_kv_heads", None)
        for text, count in (("config.num_kv_heads", grouped), ("1", 1)):
            if count and count != heads.key_value:
                yield (
                    f"replace(attention_heads(config), key_value={text})",
                    Heads(heads.query, count, heads.dim),
                )

    def _follows(self, reader: str, module: str, rows: list[slice], heads: Heads | None) -> bool:
        """Whether scaling rows of a matrix scales the input of a reader, channel by channel."""
        before = self._input(reader)
        linear = self.module.get_submodule(module)
        held = {name: parameter.clone() for name, parameter in linear.named_parameters()}
        count = sum(len(range(self._rows(module))[each]) for each in rows)
        scale = 0.5 + torch.rand(count, dtype=torch.float64, generator=torch.Generator())
        for each, part in zip(rows, scale.split(count // len(rows)), strict=True):
            for parameter in linear.parameters():
                parameter[each] *= part if parameter.dim() == 1 else part[:, None]
        after = self._input(reader)
        for name, parameter in linear.named_parameters():
            parameter.copy_(held[name])
        expected = scale if heads is None else repeat_over_queries(scale, heads)
        return _same(after, before * expected)

    def _input(self, reader: str) -> Tensor:
        _, calls = self.run()
        return next(call.input for call in calls if call.name == reader)

    def _mixes(self, module: str, reader: str) -> bool | None:
        """Whether a change of a matrix's output at one token reaches a reader's other tokens.

        None where it does not even reach the reader at that token.
        """
        before = self._input(reader)

        def disturb(linear: nn.Module, args: Any, output: Tensor) -> Tensor:
            changed = output.clone()
            changed.view(-1, output.shape[-1])[0] += 1
            return changed

        handle = self.module.get_submodule(module).register_forward_hook(disturb)
        moved = (self._input(reader) - before).flatten(0, -2).abs().amax(-1) > EXACT
        handle.remove()
        return None if not moved.any() else bool(moved[1:].any())

    def _writes(self, module: str) -> bool:
        """Whether a constant added to a matrix's output is added to the stream, up to a factor."""
        linear = self.module.get_submodule(module)
        added = torch.randn(self._rows(module), dtype=torch.float64, generator=torch.Generator())
        if len(added) != self.hidden.shape[-1]:
            return False
        with _zeroed(self.module):
            before, calls = self.run()
            if module not in {call.name for call in calls}:
                return True  # an expert that no token reaches is like those that some reach
            handle = linear.register_forward_hook(lambda linear, args, output: output + added)
            after, _ = self.run()
            handle.remove()
        change = after - before
        factor = change @ added / added.square().sum()
        straight = (change - factor[..., None] * added).abs().max() <= EXACT
        return bool(straight and factor.abs().max() > EXACT)

    def body(self, rotatable: bool) -> str:
        """The statements of the function that makes this block's graph."""
        lines, names, written = [], [], []
        for site, name in zip(self.sites, self._names(), strict=True):
            readers = [_weights(site.modules)] if site.modules else []
            if site.experts is not None:
                lines.append(f"routed, downs = {self._experts(site.experts)}")
                readers.append("routed")
            fields = [_text(name), _text(site.reads), " + ".join(readers), site.producer]
            fields += [_weights(site.floats)] if site.floats else []
            variable = f"{name}_site" if name.isidentifier() else f"site_{name}"
            arguments = "".join(f"        {each},\n" for each in fields)
            lines.append(f"{variable} = Site(\n{arguments}    )")
            made = [variable] + (["*downs"] if site.experts is not None else [])
            names += made
            written += made[1:] if site.reads == "stream" else made
        residual = f"writers({', '.join(written)})" if rotatable else "()"
        lines.append(f"return BlockGraph(({', '.join(names)}), residual_writers={residual})")
        return "".join(f"    {line}\n" for line in lines)

    def _names(self) -> list[str]:
        """Site names that are told apart."""
        names = [site.name for site in self.sites]
        return [
            name if names.count(name) == 1 else self._first(site).replace(".", "_")
            for name, site in zip(names, self.sites, strict=True)
        ]

    def _experts(self, module: str) -> str:
        """The call that makes the sites of experts."""
        config = self.writer.config
        count = next(name for name in _EXPERT_COUNTS if getattr(config, name, 0) == _EXPERTS)
        down = self._routed_downs()[0]
        fused = down.replace("down_proj", "gate_up_proj")
        width = self.module.get_parameter(f"{down}.weight").shape[1]
        up = "None"
        for text, chosen in self._up_layouts(self._rows(fused), width):
            if self._follows(down, fused, [chosen], None):
                up = text or "slice(None)"
                break
        return f"experts({_text(module)}, config.{count}, {up})"


def _text(value: str) -> str:
    """A string as it stands in a file."""
    return f'"{value}"'


def _weights(modules: list[str]) -> str:
    return f"weights({', '.join(map(_text, modules))})"


class _zeroed:
    """A context in which every matrix of a block, with its bias, is zero."""

    def __init__(self, block: nn.Module) -> None:
        self._parameters = [
            parameter
            for module in block.modules()
            if _weight(module) is not None and _weight(module).dim() == 2
            for parameter in module.parameters(recurse=False)
        ]

    def __enter__(self) -> None:
        self._held = [parameter.clone() for parameter in self._parameters]
        for parameter in self._parameters:
            parameter.zero_()

    def __exit__(self, *error: object) -> None:
        for parameter, held in zip(self._parameters, self._held, strict=True):
            parameter.copy_(held)
