"""The compressed-tensors format, which transformers and vLLM read without smoothq.

8-bit weights with scales per output channel and 8-bit activations are `int-quantized`: int8 codes.
All others are `pack-quantized`: unsigned codes packed along a row into int32 words, lowest bits
first. A group's scale may be negative, because readers only multiply by it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..checkpoint.manifest import COMPRESSED_TENSORS
from ..errors import CheckpointError
from ..recipe.recipe import FLOAT_BITS
from ..rounding.grid import QuantizedWeight

METHOD = COMPRESSED_TENSORS
WORD = 32  # bits of the integers that codes are packed into
Strategy = Literal["channel", "group"]
Inputs = Literal["float", "token", "static"]


@dataclass(frozen=True)
class Scheme:
    """How a linear's weight and input are quantized.

    Attributes:
        bits: of the weight's codes.
        strategy: scales per output channel or per group of input channels.
        group_size: input channels of a group; None per channel.
        inputs: left in `float`, with a dynamic scale per `token`, or with one `static` scale.
        input_bits: of the input's codes.
        symmetric: whether the weight has no zero points.
    """

    bits: int
    strategy: Strategy
    group_size: int | None
    inputs: Inputs
    input_bits: int
    symmetric: bool = True

    def __str__(self) -> str:
        kind = self.strategy if self.group_size is None else f"group {self.group_size}"
        static = ", static" if self.inputs == "static" else ""
        zeros = "" if self.symmetric else ", zero points"
        return f"W{self.bits}A{self.input_bits} {kind}{zeros}{static}"

    @property
    def format(self) -> Literal["int-quantized", "pack-quantized"]:
        """compressed-tensors' name of the layout."""
        integers = self.bits == self.input_bits == 8 and self.inputs != "float"
        return "int-quantized" if integers and self.strategy == "channel" else "pack-quantized"

    def tensors(
        self, weight: QuantizedWeight, dtype: torch.dtype, input_scale: Tensor | None
    ) -> dict[str, Tensor]:
        """The tensors to store for a linear, by their names in the linear.

        Args:
            weight: codes (N, K) and scales.
            dtype: of the scales of packed codes, which readers expect in the model's dtype.
            input_scale: float32 (), of `static` inputs.
        """
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

    def arguments(self) -> dict[str, Any]:
        """The entries of this scheme in `config_groups`."""
        weights = _arguments(self.bits, self.strategy, False)
        weights |= {"group_size": self.group_size, "symmetric": self.symmetric}
        inputs = None
        if self.inputs != "float":
            dynamic = self.inputs == "token"
            inputs = _arguments(self.input_bits, "token" if dynamic else "tensor", dynamic)
        return {"weights": weights, "input_activations": inputs, "format": self.format}


def _arguments(bits: int, strategy: str, dynamic: bool) -> dict[str, Any]:
    kind = {"num_bits": bits, "type": "int", "symmetric": True}
    return kind | {"strategy": strategy, "dynamic": dynamic}


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """int8 codes (N, K) of 4 or 8 bits → int32 (N, ⌈K·bits/32⌉)."""
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
                weights["group_size"],
                "float" if inputs is None else "token" if inputs["dynamic"] else "static",
                FLOAT_BITS if inputs is None else inputs["num_bits"],
                weights["symmetric"],
            )
            if any(group[field] != value for field, value in scheme.arguments().items()):
                raise ValueError(f"a group of another kind: {group}")
            names = group["targets"]
            schemes |= dict.fromkeys(linears if names == ["Linear"] else names, scheme)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"quantization_config is not one of ours: {error!r}") from error
    return {name: scheme for name, scheme in schemes.items() if name not in ignored}
