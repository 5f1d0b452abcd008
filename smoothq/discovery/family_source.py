"""The Python source of a family: what experiments on a tiny model find, or nothing but linears."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..architectures import Family
from ..architectures.added_features import adds_features
from ..architectures.graph import decoder_of, final_output, text_config
from ..architectures.linearize import linearize_block
from ..errors import first_line
from ..transforms.hadamard import Hadamard
from ..transforms.rotation import rotate_input
from . import equivalence as equivalence
from .experiments import (
    EXACT,
    BlockExperiments,
    Call,
    is_norm,
    keep,
    norm_facts,
    own_weight,
    restored,
)
from .findings import Findings, quoted
from .stack import find_stack


@dataclass(frozen=True)
class InferredFamily(Family):
    """A family that was found by experiments.

    Attributes:
        written: the Python source of its file.
    """

    written: str = ""

    def __reduce__(self) -> tuple[Any, ...]:
        """What pickle stores: the source, for its functions belong to no importable module."""
        return load_family, (self.written,)


def load_family(written: str) -> InferredFamily:
    """The FAMILY of a file's Python source."""
    namespace: dict[str, Any] = {"__package__": "smoothq.architectures", "__name__": "inferred"}
    exec(compile(written, "inferred family", "exec"), namespace)
    family: Family = namespace["FAMILY"]
    values = {field.name: getattr(family, field.name) for field in fields(family)}
    return InferredFamily(**values, written=written)


class FamilySource:
    """A family whose source is written from findings, from which claims can be taken out.

    Attributes:
        kinds: the kind of each of the real model's blocks.
        findings: of each kind of block.
        rotatable: whether the writers of the residual stream are listed.
        sums_at_entry: as of `Family`.
        notes: as of `Family`.
    """

    def __init__(self, skeleton: PreTrainedModel, kinds: list[int]) -> None:
        """Create one in which every linear is a site of its own.

        Args:
            skeleton: the real model on the meta device.
            kinds: of its blocks.
        """
        self.kinds = kinds
        self.attribute, stack = find_stack(skeleton)
        self._config = text_config(skeleton)
        self._real = {kind: _linearized(stack[kinds.index(kind)]) for kind in sorted(set(kinds))}
        self.findings = {kind: Findings.plain(block) for kind, block in self._real.items()}
        self.rotatable, self.sums_at_entry, self._centred = False, True, False
        self._final_norm: str | None = None
        self._positions: str | None = None
        self._entry_norm: str | None = None
        self.notes: list[str] = []

    def experiment(
        self, model: PreTrainedModel, read: frozenset[str], cautious: bool, tokens: Tensor
    ) -> None:
        """Replace the findings by those of experiments.

        Args:
            model: the tiny model, in float64.
            read: full names of the linears whose weights its own code reads.
            cautious: whether to exclude these from every transform; else the experiments decide.
            tokens: int64 (batch, length), which it runs on.
        """
        configs = text_config(model), self._config
        run = _Run(model, self.attribute, tokens)
        for kind, real in self._real.items():
            index = self.kinds.index(kind)
            entering = run.entering.get(index)
            if entering is None:
                self.notes.append(f"block {index} is not run for text: nothing is claimed of it")
                continue
            module, hidden, args, kwargs = entering
            within = f".{self.attribute}.{index}."
            names = {f".{name}".partition(within)[2] for name in read} - {""}
            block = BlockExperiments(configs, module, real, (hidden, args, kwargs), names, cautious)
            try:
                self.findings[kind] = block.find()
            except Exception as error:  # the model's own code may raise anything
                self.findings[kind] = Findings.plain(module, block.count_of)
                self.notes.append(
                    f"nothing is claimed of block {index}, on which the experiments failed: "
                    f"{first_line(error)}"
                )
        self._look_outside(model, run, tokens)

    def _look_outside(self, model: PreTrainedModel, run: _Run, tokens: Tensor) -> None:
        """Find the modules around the blocks, and whether a rotation passes them."""
        norms = {
            norm.centred for finding in self.findings.values() for norm in finding.stream_norms
        }
        final = [call for call in run.behind if is_norm(call.module)]
        if final:
            self._final_norm = final[0].name
            norms.add(norm_facts(final[0]).centred)
        self._centred = norms == {True}
        embedding, config = model.get_input_embeddings(), text_config(model)
        tables: list[Any] = [embedding]
        for call in run.before:
            width = own_weight(call.module).shape[-1] if own_weight(call.module) is not None else 0
            if isinstance(call.module, nn.Embedding) and call.module is not embedding:
                if width == config.hidden_size:
                    tables.append(call.module)
                    self._positions = call.name
            elif is_norm(call.module):
                self._entry_norm = call.name
        self.rotatable = (
            not run.repeats
            and len(final) == 1
            and len(norms) == 1
            and all(finding.writes_stream for finding in self.findings.values())
            and all(
                finding.stream_writers or any(site.experts for site in finding.sites)
                for finding in self.findings.values()
            )
        )
        added = adds_features(decoder_of(model))  # rotated while the model runs, never in advance
        self.sums_at_entry = not added and run.sums_at_entry(model, tables, tokens)

    def text(self) -> str:
        """The Python source."""
        bodies = "\n\n".join(
            f"def _kind_{kind}(config: PretrainedConfig) -> BlockGraph:\n"
            f"{finding.body(self.rotatable)}"
            for kind, finding in self.findings.items()
        )
        return _FILE.format(
            model_type=self._config.model_type,
            bodies=bodies,
            choice=self._choice(),
            fields="".join(f", {field}" for field in self._fields()),
        )

    def _choice(self) -> str:
        lines = []
        for kind in sorted(set(self.kinds) - {0}):
            indices = {index for index, other in enumerate(self.kinds) if other == kind}
            lines.append(f"    if index in {indices}:\n        return _kind_{kind}(config)\n")
        return "".join(lines) + "    return _kind_0(config)"

    def _fields(self) -> Iterator[str]:
        yield f"layers={quoted(self.attribute)}"
        yield f"final_norm={self._final_norm and quoted(self._final_norm)}"
        if self._positions is not None:
            yield f"positions={quoted(self._positions)}"
        if self._entry_norm is not None:
            yield f"entry_norm={quoted(self._entry_norm)}"
        if not self.sums_at_entry:
            yield "sums_at_entry=False"
        if self._centred:
            yield "centred=True"
        if any(finding.flattens for finding in self.findings.values()):
            yield "flattens=True"
        if self.notes:
            yield f"notes={tuple(self.notes)!r}"


