"""Discovery of the wiring of a model type without a registered family.

Experiments run on a tiny model, built from the same config with small widths and random weights.
Their result is a Python file like those in `architectures.families`: a set of claims, of which each
that changes the logits of the tiny model is taken out (see `claims`). Where no tiny model runs, or
nothing can be claimed, every linear is a site of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ..architectures import Family
from ..checkpoint.skeleton import empty_model
from ..compat import use_eager_experts
from ..errors import UnsupportedModelError, first_line
from . import equivalence as equivalence
from .claims import Proof, proven
from .experiments import EXACT
from .family_source import FamilySource, load_family
from .shrink import tiny_configs
from .stack import find_stack, kinds_of, towers
from .weight_watch import read_weights

TOKENS = torch.tensor(
    [[3, 1, 4, 15, 9, 2, 6, 5, 35, 8, 9, 7], [2, 7, 18, 28, 1, 8, 2, 8, 4, 5, 9, 0]], device="cpu"
)
LARGEST = 20_000_000  # parameters of a tiny model

_families: dict[str, tuple[Family, str]] = {}  # by the config, as JSON


def discover_family(config: PretrainedConfig) -> tuple[Family, str]:
    """The family of a model, found by experiments, and its file's Python source.

    Args:
        config: of the real model; results are cached by it.

    Raises:
        UnsupportedModelError: the config fits no model, or no stack of blocks is in it.
    """
    key = config.to_json_string(use_diff=False)
    if key not in _families:
        _families[key] = _discover(config)
    return _families[key]


def _discover(config: PretrainedConfig) -> tuple[Family, str]:
    try:
        skeleton = empty_model(config)
    except ValueError as error:
        raise UnsupportedModelError(
            f"'{config.model_type}' is no causal LM that transformers knows: {first_line(error)}"
        ) from error
    kinds = kinds_of(skeleton)
    source = FamilySource(skeleton, kinds)
    with torch.no_grad():
        try:
            model = example(config, kinds)
            read = read_weights(model, TOKENS)
        except Exception as error:  # the model's own code may raise anything
            source.notes.append(
                "nothing is known of its wiring, so that every linear is a site of its own: "
                f"{first_line(error)}"
            )
            return load_family(source.text()), source.text()
        with equivalence.InFloat64():
            source.experiment(model, read, False, TOKENS)
        family, written = proven(source, model, read, TOKENS)
        if not read or not family.notes:
            return family, written
        # Where code reads weights, what the experiments see may be otherwise: leave these alone.
        cautious = FamilySource(skeleton, kinds)
        with equivalence.InFloat64():
            cautious.experiment(model, read, True, TOKENS)
        return proven(cautious, model, read, TOKENS)


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
        model = example(config, kinds_of(empty_model(config)))
        changes = Proof(model, family, read_weights(model, TOKENS), TOKENS).changes()
    for claim, change in changes.items():
        if not change <= EXACT:
            raise UnsupportedModelError(
                f"the wiring given for '{config.model_type}' is wrong: {claim} changes the logits "
                f"of a tiny model by {change:.1e}"
            )
    return changes


def example(config: PretrainedConfig, kinds: list[int]) -> PreTrainedModel:
    """A tiny float64 model with every kind of block that the real one has.

    Args:
        config: of the real model.
        kinds: of the real model's blocks, by `kinds_of`.

    Raises:
        UnsupportedModelError: no small model of its wiring runs.
    """
    last = max(kinds.index(kind) for kind in set(kinds))
    problems = []
    for tiny in tiny_configs(config, max(2, last + 1)):
        try:
            model = _random_model(tiny)
            if torch.isfinite(equivalence.logits(model, TOKENS)).all():
                return model
            problems.append("its logits are not finite")
        except Exception as error:  # the model's own code may raise anything
            problems.append(first_line(error))
    name = config.get_text_config(decoder=True).model_type
    raise UnsupportedModelError(f"no small model of '{name}' runs: {problems[0]}")


def _random_model(config: PretrainedConfig) -> PreTrainedModel:
    """A float64 model with random weights; those of vision and audio towers are on meta."""
    model: Any = empty_model(config)
    outside = tuple(f"{name}." for name in towers(model, find_stack(model)[1]))
    floats = {
        name: parameter
        for name, parameter in model.named_parameters()
        if not name.startswith(outside)
    }
    numbers = sum(parameter.numel() for parameter in floats.values())
    if numbers > LARGEST:
        raise UnsupportedModelError(f"with the widths that are known it has {numbers:,} parameters")
    generator = torch.Generator().manual_seed(0)
    for name, parameter in floats.items():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        owner, _, leaf = name.rpartition(".")
        values = 0.8 + 0.2 * noise if parameter.dim() == 1 else noise * parameter.shape[-1] ** -0.5
        filled = nn.Parameter(values, requires_grad=False)
        setattr(model.get_submodule(owner), leaf, filled)
    for name, buffer in list(model.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        if buffer.is_floating_point() and not buffer.is_meta:
            model.get_submodule(owner)._buffers[leaf] = buffer.double()
    model.config.dtype = torch.float64
    model.tie_weights()
    model.eval()
    use_eager_experts(model)
    tiny_model: PreTrainedModel = model
    return tiny_model
