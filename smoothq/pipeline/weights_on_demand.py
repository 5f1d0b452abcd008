"""The weights outside the blocks, read from a source where the model's own code asks for them.

What runs before and behind the blocks differs between architectures: several embeddings,
projections of streams, norms, parameters by themselves. None of it is listed: the model stays on
the meta device, and a parameter is loaded when a torch function is called with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel

from ..checkpoint.source import Source, check_weight
from ..errors import CalibrationError, CheckpointError
from ..plan.plan import Plan
from ..rounding.grid import QuantizedWeight

WORKING_DTYPE = torch.float32  # of a loaded block; folding itself is computed in float64
ROWS_ELEMENTS = 1 << 22  # largest number of elements in a chunk of rows
SHAPE_READERS = frozenset({"size", "dim", "numel", "__len__"})
SHAPES = frozenset({"shape", "ndim", "requires_grad", "is_sparse", "layout", "names", "is_leaf"})


class HeadReached(Exception):
    """The model's code multiplies by the head, which is not wanted."""


class WeightsOnDemand(TorchFunctionMode):
    """A context in which a model on the meta device computes with the weights of its source.

    A weight is loaded once, whole, in float32, and kept until this object is freed. Of an
    embedding only the rows of the given tokens are loaded, unless it is small. The blocks are to be
    replaced before: their weights would be loaded too.
    """

    def __init__(
        self,
        source: Source,
        model: PreTrainedModel,
        plan: Plan,
        tokens: Tensor,
        device: torch.device,
        coded: Callable[[Tensor], QuantizedWeight] | None = None,
        head: bool = True,
    ) -> None:
        """Nothing is loaded yet.

        Args:
            source: the float checkpoint.
            model: its skeleton; it is not changed.
            plan: of the model.
            tokens: all token ids that the model will be run on, int64.
            device: where to load the weights.
            coded: rounds rows of the token embedding, if the plan stores it in 8 bits; or None.
            head: whether the head is to be loaded; if not, using it raises HeadReached.
        """
        super().__init__()
        self._source, self._model, self._device, self._coded = source, model, device, coded
        self._embedding = f"{plan.parts.embedding}.weight"
        self._tokens = tokens
        self._unwanted = () if head else (self._embedding, f"{plan.parts.head}.weight")
        tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        tensors |= {n: b for n, b in model.named_buffers() if n in source.specs}
        stored = {name: tensor for name, tensor in tensors.items() if name in source.specs}
        self._known = tensors  # alive, so that no id is used twice where modules are replaced
        self._names = {id(tensor): name for name, tensor in (tensors | stored).items()}
        for name, tensor in stored.items():  # of a tied tensor the name under which it is stored
            self._names[id(tensor)] = name
        self._loaded: dict[str, Tensor] = {}
        self._tables: dict[str, tuple[Tensor, Tensor]] = {}  # ids of rows, sorted, and the rows

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call a torch function with loaded weights in place of those of the skeleton."""
        kwargs = kwargs or {}
        if func is F.embedding:
            return self._embedded(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name == "__get__" and id(args[0]) in self._names:
            field = func.__self__.__name__
            if field == "dtype":
                return WORKING_DTYPE if args[0].is_floating_point() else args[0].dtype
            if field == "device":
                return self._device
            if field in SHAPES:
                return func(*args, **kwargs)
        elif name in SHAPE_READERS:
            return func(*args, **kwargs)
        args, kwargs = tree_map_only(Tensor, self._real, (args, kwargs))
        return func(*args, **kwargs)

    def _real(self, tensor: Tensor) -> Tensor:
        """The loaded form of a weight of the skeleton; any other tensor is returned as it is."""
        name = self._names.get(id(tensor))
        if name is None:
            return tensor
        if name in self._unwanted:
            raise HeadReached
        if name not in self._loaded:
            self._loaded[name] = self.load(name)
        return self._loaded[name]

    def load(self, name: str) -> Tensor:
        """A weight of the model, on the device, floats in float32; a copy.

        Raises:
            CheckpointError: for a missing tensor or a wrong shape.
            NumericsError: for NaN or Inf.
        """
        ((_, tensor),) = self._source.tensors([name])
        owner, _, leaf = name.rpartition(".")
        wanted = getattr(self._model.get_submodule(owner), leaf)
        check_weight(tensor, name, tuple(wanted.shape), self._source.name)
        dtype = WORKING_DTYPE if tensor.is_floating_point() else tensor.dtype
        return tensor.to(self._device, dtype, copy=True)

    def _embedded(self, ids: Tensor, weight: Tensor, *_: Any, **__: Any) -> Tensor:
        """The rows of an embedding. The index of a padding row only matters to its gradient."""
        name = self._names.get(id(weight))
        if name is None or name in self._loaded or not name.endswith(".weight"):
            return F.embedding(ids, self._real(weight))
        used, rows = self._tables.get(name, (ids.new_empty(0), ids.new_empty(0)))
        if not torch.isin(ids, used).all():
            used, rows = self._table(name, weight, torch.cat([used, ids.flatten()]))
            self._tables[name] = used, rows
        return F.embedding(torch.searchsorted(used, ids), rows)

    def _table(self, name: str, weight: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of an embedding that will be read, in float32: their ids, sorted, and they."""
        module = name.rpartition(".")[0]
        tokens = self._tokens.flatten().to(self._device)
        if weight.numel() <= ROWS_ELEMENTS and name != self._embedding:
            ids = torch.arange(len(weight), device=self._device)
        elif name == self._embedding or bool(torch.isin(ids, tokens).all()):
            ids = torch.cat([ids, tokens])
        used = ids.unique()
        if len(used) and used[0] < 0:
            raise CalibrationError(f"token {int(used[0])} is no row of {module}: ids begin with 0")
        first, picked, wanted = 0, list[Tensor](), used.cpu()
        for rows in float_rows(self._source, self._model, module):
            in_chunk = wanted[(wanted >= first) & (wanted < first + len(rows))] - first
            picked.append(rows[in_chunk].clone())
            first += len(rows)
        if len(used) and used[-1] >= first:
            raise CalibrationError(f"token {int(used[-1])} is beyond the {first} rows of {module}")
        table = torch.cat(picked).to(WORKING_DTYPE)
        if self._coded is not None and name == self._embedding:
            table = self._coded(table).dequantize(WORKING_DTYPE)
        return used, table.to(self._device)


def float_rows(
    source: Source,
    model: nn.Module,
    module: str,
    fold: Callable[[Tensor], None] | None = None,
) -> Iterator[Tensor]:
    """Yield the rows of an embedding or a head in chunks, each float (rows, columns).

    Args:
        source: the float checkpoint.
        model: the float model on the meta device.
        module: the full name of the embedding or head.
        fold: changes a float32 chunk in place; None yields the chunks in the stored dtype.

    Raises:
        CheckpointError: the stored tensor has another shape than the config asks for.
    """
    tensor = f"{module}.weight"
    height, width = model.get_submodule(module).get_parameter("weight").shape
    left, count = height, max(1, ROWS_ELEMENTS // width)
    for rows in source.rows(tensor, count):
        check_weight(rows, tensor, (min(left, count), width), source.name)
        left -= len(rows)
        if fold is not None:
            rows = rows.to(WORKING_DTYPE, copy=True)
            fold(rows)
        yield rows
    if left:
        raise CheckpointError(
            f"{source.name}: tensor '{tensor}' has {height - left} rows, the config asks for "
            f"{height}"
        )
