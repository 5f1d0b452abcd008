"""The proof of a family: each transform that it allows must not change a tiny model's logits."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from typing import get_args

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from ..architectures import BlockGraph, Family, Site
from ..architectures.graph import Edge
from . import equivalence as equivalence
from .experiments import EXACT
from .family_source import FamilySource, InferredFamily, load_family
from .findings import FoundSite

TOGETHER = "all transforms together"
_EDGES: dict[str, Edge] = {
    "smoothing of norms": "norms",
    "smoothing of up_down": "up_down",
    "smoothing of value_output": "value_output",
}


class Proof:
    """A tiny model on which rewrites are tried.

    Attributes:
        family: whose graphs they follow; linears whose weights the model's code reads stay float.
        claims: the rewrites that it allows, by name, and all of them together.
    """

    def __init__(
        self, model: PreTrainedModel, family: Family, read: frozenset[str], tokens: Tensor
    ) -> None:
        """Linearize a copy of the model.

        Args:
            model: in float64.
            family: to be proven.
            read: full names of the linears whose weights the model's own code reads.
            tokens: int64 (batch, length), whose logits are compared.
        """
        self.family, self._tokens = without_read(family, read), tokens
        self._before = equivalence.logits(model, tokens)
        self.opened = copy.deepcopy(model)
        equivalence.open_blocks(self.opened, self.family)
        self.claims = equivalence.claims(self.opened, self.family)
        self.claims[TOGETHER] = equivalence.everything

    def change(self, rewrite: equivalence.Rewrite) -> float:
        """The largest change of a logit, as a share of the largest; Inf where it raises."""
        tried = copy.deepcopy(self.opened)
        try:
            rewrite(tried, self.family)
            return equivalence.deviation(equivalence.logits(tried, self._tokens), self._before)
        except Exception:  # a graph that does not fit, or the model's own code
            return float("inf")

    def holds(self, rewrite: equivalence.Rewrite) -> bool:
        """Whether a rewrite changes no logit by more than `EXACT` of the largest."""
        return self.change(rewrite) <= EXACT

    def changes(self) -> dict[str, float]:
        """The change by every claim."""
        return {claim: self.change(rewrite) for claim, rewrite in self.claims.items()}


def proven(
    source: FamilySource, model: PreTrainedModel, read: frozenset[str], tokens: Tensor
) -> tuple[InferredFamily, str]:
    """The family of a source without the claims that fail, and its Python source.

    Args:
        source: what was found; the claims that fail are taken out, each with a note.
        model: the tiny model, in float64.
        read: full names of the linears whose weights the model's own code reads.
        tokens: int64 (batch, length), whose logits are compared.
    """
    while True:
        written = source.text()
        family = load_family(written)
        proof = Proof(model, family, read, tokens)
        failed = next(
            (name for name, rewrite in proof.claims.items() if not proof.holds(rewrite)), None
        )
        if failed is None:
            return family, written
        _take_out(source, proof, failed)


def _take_out(source: FamilySource, proof: Proof, claim: str) -> None:
    """Take a claim that fails out of a source, at as few sites as possible."""
    where = ""
    if claim == "stream rotation" or (claim == TOGETHER and source.rotatable):
        source.rotatable = False
    elif claim == "stream rotation, folded":
        # The rotation itself holds, and is applied where the stream enters.
        source.sums_at_entry = False
        return
    else:
        sites = _sites(source, proof, claim)
        failing = [key for key in sites if not proof.holds(_at(source, claim, key))] or list(sites)
        for key in failing:
            _take_from(sites[key], claim)
        where = " at " + ", ".join(dict.fromkeys(name for _, name in failing))
    source.notes.append(f"{claim} does not hold{where}, and is left out")


def _take_from(site: FoundSite, claim: str) -> None:
    """Take a claim out of a site."""
    if claim == "value rotation":
        site.turns = False
    elif claim == "input rotation":
        site.floats, site.modules = [*site.floats, *site.modules], []
    else:
        site.producer, site.heads = None, None
        if claim == TOGETHER or _EDGES.get(claim) == "up_down":
            site.up = "None"  # of the experts that read it, which claim that for their downs


def _sites(source: FamilySource, proof: Proof, claim: str) -> dict[tuple[int, str], FoundSite]:
    """The sites of which a source claims something: by kind of block, and name."""
    edges = {
        "norm fusion": ("norms",),
        "value rotation": ("value_output",),
        **{name: (edge,) for name, edge in _EDGES.items()},
        TOGETHER: get_args(Edge),
    }.get(claim)
    return {
        _key(source, index, site): _finding(source, index, site)
        for index, (_, graph) in enumerate(equivalence.graphs(proof.opened, proof.family))
        for site in graph.sites
        if site.readers and (edges is None or site.edge in edges)
    }


def _at(source: FamilySource, claim: str, key: tuple[int, str]) -> equivalence.Rewrite:
    """The rewrite of a claim at the sites of one name, in all blocks of one kind."""

    def chosen(index: int, site: Site) -> bool:
        return _key(source, index, site) == key

    match claim:
        case "value rotation":
            return partial(equivalence.rotate_values, chosen=chosen)
        case "input rotation":
            return partial(equivalence.rotate_inputs, chosen=chosen)
        case "norm fusion":
            return equivalence.smoothing("norms", chosen=chosen)
        case _:
            edges = (_EDGES[claim],) if claim in _EDGES else get_args(Edge)
            return equivalence.smoothing(*edges, chosen=chosen)


def _key(source: FamilySource, index: int, site: Site) -> tuple[int, str]:
    finding = source.findings[source.kinds[index]]
    names = zip(finding.names, finding.sites, strict=True)
    wanted = _finding(source, index, site)
    return source.kinds[index], next(name for name, other in names if other is wanted)


def _finding(source: FamilySource, index: int, site: Site) -> FoundSite:
    """The finding that a site of a graph was written from; for an expert's down, its experts'."""
    finding = source.findings[source.kinds[index]]
    named = dict(zip(finding.names, finding.sites, strict=True))
    if site.name in named:
        return named[site.name]
    module = site.readers[0].module
    return next(f for f in finding.sites if f.experts and module.startswith(f"{f.experts}."))


def without_read(family: Family, read: frozenset[str]) -> Family:
    """A family whose graphs leave modules in float whose weights the model's own code reads."""

    def block(config: PretrainedConfig, index: int) -> BlockGraph:
        within = f".{family.layers}.{index}."
        names = {f".{name}".partition(within)[2] for name in read}
        return family.block(config, index).keeping(lambda module: module in names)

    return replace(family, block=block) if read else family
