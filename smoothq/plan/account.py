"""The account of a checkpoint: shape and dtype of every tensor, and a check of files against it.

It is computed from the plan before the first block is worked on. It lists the tensors that the
quantized model loads (floats in the source's dtype unless the recipe names one) and the source's
extra tensors, which the model's class does not load.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from ..checkpoint.source import Source
from ..checkpoint.weight_files import Spec, tensor_shapes
from ..errors import OutputError
from ..modules import InputQuantizer, QuantizedEmbedding, QuantizedLinear
from .install import install
from .plan import Plan
from .wiring import stored_tensors

Account = dict[str, Spec]  # full tensor name → shape and dtype


def account_of(model: PreTrainedModel, plan: Plan, source: Source) -> Account:
    """Shape and dtype of every tensor that a plan's checkpoint will contain, by full name.

    Args:
        model: the float model on the meta device; it is not changed.
        plan: the plan of the checkpoint.
        source: the float checkpoint; its extra tensors are included.
    """
    quantized = copy.deepcopy(model)
    install(quantized, plan)
    codes = codes_of(quantized)

    def dtype(name: str, tensor: torch.Tensor) -> torch.dtype:
        cast = plan.recipe.dtype != "auto" and tensor.is_floating_point() and name not in codes
        return plan.stored_dtype if cast else tensor.dtype

    tensors = stored_tensors(quantized)
    specs = {name: Spec(tuple(t.shape), dtype(name, t)) for name, t in tensors.items()}
    return specs | source.extras


def codes_of(model: nn.Module) -> set[str]:
    """The full names of a quantized model's codes, scales, zero points and multipliers."""
    return {
        f"{name}.{key}"
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLinear | InputQuantizer | QuantizedEmbedding)
        for key, _ in module.named_buffers(recurse=False)
        if key != "bias"
    }


def nbytes_of(account: Account) -> int:
    """Total bytes of the tensors of an account."""
    return sum(spec.nbytes for spec in account.values())


def outside_blocks(account: Account, plan: Plan, source: Source) -> Account:
    """The part of an account that is not of a block: embedding, head, norms, buffers, extras."""
    blocks = f"{plan.parts.layers}."
    return {
        name: spec
        for name, spec in account.items()
        if not name.startswith(blocks) or name in source.extras
    }


def check_files(account: Account, directory: Path) -> None:
    """Compare names, shapes and dtypes in a directory's safetensors files with an account.

    Raises:
        OutputError: a tensor is missing, unexpected, or has another shape or dtype.
    """
    written: Account = {}
    for path in sorted(directory.glob("*.safetensors")):
        written |= tensor_shapes(path)
    wrong = sorted(name for name in account | written if account.get(name) != written.get(name))
    if wrong:
        name = wrong[0]
        raise OutputError(
            f"{len(wrong)} tensors of the output are not what was planned, the first '{name}': "
            f"planned {_text(account.get(name))}, written {_text(written.get(name))}; nothing was "
            "placed: please report this"
        )


def _text(spec: Spec | None) -> str:
    return "none" if spec is None else f"{spec.dtype} {spec.shape}"
