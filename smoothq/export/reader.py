"""Reads a quantized checkpoint for an export: quantized linears and float tensors only.

The rotation of the residual stream is folded into embedding and head. Opening reads no weights;
tensors are read one by one, embedding and head in chunks of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from ..checkpoint.checkpoint_source import CheckpointSource
from ..checkpoint.source import load_module, unload_module
from ..checkpoint.weight_files import read_tensor
from ..errors import CheckpointError
from ..modules import InputSpec, WeightSpec
from ..pipeline.weights_on_demand import WORKING_DTYPE, float_rows
from ..plan.config import quantization_of
from ..plan.portability import refuse_blockers
from ..progress import Progress
from ..rounding.grid import QuantizedWeight
from ..transforms.rotation import head_fold, rotate_input


@dataclass(frozen=True)
class FoldedLinear:
    """A quantized linear.

    Attributes:
        name: full name.
        spec: of the weight.
        input: of the input.
        weight: codes (N, K) and scales.
        bias: (N,), or None.
        input_scale: float32 (), of a static input; else None.
    """

    name: str
    spec: WeightSpec
    input: InputSpec
    weight: QuantizedWeight
    bias: Tensor | None
    input_scale: Tensor | None


@dataclass(frozen=True)
class FoldedFloat:
    """A float tensor in the checkpoint's dtype.

    Attributes:
        name: full name.
        rows: chunks along the first axis, in order.
        shape: of the whole tensor.
        nbytes: of the whole tensor.
    """

    name: str
    rows: Iterable[Tensor]
    shape: tuple[int, ...]
    nbytes: int


class ExportReader:
    """A checkpoint that `quantize` wrote, opened for an export.

    Attributes:
        name: the directory, for messages.
        source: of the stored tensors.
        model: the float model, on the meta device.
        plan: of the checkpoint.
        unties: whether a tied head becomes a separate matrix, because a rotation of the residual
            stream is folded into embedding and head differently.
    """

    def __init__(self, directory: Path, form: str, trust_remote_code: bool = False) -> None:
        """Open a checkpoint; reads no weights.

        Args:
            directory: of the checkpoint.
            form: name of the export's format, for messages.
            trust_remote_code: whether to run code beside the model.

        Raises:
            CheckpointError: for a directory that is no smoothq checkpoint, or is incomplete.
            RecipeError: for a recipe with operations at run time that the export cannot hold, such
                as online rotations; the message names them.
        """
        self.name = str(directory)
        self.source = CheckpointSource(directory, self.name, trust_remote_code)
        quantization = quantization_of(self.source.config, self.name)
        self.model = self.source.skeleton(check=False)  # whose linears are stored as codes
        self.plan = quantization.plan_for(self.model)
        refuse_blockers(self.model, self.plan, self.name, form)
        self.unties = self.plan.residual_rotation is not None and self.plan.wiring.tied

    @property
    def extras(self) -> list[str]:
        """Names of tensors of modules that the model's class lacks, such as a vision tower."""
        linears = tuple(f"{name}." for _, name, *_ in self._linears())
        known = set(self.model.state_dict()) | {scale for *_, scale in self._linears() if scale}
        return [n for n in self.source.files if n not in known and not n.startswith(linears)]

    @property
    def left_out(self) -> list[str]:
        """Names in `extras` that are not exported: all if the residual stream is rotated."""
        return self.extras if self.plan.residual_rotation is not None else []

    @property
    def added_bytes(self) -> int:
        """Bytes of the head that untying adds; 0 without untying."""
        if not self.unties:
            return 0
        embedding = self.plan.wiring.tensors[f"{self.plan.parts.embedding}.weight"]
        return embedding.elements * self.plan.stored_dtype.itemsize

    @property
    def specs(self) -> dict[str, WeightSpec]:
        """Weight specs of the quantized linears by full name, in the order of `linears`."""
        return {name: spec for _, name, spec, *_ in self._linears()}

    @property
    def forms(self) -> dict[str, tuple[WeightSpec, InputSpec]]:
        """Weight and input specs of the quantized linears by full name, ordered as `linears`."""
        return {name: (spec, fed) for _, name, spec, fed, _ in self._linears()}

    @property
    def float_linears(self) -> list[str]:
        """Full names of the linears left in float, including the head and exported extras."""
        specs = self.specs
        linears = [n for n, module in self.model.named_modules() if isinstance(module, nn.Linear)]
        if not self.left_out:
            weights = (name for name in self.extras if name.endswith(".weight"))
            linears += [name.removesuffix(".weight") for name in weights]
        return [name for name in linears if name not in specs]

    def linears(self, progress: Progress | None = None) -> Iterator[FoldedLinear]:
        """The quantized linears, one by one. progress: called at each block."""
        blocks: set[str] = set()
        for block, name, spec, site_input, scale in self._linears():
            if progress is not None and block not in blocks:
                progress(len(blocks), len(self.plan.blocks), "export")
            blocks.add(block)
            shape, grid = (spec.out_features, spec.in_features), spec.grid
            codes = grid.unpack(self._read(f"{name}.weight"), spec.in_features)
            stored = {key: self._read(f"{name}.{key}") for key in grid.stored_scales(*shape)}
            scales = grid.scales_of(stored, *shape)
            bias = f"{name}.bias"
            yield FoldedLinear(
                name,
                spec,
                site_input,
                QuantizedWeight(codes, scales, element=grid.element),
                self._read(bias) if bias in self.source.files else None,
                None if scale is None else self._read(scale),
            )

    def floats(self) -> Iterator[FoldedFloat]:
        """All other tensors, one by one, with the rotation folded into embedding and head."""
        parts, rotation = self.plan.parts, self.plan.residual_rotation
        taken = {f"{name}." for _, name, *_ in self._linears()}
        taken |= {scale for *_, scale in self._linears() if scale is not None}
        folds: dict[str, Callable[[Tensor], None]] = {}
        if rotation is not None:
            folds = dict.fromkeys(parts.entering, partial(rotate_input, rotation=rotation))
            assert parts.final_norm is not None, "a folded rotation ends at the final norm"
            norm = self.model.get_submodule(parts.final_norm)
            load_module(norm, parts.final_norm, self.source, WORKING_DTYPE)
            assert parts.head is not None  # else `refuse_blockers` refuses
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

    def _linears(self) -> Iterator[tuple[str, str, WeightSpec, InputSpec, str | None]]:
        """(block, full name, weight spec, input spec, name of a static input's scale or None)."""
        for block, site in self.plan.named_sites():
            static = site.input.calibrates_scale
            scale = f"{block}.{site.input_name}.scale" if static else None
            for module, spec in site.modules.items():
                yield block, f"{block}.{module}", spec, site.input, scale

    def _whole(self, name: str, tensor: Tensor) -> FoldedFloat:
        cast = tensor.to(self.plan.stored_dtype) if tensor.is_floating_point() else tensor
        return FoldedFloat(name, [cast], tuple(cast.shape), cast.nbytes)

    def _by_rows(self, module: str, fold: Callable[[Tensor], None]) -> FoldedFloat:
        """Embedding or head, folded in chunks of rows; a tied head is read from the embedding."""
        parts, wiring, dtype = self.plan.parts, self.plan.wiring, self.plan.stored_dtype
        read = parts.embedding if module == parts.head and wiring.tied else module
        shape = wiring.tensors[f"{read}.weight"].shape
        rows = (chunk.to(dtype) for chunk in float_rows(self.source, self.model, read, fold))
        return FoldedFloat(f"{module}.weight", rows, shape, shape[0] * shape[1] * dtype.itemsize)

    def _read(self, name: str) -> Tensor:
        if name not in self.source.files:
            raise CheckpointError(f"{self.name}: the checkpoint has no tensor '{name}'")
        return read_tensor(self.source.files[name], name)
