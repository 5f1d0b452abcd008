"""The compressed-tensors format, which transformers and vLLM read without smoothq.

8-bit weights with scales per output channel and 8-bit activations are `int-quantized`: int8 codes.
All other integers are `pack-quantized`: unsigned codes packed along a row into int32 words, lowest
bits first. A group's scale may be negative, because readers only multiply by it. Floating-point
codes are `float-quantized` (FP8) and `mxfp8-quantized`, as float8 numbers, or
`nvfp4-pack-quantized` and `mxfp4-pack-quantized`, two a byte, the even column in the low nibble.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..checkpoint.manifest import COMPRESSED_TENSORS
from ..errors import CheckpointError
from ..kernels.formats import FORMATS
from ..recipe.recipe import FLOAT_BITS
from ..rounding.grid import Grid, QuantizedWeight
from ..rounding.packing import pack

METHOD = COMPRESSED_TENSORS
MX_GROUP = 32  # input channels of a group with a power of two as its scale
WORD = 32  # bits of the integers that codes are packed into
Strategy = Literal["tensor", "channel", "group", "block", "tensor_group"]
Inputs = Literal["float", "token", "static", "group", "tensor_group"]
CodeType = Literal["int", "float"]
BLOCK_STRUCTURE = [128, 128]
E8M0, E4M3 = "torch.uint8", "torch.float8_e4m3fn"  # how the format names the dtypes of scales


@dataclass(frozen=True)
class Scheme:
    """How a linear's weight and input are quantized.

    Attributes:
        bits: of the weight's codes.
        strategy: what shares a scale of the weight: the tensor, an output channel, a group of input
            channels, a block of 128 × 128, or a group with a scale of the tensor besides.
        group_size: input channels of a group; None where there are none.
        inputs: left in `float`, with a dynamic scale per `token` or `group`, with one `static`
            scale, or with dynamic scales per group and a static one of the tensor.
        input_bits: of the input's codes.
        symmetric: whether the weight has no zero points.
        type: of the weight's codes: integers or floating-point numbers.
        input_type: of the input's codes.
        input_group: channels of a group of the input; None where there are none.
    """

    bits: int
    strategy: Strategy
    group_size: int | None
    inputs: Inputs
    input_bits: int
    symmetric: bool = True
    type: CodeType = "int"
    input_type: CodeType = "int"
    input_group: int | None = None

    def __str__(self) -> str:
        kind = self.strategy if self.group_size is None else f"group {self.group_size}"
        static = ", static" if self.inputs == "static" else ""
        zeros = "" if self.symmetric else ", zero points"
        if self.type == "float":
            name = self.format.partition("-")[0].replace("float", "fp8").upper()
            inputs = FLOAT_BITS if self.inputs == "float" else self.input_bits
            return f"{name} W{self.bits}A{inputs} {kind}{static}"
        fp8 = " FP8" if self.input_type == "float" else ""
        return f"W{self.bits}A{self.input_bits}{fp8} {kind}{zeros}{static}"

    @property
    def format(self) -> str:
        """compressed-tensors' name of the layout."""
        if self.type == "float":
            match self.bits, self.strategy:
                case 8, "group":
                    return "mxfp8-quantized"
                case 8, _:
                    return "float-quantized"
                case _, "tensor_group":
                    return "nvfp4-pack-quantized"
            return "mxfp4-pack-quantized"
        integers = self.bits == self.input_bits == 8 and self.inputs != "float"
        return "int-quantized" if integers and self.strategy == "channel" else "pack-quantized"

    def tensors(
        self, weight: QuantizedWeight, grid: Grid, dtype: torch.dtype, input_scale: Tensor | None
    ) -> dict[str, Tensor]:
        """The tensors to store for a linear, by their names in the linear.

        Args:
            weight: codes (N, K) and scales.
            grid: of the weight.
            dtype: of the scales of packed integers, which readers expect in the model's dtype.
            input_scale: float32 (), of inputs with a static scale.
        """
        if self.type == "float":
            return self._floats(weight, grid, input_scale)
        scale = weight.scales.step(torch.float32)
        stored = {"weight": weight.codes, "weight_scale": scale}
        if self.format == "pack-quantized":
            shape = torch.tensor(weight.codes.shape, dtype=torch.int64)
            words = pack_words(weight.codes, self.bits)
            stored = {"weight_packed": words, "weight_shape": shape}
            stored["weight_scale"] = scale.to(dtype)
        if weight.scales.zero is not None:
            stored["weight_zero_point"] = pack_words(weight.scales.zero.T, self.bits).T.contiguous()
        if input_scale is not None:
            stored["input_scale"] = input_scale.reshape(1)
        return stored

    def _floats(
        self, weight: QuantizedWeight, grid: Grid, input_scale: Tensor | None
    ) -> dict[str, Tensor]:
        """As `tensors`, of floating-point codes."""
        codes = FORMATS[weight.element].codes(weight.codes)
        scales = grid.store(weight.scales)
        if self.bits == 8:
            stored = {"weight": codes.view(torch.float8_e4m3fn)}
            scale = scales["weight_scale"]
            stored["weight_scale"] = scale.reshape(1) if self.strategy == "tensor" else scale
        else:
            even, odd = codes[:, ::2], codes[:, 1::2]
            stored = {"weight_packed": (even | (odd << 4)).contiguous()}
            stored["weight_scale"] = scales["weight_scale"]
        if self.strategy == "tensor_group":
            # The format divides by its scale of the tensor.
            local = scales["weight_multiplier"].view(torch.float8_e4m3fn)
            stored["weight_scale"] = local
            stored["weight_global_scale"] = 1 / scales["weight_scale"].reshape(1)
        if input_scale is not None and self.inputs == "tensor_group":
            stored["input_global_scale"] = 1 / input_scale.reshape(1)
        elif input_scale is not None:
            stored["input_scale"] = input_scale.reshape(1)
        return stored

    def arguments(self) -> dict[str, Any]:
        """The entries of this scheme in `config_groups`."""
        weights = _arguments(self.bits, self.type, self.strategy, self.group_size)
        weights |= {"symmetric": self.symmetric, "dynamic": False}
        if self.strategy == "block":
            weights["block_structure"] = BLOCK_STRUCTURE
        inputs = None
        if self.inputs != "float":
            strategy = "tensor" if self.inputs == "static" else self.inputs
            inputs = _arguments(self.input_bits, self.input_type, strategy, self.input_group)
            local = self.inputs == "tensor_group"
            inputs |= {"dynamic": "local" if local else self.inputs != "static"}
        return {"weights": weights, "input_activations": inputs, "format": self.format}


