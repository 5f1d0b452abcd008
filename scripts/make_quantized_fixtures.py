"""Small quantized weights by the programs that write such checkpoints, for `tests/fixtures`.

    python scripts/make_quantized_fixtures.py WRITER

Run once a writer, in an environment of the writer's own, with PyTorch and safetensors; smoothq is
not imported. A fixture is a folder: `stored.safetensors` has two linears as the writer stores them,
`expected.safetensors` what the writer itself decodes them to, cast to bfloat16 at the end, and
`quantization_config.json` what a model's config would say. Writers:

    transformers        5.24: Fp8Quantize and Fp8Dequantize, called directly; GPT-OSS's experts,
                        encoded by compressed-tensors 0.20 and decoded by convert_moe_packed_tensors
    compressed-tensors  0.20
    actorder            compressed-tensors 0.11, for later versions do not reorder columns
    gptqmodel           7.7, its source tree on PYTHONPATH: packed and decoded by TorchLinear
    autoawq             0.2.9, its source tree on PYTHONPATH: packed by WQLinear_GEMM, decoded by
                        dequantize_gemm
    modelopt            0.47: FP8QTensor and NVFP4QTensor
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

FIXTURES = Path(__file__).parents[1] / "tests" / "fixtures" / "quantized"
BLOCK = "model.layers.0"
# Two linears of another shape each, (out, in); the second has several groups and blocks.
SHAPES = {f"{BLOCK}.self_attn.q_proj": (64, 32), f"{BLOCK}.mlp.down_proj": (96, 128)}

Fixture = tuple[str, dict[str, Any], dict[str, Tensor], dict[str, Tensor]]


def weights() -> dict[str, Tensor]:
    """Float32 weights by module, with some channels larger than others."""
    generator = torch.Generator().manual_seed(3)
    of_modules = {}
    for module, shape in SHAPES.items():
        values = torch.randn(shape, generator=generator)
        sizes = torch.logspace(-1.5, 0.5, shape[0])
        of_modules[module] = values * sizes[torch.randperm(shape[0], generator=generator), None]
    return of_modules


def transformers() -> Iterator[Fixture]:
    """FP8 in blocks, with scales of powers of two, and a matrix; experts in FP8 and two of FP4."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    def coders(config: dict[str, Any]) -> tuple[Any, Any]:
        """Encode {name: weight}; decode a weight's tensors."""
        settings = SimpleNamespace(**({"scale_fmt": "float"} | config))
        quantizer: Any = SimpleNamespace(quantization_config=settings)
        decoder: Any = Fp8Dequantize(quantizer)
        return Fp8Quantize(quantizer).convert, partial(
            decoder._dequantize_one, output_dtype=torch.bfloat16
        )

    blocks: dict[str, Any] = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    stored: dict[str, Tensor] = {}
    expected: dict[str, Tensor] = {}
    for name, config in {
        "fp8-blocks": blocks,
        "fp8-blocks-ue8m0": blocks | {"scale_fmt": "ue8m0"},
        "fp8-tensor": blocks | {"weight_block_size": None},
    }.items():
        encode, decode = coders(config)
        stored, expected = {}, {}
        for module, weight in weights().items():
            parts = encode({f"{module}.weight": weight})
            stored |= parts
            expected[f"{module}.weight"] = decode(*parts.values())
        yield name, config, stored, expected
    encode, decode = coders(blocks)
    name = f"{BLOCK}.mlp.experts.down_proj"
    experts = torch.randn(3, 64, 96, generator=torch.Generator().manual_seed(4))
    stored = encode({name: experts})
    yield "fp8-experts", blocks, stored, {name: decode(*stored.values())}
    codes, exponents = mxfp4(experts[0])
    name = f"{BLOCK}.mlp.experts.0.down_proj"
    stored = {
        f"{name}.weight": codes.view(torch.int8),
        f"{name}.scale": exponents.view(torch.float8_e8m0fnu),
    }
    config = {"quant_method": "fp8", "weight_block_size": [128, 128], "expert_dtype": "fp4"}
    yield "fp8-fp4-experts", config, stored, {f"{name}.weight": decode(*stored.values())}
    stored, expected = {}, {}
    for leaf, out, width in (("gate_up_proj", 96, 64), ("down_proj", 64, 96)):
        name = f"{BLOCK}.mlp.experts.{leaf}"
        experts = torch.randn(3, out, width, generator=torch.Generator().manual_seed(out))
        packed = [mxfp4(matrix) for matrix in experts]
        codes = torch.stack([codes for codes, _ in packed])
        stored[f"{name}_scales"] = torch.stack([scales for _, scales in packed])
        stored[f"{name}_blocks"] = codes.reshape(3, out, width // 32, 16)
        expected[name] = convert_moe_packed_tensors(
            stored[f"{name}_blocks"], stored[f"{name}_scales"], dtype=torch.bfloat16
        )
    yield "mxfp4-gpt-oss", {"quant_method": "mxfp4"}, stored, expected


def mxfp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, uint8 (out, in / 2), and exponents, uint8 (out, in / 32), by compressed-tensors."""
    parts, _ = compressed(weight, "mxfp4-pack-quantized", MXFP4)
    return parts["weight_packed"], parts["weight_scale"]


MXFP4 = {
    "num_bits": 4,
    "type": "float",
    "strategy": "group",
    "group_size": 32,
    "scale_dtype": torch.uint8,
}
_GROUPS = {"num_bits": 4, "strategy": "group", "group_size": 16}
_FP8 = {"num_bits": 8, "type": "float"}
COMPRESSED: dict[str, tuple[str, dict[str, Any]]] = {
    "int-channel": ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
    "int-asymmetric": (
        "int-quantized",
        {"num_bits": 8, "strategy": "channel", "symmetric": False, "zp_dtype": torch.int8},
    ),
    "float-tensor": ("float-quantized", _FP8 | {"strategy": "tensor"}),
    "float-channel": ("float-quantized", _FP8 | {"strategy": "channel"}),
    "float-block": ("float-quantized", _FP8 | {"strategy": "block", "block_structure": [40, 32]}),
    "pack-4": ("pack-quantized", _GROUPS),
    "pack-4-asymmetric": (
        "pack-quantized",
        _GROUPS | {"symmetric": False, "zp_dtype": torch.int8},
    ),
    "pack-8": ("pack-quantized", {"num_bits": 8, "strategy": "channel"}),
    "pack-3": ("pack-quantized", {"num_bits": 3, "strategy": "channel"}),
    "nvfp4": (
        "nvfp4-pack-quantized",
        {
            "num_bits": 4,
            "type": "float",
            "strategy": "tensor_group",
            "group_size": 16,
            "scale_dtype": torch.float8_e4m3fn,
        },
    ),
    "mxfp4": ("mxfp4-pack-quantized", MXFP4),
    "mxfp8": ("mxfp8-quantized", MXFP4 | {"num_bits": 8}),
}


def ranges(weight: Tensor, args: Any) -> Tensor:
    """The weight so that its scales' elements are the last axis: (..., elements)."""
    if args.strategy == "tensor":
        return weight.reshape(1, -1)
    if args.strategy == "channel":
        return weight[:, None]
    if args.strategy == "block":
        rows, columns = weight.shape
        height, width = args.block_structure
        padded = nn.functional.pad(weight, (0, -columns % width, 0, -rows % height))
        blocks: Tensor = padded.unflatten(1, (-1, width)).unflatten(0, (-1, height))
        return blocks.transpose(1, 2).flatten(2)
    groups: Tensor = weight.unflatten(1, (-1, args.group_size))
    return groups


def compressed(
    weight: Tensor, format: str, fields: dict[str, Any], order: Tensor | None = None
) -> tuple[dict[str, Tensor], Tensor]:
    """What compressed-tensors stores of a weight, and what it decodes that to.

    Args:
        weight: float (out, in).
        format: name of the compressor.
        fields: of QuantizationArgs.
        order: the group of each column, for versions that reorder them.
    """
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    args = QuantizationArgs(**fields)
    weight = weight.bfloat16()
    parts: dict[str, Tensor] = {"weight": weight}
    if args.strategy == "tensor_group":
        parts["weight_global_scale"] = generate_gparam(weight.amin(), weight.amax()).reshape(1)
    seen = weight if order is None else weight[:, torch.argsort(order, stable=True)]
    elements = ranges(seen, args)
    scale, zero = calculate_qparams(
        *(elements.amin(-1), elements.amax(-1), args),
        global_scale=parts.get("weight_global_scale"),
    )
    parts["weight_scale"] = scale
    if not args.symmetric:
        parts["weight_zero_point"] = zero.to(torch.int8)
    if order is not None:
        parts["weight_g_idx"] = order
    compressor = BaseCompressor.get_value_from_registry(format)
    if order is None:
        scheme = QuantizationScheme(targets=["Linear"], weights=args, format=format)
        packed = compressor.compress(parts, scheme)
        return packed, compressor.decompress(packed, scheme)["weight"].bfloat16()
    old = compressor()
    packed = old.compress_weight(
        **{name.removeprefix("weight_"): part for name, part in parts.items()},
        quantization_args=args,
    )
    packed |= {name: parts[name] for name in ("weight_scale", "weight_g_idx")}
    decoded = old.decompress_weight(packed, args)
    return packed, decoded.bfloat16()


def compressed_config(format: str, fields: dict[str, Any]) -> dict[str, Any]:
    """A quantization_config of compressed-tensors."""
    plain = {
        key: str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
        for key, value in fields.items()
    }
    group = {"targets": ["Linear"], "weights": plain, "format": format}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "config_groups": {"group_0": group},
        "quantization_status": "compressed",
    }


