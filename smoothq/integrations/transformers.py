"""Loading through transformers: `from_pretrained` understands `quant_method: smoothq`.

Importing this module registers a config and an HfQuantizer with transformers. The quantizer makes
the plan again from the recipe in `config.json`, replaces dense modules by the plan's quantized ones
before any weight is read, and compares the checkpoint's tensors with the modules by name, shape and
dtype: a missing or unknown tensor is an error, never random weights.

This module is imported while transformers itself is being imported, so imports that need its models
are inside functions.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer

from ..compat import convert_when_loading_alone, remove_ties, renamings_among
from ..errors import CheckpointError, UnsupportedModelError
from ..moved import names_of
from ..plan.config import METHOD, SmoothqConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..plan.plan import Plan

__getattr__ = names_of(
    __name__, "plan.config", "plan.install", "modules.prepare", "checkpoint.check"
)

register_quantization_config(METHOD)(SmoothqConfig)


@register_quantizer(METHOD)
class SmoothqHfQuantizer(HfQuantizer):
    """Installs quantized modules for `from_pretrained`, and dense ones for `dequantize`."""

    requires_calibration = True
    quantization_config: SmoothqConfig
    plan: Plan
    _renames = False  # whether the model has other names than the checkpoint

    @property
    def is_trainable(self) -> bool:
        """False: integer codes have no gradient."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Whether `torch.compile` and static caches work: not with routed experts."""
        return not any(site.routed for block in self.plan.blocks for site in block.graph.sites)

    def is_serializable(self) -> bool:
        """True: `save_pretrained` writes the quantized tensors as they were loaded."""
        return True

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        from ..checkpoint.check import check_tensors, renaming_of_text_model
        from ..plan.install import install

        _check_class(model)
        renamed = renaming_of_text_model(model, checkpoint_files or [])
        self._renames = renamed is not None
        # transformers calls this under a meta-device context; rotations need real tensors.
        with torch.device("cpu"):
            self.plan = self.quantization_config.plan_for(model, renamed)
            self._check_rotations(self.plan)
            install(model, self.plan)
        if self.plan.tables:
            # A tied head uses the embedding's codes, so no parameter is tied.
            remove_ties(model)
        if checkpoint_files:
            check_tensors(model, checkpoint_files, self._renames)

    def update_weight_conversions(self, weight_conversions: Any, *model: Any) -> Any:
        """Return no conversions: smoothq's checkpoints use the names of the modules.

        For a text model alone, of a checkpoint with towers, the renamings.
        """
        return renamings_among(weight_conversions) if self._renames else []

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        from ..modules.prepare import check_filled, prepare

        check_filled(model)
        model.requires_grad_(False)  # the operators have no gradients, for which torch.compile asks
        prepare(model)
        _warn_of_buffers(model)
        convert_when_loading_alone(model)

    def _check_rotations(self, plan: Plan) -> None:
        from ..transforms.hadamard import Hadamard

        stored = [Hadamard.from_dict(entry) for entry in self.quantization_config.rotations]
        if set(stored) != set(plan.online_rotations):
            raise CheckpointError(
                "the rotations in quantization_config are not those that its recipe asks for; "
                "the checkpoint was edited, or written by another version of smoothq "
                f"({self.quantization_config.version})"
            )

    def _dequantize(
        self, model: PreTrainedModel, dtype: torch.dtype | str | None = None
    ) -> PreTrainedModel:
        from ..plan.install import dequantize

        # A config that was read from JSON holds the dtype's name.
        wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        dequantize(model, self.plan, wanted or model.dtype)
        return model


def _warn_of_buffers(model: PreTrainedModel) -> None:
    """Warn where accelerate offloads a model's parameters alone."""
    from ..modules.prepare import weights_that_stay

    name = next(weights_that_stay(model), None)
    if name is not None:
        warnings.warn(
            f"'{name}' is offloaded without its weight: quantized weights are buffers, and stay on "
            "the device that runs them, unless from_pretrained is given offload_buffers=True",
            stacklevel=2,
        )


def _check_class(model: PreTrainedModel) -> None:
    """Raise UnsupportedModelError for a class that lacks the head that the checkpoint has."""
    stored = (model.config.architectures or [""])[0]
    headless = not isinstance(model.get_output_embeddings(), torch.nn.Module)
    if headless and type(model).__name__ != stored:
        raise UnsupportedModelError(
            f"the checkpoint holds a {stored or 'causal LM'}, and {type(model).__name__} has not "
            "its head; load it with AutoModelForCausalLM.from_pretrained, or the auto class of "
            f"{stored or 'its class'}, whose get_decoder() is the model without a head"
        )