def _arguments(bits: int, kind: CodeType, strategy: str, group_size: int | None) -> dict[str, Any]:
    arguments: dict[str, Any] = {"num_bits": bits, "type": kind, "symmetric": True}
    arguments |= {"strategy": strategy}
    if group_size is not None or strategy in ("channel", "group"):
        arguments["group_size"] = group_size
    if strategy == "tensor_group":
        arguments["scale_dtype"] = E4M3
    elif kind == "float" and strategy == "group" and group_size == MX_GROUP:
        arguments["scale_dtype"] = E8M0
    return arguments


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """int8 codes (N, K) of 2 to 8 bits → int32 (N, ⌈K·bits/32⌉)."""
    if bits not in (4, 8):
        return pack(codes, bits)
    unsigned = codes.to(torch.uint8) + (1 << (bits - 1))  # modulo 256
    octets = nn.functional.pad(unsigned, (0, -codes.shape[1] % (WORD // bits)))
    if bits == 4:
        octets = octets[:, ::2] | (octets[:, 1::2] << 4)
    return octets.reshape(-1).view(torch.int32).reshape(len(codes), -1)


def quantization_config(schemes: Mapping[str, Scheme], floats: list[str]) -> dict[str, Any]:
    """The `quantization_config` of a model, in compressed-tensors' schema.

    Args:
        schemes: of the quantized linears, by full name.
        floats: full names of the linears left in float.
    """
    by_scheme: dict[Scheme, list[str]] = {}
    for name, scheme in schemes.items():
        by_scheme.setdefault(scheme, []).append(name)
    formats = {scheme.format for scheme in by_scheme}
    alone = len(by_scheme) == 1
    groups = {
        f"group_{number}": {
            "targets": ["Linear"] if alone else names,
            "output_activations": None,
            **scheme.arguments(),
        }
        for number, (scheme, names) in enumerate(by_scheme.items())
    }
    return {
        "quant_method": METHOD,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "ignore": floats,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "config_groups": groups,
    }


def schemes_of(quantization: Mapping[str, Any], linears: list[str]) -> dict[str, Scheme]:
    """Read the schemes out of a `quantization_config`: the inverse of that function.

    Args:
        quantization: the config.
        linears: full names of all linears of the model.

    Returns:
        Full name of a quantized linear → its scheme.

    Raises:
        CheckpointError: for a config that `quantization_config` did not write.
    """
    schemes: dict[str, Scheme] = {}
    try:
        ignored = set(quantization["ignore"])
        for group in quantization["config_groups"].values():
            weights, inputs = group["weights"], group["input_activations"]
            scheme = Scheme(
                weights["num_bits"],
                weights["strategy"],
                weights.get("group_size"),
                "float" if inputs is None else _inputs_of(inputs),
                FLOAT_BITS if inputs is None else inputs["num_bits"],
                weights["symmetric"],
                weights["type"],
                "int" if inputs is None else inputs["type"],
                None if inputs is None else inputs.get("group_size"),
            )
            if any(group[field] != value for field, value in scheme.arguments().items()):
                raise ValueError(f"a group of another kind: {group}")
            names = group["targets"]
            schemes |= dict.fromkeys(linears if names == ["Linear"] else names, scheme)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"quantization_config is not one of ours: {error!r}") from error
    return {name: scheme for name, scheme in schemes.items() if name not in ignored}


def _inputs_of(arguments: Mapping[str, Any]) -> Inputs:
    """`Scheme.inputs` of the arguments of quantized inputs."""
    strategy: Inputs | Literal["tensor"] = arguments["strategy"]
    return "static" if strategy == "tensor" else strategy
