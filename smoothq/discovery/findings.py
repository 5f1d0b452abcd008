"""What is found of a block: sites, their producers, writers of the stream; as Python source."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from torch import nn

from ..architectures.linearize import SeparateExperts


@dataclass(frozen=True)
class NormFacts:
    """How a norm computes.

    Attributes:
        offset: as `Norm.offset`, 0 or 1.
        centred: whether it subtracts the mean (LayerNorm).
    """

    offset: int
    centred: bool


@dataclass
class FoundSite:
    """A site that was found.

    Attributes:
        modules: the linears that read it, to be quantized.
        multiples: of the modules that read it times a factor, their `WeightRef.multiple`.
        floats: other modules that read it and stay in float.
        reads: as `Site.reads`.
        producer: Python source of `Site.producer` without heads, or None.
        heads: Python source of the heads whose values the producer's rows are, or None.
        turns: as `Rows.turns`.
        experts: the name of the experts module that reads it, or None.
        count: Python source of the number of its experts.
        lists: Python source of the names of their lists of linears, as `experts` takes them.
        up: Python source of the rows of up in each of its experts, or `None`.
    """

    modules: list[str]
    multiples: dict[str, int] = field(default_factory=dict)
    floats: list[str] = field(default_factory=list)
    reads: str = "mlp"
    producer: str | None = None
    heads: str | None = None
    turns: bool = True
    experts: str | None = None
    count: str = ""
    lists: str = ""
    up: str = "None"

    @property
    def name(self) -> str:
        """A name for the site, from the names of its modules: `q_k_v` of q_proj, k_proj, v_proj."""
        if self.experts is not None:
            return "experts"
        names = [*self.modules, *self.floats]
        leaves = [name.rpartition(".")[2].removesuffix("_proj") for name in names]
        return "_".join(dict.fromkeys(leaves))

    @property
    def first(self) -> str:
        """The name of the first module that reads it."""
        return next(iter([*self.modules, *self.floats]), str(self.experts))

    def sources(self) -> Iterator[str]:
        """Python source of the references to its modules' weights."""
        number = self.multiples.get
        for multiple, names in groupby(self.modules, key=lambda name: number(name, 0)):
            yield weights_source(names, multiple)

    @property
    def producer_source(self) -> str:
        """Python source of `Site.producer`."""
        if self.producer is None or self.heads is None:
            return str(self.producer)
        turns = "" if self.turns else ", turns=False"
        return f"{self.producer.removesuffix(')')}, {self.heads}{turns})"


@dataclass
class Findings:
    """What was found of one kind of block.

    Attributes:
        sites: in the order of execution.
        stream_norms: the norms that read the residual stream.
        stream_writers: the linears outside of experts whose outputs are added to the stream.
        writes_stream: whether a rotation of the stream can be folded into all its writers.
        flattens: as of `Family`.
    """

    sites: list[FoundSite] = field(default_factory=list)
    stream_norms: list[NormFacts] = field(default_factory=list)
    stream_writers: list[str] = field(default_factory=list)
    writes_stream: bool = True
    flattens: bool = False

    @classmethod
    def plain(cls, block: nn.Module, count_of: Callable[[str], str] | None = None) -> Findings:
        """A site for every linear and every layer of experts, of which nothing is claimed.

        Args:
            block: linearized, on any device.
            count_of: name of an experts module → Python source of the number of its experts; None
                for the number itself.
        """
        experts = [name for name, m in block.named_modules() if isinstance(m, SeparateExperts)]
        inside = tuple(f"{name}." for name in experts)
        linears = [name for name in plain_linears(block) if not name.startswith(inside)]
        sites = [FoundSite([name]) for name in linears]
        for name in experts:
            count = str(experts_count(block, name)) if count_of is None else count_of(name)
            lists = lists_source(block, name, str(downs_count(block, name)))
            sites.append(FoundSite([], experts=name, count=count, lists=lists))
        return cls(sites, writes_stream=False)

    def body(self, rotatable: bool) -> str:
        """Python source of the body of the function that returns this block's graph.

        Args:
            rotatable: whether the writers of the residual stream are listed.
        """
        lines, variables, downs = [], [], []
        for number, name in enumerate(self.names):
            site, routed = self.sites[number], ""
            readers = list(site.sources())
            if site.experts is not None:
                routed = f"*downs_{number}"
                call = f"experts({quoted(site.experts)}, {site.count}, {site.up}{site.lists})"
                lines.append(f"routed, downs_{number} = {call}")
                readers.append("routed")
            fields = [quoted(name), quoted(site.reads), " + ".join(readers) or "()"]
            fields += [site.producer_source]
            fields += [weights_source(site.floats)] if site.floats else []
            arguments = "".join(f"        {argument},\n" for argument in fields)
            lines.append(f"site_{number} = Site(\n{arguments}    )")
            variables += [f"site_{number}", *([routed] if routed else [])]
            downs += [routed] if routed else []
        written = [weights_source(self.stream_writers)] if self.stream_writers else []
        written += [f"writers({', '.join(downs)})"] if downs else []
        residual = " + ".join(written) if rotatable and written else "()"
        sites = "".join(f"{variable}, " for variable in variables)
        lines.append(f"return BlockGraph(({sites}), residual_writers={residual})")
        return "".join(f"    {line}\n" for line in lines)

    @property
    def names(self) -> list[str]:
        """Names of the sites, all different."""
        names = [site.name for site in self.sites]
        return [
            name if names.count(name) == 1 else site.first.replace(".", "_")
            for name, site in zip(names, self.sites, strict=True)
        ]


def plain_linears(block: nn.Module) -> list[str]:
    """The names of a block's linears that do no more than multiply by their weight."""
    return [
        name
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    ]


def experts_count(block: nn.Module, experts: str) -> int:
    """The number of experts that a module of a linearized block has."""
    module: Any = block.get_submodule(experts)
    return len(module.first[0])


def downs_count(block: nn.Module, experts: str) -> int:
    """The number of second matrices of an experts module of a linearized block."""
    module: Any = block.get_submodule(experts)
    return 0 if module.second is None else len(module.second)


def lists_source(block: nn.Module, experts: str, downs: str) -> str:
    """Python source of the names of an experts module's lists; empty for the commonest names.

    Args:
        block: linearized.
        experts: name of the module within it.
        downs: Python source of the number of its second matrices.
    """
    module: Any = block.get_submodule(experts)
    names = module.first_names, module.second_name
    usual = names == (("gate_up_proj",), "down_proj")
    lists = "" if usual else f", {names[0]!r}, {names[1]!r}"
    if downs_count(block, experts) in (0, experts_count(block, experts)):
        return lists
    return f"{lists}, downs={downs}"


def quoted(value: str) -> str:
    """A string as a literal of Python source."""
    return f'"{value}"'


def weights_source(modules: Iterable[str], multiple: int = 0) -> str:
    """Python source of references to the whole weights of modules."""
    arguments = [*map(quoted, modules), *([f"multiple={multiple}"] if multiple else [])]
    return f"weights({', '.join(arguments)})"
