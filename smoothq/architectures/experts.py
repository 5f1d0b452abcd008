"""Experts modules of transformers, opened: a linear for every matrix of every expert.

Transformers stacks the matrices of a layer's experts in one parameter, in several forms. `form_of`
says which a module has; `open_experts` replaces each stack by a list of linears and the module's
forward by one that computes the same with them; `close_experts` undoes it. A module of no known
form is left as it is.

Where every matrix has been quantized, all experts of a layer are multiplied at once
(`multiply_together` of their linears); otherwise, and where a model's experts implementation is
`eager`, one after the other, so that hooks see each expert's tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..compat import (
    activated,
    expert_count,
    experts_are_gated,
    experts_are_transposed,
    experts_sum_dtype,
    mark_initialized,
    passes_identities,
    runs_experts_one_by_one,
)
from .mixin import Mixin, mix_in, take_out


@dataclass(frozen=True)
class Form:
    """How a kind of experts module stores its matrices.

    Attributes:
        mixin: what computes with them, opened.
        first: names of the parameters that are multiplied by the module's input.
        second: name of the parameter that is multiplied by the activation; None for a module that
            is a single product.
        transposed: those of them whose matrices are (in_features, out_features).
    """

    mixin: type[SeparateExperts]
    first: tuple[str, ...]
    second: str | None
    transposed: tuple[str, ...] = ()

    @property
    def stacks(self) -> tuple[str, ...]:
        """The names of all parameters."""
        return self.first + (() if self.second is None else (self.second,))


@mark_initialized  # transformers would initialise the parameters that it had
class SeparateExperts(Mixin):
    """Base of what is mixed into an opened experts module: lists of linears in place of stacks.

    Attributes:
        form: of the module.
    """

    form: Form

    @property
    def first(self) -> tuple[nn.ModuleList, ...]:
        """The linears that read the module's input: one list, or a list for each kind."""
        return tuple(_list_of(self, name) for name in self.form.first)

    @property
    def second(self) -> nn.ModuleList | None:
        """The linears that read the activation, or None."""
        return None if self.form.second is None else _list_of(self, self.form.second)

    @property
    def views(self) -> dict[str, str]:
        """Stacks whose matrices the linears were views of when opened: name → that of the list."""
        form = self.form
        return {name: _list_path(name) for name in form.stacks if name not in form.transposed}

    @property
    def first_names(self) -> tuple[str, ...]:
        """The names of the lists in `first`, within the module."""
        return tuple(map(_list_name, self.form.first))

    @property
    def second_name(self) -> str | None:
        """The name of the list `second`, within the module, or None."""
        return None if self.form.second is None else _list_name(self.form.second)

    @property
    def multiplies_together(self) -> bool:
        """Whether all experts can be multiplied at once: the last matrix is quantized."""
        if runs_experts_one_by_one(self):
            return False
        linears = self.first[-1] if self.second is None else self.second
        return hasattr(type(_members(linears)[-1]), "multiply_together")

    @property
    def device(self) -> torch.device:
        """Where the experts run."""
        linear = _members(self.first[0])[0]
        tensor = linear if hasattr(type(linear), "device") else linear.weight
        device: torch.device = tensor.device
        return device

    def operators(self) -> tuple[str, ...]:
        """The operators of `smoothq.kernels` that multiply all experts at once; none one by one."""
        if not self.multiplies_together:
            return ()
        lists = [*self.first, *(() if self.second is None else (self.second,))]
        members = [_members(linears)[0] for linears in lists]
        names = [getattr(linear, "operator_together", None) for linear in members]
        return () if None in names else tuple(dict.fromkeys(map(str, names)))

    def _inner(self, products: Sequence[Tensor]) -> Tensor:
        """The activation, from the products of the first matrices."""
        return activated(self, products[0] if len(products) == 1 else torch.cat([*products], -1))


