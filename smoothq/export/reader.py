"""A quantized checkpoint as other formats can hold it: linears and floats, nothing beside them.

Opening reads no weight. Everything comes tensor by tensor, an embedding or a head by its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from ..architectures.graph import is_tied
from ..checkpoint.source import (
    CheckpointSource,
    load_module,
    read_tensor,
    skeleton_of,
    unload_module,
)
from ..errors import CheckpointError
from ..modules import InputSpec, WeightSpec
from ..pipeline.ends import WORKING_DTYPE, float_rows
from ..plan.config import quantization_of
from ..plan.portability import refuse_blockers
from ..progress import Progress
from ..rounding.grid import QuantizedWeight, Scales
from ..rounding.packing import unpack
from ..transforms.rotation import head_fold, rotate_input


@dataclass(frozen=True)
class FoldedLinear:
    """A quantized linear, by full name. input_scale: float32 (), of a static input."""

    name: str
    spec: WeightSpec
    input: InputSpec
    weight: QuantizedWeight
    bias: Tensor | None
    input_scale: Tensor | None


@dataclass(frozen=True)
class FoldedFloat:
    """A tensor that stays float, in the checkpoint's dtype, by its rows."""

    name: str
    rows: Iterable[Tensor]
    shape: tuple[int, ...]
    nbytes: int


