"""Experiments on a block of a tiny model that find its sites, their producers, and its writers.

- Modules that are called with the same tensor form a site.
- A norm whose output is that tensor can absorb a divisor of it. So can rows of an earlier matrix,
  if scaling the rows scales the site's channels and nothing else.
- A matrix writes the residual stream if a constant added to its output is added to the block's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from ..architectures import Heads
from ..architectures.graph import attention_heads
from ..architectures.linearize import EXPERT_MATRICES, SeparateExperts
from ..transforms.smoothing import repeat_over_queries

EXACT = 1e-9  # the largest relative difference that counts as float64 rounding
TINY_EXPERTS = 4
# All different: a config may hold a width that its model does not use.
TINY_WIDTHS = {
    "intermediate_size": 80,
    "ffn_dim": 112,
    "ffn_hidden_size": 160,
    "n_inner": 144,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 96,
}
EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
# Rows of up in a gate_up matrix: their slice as Python source → the slice for N rows.
_UP_ROWS: dict[str, Callable[[int], slice]] = {
    "": lambda rows: slice(None),
    "slice({width}, None)": lambda rows: slice(rows // 2, None),
    "slice(0, {width})": lambda rows: slice(0, rows // 2),
    "slice(1, None, 2)": lambda rows: slice(1, None, 2),
    "slice(0, None, 2)": lambda rows: slice(0, None, 2),
}


class Unexplained(Exception):
    """The experiments cannot explain a part of a block; the message names it."""


@dataclass
class FoundSite:
    """A site that the experiments found.

    Attributes:
        modules: the linears that read it, to be quantized.
        floats: other modules that read it and stay in float.
        reads: as `Site.reads`.
        producer: Python source of `Site.producer`.
        experts: the name of the experts module that reads it, or None.
    """

    modules: list[str]
    floats: list[str] = field(default_factory=list)
    reads: str = "mlp"
    producer: str = "None"
    experts: str | None = None

    @property
    def name(self) -> str:
        """A name for the site, from the names of its modules: `q_k_v` of q_proj, k_proj, v_proj."""
        if self.experts is not None:
            return "experts"
        leaves = [module.rpartition(".")[2].removesuffix("_proj") for module in self.modules]
        return "_".join(dict.fromkeys(leaves))


@dataclass(frozen=True)
class Call:
    """One recorded call of a module that has a weight, with its input and output."""

    name: str
    module: nn.Module
    input: Tensor
    output: Tensor

    @property
    def key(self) -> tuple[int, int]:
        """Address and size of the input: equal for all calls with one tensor, in any shape."""
        return self.input.data_ptr(), self.input.numel()


def own_weight(module: nn.Module) -> Any:
    """The module's parameter `weight`, as a tensor, or None where it has none."""
    weight = getattr(module, "weight", None)
    return weight.data if isinstance(weight, nn.Parameter) else None


def keep(calls: list[Call], name: str) -> Callable[..., None]:
    """A forward hook that appends a `Call` to `calls` at each call of a module.

    The calls keep their tensors alive, so that `data_ptr()` identifies a tensor during the forward.

    Args:
        calls: the list that is appended to.
        name: of the module.
    """

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        given = args[0] if args and isinstance(args[0], Tensor) else output
        calls.append(Call(name, module, given, output[0] if isinstance(output, tuple) else output))

    return hook


@dataclass(frozen=True)
class NormFacts:
    """How a norm computes.

    Attributes:
        offset: as `Norm.offset`, 0 or 1.
        centred: whether it subtracts the mean (LayerNorm).
    """

    offset: int
    centred: bool

    @classmethod
    def of(cls, call: Call) -> NormFacts:
        """Find out by running a norm on the input of a recorded call."""
        norm: Any = call.module
        bias = getattr(norm, "bias", None)
        with restored([norm.weight]):
            norm.weight.zero_()
            silent = norm(call.input) - (bias if isinstance(bias, Tensor) else 0.0)
        moved = norm(call.input + 3)
        return cls(int(bool(silent.abs().max() > EXACT)), _same(moved, norm(call.input)))