class RoutedExperts(SeparateExperts):
    """Experts that are called with all tokens, the experts of each, and their weights."""

    def forward(self, hidden_states: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum of each token's experts.

        Args:
            hidden_states: float (tokens, K).
            experts: int64 (tokens, k), the experts that each token is routed to.
            weights: float (tokens, k), of these experts.

        Returns:
            float (tokens, K).
        """
        result = self._together(hidden_states, experts, weights)
        return self._one_by_one(hidden_states, experts, weights) if result is None else result

    def _one_by_one(self, hidden_states: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        dtype = experts_sum_dtype(self, hidden_states, weights)
        result = torch.zeros_like(hidden_states, dtype=dtype)
        for expert in experts.unique().tolist():
            token, place = torch.where(experts == expert)
            output = self._expert(expert, hidden_states[token])
            if output is not None:
                output = output * weights[token, place, None]
                result.index_add_(0, token, output.to(result.dtype))
        return result.to(hidden_states.dtype)

    def _expert(self, expert: int, x: Tensor) -> Tensor | None:
        """One expert's output; None where a number stands for no expert."""
        assert self.second is not None
        if expert >= len(self.second):
            return x if passes_identities(self) else None
        inner = self._inner([linears[expert](x) for linears in self.first])
        return self._normed(self.second[expert](inner))

    def _normed(self, output: Tensor) -> Tensor:
        norm = getattr(self, "post_expert_norm", None)
        return output if norm is None else norm(output)

    def _together(self, hidden_states: Tensor, experts: Tensor, weights: Tensor) -> Tensor | None:
        """As `_one_by_one`, all experts at once; None where that is not possible.

        Sums have the same order: by expert, from the first on.
        """
        if not self.multiplies_together or not experts.numel():
            return None
        second = self.second
        assert second is not None
        tokens, chosen = experts.shape
        ordered, order = experts.flatten().sort(stable=True)
        rows = order // chosen
        ends = _ends(ordered, len(second))
        products = _all_together(self.first, hidden_states, rows, ends)
        if products is None:
            return None
        output = _together(second, self._inner(products), None, ends)
        if output is None:
            return None
        output = self._normed(output)
        if passes_identities(self):
            beyond = (ordered >= len(second)).unsqueeze(-1)
            output = torch.where(beyond, hidden_states[rows], output)
        output = output * weights.flatten()[order].unsqueeze(-1)
        output = output.to(experts_sum_dtype(self, hidden_states, weights))
        if tokens > 1:
            places = order.argsort().view(tokens, chosen).sort(-1).values
            output = output[places.flatten()]
        result, *others = output.view(tokens, chosen, -1).unbind(1)
        for other in others:
            result = result + other
        return result.to(hidden_states.dtype)


class GluExperts(RoutedExperts):
    """Routed experts whose matrices belong to a child module (DBRX), called with sequences."""

    def forward(self, hidden_states: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """As `RoutedExperts.forward`, for hidden states (batch, tokens, K)."""
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        result = super().forward(flat, experts, weights)
        return result.view(hidden_states.shape[0], -1, hidden_states.shape[-1])


class CopiedExperts(SeparateExperts):
    """Experts that are called with a copy of all tokens for each (Llama 4).

    A copy is zero but for the tokens that are routed to its expert; only these are multiplied.
    """

    def forward(self, hidden_states: Tensor) -> Tensor:
        """The experts' outputs.

        Args:
            hidden_states: float (experts · tokens, K), first all tokens of the first expert.

        Returns:
            The same shape.
        """
        assert self.second is not None
        count, tokens = len(self.second), len(hidden_states) // len(self.second)
        result = torch.zeros_like(hidden_states)
        routed = (hidden_states != 0).any(-1).nonzero().squeeze(-1)
        if self.multiplies_together and len(routed):
            ends = _ends(routed // tokens, count)
            products = _all_together(self.first, hidden_states[routed], None, ends)
            if products is not None:
                output = _together(self.second, self._inner(products), None, ends)
                if output is not None:
                    result[routed] = output
                    return result
        for expert, rows in enumerate(routed.split(_counts(routed // max(1, tokens), count))):
            if len(rows):
                x = hidden_states[rows]
                inner = self._inner([linears[expert](x) for linears in self.first])
                result[rows] = self.second[expert](inner)
        return result


class SplitExperts(SeparateExperts):
    """A product whose rows come sorted by expert, with the number of each (JetMoE)."""

    def forward(self, inputs: Tensor, expert_size: list[int]) -> Tensor:
        """The products.

        Args:
            inputs: float (rows, K), sorted by expert.
            expert_size: rows of each expert.

        Returns:
            float (rows, N).
        """
        (linears,) = self.first
        if self.multiplies_together and len(inputs):
            ends = torch.tensor(expert_size, device=inputs.device).cumsum(0)
            output = _together(linears, inputs, None, ends)
            if output is not None:
                return output
        parts = zip(linears, inputs.split(expert_size), strict=True)
        outputs = [linear(part) for linear, part in parts if len(part)]
        return torch.cat(outputs) if outputs else linears[0](inputs)


class SharedExperts(SeparateExperts):
    """Experts that every token passes, each with a factor of its own (Inkling)."""

    @property
    def multiplies_together(self) -> bool:
        """False: they are few, and all tokens pass each."""
        return False

    def forward(self, hidden_states: Tensor, gammas: Tensor) -> Tensor:
        """The sum of all experts.

        Args:
            hidden_states: float (..., K).
            gammas: float (..., experts), the factors of their activations.

        Returns:
            As `hidden_states`.
        """
        assert self.second is not None
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        factors = gammas.reshape(len(x), -1, 1)
        outputs = [
            linear(self._inner([linears[expert](x) for linears in self.first]) * factors[:, expert])
            for expert, linear in enumerate(self.second)
        ]
        total = torch.stack(outputs).float().sum(0)
        return total.to(hidden_states.dtype).view(hidden_states.shape)


def _ends(ordered: Tensor, count: int) -> Tensor:
    """Of numbers in order, how many are at most 0, 1, …, count - 1: int64 (count,)."""
    numbers = torch.arange(count, device=ordered.device, dtype=ordered.dtype)
    return torch.searchsorted(ordered, numbers, right=True)


def _counts(numbers: Tensor, count: int) -> list[int]:
    counts: list[int] = torch.bincount(numbers, minlength=count).tolist()
    return counts


def _together(
    linears: nn.ModuleList, x: Tensor, rows: Tensor | None, ends: Tensor
) -> Tensor | None:
    """The products of all experts, sorted by expert; None where each must run by itself."""
    members = _members(linears)[: len(ends)]  # LongCat stacks first matrices for identities too
    if not hasattr(type(members[0]), "multiply_together"):
        return None
    product: Tensor | None = members[0].multiply_together(members, x, rows, ends)
    return product


def _members(linears: nn.ModuleList) -> list[Any]:
    """The linears of a list; faster than its own iterator."""
    return list(linears._modules.values())


def _all_together(
    lists: Sequence[nn.ModuleList], x: Tensor, rows: Tensor | None, ends: Tensor
) -> list[Tensor] | None:
    products = []
    for linears in lists:
        product = _together(linears, x, rows, ends)
        if product is None:
            return None
        products.append(product)
    return products


_BOTH = ("gate_up_proj", "down_proj")
_FORMS = {
    "DbrxExperts": Form(GluExperts, ("mlp.w1", "mlp.v1"), "mlp.w2", ("mlp.w2",)),
    "InklingSharedExperts": Form(SharedExperts, ("gate_proj", "up_proj"), "down_proj"),
    "JetMoeParallelExperts": Form(SplitExperts, ("weight",), None),
    "Llama4TextExperts": Form(CopiedExperts, _BOTH[:1], _BOTH[1], _BOTH),
    "LongcatFlashExperts": Form(RoutedExperts, _BOTH[:1], _BOTH[1]),
    "Step3p7Experts": Form(RoutedExperts, _BOTH[:1], _BOTH[1]),
}


def form_of(module: nn.Module) -> Form | None:
    """The form of an experts module of transformers, opened or not; None for any other module."""
    if isinstance(module, SeparateExperts):
        return module.form
    named = _FORMS.get(type(module).__name__)
    if named is not None:
        return named
    gate = experts_are_gated(module)
    if gate is None:
        return None
    stacks = ("gate_up_proj" if gate else "up_proj", "down_proj")
    return Form(
        RoutedExperts, stacks[:1], stacks[1], stacks if experts_are_transposed(module) else ()
    )


def is_experts(module: nn.Module) -> bool:
    """Whether a module of transformers stores experts in stacks that `open_experts` opens."""
    form = None if isinstance(module, SeparateExperts) else form_of(module)
    return form is not None and all(_stack(module, name) is not None for name in form.stacks)


def closed_stacks(block: nn.Module) -> Iterator[str]:
    """The full names of a block's stacks of matrices, which no linear stands for.

    They stay float: of a linearized block, those of experts of an unknown form.
    """
    for name, parameter in block.named_parameters():
        if parameter.dim() == 3 and min(parameter.shape[1:]) > 1:
            owner = block.get_submodule(name.rpartition(".")[0])
            if not isinstance(owner, nn.modules.conv._ConvNd):
                yield name


def open_experts(experts: nn.Module) -> None:
    """Replace the stacks of an experts module by lists of linears, in place.

    The linears are views of the stacks where these are not transposed.
    """
    form = _form(experts)
    for name in form.stacks:
        stack = _stack(experts, name)
        assert stack is not None
        owner, attribute = _owner(experts, name)
        biases = getattr(owner, f"{attribute}_bias", None)
        matrices = stack.data
        if matrices.dim() == 2:
            matrices = matrices.unflatten(0, (expert_count(experts), -1))
        linears = [
            linear_of(
                matrix.t() if name in form.transposed else matrix,
                None if biases is None else biases.data[expert],
            )
            for expert, matrix in enumerate(matrices)
        ]
        delattr(owner, attribute)
        if biases is not None:
            delattr(owner, f"{attribute}_bias")
        setattr(owner, _list_name(attribute), nn.ModuleList(linears))
    mix_in(experts, form.mixin)
    experts.__dict__["form"] = form


def close_experts(experts: SeparateExperts) -> None:
    """Undo `open_experts`, in place."""
    form = experts.form
    take_out(experts)
    del experts.__dict__["form"]
    for name in form.stacks:
        owner, attribute = _owner(experts, name)
        linears: list[Any] = list(_list_of(experts, name))
        delattr(owner, _list_name(attribute))
        matrices = [linear.weight.data for linear in linears]
        if name in form.transposed:
            matrices = [matrix.t() for matrix in matrices]
        flat = form.mixin is GluExperts
        stack = torch.cat(matrices) if flat else torch.stack(matrices)
        setattr(owner, attribute, parameter_of(stack))
        if getattr(experts, "has_bias", False):
            biases = torch.stack([linear.bias.data for linear in linears])
            setattr(owner, f"{attribute}_bias", parameter_of(biases))


def parameter_of(values: Tensor) -> nn.Parameter:
    """A parameter of these values, contiguous, without a gradient."""
    return nn.Parameter(values.contiguous(), requires_grad=False)


def linear_of(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear with this weight, (N, K), and bias."""
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    linear.weight = parameter_of(weight)
    if bias is not None:
        linear.bias = parameter_of(bias.data)
    return linear


def _form(module: nn.Module) -> Form:
    form = form_of(module)
    assert form is not None
    return form


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, attribute = name.rpartition(".")
    return module.get_submodule(path) if path else module, attribute


def _stack(module: nn.Module, name: str) -> nn.Parameter | None:
    owner, attribute = _owner(module, name)
    stack = getattr(owner, attribute, None)
    if not isinstance(stack, nn.Parameter):
        return None
    flat = _form(module).mixin is GluExperts
    return stack if stack.dim() == (2 if flat else 3) else None


def _list_name(stack: str) -> str:
    """Where the linears of a stack are: a module named `weight` would be taken for a tensor."""
    return "experts" if stack == "weight" else stack


def _list_path(stack: str) -> str:
    path, dot, attribute = stack.rpartition(".")
    return f"{path}{dot}{_list_name(attribute)}"


def _list_of(module: nn.Module, name: str) -> nn.ModuleList:
    owner, attribute = _owner(module, name)
    linears = owner._modules[_list_name(attribute)]
    assert isinstance(linears, nn.ModuleList)
    return linears
