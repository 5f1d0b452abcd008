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
from ..architectures.linearize import SeparateExperts
from ..transforms.smoothing import repeat_over_queries
from .findings import (
    Findings,
    FoundSite,
    NormFacts,
    downs_count,
    experts_count,
    lists_source,
    plain_linears,
    quoted,
    weights_source,
)
from .shrink import EXPERT_COUNTS, EXPERTS, WIDTHS, number_of

EXACT = 1e-9  # the largest relative difference that counts as float64 rounding
# Rows of up in a gate_up matrix: their slice as Python source → the slice for N rows.
_UP_ROWS: dict[str, Callable[[int], slice]] = {
    "": lambda rows: slice(None),
    "slice({width}, None)": lambda rows: slice(rows // 2, None),
    "slice(0, {width})": lambda rows: slice(0, rows // 2),
    "slice(1, None, 2)": lambda rows: slice(1, None, 2),
    "slice(0, None, 2)": lambda rows: slice(0, None, 2),
}


@dataclass(frozen=True)
class Call:
    """One recorded call of a module: input, output, further arguments by position and by name."""

    name: str
    module: nn.Module
    input: Tensor
    output: Tensor
    more: tuple[Any, ...] = ()
    named: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> tuple[int, int]:
        """Address and size of the input: equal for all calls with one tensor, in any shape."""
        return self.input.data_ptr(), self.input.numel()


def _output_key(call: Call) -> tuple[int, int]:
    """As `Call.key`, of the output."""
    return call.output.data_ptr(), call.output.numel()


def _is_multiple(left: Tensor, right: Tensor) -> bool:
    """Whether a tensor is another times one positive number."""
    return left.numel() == right.numel() and _has_rows_of(left.reshape(1, -1), right.reshape(1, -1))


def _has_rows_of(left: Tensor, right: Tensor) -> bool:
    """Whether each row of a tensor is zero or a row of another times a positive number."""
    rows, others = left.flatten(0, -2), right.flatten(0, -2)
    factors = rows @ others.T / others.square().sum(-1)
    away = (rows[:, None] - factors.clamp(min=0)[..., None] * others).abs().amax(-1)
    return bool((away.amin(1) <= EXACT * rows.abs().amax(-1)).all())


def _unnumbered(name: str) -> str:
    """A module's name without the places in lists."""
    return ".".join(part for part in name.split(".") if not part.isdigit())


def own_weight(module: nn.Module) -> Any:
    """The module's parameter `weight`, as a tensor, or None where it has none."""
    weight = getattr(module, "weight", None)
    return weight.data if isinstance(weight, nn.Parameter) else None


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm, with a weight or without: no other module has one of rank 1."""
    weight = own_weight(module)
    if weight is not None:
        return bool(weight.dim() == 1)
    named = "norm" in type(module).__name__.lower()
    return named and next(module.parameters(), None) is None and not list(module.children())


def keep(calls: list[Call], name: str) -> Callable[..., None]:
    """A forward hook, registered `with_kwargs`, that appends a `Call` at each call of a module.

    The calls keep their tensors alive, so that `data_ptr()` identifies a tensor during the forward.

    Args:
        calls: the list that is appended to.
        name: of the module.
    """

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = args[0] if args and isinstance(args[0], Tensor) else output
        result = output[0] if isinstance(output, tuple) else output
        if isinstance(given, Tensor) and isinstance(result, Tensor):
            calls.append(Call(name, module, given, result, args[1:], kwargs))

    return hook


def norm_facts(call: Call) -> NormFacts:
    """How a norm computes, by running it on the input of a recorded call."""
    norm: Any = call.module

    def run(given: Tensor) -> Tensor:
        output = norm(given, *call.more, **call.named)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    centred = _same(run(call.input + 3), run(call.input))
    if own_weight(norm) is None:
        return NormFacts(0, centred)
    bias = getattr(norm, "bias", None)
    with restored([norm.weight]):
        norm.weight.zero_()
        silent = run(call.input) - (bias if isinstance(bias, Tensor) else 0.0)
    return NormFacts(int(bool(silent.abs().max() > EXACT)), centred)


def _same(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors agree but for float64 rounding."""
    if left.numel() != right.numel():
        return False
    difference = (left.flatten() - right.flatten()).abs().max()
    return bool(difference <= EXACT * right.abs().max().clamp(min=EXACT))


class BlockExperiments:
    """Experiments on one linearized block of a tiny model."""

    def __init__(
        self,
        configs: tuple[PretrainedConfig, PretrainedConfig],
        module: nn.Module,
        real: nn.Module,
        entering: tuple[Tensor, tuple[Any, ...], dict[str, Any]],
        read: set[str],
        cautious: bool,
    ) -> None:
        """Prepare experiments; runs nothing.

        Args:
            configs: of the tiny model's decoder, and of the real one's.
            module: the block, linearized.
            real: the real model's block in its place, linearized, on the meta device.
            entering: the arguments of its forward: the residual stream, float64 (batch, tokens,
                hidden size); further ones by position; and those by name.
            read: names of linears whose `weight` the block's own code reads.
            cautious: whether to exclude these from every transform; else the experiments decide.
        """
        self._config, self._real_config = configs
        self.module, self._real = module, real
        self.hidden, self._args, self._kwargs = entering
        self._read, self._cautious = read, cautious
        self._owners = {
            name: m for name, m in module.named_modules() if isinstance(m, SeparateExperts)
        }
        # Linears of experts by name → whether their outputs are what the experts put out.
        self._routed = {
            f"{owner}.{name}.{expert}": name == (m.second_name or name)
            for owner, m in self._owners.items()
            for name in (*m.first_names, *filter(None, [m.second_name]))
            for expert in range(len(m.first[0]))
        }
        self._findings = Findings()

    def run(self) -> tuple[Tensor, list[Call]]:
        """Run the block once: its output, and the calls of norms, experts, and matrices."""
        calls: list[Call] = []
        handles = [
            module.register_forward_hook(keep(calls, name), with_kwargs=True)
            for name, module in self.module.named_modules()
            if own_weight(module) is not None
            or is_norm(module)
            or isinstance(module, SeparateExperts)
        ]
        output = self.module(self.hidden.clone(), *self._args, **self._kwargs)
        for handle in handles:
            handle.remove()
        return (output[0] if isinstance(output, tuple | list) else output), calls

    def find(self) -> Findings:
        """Run the experiments and return what they find."""
        _, calls = self.run()
        readers = [call for call in calls if self._is_reader(call)]
        self._findings.flattens = any(call.input.dim() < self.hidden.dim() for call in readers)
        by_key = self._sites_of(calls)
        for call in calls:
            matrix = own_weight(call.module) is not None and own_weight(call.module).dim() == 2
            if matrix and not self._is_reader(call) and call.key in by_key:
                by_key[call.key].floats.append(call.name)
        called = {call.name for call in calls}
        self._uncalled = [
            name for name in self._read if name not in called and self._is_linear(name)
        ]
        for site in by_key.values():
            if site.experts is not None:
                small = [name for name in site.modules if self._rows(name) in (1, EXPERTS)]
                site.floats += small
                site.modules = [name for name in site.modules if name not in small]
        self._findings.sites = list(by_key.values())
        for site in self._findings.sites:
            if site.experts is not None:
                site.count = self.count_of(site.experts)
                downs = [downs_count(block, site.experts) for block in (self.module, self._real)]
                site.lists = lists_source(self.module, site.experts, str(self._named(*downs)))
                self._find_up(site)
        self._explain_inputs(by_key, calls)
        self._find_writers()
        self._findings.sites += [FoundSite([name]) for name in self._uncalled]
        self._find_uncalled(called)
        return self._findings

    def _find_writers(self) -> None:
        """Set `stream_writers` and `writes_stream`."""
        for site in self._findings.sites:
            for name in site.modules:
                writes = self._writes(name)
                if writes:
                    self._findings.stream_writers.append(name)
                elif writes is None:
                    self._findings.writes_stream = False
        if not all(self._writes(name) for name in self._routed_downs()):
            self._findings.writes_stream = False
        if self._cautious and self._read.intersection(self._linears()):
            # A matrix whose weight is read directly may read or write the stream unobserved.
            self._findings.writes_stream = False

    def _find_uncalled(self, called: set[str]) -> None:
        """Add a site of its own for each linear that these tokens did not reach.

        Where a list has one beside those that are reached, a block chooses from the list (the
        adapters of Zamba 2), maybe another than this block: no divisor is folded there.
        """
        known = {name for site in self._findings.sites for name in [*site.modules, *site.floats]}
        experts = tuple(f"{site.experts}." for site in self._findings.sites if site.experts)
        for name in plain_linears(self.module):
            if name not in known | called and not name.startswith(experts):
                for site in self._findings.sites:
                    if _unnumbered(name) in map(_unnumbered, site.modules):
                        site.producer = site.heads = None
                self._findings.sites.append(FoundSite([name]))
                self._findings.writes_stream = False

    def _explain_inputs(self, by_key: dict[tuple[int, int], FoundSite], calls: list[Call]) -> None:
        """Set what each site reads, and its producer."""
        readers = [call.name for call in calls if self._is_reader(call)]
        norms = {_output_key(call): call for call in calls}
        silent = self._silent_inputs()
        for key, site in by_key.items():
            norm = norms.get(key)
            if norm is not None and is_norm(norm.module):
                self._behind_norm(site, norm, silent)
            elif site.first in silent and _same(silent[site.first], self.hidden):
                site.reads = "residual"
            elif site.experts is None:
                self._producer(site, readers)

    def _sites_of(self, calls: list[Call]) -> dict[tuple[int, int], FoundSite]:
        """The sites of the linears and experts that are called, by the keys of their inputs."""
        by_key: dict[tuple[int, int], FoundSite] = {}
        placed: set[str] = set()
        multiples: dict[tuple[int, int], int] = {}  # by the key of a norm's output times a factor
        norm: Call | None = None  # the last before a call
        for call in calls:
            if is_norm(call.module):
                norm = call
            if not self._is_reader(call) or call.name in placed:
                continue  # of a module that is called twice, the site is what it reads first
            placed.add(call.name)
            key, experts = call.key, isinstance(call.module, SeparateExperts)
            if key not in by_key and norm is not None:
                width = call.input.shape[-1]
                of_norm = norm.output.shape[-1] == width == self.hidden.shape[-1]
                # Experts may read copies, or a selection, of what the norm before them puts out,
                # times the router's scores (Llama 4); a linear may read a multiple of it, as where
                # inputs have a factor (Falcon-H1).
                same = _has_rows_of if experts else _is_multiple
                if of_norm and same(call.input, norm.output):
                    key = _output_key(norm)
            site = by_key.setdefault(key, FoundSite([]))
            if key != call.key and not experts:
                multiples.setdefault(call.key, len(multiples) + 1)
                site.multiples[call.name] = multiples[call.key]
            if experts and site.experts is None:
                site.experts = call.name
            elif experts:
                by_key[call.key[0], -len(by_key)] = FoundSite([], experts=call.name)
            else:
                site.modules.append(call.name)
        return by_key

    def _is_reader(self, call: Call) -> bool:
        return isinstance(call.module, SeparateExperts) or (
            isinstance(call.module, nn.Linear) and call.name not in self._routed
        )

    def _rows(self, module: str) -> int:
        return len(self.module.get_parameter(f"{module}.weight"))

    def _routed_downs(self) -> list[str]:
        """The names of experts' last linears that some token reaches."""
        _, calls = self.run()
        return [call.name for call in calls if self._routed.get(call.name)]

    def _silent_inputs(self) -> dict[str, Tensor]:
        """The input of each module when all matrices of the block are zero.

        Nothing is added to the residual stream then, so its readers get the block's input.
        """
        with _zeroed(self.module):
            output, calls = self.run()
        if not _same(output, self.hidden):
            self._findings.writes_stream = False
        return {call.name: call.input for call in calls}

    def _behind_norm(self, site: FoundSite, norm: Call, silent: dict[str, Tensor]) -> None:
        facts = norm_facts(norm)
        offset = ", offset=1" if facts.offset else ""
        weight = own_weight(norm.module)
        takes = weight is not None and weight.numel() == self._width(site)
        if (
            takes
            and not self._is_read(site)
            and (not self._uncalled or self._absorbs(site, norm, facts))
        ):
            site.producer = f"Norm({quoted(norm.name + '.weight')}{offset})"
        if norm.name in silent and _same(silent[norm.name], self.hidden):
            site.reads = "residual"
            self._findings.stream_norms.append(facts)

    def _width(self, site: FoundSite) -> int:
        """Channels of a site's input."""
        if not site.modules:
            return int(self.hidden.shape[-1])
        return int(self.module.get_parameter(f"{site.modules[0]}.weight").shape[1])

    def _absorbs(self, site: FoundSite, norm: Call, facts: NormFacts) -> bool:
        """Whether a divisor folded into a norm cancels in a site's readers.

        If not, something else reads the norm's output.
        """
        readers = [*site.modules, *site.floats]
        if site.experts is not None:
            within = f"{site.experts}."
            readers += [n for n, last in self._routed.items() if n.startswith(within) and not last]
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
            for producer, source, rows, heads in self._candidates(name, width):
                if self._follows(module, name, rows, heads):
                    mixes = self._mixes(name, module)
                    if mixes == (heads is not None):
                        site.producer, site.heads = producer, source
                        site.reads = "attention" if mixes else "mlp"
                        return
        # Without a producer: a reader that an earlier matrix reaches token by token is in an MLP.
        alone = any(self._mixes(name, module) is False for name in earlier)
        site.reads = "mlp" if alone else "attention"

    def _is_linear(self, name: str) -> bool:
        return name in self._linears()

    def _candidates(
        self, module: str, width: int
    ) -> Iterator[tuple[str, str | None, list[slice], Heads | None]]:
        """Rows of a matrix that may be the producer of a site, for every possible layout.

        Args:
            module: the earlier linear.
            width: channels of the site's input.

        Yields:
            Python source of the producer and of the heads of values, or None; the slices of rows;
            these heads, or None.
        """
        rows, tensor = self._rows(module), f"{module}.weight"
        for counted, heads in self._head_counts(rows, width):
            values, fused = heads.key_value * heads.dim, heads.query + 2 * heads.key_value
            if heads.query * heads.dim != width or heads.query % heads.key_value:
                continue
            if rows == values:
                yield f"Rows({weights_source([module])})", counted, [slice(None)], heads
            if rows == fused * heads.dim:
                last = slice(rows - values, None)
                call = f"(concatenated_values({quoted(tensor)}, {counted}),)"
                yield f"Rows({call})", counted, [last], heads
                size = fused // heads.key_value
                starts = range((size - 1) * heads.dim, rows, size * heads.dim)
                call = f"interleaved_values({quoted(tensor)}, {counted})"
                value_rows = [slice(start, start + heads.dim) for start in starts]
                yield f"Rows({call})", counted, value_rows, heads
        for chosen, part in self._up_layouts(module, width):
            ref = f"WeightRef({quoted(tensor)}{', ' + chosen if chosen else ''})"
            yield f"Rows(({ref},))", None, [part], None

    def _up_layouts(self, module: str, width: int) -> Iterator[tuple[str, slice]]:
        """Rows of a matrix that may be `up`: Python source of their slice, and the slice."""
        rows = self._rows(module)
        real = self._real.get_parameter(f"{module}.weight").shape[0]
        size = self._named(rows // 2, real // 2)
        for layout, part in _UP_ROWS.items():
            chosen = part(rows)
            known = "{width}" not in layout or size is not None
            if known and len(range(rows)[chosen]) == width:
                yield layout.format(width=size), chosen

    def _named(self, tiny: int, real: int) -> str | None:
        """Python source of a number that is `tiny` in the tiny model and `real` in the real one."""
        if tiny == real:
            return str(real)
        fields = dict.fromkeys((*WIDTHS, *EXPERT_COUNTS, *vars(self._config)))
        return next(
            (
                f"config.{name}"
                for name in fields
                if number_of(self._config, name) == tiny
                and number_of(self._real_config, name) == real
            ),
            None,
        )

    def _head_counts(self, rows: int, width: int) -> Iterator[tuple[str, Heads]]:
        """Head counts that a block may have, each with its Python source.

        Args:
            rows: of the matrix that computes its values.
            width: channels of the output projection's input.
        """
        if not getattr(self._config, "num_attention_heads", None):
            return
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

    def _writes(self, module: str) -> bool | None:
        """Whether a constant added to a matrix's output is added, times a factor, to the stream.

        None where it reaches the stream in another way. All matrices are zero, so that what it
        writes to the stream is all that it can change there.
        """
        linear = self.module.get_submodule(module)
        added = torch.randn(self._rows(module), dtype=torch.float64, generator=torch.Generator())

        def add(_linear: nn.Module, _args: Any, output: Any) -> Any:
            if isinstance(output, tuple):  # of a router, scores come first
                return output[0] + added, *output[1:]
            return output + added

        with _zeroed(self.module):
            before, calls = self.run()
            call = next((call for call in calls if call.name == module), None)
            if call is None:
                return True  # an expert that no token reaches is like those that some reach
            if call.output.shape[-1] != len(added):
                return None  # a subclass of nn.Linear with a product of its own
            with linear.register_forward_hook(add):
                after, _ = self.run()
        change = after - before
        if change.abs().max() <= EXACT:
            return False
        if len(added) != change.shape[-1]:
            return None
        factor = change @ added / added.square().sum()
        straight = (change - factor[..., None] * added).abs().max() <= EXACT
        return True if straight else None

    def count_of(self, experts: str) -> str:
        """Python source of the number of experts of a layer."""
        tiny, real = (experts_count(block, experts) for block in (self.module, self._real))
        named = self._named(tiny, real)
        if named is None:
            raise LookupError(f"no field of the config is the number of experts in '{experts}'")
        return named

    def _up_beside(self, down: str) -> str:
        """The name of the last of an expert's first linears, by that of its second."""
        owner = next(n for n in self._owners if down.startswith(f"{n}."))
        module: Any = self._owners[owner]
        return f"{owner}.{module.first_names[-1]}.{down.rpartition('.')[2]}"

    def _find_up(self, site: FoundSite) -> None:
        """Set the rows of up in the experts of a site, which can absorb a divisor of down."""
        for down in self._routed_downs():
            if not down.startswith(f"{site.experts}."):
                continue
            fused = self._up_beside(down)
            width = self.module.get_parameter(f"{down}.weight").shape[1]
            for layout, chosen in self._up_layouts(fused, width):
                if self._follows(down, fused, [chosen], None):
                    site.up = layout or "slice(None)"
                    return


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
