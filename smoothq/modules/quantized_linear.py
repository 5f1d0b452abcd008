"""A linear layer whose weight is packed codes and scales, multiplied in integers.

Checkpoints store the packed codes, under the name `weight` and in a shape that `nn.Linear` rejects,
and their scales. `prepare()` computes the operands that run fastest from them (`RunningForm`); they
are not saved, and are computed again from tensors that replace the stored ones.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from ..kernels import QuantizedInput
from ..kernels.reference import MX_GROUP, PACKED_BLOCK, multiplied_weight
from ..kernels.tracing import is_traced
from ..rounding.float_grid import BLOCK, FloatGrid
from ..rounding.grid import Grid, QuantizedWeight
from ..runtime.mapped import touch
from ..runtime.offload import running_device
from .expert_products import multiply_together, product_of_experts
from .input_quantizer import InputQuantizer, InputSpec
from .running_form import RunningForm
from .weight_answer import HoldsCodes


@dataclass(frozen=True)
class WeightSpec:
    """The shape and the grid of a linear's quantized weight."""

    out_features: int
    in_features: int
    grid: Grid

    @property
    def elements(self) -> int:
        """The number of weights."""
        return self.out_features * self.in_features

    @property
    def groups(self) -> int:
        """Groups of input channels in a row; 1 where a row or the matrix shares a scale."""
        return 1 if self.grid.granularity == "tensor" else self.in_features // self.grid.group_size

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that a checkpoint stores, on the meta device, by buffer name."""
        grid, shape = self.grid, (self.out_features, self.in_features)
        return {"weight": grid.packed_like(*shape), **grid.stored_scales(*shape)}

    @cached_property
    def stored_bits(self) -> int:
        """Bits of the stored weight, scales, multipliers and zero points included."""
        return 8 * sum(tensor.nbytes for tensor in self.tensors().values())

    @property
    def floating(self) -> bool:
        """Whether codes are floating-point numbers."""
        return self.grid.element != "int"

    @property
    def float_groups(self) -> bool:
        """Whether each group of a row has its own float scale, not an integer multiplier."""
        return self.groups > 1 and not self.grid.multiplier

    def packed_tokens(self, source: InputSpec, device: torch.device, keeps_packed: bool) -> int:
        """The most tokens for which a product multiplies by packed codes; 0 for none.

        Args:
            source: of the linear's input.
            device: where it runs.
            keeps_packed: multiply by packed codes for any number of tokens, where it is possible.

        Returns:
            `sys.maxsize` for any number of tokens.
        """
        if self.floating or (source.floating and self.grid.bits not in (4, 8)):
            return sys.maxsize
        if self.grid.bits != 4 or source.blocked or (not source.floating and self.float_groups):
            return 0
        group_size = self.grid.group_size if self.groups > 1 else None
        operator = "weight_only_gemm" if source.floating else "int4_gemm"
        tokens: int = kernels.packed_tokens(operator, device, group_size)
        return sys.maxsize if tokens and keeps_packed else tokens

    def multiplies_codes(
        self, source: InputSpec, device: torch.device, architecture: str | None = None
    ) -> bool:
        """Whether a product multiplies the floating-point codes themselves, on both sides.

        They are E4M3 with float scales: of rows and tokens (or of all of them), or of groups that
        are alike on both sides; or MX codes, of one element on both sides.

        Args:
            source: of the linear's input.
            device: where it runs.
            architecture: of a GPU that is not here, such as `sm_90`; None asks the device.
        """
        grid = self.grid
        if not isinstance(grid, FloatGrid):
            return False
        if (grid.scale, source.mode) == ("e8m0", "fp_e8m0"):
            alike = grid.element == source.element and self.in_features % PACKED_BLOCK == 0
            alike = alike and grid.group_size == source.group_size == MX_GROUP
            return alike and bool(kernels.multiplies_mx(device, architecture))
        if (grid.element, grid.scale) != ("e4m3", "float"):
            return False
        if source.mode == "fp_group":
            alike = grid.group_size == source.group_size and grid.group_size % BLOCK == 0
        else:
            alike = source.mode in ("fp_token", "fp_tensor", "fp_static") and self.groups == 1
        return alike and bool(kernels.multiplies_fp8(device, architecture))

    def operators(
        self,
        source: InputSpec,
        device: torch.device,
        keeps_packed: bool = False,
        architecture: str | None = None,
    ) -> tuple[str, ...]:
        """The operators of `smoothq.kernels` that a linear runs, input quantizer first.

        Args:
            source: of the linear's input.
            device: where it runs.
            keeps_packed: as in `packed_tokens`.
            architecture: as in `multiplies_codes`.
        """
        if self.multiplies_codes(source, device, architecture):
            product = "mx_gemm" if source.mode == "fp_e8m0" else "fp8_gemm"
            return (*source.operators(codes=True), product)
        inputs = source.operators()
        if source.floating:
            product = "fp_gemm" if self.floating else "weight_only_gemm"
            return (*inputs, f"{product} (emulated)" if source.emulated else product)
        if source.blocked or self.float_groups:
            return (*inputs, "group_gemm")
        tokens = self.packed_tokens(source, device, keeps_packed)
        if tokens == sys.maxsize:
            return (*inputs, "int4_gemm")
        few = (f"int4_gemm (up to {tokens} tokens)",) if tokens else ()
        return (*inputs, *few, "int8_gemm")


class QuantizedLinear(HoldsCodes):
    """y = x Ŵᵀ + b, where x is quantized by an InputQuantizer that a site's linears share.

    Persistent buffers: `weight` (packed codes), `weight_scale`; `weight_multiplier`,
    `weight_zero_point` and `bias` where the layer has them.

    Attributes:
        keeps_packed: whether it never has an int8 copy of 4-bit codes.
        transient: whether it drops that copy after each product: an expert of many in a pass, which
            runs by itself then.
    """

    weight_scale: Tensor
    weight_multiplier: Tensor | None
    weight_zero_point: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        spec: WeightSpec,
        site_input: InputQuantizer,
        dtype: torch.dtype,
        bias_dtype: torch.dtype | None = None,
    ) -> None:
        """Create it with tensors on the meta device, for `set_weight` or a checkpoint to fill.

        Args:
            spec: shape and grid of the weight.
            site_input: the quantizer of its input.
            dtype: that `weight` reports, until the module is cast: that of the float weight.
            bias_dtype: of the bias, until the module is cast; None for a layer without one.
        """
        super().__init__()
        self.spec = spec
        self.in_features, self.out_features = spec.in_features, spec.out_features
        self.weight_shape, self.weight_dtype = (spec.out_features, spec.in_features), dtype
        # The site owns its InputQuantizer; a reader refers to it without registering it again.
        object.__setattr__(self, "site_input", site_input)
        self.register_buffer("weight_multiplier", None)
        self.register_buffer("weight_zero_point", None)
        for name, tensor in spec.tensors().items():
            self.register_buffer(name, tensor)
        bias = torch.empty(spec.out_features, dtype=bias_dtype, device="meta")
        self.register_buffer("bias", None if bias_dtype is None else bias)
        self.keeps_packed = self.transient = False
        self._running: RunningForm | None = None

    site_input: InputQuantizer

    def set_weight(self, quantized: QuantizedWeight, bias: Tensor | None) -> None:
        """Set codes, scales and, unless None, the bias; then `prepare`."""
        self.hold(self.spec.grid.pack(quantized.codes))
        for name, tensor in self.spec.grid.store(quantized.scales).items():
            setattr(self, name, tensor)
        if bias is not None:
            self.bias = bias.detach().clone()
        self.prepare()

    def quantized_weight(self) -> QuantizedWeight:
        """The codes, unpacked to int8 (N, K), and their scales."""
        grid = self.spec.grid
        codes = grid.unpack(self.codes, self.in_features)
        scales = grid.scales_of(self._buffers, self.out_features, self.in_features)
        return QuantizedWeight(codes, scales, element=grid.element)

    @property
    def device(self) -> torch.device:
        """Where it runs: the device of the weight, or the one that accelerate brings it to."""
        return running_device(self)

    def operators(self) -> tuple[str, ...]:
        """The operators of `smoothq.kernels` that a forward runs, in order."""
        return self.spec.operators(self.site_input.spec, self.device, self.keeps_packed)

    def prepare(self) -> None:
        """Compute the operands of the products from the stored tensors.

        These are an int8 copy of the weight, multiplied by its multipliers, unless packed codes are
        fastest for any number of tokens (or `keeps_packed` is set). For float inputs the copy is
        without multipliers: these are an operand of `weight_only_gemm`. Codes of 8 bits are their
        own operand, in the same memory.
        """
        self._running = None
        if not self.codes.is_meta:
            kernels.load(self.codes.device)
            self._running = running = self._derived()
            if running.packed_tokens < sys.maxsize and not self.transient:
                self._unpacked(running)

    def _derived(self) -> RunningForm:
        row_scale = shift = None
        multiplies_codes = self.spec.multiplies_codes(self.site_input.spec, self.codes.device)
        if self.spec.floating and self.spec.grid.granularity in ("block", "tensor"):
            # A product takes scales of rows and groups: they are a sixteenth of the codes.
            scales = self.spec.grid.scales_of(self._buffers, self.out_features, self.in_features)
            block_scale = scales.scale.contiguous()
            return RunningForm(self.codes, sys.maxsize, None, None, block_scale, multiplies_codes)
        if self.weight_zero_point is not None:
            shift = self.weight_zero_point.float() * self.weight_scale.float()
        if self.weight_scale.shape[1] == 1:
            row_scale = self.weight_scale.float().squeeze(1)
        packed_tokens = self._packed_tokens(self.codes.device)
        return RunningForm(self.codes, packed_tokens, row_scale, shift, None, multiplies_codes)

    def _packed_tokens(self, device: torch.device) -> int:
        return self.spec.packed_tokens(self.site_input.spec, device, self.keeps_packed)

    def _unpacked(self, running: RunningForm) -> Tensor:
        """The operand of products that do not multiply by packed codes, computed once a form."""
        operand = running.operand
        if operand is None:
            # `data`: a view of the codes themselves would keep them alive. A trace ends anyway, and
            # would take it for a constant.
            codes = self.codes if is_traced(self.codes) else self.codes.data
            if self.transient:
                touch(codes)
            operand = self.spec.grid.unpack(codes, self.in_features)
            if not self.site_input.spec.floating:
                operand = multiplied_weight(operand, self.weight_multiplier)
            if not self.transient:
                running.operand = operand
        return operand

    def _current(self) -> RunningForm:
        """The running form of the tensors that the module has now."""
        running, codes = self._running, self.codes
        if running is None or not running.is_of(codes):
            if codes.is_meta:
                raise RuntimeError(
                    "the weight of this QuantizedLinear is on the meta device: no checkpoint was "
                    "loaded, or it is offloaded and was called past the hooks that bring it"
                )
            running = self._derived()
            if not is_traced(codes):  # of a trace, nothing may stay
                self._running = running
        return running

    def forward(self, x: Tensor) -> Tensor:
        """y, (..., N), in the dtype of x, float (..., K)."""
        running = self._current()
        quantized = self.site_input(x, running.multiplies_codes)
        if isinstance(quantized, Tensor):
            floats = quantized.reshape(-1, self.in_features)
            product = self._fp_product if self.spec.floating else self._float_product
            result = product(floats, running).to(x.dtype)
        elif running.multiplies_codes:
            result = self._code_product(quantized, running, x.dtype)
        elif quantized.block_scale is None and self.weight_scale.shape[1] == 1:
            result = self._integer_product(quantized, running, x.dtype)
        else:
            result = self._group_product(quantized, running, x.dtype)
        return result.reshape(*x.shape[:-1], self.out_features)

    multiply_together = staticmethod(multiply_together)

    @property
    def operator_together(self) -> str | None:
        """The operator of `multiply_together` where experts are alike and unwatched, or None."""
        return product_of_experts(self.site_input.spec.mode, self.spec)

    def integer_operands(
        self, tokens: int
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """What an integer product with that many tokens multiplies by, and the bias.

        Returns:
            The weight, packed or int8 (N, K); its scales, float32 (N,), or None where groups have
            scales of their own; multipliers beside packed codes, or None; the bias, or None.

        Raises:
            RuntimeError: the weight is on the meta device.
        """
        running, buffers = self._current(), self._buffers
        packed = running.multiplies_packed(tokens)
        # Multipliers are in the copy; an operator for both kinds of weights passes them over.
        weight = self.codes if packed else self._unpacked(running)
        return weight, running.row_scale, buffers["weight_multiplier"], buffers["bias"]

    def float_operands(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, int]:
        """What a product of floats multiplies by: the operands of `weight_only_gemm` behind x.

        Returns:
            The weight, packed or int8 (N, K); its scales; multipliers and the bias, or None for
            either; the bits of a code. Zero points are not among them.

        Raises:
            RuntimeError: the weight is on the meta device.
        """
        return self._float_operands(self._current())

    def _float_operands(
        self, running: RunningForm
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, int]:
        packed, buffers = running.packed_tokens == sys.maxsize, self._buffers
        weight, scale = self.codes if packed else self._unpacked(running), buffers["weight_scale"]
        assert scale is not None
        multiplier, bias = buffers["weight_multiplier"], buffers["bias"]
        return weight, scale, multiplier, bias, self.spec.grid.bits if packed else 8

    def bytes_read(self, tokens: int) -> int:
        """Bytes of the weight, scales and bias that a product with that many tokens reads."""
        packed = tokens <= self._packed_tokens(self.device)
        multiplier = self.weight_multiplier if packed else None
        tensors = (multiplier, self.weight_scale, self.weight_zero_point, self.bias)
        codes = self.codes.nbytes if packed else self.spec.elements
        return codes + sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def _float_product(self, x: Tensor, running: RunningForm) -> Tensor:
        operands = self._float_operands(running)
        product: Tensor = kernels.weight_only_gemm(x, *operands)
        if running.shift is None:
            return product
        # x Ŵᵀ with Ŵ = (Q − Z) · S: the codes' product, less each group's sum of x times Z · S.
        sums = x.float().reshape(-1, self.spec.groups, self.spec.grid.group_size).sum(-1)
        with torch.autocast(x.device.type, enabled=False):
            shifts = sums @ running.shift.T
        return product - shifts.to(product.dtype)

    def _fp_product(self, x: Tensor, running: RunningForm) -> Tensor:
        """The product with floating-point codes, of float (M, K)."""
        scale, tensor_scale = self.weight_scale, None
        if running.block_scale is not None:
            scale = running.block_scale
        elif self.weight_multiplier is not None:
            scale, tensor_scale = self.weight_multiplier, self.weight_scale
        product: Tensor = kernels.fp_gemm(
            x, self.codes.flatten(1), scale, tensor_scale, self.bias, self.spec.grid.element
        )
        return product

    def _code_product(self, x: QuantizedInput, running: RunningForm, dtype: torch.dtype) -> Tensor:
        """The product of floating-point codes on both sides."""
        blocks = running.block_scale
        product: Tensor
        if x.scale.dtype == torch.uint8:
            codes, scale = (part.reshape(-1, part.shape[-1]) for part in (x.codes, x.scale))
            weight = (self.codes.flatten(1), self.weight_scale)
            element = self.spec.grid.element
            product = kernels.mx_gemm(codes, scale, *weight, self.bias, element, dtype)
            return product
        product = kernels.fp8_gemm(
            x.codes.reshape(-1, self.in_features),
            x.scale.reshape(-1, x.scale.shape[-1] if x.scale.dim() else 1),
            self.codes.flatten(1),
            self.weight_scale if blocks is None else blocks,
            self.bias,
            dtype,
        )
        return product

    def _integer_product(
        self, x: QuantizedInput, running: RunningForm, dtype: torch.dtype
    ) -> Tensor:
        codes, scale = x.codes.reshape(-1, self.in_features), x.scale.reshape(-1, 1)
        product: Tensor
        if running.multiplies_packed(codes.shape[0]):
            multiplier = self.weight_multiplier
            product = kernels.int4_gemm(
                codes, scale, self.codes, running.row_scale, multiplier, self.bias, dtype
            )
        else:
            operand = self._unpacked(running)
            product = kernels.int8_gemm(codes, scale, operand, running.row_scale, self.bias, dtype)
        return product

    def _group_product(self, x: QuantizedInput, running: RunningForm, dtype: torch.dtype) -> Tensor:
        """The product where groups of channels have float scales.

        They are the input's in mode `smooth_live`, or the weight's.
        """
        live = x.block_scale is not None
        product: Tensor = kernels.group_gemm(
            x.codes if live else x.codes.reshape(1, -1, self.in_features),
            x.scale if live else x.scale.reshape(1, -1, 1),
            x.block_scale,
            x.order,
            self._unpacked(running),
            self.weight_scale,
            self.bias,
            self.site_input.spec.group_size if live else self.spec.grid.group_size,
            dtype,
        )
        return product

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        scale = self.weight_scale
        self.weight_dtype = fn(torch.empty(0, dtype=self.weight_dtype, device=scale.device)).dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.weight_scale.dtype != scale.dtype:
            # `.to(dtype)` is about activations; a scale that lost bits would move every weight.
            self.weight_scale = scale.to(self.weight_scale.device)
        self.prepare()
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._running = None  # of other values, though the tensors may be the same

    def __getstate__(self) -> dict[str, Any]:
        """The state for copies and pickles: without what is derived."""
        return self.__dict__ | {"_running": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the state of a copy or a pickle, and derive the rest."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.prepare()

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{self.in_features} → {self.out_features}, {self.spec.grid}, {self.site_input.name}"
