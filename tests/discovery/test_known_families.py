"""Discovery finds for every type with a file just the claims that the file makes."""

from typing import Any

import pytest
from transformers import AutoConfig

from smoothq.architectures import Family, Site, family_of, supported_model_types
from smoothq.architectures.graph import takes_rotation, text_config
from smoothq.architectures.linearize import linearize_block
from smoothq.checkpoint.skeleton import empty_model
from smoothq.discovery.infer import discover_family


def claims_of(site: Site) -> tuple[Any, ...]:
    """What a site says but for its name, and that of the norm's parameter."""
    rows = site.producer if site.edge == "up_down" else None
    floats = tuple(reader.tensor for reader in site.float_readers)
    return site.modules, site.reads, site.edge, site.turns_values, rows, floats


def claims(family: Family, config: Any) -> tuple[Any, ...]:
    """What a family says of a model's first block, and of what stands around the blocks."""
    model = empty_model(config)
    parts = family.parts(model)
    block = next(iter(model.get_submodule(parts.layers).children()))
    linearize_block(block)
    graph = family.graph(text_config(model), 0, block)
    sites = sorted(map(claims_of, graph.sites), key=str)
    return parts, family.centred, family.sums_at_entry, takes_rotation([graph]), sites


@pytest.mark.slow
@pytest.mark.parametrize("name", supported_model_types())
def test_discovery_finds_what_the_file_claims(name: str) -> None:
    config = AutoConfig.for_model(name, num_hidden_layers=2)
    known, (discovered, _) = family_of(config), discover_family(config)
    assert known is not None
    assert not discovered.notes
    assert claims(discovered, config) == claims(known, config)