def _same(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors agree but for float64 rounding."""
    if left.numel() != right.numel():
        return False
    difference = (left.flatten() - right.flatten()).abs().max()
    return bool(difference <= EXACT * right.abs().max().clamp(min=EXACT))


class BlockExperiments:
    """Experiments on one linearized block of a tiny model.

    Attributes, after `find`:
        sites: in the order of execution.
        stream_norms: the norms that read the residual stream.
        writes_stream: whether a rotation of the stream can be folded into all its writers.
        returns_tuple, flattens: as of `Family`.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        module: nn.Module,
        hidden: Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        read: set[str],
        cautious: bool,
    ) -> None:
        """Prepare experiments; runs nothing.

        Args:
            config: of the tiny model's decoder.
            module: the block, linearized.
            hidden: float64 (batch, tokens, hidden size), the residual stream that enters it.
            args: further positional arguments of its forward.
            kwargs: keyword arguments of its forward.
            read: names of linears whose `weight` the block's own code reads.
            cautious: whether to exclude these from every transform; else the experiments decide.
        """
        self._config, self.module, self.hidden = config, module, hidden
        self._args, self._kwargs = args, kwargs
        self._read, self._cautious = read, cautious
        self.sites: list[FoundSite] = []
        self.stream_norms: list[NormFacts] = []
        self.writes_stream = True
        self.returns_tuple = self.flattens = False

    def run(self) -> tuple[Tensor, list[Call]]:
        """Run the block once: its output, and the calls of all modules that have a weight."""
        calls: list[Call] = []
        handles = [
            module.register_forward_hook(keep(calls, name))
            for name, module in self.module.named_modules()
            if own_weight(module) is not None or isinstance(module, SeparateExperts)
        ]
        output = self.module(self.hidden.clone(), *self._args, **self._kwargs)
        for handle in handles:
            handle.remove()
        self.returns_tuple = isinstance(output, tuple)
        return (output[0] if self.returns_tuple else output), calls

    def find(self) -> None:
        """Run the experiments and set the attributes. Raises Unexplained."""
        _, calls = self.run()
        by_key: dict[tuple[int, int], FoundSite] = {}
        readers = [call for call in calls if self._is_reader(call)]
        self.flattens = any(call.input.dim() < self.hidden.dim() for call in readers)
        for call in readers:
            site = by_key.setdefault(call.key, FoundSite([]))
            if isinstance(call.module, SeparateExperts):
                site.experts = call.name
            else:
                site.modules.append(call.name)
        others = [call for call in calls if not self._is_reader(call) and call.key in by_key]
        for call in others:
            if own_weight(call.module).dim() == 2:
                by_key[call.key].floats.append(call.name)
        self.sites = list(by_key.values())
        self._check_explained(calls)
        called = {call.name for call in calls}
        self._uncalled = [
            name for name in self._read if name not in called and self._is_linear(name)
        ]
        for site in self.sites:
            if site.experts is not None:
                small = [name for name in site.modules if self._rows(name) in (1, TINY_EXPERTS)]
                site.floats += small
                site.modules = [name for name in site.modules if name not in small]
        self._explain_inputs(by_key, calls)
        self.writes_stream = all(
            self._writes(name)
            for site in self.sites
            if site.reads != "residual"
            for name in site.modules
        ) and all(self._writes(name) for name in self._routed_downs())
        if self._uncalled or (self._cautious and self._read.intersection(self._linears())):
            # A matrix whose weight is read directly may read or write the stream unobserved.
            self.writes_stream = False
        self.sites += [FoundSite([name]) for name in self._uncalled]

    def _explain_inputs(self, by_key: dict[tuple[int, int], FoundSite], calls: list[Call]) -> None:
        """Set what each site reads, and its producer."""
        readers = [call.name for call in calls if self._is_reader(call)]
        norms = {(call.output.data_ptr(), call.output.numel()): call for call in calls}
        silent = self._silent_inputs()
        for key, site in by_key.items():
            norm = norms.get(key)
            if norm is not None and own_weight(norm.module).dim() == 1:
                self._behind_norm(site, norm, silent)
            elif _same(silent[self._first(site)], self.hidden):
                site.reads = "residual"
            elif site.experts is None:
                self._producer(site, readers)

    def _is_reader(self, call: Call) -> bool:
        routed = any(f".{matrix}." in call.name for matrix in EXPERT_MATRICES)
        return isinstance(call.module, SeparateExperts) or (
            isinstance(call.module, nn.Linear) and not routed
        )

    def _rows(self, module: str) -> int:
        return len(self.module.get_parameter(f"{module}.weight"))

    def _first(self, site: FoundSite) -> str:
        return site.modules[0] if site.modules else str(site.experts)

    def _routed_downs(self) -> list[str]:
        """The names of experts' down linears that some token reaches."""
        _, calls = self.run()
        names = {f"{site.experts}.down_proj." for site in self.sites if site.experts is not None}
        return [call.name for call in calls if call.name.startswith(tuple(names))] if names else []

    def _check_explained(self, calls: list[Call]) -> None:
        """Raise Unexplained for a block with a matrix that belongs to no site."""
        known = {name for site in self.sites for name in site.modules + site.floats}
        known |= self._read
        known |= {call.name for call in calls if own_weight(call.module) is not None}
        experts = tuple(f"{site.experts}." for site in self.sites if site.experts is not None)
        for name, parameter in self.module.named_parameters():
            owner = name.rpartition(".")[0]
            if experts and name.startswith(experts):
                continue
            if parameter.dim() > 2 or (parameter.dim() == 2 and owner not in known):
                raise Unexplained(f"what '{name}' of a block is for")

    def _silent_inputs(self) -> dict[str, Tensor]:
        """The input of each module when all matrices of the block are zero.

        Nothing is added to the residual stream then, so its readers get the block's input.
        """
        with _zeroed(self.module):
            output, calls = self.run()
        if not _same(output, self.hidden):
            self.writes_stream = False
        return {call.name: call.input for call in calls}

    def _behind_norm(self, site: FoundSite, norm: Call, silent: dict[str, Tensor]) -> None:
        facts = NormFacts.of(norm)
        offset = ", offset=1" if facts.offset else ""
        if not self._is_read(site) and (not self._uncalled or self._absorbs(site, norm, facts)):
            site.producer = f"Norm({text(norm.name + '.weight')}{offset})"
        if _same(silent[norm.name], self.hidden):
            site.reads = "residual"
            self.stream_norms.append(facts)

    def _absorbs(self, site: FoundSite, norm: Call, facts: NormFacts) -> bool:
        """Whether a divisor folded into a norm cancels in a site's readers.

        If not, something else reads the norm's output.
        """
        readers = [*site.modules, *site.floats]
        if site.experts is not None:
            readers += [n for n in self._linears() if n.startswith(f"{site.experts}.gate_up_proj.")]
        before, _ = self.run()
        tried = copy.deepcopy(self.module)
        scale = 0.5 + torch.rand(norm.output.shape[-1], dtype=torch.float64)
        scaled: Any = tried.get_submodule(norm.name)
        scaled.weight.copy_((scaled.weight + facts.offset) * scale - facts.offset)
        if isinstance(getattr(scaled, "bias", None), Tensor):
            scaled.bias.mul_(scale)
        for name in readers:
            tried.get_parameter(f"{name}.weight").div_(scale)
        original, self.module = self.module, tried
        after, _ = self.run()
        self.module = original
        return _same(after, before)

    def _is_read(self, site: FoundSite) -> bool:
        """Whether a site's weights must not change, because the block's code reads one of them."""
        return self._cautious and not self._read.isdisjoint(site.modules)

    def _linears(self) -> list[str]:
        return [n for n, module in self.module.named_modules() if isinstance(module, nn.Linear)]

    def _producer(self, site: FoundSite, readers: list[str]) -> None:
        """Set a site's producer, and what it reads: attention's values if tokens mix on the way."""
        module = site.modules[0]
        width = self.module.get_parameter(f"{module}.weight").shape[1]
        earlier = [name for name in readers[: readers.index(module)] if self._is_linear(name)]
        usable = [] if self._is_read(site) else [name for name in earlier if name not in self._read]
        for name in usable:
            for producer, rows, heads in self._candidates(name, width):
                if self._follows(module, name, rows, heads):
                    mixes = self._mixes(name, module)
                    if mixes == (heads is not None):
                        site.producer, site.reads = producer, "attention" if mixes else "mlp"
                        return
        # Without a producer: a reader that an earlier matrix reaches token by token is in an MLP.
        alone = any(self._mixes(name, module) is False for name in earlier)
        site.reads = "mlp" if alone else "attention"

    def _is_linear(self, name: str) -> bool:
        return name in self._linears()

    def _candidates(
        self, module: str, width: int
    ) -> Iterator[tuple[str, list[slice], Heads | None]]:
        """Rows of a matrix that may be the producer of a site, for every possible layout.

        Args:
            module: the earlier linear.
            width: channels of the site's input.

        Yields:
            Python source of the producer, the slices of rows, and the heads of values or None.
        """
        rows, tensor = self._rows(module), f"{module}.weight"
        for counted, heads in self._head_counts(rows, width):
            values, fused = heads.key_value * heads.dim, heads.query + 2 * heads.key_value
            if heads.query * heads.dim != width or heads.query % heads.key_value:
                continue
            if rows == values:
                yield f"Rows({_weights([module])}, {counted})", [slice(None)], heads
            if rows == fused * heads.dim:
                last = slice(rows - values, None)
                yield (
                    f"Rows((concatenated_values({text(tensor)}, {counted}),), {counted})",
                    [last],
                    heads,
                )
                size = fused // heads.key_value
                starts = range((size - 1) * heads.dim, rows, size * heads.dim)
                call = f"interleaved_values({text(tensor)}, {counted})"
                value_rows = [slice(start, start + heads.dim) for start in starts]
                yield f"Rows({call}, {counted})", value_rows, heads
        for chosen, part in self._up_layouts(rows, width):
            ref = f"WeightRef({text(tensor)}{', ' + chosen if chosen else ''})"
            yield f"Rows(({ref},))", [part], None

    def _up_layouts(self, rows: int, width: int) -> Iterator[tuple[str, slice]]:
        sizes = [name for name in TINY_WIDTHS if getattr(self._config, name, None) == rows // 2]
        for layout, part in _UP_ROWS.items():
            chosen = part(rows)
            named = "{width}" not in layout or bool(sizes)
            if named and len(range(rows)[chosen]) == width:
                yield layout.format(width=f"config.{sizes[0]}" if sizes else ""), chosen

    def _head_counts(self, rows: int, width: int) -> Iterator[tuple[str, Heads]]:
        """Head counts that a block may have, each with its Python source.

        Args:
            rows: of the matrix that computes its values.
            width: channels of the output projection's input.
        """
        heads = attention_heads(self._config)
        yield "attention_heads(config)", heads
        # What a config says and its model does not use, `Family.graph` puts right.
        dim = width // heads.query
        for values in (rows, (rows - width) // 2):
            if dim and values > 0 and values % dim == 0:
                yield "attention_heads(config)", Heads(heads.query, values // dim, dim)
        grouped = getattr(self._config, "num_kv_heads", None)
        for counted, count in (("config.num_kv_heads", grouped), ("1", 1)):
            if count and count != heads.key_value:
                yield (
                    f"replace(attention_heads(config), key_value={counted})",
                    Heads(heads.query, count, heads.dim),
                )

    def _follows(self, reader: str, module: str, rows: list[slice], heads: Heads | None) -> bool:
        """Whether scaling rows of a matrix scales the channels of a reader's input likewise."""
        before = self._input(reader)
        linear = self.module.get_submodule(module)
        count = sum(len(range(self._rows(module))[part]) for part in rows)
        scale = 0.5 + torch.rand(count, dtype=torch.float64, generator=torch.Generator())
        with restored(linear.parameters()):
            for part, factors in zip(rows, scale.split(count // len(rows)), strict=True):
                for parameter in linear.parameters():
                    parameter[part] *= factors if parameter.dim() == 1 else factors[:, None]
            after = self._input(reader)
        expected = scale if heads is None else repeat_over_queries(scale, heads)
        return _same(after, before * expected)

    def _input(self, reader: str) -> Tensor:
        _, calls = self.run()
        return next(call.input for call in calls if call.name == reader)

    def _mixes(self, module: str, reader: str) -> bool | None:
        """Whether a change of a matrix's output at one token changes a reader's input at others.

        None where it does not change that token's input either.
        """
        before = self._input(reader)

        def disturb(_linear: nn.Module, _args: Any, output: Tensor) -> Tensor:
            changed = output.clone()
            changed.view(-1, output.shape[-1])[0] += 1
            return changed

        with self.module.get_submodule(module).register_forward_hook(disturb):
            moved = (self._input(reader) - before).flatten(0, -2).abs().amax(-1) > EXACT
        return None if not moved.any() else bool(moved[1:].any())

    def _writes(self, module: str) -> bool:
        """Whether a constant added to a matrix's output is added, times a factor, to the stream."""
        linear = self.module.get_submodule(module)
        added = torch.randn(self._rows(module), dtype=torch.float64, generator=torch.Generator())
        if len(added) != self.hidden.shape[-1]:
            return False
        with _zeroed(self.module):
            before, calls = self.run()
            if module not in {call.name for call in calls}:
                return True  # an expert that no token reaches is like those that some reach
            with linear.register_forward_hook(lambda linear, args, output: output + added):
                after, _ = self.run()
        change = after - before
        factor = change @ added / added.square().sum()
        straight = (change - factor[..., None] * added).abs().max() <= EXACT
        return bool(straight and factor.abs().max() > EXACT)

    def body(self, rotatable: bool) -> str:
        """Python source of the body of the function that returns this block's graph.

        Args:
            rotatable: whether the writers of the residual stream are listed.
        """
        lines, names, written = [], [], []
        for site, name in zip(self.sites, self._names(), strict=True):
            readers = [_weights(site.modules)] if site.modules else []
            if site.experts is not None:
                lines.append(f"routed, downs = {self._experts(site.experts)}")
                readers.append("routed")
            fields = [text(name), text(site.reads), " + ".join(readers), site.producer]
            fields += [_weights(site.floats)] if site.floats else []
            variable = f"{name}_site" if name.isidentifier() else f"site_{name}"
            arguments = "".join(f"        {argument},\n" for argument in fields)
            lines.append(f"{variable} = Site(\n{arguments}    )")
            variables = [variable] + (["*downs"] if site.experts is not None else [])
            names += variables
            written += variables[1:] if site.reads == "residual" else variables
        residual = f"writers({', '.join(written)})" if rotatable else "()"
        lines.append(f"return BlockGraph(({', '.join(names)}), residual_writers={residual})")
        return "".join(f"    {line}\n" for line in lines)

    def _names(self) -> list[str]:
        """Names of the sites, all different."""
        names = [site.name for site in self.sites]
        return [
            name if names.count(name) == 1 else self._first(site).replace(".", "_")
            for name, site in zip(names, self.sites, strict=True)
        ]

    def _experts(self, module: str) -> str:
        """Python source of the call that returns the sites of experts."""
        config = self._config
        count = next(name for name in EXPERT_COUNTS if getattr(config, name, 0) == TINY_EXPERTS)
        down = self._routed_downs()[0]
        fused = down.replace("down_proj", "gate_up_proj")
        width = self.module.get_parameter(f"{down}.weight").shape[1]
        up = "None"
        for layout, chosen in self._up_layouts(self._rows(fused), width):
            if self._follows(down, fused, [chosen], None):
                up = layout or "slice(None)"
                break
        return f"experts({text(module)}, config.{count}, {up})"


def text(value: str) -> str:
    """A string as a literal of Python source."""
    return f'"{value}"'


def _weights(modules: list[str]) -> str:
    return f"weights({', '.join(map(text, modules))})"


@contextmanager
def restored(tensors: Iterable[Tensor]) -> Iterator[None]:
    """A context at whose end tensors have the values that they had at its beginning."""
    originals = [(tensor, tensor.clone()) for tensor in tensors]
    try:
        yield
    finally:
        for tensor, original in originals:
            tensor.copy_(original)


@contextmanager
def _zeroed(block: nn.Module) -> Iterator[None]:
    """A context in which every matrix of a block, and its bias, is set to zero."""
    parameters = [
        parameter
        for module in block.modules()
        if own_weight(module) is not None and own_weight(module).dim() == 2
        for parameter in module.parameters(recurse=False)
    ]
    with restored(parameters):
        for parameter in parameters:
            parameter.zero_()
        yield