class ExportReader:
    """A directory that `quantize` wrote, opened for a format that others read.

    The rotation of the residual stream is folded into the embeddings and into the head; a head that
    was the embedding becomes a matrix of its own: `unties`.
    """

    def __init__(self, directory: Path, form: str) -> None:
        """form: the format's name, for messages.

        Raises CheckpointError for a directory that is none of ours or incomplete, RecipeError,
        naming what is in the way, for a recipe that leaves something to run beside the linears.
        """
        self.name = str(directory)
        self.source = CheckpointSource(directory, self.name)
        quantization = quantization_of(self.source.config, self.name)
        self.model = skeleton_of(self.source.config, self.name)
        self.source.adopt(self.model)
        self.plan = quantization.plan_for(self.model)
        refuse_blockers(self.model, self.plan, self.name, form)
        self.unties = self.plan.residual_rotation is not None and is_tied(self.model)

    @property
    def extras(self) -> list[str]:
        """Tensors of modules that the model's class does not have, such as a tower, by name."""
        linears = tuple(f"{name}." for _, name, *_ in self._linears())
        known = set(self.model.state_dict()) | {scale for *_, scale in self._linears() if scale}
        return [n for n in self.source.files if n not in known and not n.startswith(linears)]

    @property
    def left_out(self) -> list[str]:
        """Those that are not exported: all, where what they read of the model is rotated."""
        return self.extras if self.plan.residual_rotation is not None else []

    @property
    def added_bytes(self) -> int:
        """Bytes of the head that untying adds."""
        if not self.unties:
            return 0
        embedding = self.model.get_submodule(self.plan.parts.embedding).get_parameter("weight")
        return embedding.numel() * self.plan.stored_dtype.itemsize

    @property
    def specs(self) -> dict[str, WeightSpec]:
        """The forms of the quantized linears by full name, in the order of `linears`."""
        return {name: spec for _, name, spec, *_ in self._linears()}

    @property
    def forms(self) -> dict[str, tuple[WeightSpec, InputSpec]]:
        """The forms of the quantized linears and their inputs, in the order of `linears`."""
        return {name: (spec, fed) for _, name, spec, fed, _ in self._linears()}

    @property
    def float_linears(self) -> list[str]:
        """Full names of the linears that are not quantized, the head and extras among them."""
        specs = self.specs
        linears = [n for n, module in self.model.named_modules() if isinstance(module, nn.Linear)]
        if not self.left_out:
            weights = (name for name in self.extras if name.endswith(".weight"))
            linears += [name.removesuffix(".weight") for name in weights]
        return [name for name in linears if name not in specs]

    def linears(self, progress: Progress | None = None) -> Iterator[FoldedLinear]:
        """The quantized linears, one by one. progress: told of each block."""
        before = None
        for index, name, spec, site_input, scale in self._linears():
            if progress is not None and index != before:
                progress(index, len(self.plan.blocks), "export")
            before = index
            codes = unpack(self._read(f"{name}.weight"), spec.in_features, spec.grid.bits)
            multiplier = self._read(f"{name}.weight_multiplier") if spec.grid.multiplier else None
            zero = None if spec.grid.symmetric else self._read(f"{name}.weight_zero_point")
            scales = Scales(self._read(f"{name}.weight_scale"), multiplier, zero)
            bias = f"{name}.bias"
            yield FoldedLinear(
                name,
                spec,
                site_input,
                QuantizedWeight(codes, scales),
                self._read(bias) if bias in self.source.files else None,
                None if scale is None else self._read(scale),
            )

    def floats(self) -> Iterator[FoldedFloat]:
        """Everything else, one by one."""
        parts, rotation = self.plan.parts, self.plan.residual_rotation
        taken = {f"{name}." for _, name, *_ in self._linears()}
        taken |= {scale for *_, scale in self._linears() if scale is not None}
        folds: dict[str, Callable[[Tensor], None]] = {}
        if rotation is not None:
            folds = dict.fromkeys(parts.entering, partial(rotate_input, rotation=rotation))
            norm = self.model.get_submodule(parts.final_norm)
            load_module(norm, parts.final_norm, self.source, WORKING_DTYPE)
            folds[parts.head] = head_fold(self.model, parts, rotation, self.plan.norm_offset)
            yield self._whole(f"{parts.final_norm}.weight", norm.get_parameter("weight"))
            unload_module(norm)
            taken.add(f"{parts.final_norm}.weight")
        for name, fold in folds.items():
            yield self._by_rows(name, fold)
            taken.add(f"{name}.weight")
        extras, left_out = set(self.extras), set(self.left_out)
        for name in self.source.files:
            if name in extras - left_out:
                tensor = self._read(name)
                yield FoldedFloat(name, [tensor], tuple(tensor.shape), tensor.nbytes)
            elif name not in left_out and not name.startswith(tuple(taken)):
                yield self._whole(name, self._read(name))

    def _linears(self) -> Iterator[tuple[int, str, WeightSpec, InputSpec, str | None]]:
        """Block, full name, form, input, and the name of the input's stored scale, if there is."""
        for index, _, site in self.plan.sites():
            prefix = self.plan.block_name(index)
            static = site.input.mode == "static"
            scale = f"{prefix}.{site.input_name}.scale" if static else None
            for module, spec in site.modules.items():
                yield index, f"{prefix}.{module}", spec, site.input, scale

    def _whole(self, name: str, tensor: Tensor) -> FoldedFloat:
        cast = tensor.to(self.plan.stored_dtype) if tensor.is_floating_point() else tensor
        return FoldedFloat(name, [cast], tuple(cast.shape), cast.nbytes)

    def _by_rows(self, module: str, fold: Callable[[Tensor], None]) -> FoldedFloat:
        """An end, folded; a head is read from the embedding that it was tied to."""
        parts = self.plan.parts
        read = parts.embedding if module == parts.head and is_tied(self.model) else module
        shape = tuple(self.model.get_submodule(read).get_parameter("weight").shape)
        dtype = self.plan.stored_dtype
        rows = (each.to(dtype) for each in float_rows(self.source, self.model, read, fold))
        return FoldedFloat(f"{module}.weight", rows, shape, shape[0] * shape[1] * dtype.itemsize)

    def _read(self, name: str) -> Tensor:
        if name not in self.source.files:
            raise CheckpointError(f"{self.name}: the checkpoint has no tensor '{name}'")
        return read_tensor(self.source.files[name], name)
