"""Every form in which transformers stores experts, opened into linears and closed again."""

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from smoothq.architectures.experts import SeparateExperts, closed_stacks, form_of, is_experts
from smoothq.architectures.linearize import linearize_block, restore_block
from smoothq.architectures.parts import experts

HIDDEN, WIDTH, EXPERTS, CHOSEN, TOKENS = 12, 8, 5, 2, 7

# What a config of any experts module may be asked for.
FIELDS: dict[str, Any] = dict.fromkeys(
    ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), EXPERTS
) | {
    "n_shared_experts": 3,
    "zero_expert_num": 2,
    "moe_latent_size": None,
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "moe_intermediate_size": WIDTH,
    "expert_ffn_hidden_size": WIDTH,
    "ffn_hidden_size": WIDTH,
    "ffn_act_fn": {"name": "silu"},
    "moe_hidden_size": HIDDEN,
    "hidden_act": "silu",
    "hidden_activation": "silu",
    "mlp_gate_softcap": 3.0,
    "mlp_up_softcap": 3.0,
    "mlp_hidden_act": "relu2",
    "activation": "silu",
    "swiglu_alpha": 1.7,
    "swiglu_limit": 0.4,
    "rms_norm_eps": 1e-5,
    "post_norm_eps": 1e-5,
    "_experts_implementation": "eager",
}
ENCODERS = ("nllb_moe", "switch_transformers", "openai_privacy_filter")


def experts_classes() -> Iterator[type[nn.Module]]:
    """Every class of transformers that stores experts in stacks, but those of encoders."""
    names: set[str] = set()
    for path in sorted(Path(transformers.models.__path__[0]).glob("*/modeling_*.py")):
        package = path.parent.name
        if package in ENCODERS or "Experts(nn.Module)" not in path.read_text(encoding="utf-8"):
            continue
        module = importlib.import_module(f"transformers.models.{package}.{path.stem}")
        for name, kind in inspect.getmembers(module, inspect.isclass):
            local = kind.__module__ == module.__name__
            if name.endswith("Experts") and local and name not in names:
                names.add(name)
                yield kind


CLASSES = list(experts_classes())


def stock(kind: type[nn.Module]) -> nn.Module:
    """A stock module of random float64 weights."""
    split = kind.__name__ == "JetMoeParallelExperts"
    module = kind(EXPERTS, HIDDEN, WIDTH) if split else kind(SimpleNamespace(**FIELDS))
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.requires_grad_(False)
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module.double()


def opened(kind: type[nn.Module]) -> tuple[nn.Module, nn.Module]:
    """A stock module, and a block that holds an opened copy of it."""
    module = stock(kind)
    block = nn.ModuleDict({"experts": copy.deepcopy(module)})
    linearize_block(block)
    return module, block


def arguments(name: str, spare: bool) -> tuple[Any, ...]:
    """What a module is called with. spare: leave the last expert without a token."""
    generator = torch.Generator().manual_seed(2)
    used = EXPERTS - spare + (2 if name == "LongcatFlashExperts" else 0)
    x = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64)
    scores = torch.rand(TOKENS, used, generator=generator, dtype=torch.float64)
    weights, chosen = scores.topk(CHOSEN, -1)
    match name:
        case "DbrxExperts":
            return x.view(1, TOKENS, HIDDEN), chosen, weights
        case "InklingSharedExperts":
            return x.view(1, TOKENS, HIDDEN), torch.rand(1, TOKENS, 3, dtype=torch.float64)
        case "JetMoeParallelExperts":
            counts = torch.bincount(chosen.flatten(), minlength=EXPERTS).tolist()
            return torch.randn(sum(counts), HIDDEN, generator=generator).double(), counts
        case "Llama4TextExperts":
            routed = torch.zeros(EXPERTS, TOKENS, dtype=torch.float64)
            routed.scatter_(0, chosen.T, weights.T)
            return ((routed.unsqueeze(-1) * x).flatten(0, 1),)
    return x, chosen, weights


