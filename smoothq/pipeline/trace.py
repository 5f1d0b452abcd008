"""What a decoder passes to its blocks, recorded from its own loop.

The stock loop runs once a micro-batch with a recorder in place of every block. A recorder keeps the
arguments of its call and returns placeholders of the form that the block's result has. A `Trace` is
the outcome, and it says where every argument comes from:

- a `Slot` is a tensor that a block returned, or the hidden states that enter the first block;
- a `Result` is computed by the decoder from slots, between two blocks;
- a `Constant` is any other tensor: a mask, a rotary table, the embedding of a layer;
- a `Shared` is an object that several blocks get and may write into, such as the keys and values
  that later layers read.

No name of an argument is known here. The form of a block's result is learned by running the block
on the meta device, with its arguments there too (`Forms`).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map, tree_unflatten
from transformers import PretrainedConfig

from ..architectures import Parts
from ..errors import UnsupportedModelError

ARITHMETIC = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")
CHANGING = frozenset({"__setitem__", "__set__", *(f"__i{name}__" for name in ARITHMETIC)})
ATOMS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
OPAQUE = (nn.Module, type, Enum, PretrainedConfig, FunctionType, BuiltinFunctionType, MethodType)


@dataclass(frozen=True)
class Constant:
    """A tensor that no block computes. number: in its trace."""

    number: int


@dataclass(frozen=True, order=True)
class Slot:
    """A tensor of a block's result.

    Attributes:
        call: the number of the block's call; −1 for the hidden states that enter the first block.
        leaf: the number of the tensor in the result; 0 are the hidden states.
    """

    call: int
    leaf: int = 0


@dataclass(frozen=True)
class Result:
    """A tensor that the decoder computes from slots.

    Attributes:
        operation: the number of the torch function's call in the trace.
        leaf: the number of the tensor among those that it returns or changes.
    """

    operation: int
    leaf: int


@dataclass(frozen=True)
class Shared:
    """A mutable object among the arguments. number: in its trace."""

    number: int


Reference = (Constant, Slot, Result, Shared)
ENTRY = Slot(-1)


@dataclass(frozen=True)
class Operation:
    """A torch function that the decoder called on slots, or on results of such functions.

    Attributes:
        function: of torch.
        arguments: (args, kwargs), with references in place of tensors.
        in_place: whether it changes its first argument.
        before: how many blocks had been called.
    """

    function: Callable[..., Any]
    arguments: Any
    in_place: bool
    before: int


@dataclass
class SharedObject:
    """An object that the decoder passes to blocks.

    Attributes:
        prototype: the object; its content is replaced before it is passed on.
        content: what it had in it: (key, value) of a mapping or an object's attributes, or the
            values of a list, with references in place of tensors.
        calls: the numbers of the calls that it is passed to.
    """

    prototype: Any
    content: list[Any]
    calls: list[int] = field(default_factory=list)

    @property
    def carries(self) -> bool:
        """Whether one block may read from it what another has written."""
        return len(set(self.calls)) > 1


@dataclass(frozen=True)
class Call:
    """A block's call.

    Attributes:
        block: the number of the block.
        args, kwargs: with references in place of tensors and mutable objects.
        form: of the result.
        leaves: of the result; a tensor's place is taken by the example that was returned.
    """

    block: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    form: TreeSpec
    leaves: tuple[Any, ...]

    def result(self, tensors: Callable[[int, Tensor], Tensor]) -> Any:
        """An object of the form of the block's result.

        Args:
            tensors: number of a tensor in the result, and an example of it → the tensor.
        """
        leaves, number = [], 0
        for leaf in self.leaves:
            if isinstance(leaf, Tensor):
                leaves.append(tensors(number, leaf))
                number += 1
            else:
                leaves.append(leaf)
        return tree_unflatten(leaves, self.form)


@dataclass
class Trace:
    """The calls of all blocks in one forward, in order.

    Attributes:
        calls: of blocks.
        operations: of the decoder, between and behind the blocks.
        constants: number → tensor.
        varying: the numbers of the constants that depend on the tokens.
        shared: the mutable objects.
    """

    calls: list[Call] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)
    constants: dict[int, Tensor] = field(default_factory=dict)
    varying: set[int] = field(default_factory=set)
    shared: list[SharedObject] = field(default_factory=list)
    _alive: dict[int, list[Slot]] = field(default_factory=dict)
    _varying_in: dict[int, list[int]] = field(default_factory=dict)

    def call_of(self, block: int) -> int | None:
        """The number of a block's first call; None for a block that is not called."""
        return next((n for n, call in enumerate(self.calls) if call.block == block), None)

    def call_from(self, block: int) -> int:
        """The number of the first call of a block with this number or a later one."""
        later = (n for n, call in enumerate(self.calls) if call.block >= block)
        return next(later, len(self.calls))

    def calls_again(self, block: int, after: int) -> bool:
        """Whether a block is called once more after a call."""
        return any(call.block == block for call in self.calls[after + 1 :])

    def varying_in(self, call: int) -> list[int]:
        """The numbers of the varying constants that a call's arguments lead to."""
        if call not in self._varying_in:
            used = self._used((self.calls[call].args, self.calls[call].kwargs))
            numbers = {ref.number for ref in used if isinstance(ref, Constant)}
            self._varying_in[call] = sorted(numbers & self.varying)
        return self._varying_in[call]

    def carried(self, call: int) -> list[Slot]:
        """The slots that are needed in a call or later, by the next call's number; sorted.

        The last are the hidden states: what the previous block returned first.
        """
        if call not in self._alive:
            trees = [(c.args, c.kwargs) for c in self.calls[call:]]
            behind = [op.arguments for op in self.operations if op.before == len(self.calls)]
            needed = {ref for ref in self._used([*trees, behind]) if isinstance(ref, Slot)}
            before = {slot for slot in needed if slot.call < call} - {Slot(call - 1)}
            self._alive[call] = [*sorted(before), Slot(call - 1)]
        return self._alive[call]

    def changing(self, call: int) -> list[int]:
        """The numbers of the objects that blocks before a call may have changed for it."""
        return [
            number
            for number, shared in enumerate(self.shared)
            if shared.carries and min(shared.calls) < call <= max(shared.calls)
        ]

    def _used(self, tree: Any) -> set[Any]:
        """All references that a tree of arguments leads to."""
        used: set[Any] = set()
        waiting = tree_leaves(tree)
        while waiting:
            reference = waiting.pop()
            if not isinstance(reference, Reference) or reference in used:
                continue
            used.add(reference)
            if isinstance(reference, Result):
                waiting += tree_leaves(self.operations[reference.operation].arguments)
            if isinstance(reference, Shared):
                waiting += tree_leaves(self.shared[reference.number].content)
        return used

    def prune(self) -> None:
        """Forget the constants that no block's arguments lead to."""
        used = self._used([(call.args, call.kwargs) for call in self.calls])
        kept = {ref.number for ref in used if isinstance(ref, Constant)}
        self.constants = {n: tensor for n, tensor in self.constants.items() if n in kept}
        self.varying &= kept

    def forget_varying(self, device: torch.device) -> None:
        """Keep the constants that do not depend on the tokens, on a device, and no others."""
        self.constants = {
            number: tensor.to(device)
            for number, tensor in self.constants.items()
            if number not in self.varying
        }