class _Run:
    """One run of a tiny model: what enters its blocks, and the calls around them.

    Attributes:
        repeats: whether a block is called more than once: between the calls its output may go
            elsewhere, unrotated.
        entering: number of a block → it, linearized; its hidden state and other arguments.
        before, behind: calls before the first block and behind the last, of modules beside the
            stack that have a weight or are norms, by their names within the decoder.
    """

    def __init__(self, model: PreTrainedModel, attribute: str, tokens: Tensor) -> None:
        self._attribute = attribute
        self.repeats = False
        self.entering: dict[int, tuple[nn.Module, Tensor, tuple[Any, ...], dict[str, Any]]] = {}
        self.before: list[Call] = []
        self.behind: list[Call] = []
        decoder = decoder_of(model)
        stack = decoder.get_submodule(attribute)
        parent = attribute.rpartition(".")[0]
        prefix = f"{parent}." if parent else ""
        calls: list[Call] = []
        self._last_block_begins = 0
        with ExitStack() as hooks:
            for name, child in decoder.get_submodule(parent).named_children():
                if child is not stack and (own_weight(child) is not None or is_norm(child)):
                    hooks.enter_context(
                        child.register_forward_hook(keep(calls, prefix + name), with_kwargs=True)
                    )
            for index, layer in enumerate(stack.children()):
                entering = self._enter(index, layer, calls)
                hooks.enter_context(layer.register_forward_pre_hook(entering, with_kwargs=True))
            final_output(model, tokens, use_cache=False)
        self.behind = calls[self._last_block_begins :]
        # Only now, so that the copies have no hooks, which experiments on them would run.
        for index, (layer, hidden, args, kwargs) in self.entering.items():
            opened = copy.deepcopy(layer)
            linearize_block(opened)
            self.entering[index] = opened, hidden, args, kwargs

    def _enter(self, index: int, layer: nn.Module, calls: list[Call]) -> Callable[..., None]:
        def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self.entering:
                self.before = calls.copy()
            self._last_block_begins = len(calls)
            if index in self.entering:
                self.repeats = True
                return
            if not args:  # the hidden states come by name, as the first argument
                name = next(iter(kwargs))
                args, kwargs = (kwargs[name],), {k: v for k, v in kwargs.items() if k != name}
            self.entering[index] = layer, args[0].clone(), args[1:], kwargs

        return enter

    def sums_at_entry(self, model: PreTrainedModel, tables: list[Any], tokens: Tensor) -> bool:
        """Whether rotating the rows of embeddings rotates what enters the first block."""
        stack = decoder_of(model).get_submodule(self._attribute)
        first = min(self.entering)
        hidden = self.entering[first][1]
        entering: list[Tensor] = []

        def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            entering.append(args[0] if args else next(iter(kwargs.values())))

        layer = stack.get_submodule(str(first))
        if tables[0].weight.shape[1] != hidden.shape[-1]:
            return False
        rotation = Hadamard.of(hidden.shape[-1], seed=0)
        hook = layer.register_forward_pre_hook(enter, with_kwargs=True)
        with hook, restored([table.weight for table in tables]):
            for table in tables:
                rotate_input(table.weight, rotation)
            final_output(model, tokens, use_cache=False)
        return equivalence.deviation(entering[0], rotation.apply(hidden)) <= EXACT


def _linearized(block: nn.Module) -> nn.Module:
    """A copy of a block on the meta device, linearized."""
    opened = copy.deepcopy(block).to("meta")
    linearize_block(opened)
    return opened


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