def compressed_tensors() -> Iterator[Fixture]:
    """Every format of `COMPRESSED`."""
    for name, (format, fields) in COMPRESSED.items():
        stored: dict[str, Tensor] = {}
        expected: dict[str, Tensor] = {}
        for module, weight in weights().items():
            parts, decoded = compressed(weight, format, fields)
            stored |= {f"{module}.{leaf}": tensor for leaf, tensor in parts.items()}
            expected[f"{module}.weight"] = decoded
        yield f"compressed-{name}", compressed_config(format, fields), stored, expected


def actorder() -> Iterator[Fixture]:
    """Packed integers in groups of columns that are not neighbours."""
    fields = _GROUPS | {"actorder": "group"}
    stored: dict[str, Tensor] = {}
    expected: dict[str, Tensor] = {}
    for module, weight in weights().items():
        parts, decoded = compressed(
            weight, "pack-quantized", fields, scattered(weight.shape[1], 16)
        )
        stored |= {f"{module}.{leaf}": tensor for leaf, tensor in parts.items()}
        expected[f"{module}.weight"] = decoded
    yield (
        "compressed-pack-4-actorder",
        compressed_config("pack-quantized", fields),
        stored,
        expected,
    )


def scattered(columns: int, group_size: int) -> Tensor:
    """The group of each column, int32 (columns,), in an order that is not the columns'."""
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(columns))
    return (order // group_size).to(torch.int32)


def affine(weight: Tensor, bits: int, group: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scales and zero points, float16 and float32 (out, groups), by the extremes of each group."""
    top = 2**bits - 1
    scales, zeros = [], []
    for index in range(int(group.max()) + 1):
        part = weight[:, group == index]
        if symmetric:
            scale = part.abs().amax(1) * 2 / top
            zero = torch.full_like(scale, 2 ** (bits - 1))
        else:
            scale = (part.amax(1).clamp(min=0) - part.amin(1).clamp(max=0)) / top
            zero = (-part.amin(1).clamp(max=0) / scale).round()
        scales.append(scale.half())
        zeros.append(zero)
    return torch.stack(scales, 1), torch.stack(zeros, 1)


def gptqmodel() -> Iterator[Fixture]:
    """GPTQ in both formats and several bits, in the order of columns and in another."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    for name, bits, format, symmetric, reorders in (
        ("gptq-4", 4, "gptq", True, False),
        ("gptq-4-reordered", 4, "gptq", False, True),
        ("gptq-4-v2", 4, "gptq_v2", False, True),
        ("gptq-8", 8, "gptq", False, False),
        ("gptq-2", 2, "gptq", False, False),
    ):
        stored: dict[str, Tensor] = {}
        expected: dict[str, Tensor] = {}
        for module, weight in weights().items():
            rows, columns = weight.shape
            neighbours = (torch.arange(columns) // 32).to(torch.int32)
            group = scattered(columns, 32) if reorders else neighbours
            linear = nn.Linear(columns, rows, bias=False)
            linear.weight.data = weight
            scales, zeros = affine(weight, bits, group, symmetric)
            packed = TorchLinear(
                bits=bits,
                group_size=32,
                sym=symmetric,
                desc_act=reorders,
                in_features=columns,
                out_features=rows,
            )
            packed.pack_original(linear, scales.float(), zeros, group)
            decoded = packed.dequantize_weight().T.contiguous()
            if format == "gptq":
                convert_gptq_v2_to_v1_format_module(
                    packed, QuantizeConfig(bits=bits, group_size=32)
                )
            tensors = {leaf: getattr(packed, leaf) for leaf in ("qweight", "qzeros", "scales")}
            tensors["g_idx"] = group
            stored |= {f"{module}.{leaf}": tensor for leaf, tensor in tensors.items()}
            expected[f"{module}.weight"] = decoded.bfloat16()
        config = {
            "quant_method": "gptq",
            "bits": bits,
            "group_size": 32,
            "desc_act": reorders,
            "sym": symmetric,
            "checkpoint_format": format,
        }
        yield name, config, stored, expected


def autoawq() -> Iterator[Fixture]:
    """AWQ of 4 bits for GEMM kernels."""
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.utils.packing_utils import dequantize_gemm

    stored: dict[str, Tensor] = {}
    expected: dict[str, Tensor] = {}
    for module, weight in weights().items():
        rows, columns = weight.shape
        linear = nn.Linear(columns, rows, bias=False)
        linear.weight.data = weight
        scales, zeros = affine(weight, 4, torch.arange(columns) // 32, symmetric=False)
        packed = WQLinear_GEMM.from_linear(
            linear, 4, 32, scales=scales.T.contiguous(), zeros=zeros.T.contiguous()
        )
        tensors = {leaf: getattr(packed, leaf) for leaf in ("qweight", "qzeros", "scales")}
        stored |= {f"{module}.{leaf}": tensor for leaf, tensor in tensors.items()}
        decoded = dequantize_gemm(**tensors, bits=4, group_size=32)
        expected[f"{module}.weight"] = decoded.T.contiguous().bfloat16()
    config = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 32,
        "zero_point": True,
        "version": "gemm",
    }
    yield "awq", config, stored, expected


def modelopt() -> Iterator[Fixture]:
    """FP8 with a scale of the matrix; NVFP4 with a scale of 16 inputs and one of the matrix."""
    from modelopt.torch.quantization.qtensor import FP8QTensor, NVFP4QTensor

    stored: dict[str, Tensor] = {}
    expected: dict[str, Tensor] = {}
    for module, weight in weights().items():
        codes, scale = FP8QTensor.quantize(weight)
        stored |= {
            f"{module}.weight": codes._quantized_data,
            f"{module}.weight_scale": scale.reshape(()),
        }
        expected[f"{module}.weight"] = codes.dequantize(torch.float32, scale=scale).bfloat16()
    yield "modelopt-fp8", {"quant_method": "modelopt", "quant_algo": "FP8"}, stored, expected
    stored, expected = {}, {}
    for module, weight in weights().items():
        codes, scale, whole = NVFP4QTensor.quantize(weight.bfloat16(), 16)
        stored |= {
            f"{module}.weight": codes._quantized_data,
            f"{module}.weight_scale": scale,
            f"{module}.weight_scale_2": whole,
        }
        expected[f"{module}.weight"] = codes.dequantize(
            scale=scale, double_scale=whole, block_sizes={-1: 16}, dtype=torch.bfloat16
        )
    yield "modelopt-nvfp4", {"quant_method": "modelopt", "quant_algo": "NVFP4"}, stored, expected


WRITERS: dict[str, Callable[[], Iterator[Fixture]]] = {
    "transformers": transformers,
    "compressed-tensors": compressed_tensors,
    "actorder": actorder,
    "gptqmodel": gptqmodel,
    "autoawq": autoawq,
    "modelopt": modelopt,
}


@torch.no_grad()
def main() -> None:
    """Write the fixtures of one writer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("writer", choices=WRITERS)
    for name, config, stored, expected in WRITERS[parser.parse_args().writer]():
        folder = FIXTURES / name
        folder.mkdir(parents=True, exist_ok=True)
        for file, tensors in (("stored", stored), ("expected", expected)):
            plain = {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
            save_file(plain, folder / f"{file}.safetensors")
        (folder / "quantization_config.json").write_text(json.dumps(config, indent=2) + "\n")
        print(name, sum(path.stat().st_size for path in folder.iterdir()), "bytes")


if __name__ == "__main__":
    main()