class Arguments:
    """Computes the arguments of one call for one micro-batch."""

    def __init__(
        self,
        trace: Trace,
        tensor: Callable[[Constant | Slot], Tensor],
        content: Callable[[int], list[Any] | None],
        device: torch.device,
    ) -> None:
        """Nothing is computed yet.

        Args:
            trace: of the micro-batch.
            tensor: gives its constants and slots.
            content: number of a mutable object → what blocks have left in it, or None where it is
                as the decoder made it.
            device: where blocks run.
        """
        self._trace, self._tensor, self._content = trace, tensor, content
        self._device = device
        self._results: dict[int, list[Tensor]] = {}
        self.shared: dict[int, Any] = {}  # the objects that the arguments contain, by number

    def of(self, call: Call) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments of a block."""
        args, kwargs = tree_map(self._value, (call.args, call.kwargs))
        return args, kwargs

    def _value(self, leaf: Any) -> Any:
        if isinstance(leaf, torch.device):
            return self._device
        if isinstance(leaf, Constant | Slot):
            return self._tensor(leaf)
        if isinstance(leaf, Result):
            return self._computed(leaf.operation)[leaf.leaf]
        if isinstance(leaf, Shared):
            return self._object(leaf.number)
        return leaf

    def _computed(self, number: int) -> list[Tensor]:
        if number not in self._results:
            operation = self._trace.operations[number]
            args, kwargs = tree_map(self._value, operation.arguments)
            if operation.in_place:  # what is stored stays as it is
                args = (args[0].clone(), *args[1:])
            result = operation.function(*args, **kwargs)
            self._results[number] = tensors_of(args[0] if operation.in_place else result)
        return self._results[number]

    def _object(self, number: int) -> Any:
        if number not in self.shared:
            described = self._trace.shared[number]
            content = self._content(number)
            if content is None:
                content = tree_map(self._value, described.content)
            if described.carries:  # a block may write into its tensors, which others share
                content = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, content)
            self.shared[number] = _filled(described.prototype, content)
        return self.shared[number]


Reply = Callable[[int, nn.Module, tuple[Any, ...], dict[str, Any]], Any]
"""What a stand-in does when it is called: number of the block, block, args, kwargs → its result."""


class _StandIn(nn.Module):
    """Stands in place of a block."""

    def __init__(self, block: nn.Module, number: int, reply: Reply) -> None:
        super().__init__()
        object.__setattr__(self, "_block", block)
        self._number, self._reply = number, reply

    def __getattr__(self, name: str) -> Any:
        # Attributes of the block that a decoder reads, such as its attention type.
        return getattr(object.__getattribute__(self, "_block"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._reply(self._number, object.__getattribute__(self, "_block"), args, kwargs)


@contextmanager
def in_place_of_blocks(model: nn.Module, parts: Parts, reply: Reply) -> Iterator[None]:
    """Context in which a model's decoder calls `reply` in place of its blocks.

    Args:
        model: whose blocks are put back at the end.
        parts: its parts.
        reply: gives a block's result.
    """
    layers = model.get_submodule(parts.layers)
    blocks = dict(layers.named_children())
    for number, (name, block) in enumerate(blocks.items()):
        layers._modules[name] = _StandIn(block, number, reply)
    try:
        yield
    finally:
        layers._modules.update(blocks)


class Tracer(TorchFunctionMode):
    """A context in which the decoder's loop is recorded; `trace` is complete behind it."""

    def __init__(self, inputs: Sequence[Tensor], forms: Forms, all_vary: bool = False) -> None:
        """Record one forward.

        Args:
            inputs: what the model is run on, the tokens first, int64 (sequences, length).
            forms: of the results of the blocks.
            all_vary: whether to take every constant for one that depends on the inputs: with
                images positions are computed from sizes in Python, which no function shows.
        """
        super().__init__()
        self.trace, self.entered = Trace(), inputs[0]
        self._forms = forms.for_shape((all_vary, *inputs[0].shape))
        self._references: dict[int, Any] = {}  # id of a tensor or object → its reference
        self._shared: dict[tuple[torch.Size, torch.dtype], Tensor] = {}
        self._kept: list[Any] = [*inputs]  # alive, so that no id is used twice
        self._from_tokens = {id(tensor) for tensor in inputs}
        self._all_vary = all_vary

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call a torch function, and record it where it reads what a block returned."""
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        slots = (Slot, Result)
        recorded = any(isinstance(self._references.get(id(t)), slots) for t in inputs)
        arguments = self._operands((args, kwargs)) if recorded else None
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        in_place = name in CHANGING or (name.endswith("_") and not name.endswith("__"))
        produced = tensors_of(args[0] if in_place else result)
        if recorded and produced:
            number = len(self.trace.operations)
            calls = len(self.trace.calls)
            self.trace.operations.append(Operation(func, arguments, in_place, calls))
            for leaf, tensor in enumerate(produced):
                self._name(tensor, Result(number, leaf))
        elif any(id(tensor) in self._from_tokens for tensor in inputs):
            self._kept += produced
            self._from_tokens |= {id(tensor) for tensor in produced}
        return result

    def record(
        self, block_number: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Keep the arguments of a block's call. Returns placeholders in the form of its result."""
        number, hidden = len(self.trace.calls), _hidden(args, kwargs)
        if not number:
            self.entered = hidden
            self._name(hidden, ENTRY)
        encoded = self._encoded(args, number), self._encoded(kwargs, number)
        if number == len(self._forms):
            self._forms.append(_Form.of(block, args, kwargs, hidden))
        form = self._forms[number]
        call = Call(block_number, *encoded, form.spec, form.examples(hidden))
        self.trace.calls.append(call)

        def placeholder(leaf: int, example: Tensor) -> Tensor:
            with torch._C.DisableTorchFunction():
                tensor = self._zeros(example.shape, example.dtype, hidden.device)
            self._name(tensor, Slot(number, leaf))
            return tensor

        return call.result(placeholder)

    def _zeros(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor of its own identity and version; all of one form share their memory."""
        form = shape, dtype
        if form not in self._shared:
            self._shared[form] = torch.zeros(shape, dtype=dtype, device=device)
        return self._shared[form].data

    def _name(self, value: Any, reference: Any) -> None:
        self._kept.append(value)
        self._references[id(value)] = reference

    def _reference(self, tensor: Tensor) -> Any:
        if id(tensor) not in self._references:
            number = len(self.trace.constants)
            self.trace.constants[number] = tensor.detach()
            if self._all_vary or id(tensor) in self._from_tokens:
                self.trace.varying.add(number)
            self._name(tensor, Constant(number))
        return self._references[id(tensor)]

    def _operands(self, tree: Any) -> Any:
        """The arguments of a torch function, with references in place of tensors."""
        return tree_map(lambda x: self._reference(x) if isinstance(x, Tensor) else x, tree)

    def _encoded(self, value: Any, call: int, outermost: bool = True) -> Any:
        """An argument with references in place of tensors and mutable objects."""
        if isinstance(value, Tensor):
            return self._reference(value)
        if isinstance(value, tuple) and not isinstance(value, torch.Size):
            encoded = [self._encoded(member, call, False) for member in value]
            return type(value)(*encoded) if hasattr(value, "_fields") else tuple(encoded)
        if outermost and isinstance(value, dict):
            return {key: self._encoded(member, call, False) for key, member in value.items()}
        content = _content(value)
        if content is None:
            return value
        if id(value) not in self._references:
            self._name(value, Shared(len(self.trace.shared)))
            described = SharedObject(value, [])
            self.trace.shared.append(described)
            described.content = [self._encoded(member, call, False) for member in content]
        reference = self._references[id(value)]
        self._mark(reference, call)
        return reference

    def _mark(self, reference: Any, call: int) -> None:
        """Note that an object, and those within it, are passed to a call."""
        described = self.trace.shared[reference.number]
        if call not in described.calls:
            described.calls.append(call)
            for leaf in tree_leaves(described.content):
                if isinstance(leaf, Shared):
                    self._mark(leaf, call)


class Forms:
    """The forms of the results of a model's blocks.

    They are learned in the first forward, and again for another shape of tokens if a block returns
    more than one tensor like its hidden states.
    """

    def __init__(self) -> None:
        self._by_shape: dict[tuple[int, ...], list[_Form]] = {}

    def for_shape(self, shape: tuple[int, ...]) -> list[_Form]:
        """The forms for tokens of one shape, by the number of the call; to be filled."""
        first = next(iter(self._by_shape.values()), [])
        if first and all(form.like_hidden for form in first):
            return first
        return self._by_shape.setdefault(shape, [])


@dataclass(frozen=True)
class _Form:
    """The form of a result: its leaves, with examples of tensors on the meta device.

    like_hidden: whether the only tensor has the shape and dtype of the hidden states given.
    """

    spec: TreeSpec
    leaves: tuple[Any, ...]
    like_hidden: bool

    @classmethod
    def of(
        cls, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor
    ) -> _Form:
        """The form of what a block returns for arguments."""
        with torch._C.DisableTorchFunction():
            leaves, spec = tree_flatten(_without_values(block, args, kwargs, hidden))
        shapes = [(leaf.shape, leaf.dtype) for leaf in leaves if isinstance(leaf, Tensor)]
        if not shapes:
            raise UnsupportedModelError(f"a {type(block).__name__} returns no hidden states")
        return cls(spec, tuple(leaves), shapes == [(hidden.shape, hidden.dtype)])

    def examples(self, hidden: Tensor) -> tuple[Any, ...]:
        """The leaves, with examples of the shapes that they have for some hidden states."""
        if not self.like_hidden:
            return self.leaves
        like = torch.empty(hidden.shape, dtype=hidden.dtype, device="meta")
        return tuple(like if isinstance(leaf, Tensor) else leaf for leaf in self.leaves)


def _without_values(
    block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor
) -> Any:
    """A result of a block's form, with tensors of the right shapes on the meta device.

    The block runs on the meta device. Where its code needs values, as a router does that picks the
    tokens of an expert, the innermost module that fails is replaced by one that returns its input;
    if that does not fit, the block runs on the CPU with weights of zero. What the block writes into
    objects among its arguments is on the meta device too, where the next blocks read it.
    """
    copied = copy.deepcopy(block).to("meta", torch.float32)
    on_meta = _on_meta(args), {name: _on_meta(value) for name, value in kwargs.items()}
    stand_ins: list[nn.Module] = []
    while True:
        running: list[nn.Module] = []
        try:
            with _watched(copied, running):
                return copied(*on_meta[0], **on_meta[1])
        except Exception:  # whatever its code raises without values
            failed: Any = running[-1]
            if any(stand_in in failed.modules() for stand_in in stand_ins) or failed is copied:
                break
            stand_ins.append(failed)
            failed.forward = _like_its_input
    try:
        return _on_meta(_zeroed(block)(*args, **kwargs))
    except Exception:  # it reads what another block has left without values
        return torch.empty_like(hidden, device="meta")


@contextmanager
def _watched(block: nn.Module, running: list[nn.Module]) -> Iterator[None]:
    """Context in which `running` lists the modules whose forward runs, the innermost last."""

    def enter(module: nn.Module, _args: Any) -> None:
        running.append(module)

    def leave(_module: nn.Module, _args: Any, _result: Any) -> None:
        running.pop()

    with ExitStack() as hooks:
        for module in block.modules():
            hooks.enter_context(module.register_forward_pre_hook(enter))
            hooks.enter_context(module.register_forward_hook(leave))
        yield


def _zeroed(block: nn.Module) -> nn.Module:
    """A copy of a block with float32 weights of zero, whose memory the system need not provide."""
    copied = copy.deepcopy(block)
    for module in copied.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            dtype = torch.float32 if weight.is_floating_point() else weight.dtype
            zeros = torch.zeros(weight.shape, dtype=dtype, device="cpu")
            module._parameters[name] = nn.Parameter(zeros, requires_grad=False)
    return copied


def _like_its_input(*args: Any, **kwargs: Any) -> Tensor:
    return torch.empty_like(_hidden(args, kwargs))


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states among the arguments: the first float tensor."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    floats = [tensor for tensor in tensors if tensor.is_floating_point()]
    if not floats:
        raise UnsupportedModelError("a block is called without hidden states")
    return floats[0]


def _on_meta(value: Any) -> Any:
    """An argument with all its tensors on the meta device."""
    if isinstance(value, Tensor):
        return value.to("meta")
    if isinstance(value, tuple) and not isinstance(value, torch.Size):
        members = [_on_meta(member) for member in value]
        return type(value)(*members) if hasattr(value, "_fields") else tuple(members)
    content = _content(value)
    if content is None or not any(_has_values(member) for member in content):
        return value  # the object itself: the block may write into it
    return _filled(value, _on_meta(tuple(content)))


def _has_values(value: Any) -> bool:
    """Whether a tensor in an argument is not on the meta device."""
    return any(isinstance(part, Tensor) and not part.is_meta for part in snapshot(value))


def snapshot(value: Any) -> list[Any]:
    """What tells whether a mutable object's content was changed: its tensors with their versions.

    Values other than tensors and containers count by identity.
    """
    parts: list[Any] = []
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        part = waiting.pop()
        members = part if isinstance(part, tuple) else _content(part)
        if isinstance(part, Tensor):
            parts += [part, part._version]
        elif members is None:
            parts.append(part)
        elif id(part) not in seen or isinstance(part, tuple):
            seen.add(id(part))
            waiting += members
    return parts


def changed(before: list[Any], after: list[Any]) -> bool:
    """Whether two snapshots of one object differ."""
    return len(before) != len(after) or any(
        old is not new and not (isinstance(old, int | str) and old == new)
        for old, new in zip(before, after, strict=True)
    )


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in a result, in order."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _content(value: Any) -> list[Any] | None:
    """What is in a mutable object: (key, value) or values; None for anything else."""
    if isinstance(value, MutableMapping):
        return list(value.items())
    if isinstance(value, list):
        return list(value)
    if isinstance(value, (*ATOMS, *OPAQUE)) or not hasattr(value, "__dict__"):
        return None
    if is_dataclass(value):
        return [(item.name, getattr(value, item.name)) for item in fields(value)]
    return list(vars(value).items())


def _filled(prototype: Any, content: Any) -> Any:
    """An object of a prototype's class with other content, given as `_content` gives it."""
    filled = copy.copy(prototype)
    if isinstance(filled, MutableMapping):
        filled.clear()
        filled.update(content)
    elif isinstance(filled, list):
        filled[:] = content
    else:
        for name, value in content:
            object.__setattr__(filled, name, value)
    return filled


def written(value: Any) -> tuple[str, list[Tensor]]:
    """The content of a mutable object as text and tensors, from which `read` makes it again.

    Raises:
        UnsupportedModelError: it contains what is neither a tensor nor a number nor text.
    """
    tensors: list[Tensor] = []

    def encoded(member: Any) -> Any:
        if isinstance(member, Tensor):
            tensors.append(member)
            return {"tensor": len(tensors) - 1}
        if isinstance(member, tuple):
            return {"tuple": [encoded(inner) for inner in member]}
        if isinstance(member, list):
            return {"list": [encoded(inner) for inner in member]}
        if isinstance(member, dict):
            return {"dict": [encoded(item) for item in member.items()]}
        if member is None or isinstance(member, bool | int | float | str):
            return member
        raise UnsupportedModelError(
            f"its blocks share an object of {type(value).__name__} that contains a "
            f"{type(member).__name__}, which cannot be saved between two blocks"
        )

    return json.dumps([encoded(item) for item in _content(value) or ()]), tensors


def read(text: str, tensors: list[Tensor]) -> list[Any]:
    """The content of a mutable object that `written` returned."""

    def decoded(member: Any) -> Any:
        if not isinstance(member, dict):
            return member
        ((kind, inner),) = member.items()
        if kind == "tensor":
            return tensors[inner]
        members = [decoded(one) for one in inner]
        return {"tuple": tuple, "list": list, "dict": dict}[kind](members)

    return [decoded(item) for item in json.loads(text)]


def tensors_in(text: str) -> int:
    """How many tensors belong to a text of `written`."""

    def count(member: Any) -> Iterator[int]:
        if isinstance(member, list):
            for inner in member:
                yield from count(inner)
        elif isinstance(member, dict):
            ((kind, inner),) = member.items()
            yield from [1] if kind == "tensor" else count(inner)

    return sum(count(json.loads(text)))