class TestEveryForm:
    """Whatever way a module of transformers stores its experts."""

    @pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
    def test_it_is_opened_into_linears_that_compute_the_same(self, kind) -> None:
        module, block = opened(kind)
        assert isinstance(block["experts"], SeparateExperts)
        assert not list(closed_stacks(block))
        for spare in (False, True):
            given = arguments(kind.__name__, spare)
            expected, result = module(*given), block["experts"](*given)
            # Some sum up in float32, whatever they are given.
            rounded = "Inkling" in kind.__name__ or kind.__name__ == "BeamExperts"
            torch.testing.assert_close(
                result, expected, rtol=0, atol=1e-4 if rounded else 1e-12, check_dtype=True
            )

    @pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
    def test_closing_it_gives_the_stock_module_back(self, kind) -> None:
        module, block = opened(kind)
        restore_block(block, nn.ModuleDict({"experts": module}))
        closed = block["experts"]
        assert type(closed) is kind
        expected = module.state_dict()
        assert closed.state_dict().keys() == expected.keys()
        for name, tensor in closed.state_dict().items():
            assert torch.equal(tensor, expected[name])
        given = arguments(kind.__name__, False)
        assert torch.equal(closed(*given), module(*given))

    @pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
    def test_each_matrix_is_a_linear_of_its_own_and_shares_the_stacks_memory(self, kind) -> None:
        module, block = opened(kind)
        form = form_of(module)
        assert form is not None
        split = block["experts"]
        assert sum(p.numel() for p in split.parameters()) == sum(
            p.numel() for p in module.parameters()
        )
        lists = [*split.first, *([] if split.second is None else [split.second])]
        for name, linears in zip(form.stacks, lists, strict=True):
            assert all(isinstance(linear, nn.Linear) for linear in linears)
            if name not in form.transposed:
                storages = {linear.weight.untyped_storage().data_ptr() for linear in linears}
                assert len(storages) == 1

    def test_only_routed_tokens_reach_an_expert(self) -> None:
        """As statistics need it, also where a stock module multiplies a copy of all tokens."""
        for kind in CLASSES:
            if kind.__name__ == "InklingSharedExperts":
                continue
            _, block = opened(kind)
            split, seen = block["experts"], dict[int, int]()

            def count(linear: nn.Module, args: tuple[Tensor], number: int, seen=seen) -> None:
                seen[number] = len(args[0])

            for number, linear in enumerate(split.first[0]):
                linear.register_forward_pre_hook(
                    lambda module, args, number=number, count=count: count(module, args, number)
                )
            split(*arguments(kind.__name__, True))
            assert sum(seen.values()) <= TOKENS * CHOSEN
            assert EXPERTS - 1 not in seen or kind.__name__ == "LongcatFlashExperts"


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_sites_name_the_linears_of_a_form(kind) -> None:
    module, block = opened(kind)
    form = form_of(module)
    assert form is not None
    if form.second is None:
        return
    count, up = len(block["experts"].second), slice(None)
    readers, downs = experts("experts", count, up, first=form.first, second=form.second)
    named = [*readers, *(reader for site in downs for reader in site.readers)]
    assert len({ref.tensor for ref in named}) == count * len(form.stacks)
    for ref in named:
        assert ref.routed
        assert isinstance(block.get_submodule(ref.module), nn.Linear)


def test_a_module_of_an_unknown_form_stays_as_it_is_and_is_named() -> None:
    class Unknown(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.zeros(3, 8, 4))
            self.down_proj = nn.Parameter(torch.zeros(3, 4, 4))
            self.mixing = nn.Parameter(torch.zeros(1, 1, 4))  # no stack of matrices

    block = nn.ModuleDict({"experts": Unknown(), "conv": nn.Conv1d(2, 2, 3)})
    linearize_block(block)
    assert type(block["experts"]) is Unknown
    assert not is_experts(block["experts"])
    assert list(closed_stacks(block)) == ["experts.gate_up_proj", "experts.down_proj"]
