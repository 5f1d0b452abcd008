"""Loading through transformers: `from_pretrained` understands `quant_method: smoothq`.

Importing smoothq has transformers register a config and an HfQuantizer. The quantizer makes the
plan again from the recipe in `config.json`, puts the empty modules of that plan in the place of the
dense ones before any weight is read, and compares the checkpoint's tensors with them by name, shape
and dtype: a missing, extra or foreign tensor is an error, never random weights.

transformers imports this while it is being imported itself, so what needs its models is imported
where it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer

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
    """Builds the quantized modules for `from_pretrained`, and takes them apart to dequantize."""

    requires_calibration = True
    quantization_config: SmoothqConfig
    plan: Plan

    @property
    def is_trainable(self) -> bool:
        """Packed integers have no gradient."""
        return False

    @property
    def is_compileable(self) -> bool:
        """`torch.compile` and static caches work; not with experts, which run as tokens ask."""
        return not any(site.routed for block in self.plan.blocks for site in block.graph.sites)

    def is_serializable(self) -> bool:
        """`save_pretrained` writes what was loaded."""
        return True

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        from ..checkpoint.check import check_tensors
        from ..plan.install import install

        _check_class(model)
        # transformers builds the model under a meta-device context; rotations must be real.
        with torch.device("cpu"):
            self.plan = self.quantization_config.plan_for(model)
            self._check_rotations(self.plan)
            install(model, self.plan)
        if self.plan.tables:
            # The head looks its codes up in the embedding: there is no parameter to tie.
            model.all_tied_weights_keys = {}
        if checkpoint_files:
            check_tensors(model, checkpoint_files)

    def update_weight_conversions(self, weight_conversions: Any, *model: Any) -> Any:
        """None: a checkpoint of ours has the names that the modules have."""
        return []

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping

        from ..modules.prepare import check_filled, prepare

        check_filled(model)
        model.requires_grad_(False)  # its operators have none, and a compiler would ask for it
        prepare(model)
        loaded: Any = model
        loaded._weight_conversions = _OneWay(get_model_conversion_mapping(model))

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

        # A config that was written holds a name.
        wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        dequantize(model, self.plan, wanted or model.dtype)
        return model


class _OneWay(list[Any]):
    """Conversions from stored names, for what transformers loads later.

    Such as layers that predict several tokens. Saving asks for them in reverse, and our tensors
    have their names already.
    """

    def __getitem__(self, index: Any) -> Any:
        return [] if index == slice(None, None, -1) else super().__getitem__(index)


def _check_class(model: PreTrainedModel) -> None:
    """Raise UnsupportedModelError for a class without the head that a checkpoint of ours has."""
    if model.get_decoder() is model or not isinstance(
        model.get_output_embeddings(), torch.nn.Module
    ):
        raise UnsupportedModelError(
            f"the checkpoint holds a causal LM, and {type(model).__name__} has no head for its "
            "tokens; load it with AutoModelForCausalLM.from_pretrained, whose get_decoder() is the "
            "model without a head"
        )
