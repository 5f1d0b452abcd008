"""The `quantization_config` of a checkpoint, and the plan that follows from it.

transformers imports this module during its own import (see `integrations.register`), so modules
that need transformers' model classes are imported inside the functions that use them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from ..errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from ..recipe.recipe import Recipe
    from .plan import Plan

METHOD = "smoothq"
FORMAT = 3  # of the tensors: those outside the blocks do not contain the residual rotation
READABLE = (2, FORMAT)  # in 2 some embeddings and heads contained it: see `SmoothqConfig.plan_for`


class SmoothqConfig(QuantizationConfigMixin):
    """The `quantization_config` of a checkpoint.

    Args:
        recipe: the whole Recipe as a mapping.
        version: the version of smoothq that wrote the checkpoint.
        rotations: construction and hash of every rotation that is applied online.
        format: the version of the tensor layout.
        unknown: fields of later versions, kept when the config is saved again.
    """

    def __init__(
        self,
        recipe: dict[str, Any] | None = None,
        version: str = "",
        rotations: Iterable[dict[str, Any]] = (),
        format: int = 1,
        **unknown: Any,
    ) -> None:
        self.quant_method: Any = METHOD
        self.recipe = recipe or {}
        self.version = version
        self.rotations = list(rotations)
        self.format = format
        # Kept, so that a newer writer's fields survive being loaded and saved again.
        unknown.pop("quant_method", None)
        for name, value in unknown.items():
            setattr(self, name, value)

    @classmethod
    def of(cls, plan: Plan, version: str) -> SmoothqConfig:
        """The `quantization_config` for the checkpoint of a plan; `version` is smoothq's."""
        rotations = [rotation.to_dict() for rotation in plan.online_rotations]
        return cls(plan.recipe.model_dump(mode="json"), version, rotations, FORMAT)

    def check_format(self) -> None:
        """Raise CheckpointError unless this version can read the format of the tensors."""
        if self.format not in READABLE:
            raise self._foreign()

    def plan_for(self, model: PreTrainedModel, renamed: Callable[[str], str] | None = None) -> Plan:
        """The plan of the checkpoint with this config, resolved again from its recipe.

        Args:
            model: the float model of the checkpoint's class, on the meta device.
            renamed: where the model is only the text model of the checkpoint's class: a stored name
                → the model's. Patterns are renamed, and those of what it lacks are left out.

        Raises:
            CheckpointError: the checkpoint's format lays the tensors of this plan out differently.
        """
        from .resolve import resolve
        from .wiring import Wiring

        self.check_format()
        wiring, recipe = Wiring.of(model), self.parsed_recipe()
        if renamed is not None:
            recipe = recipe.renamed(renamed, wiring.linears)
            self.recipe = recipe.model_dump(mode="json")
        plan = resolve(wiring, recipe)
        parts = plan.parts
        folded = not plan.wiring.tied and parts.entry_norm is None and parts.folds_head(model)
        moved = plan.residual_rotation is not None and (folded or parts.positions is not None)
        if self.format < FORMAT and moved:
            raise self._foreign()
        return plan

    def _foreign(self) -> CheckpointError:
        return CheckpointError(
            f"the checkpoint has format {self.format} (smoothq {self.version}), this one "
            f"reads format {FORMAT}; quantize the model again, or load it with that version"
        )

    def parsed_recipe(self) -> Recipe:
        """The stored recipe. Raises RecipeError naming the field that is invalid."""
        from ..recipe.recipe import recipe_from_dict

        return recipe_from_dict(self.recipe)


def quantization_of(config: PretrainedConfig, name: str) -> SmoothqConfig:
    """The `quantization_config` of a checkpoint's config, parsed.

    Args:
        config: the checkpoint's config.
        name: the checkpoint's name, for messages.

    Raises:
        CheckpointError: the checkpoint is not quantized by smoothq, or has a format that this
            version cannot read.
    """
    quantization = getattr(config, "quantization_config", None)
    if not isinstance(quantization, dict) or quantization.get("quant_method") != METHOD:
        raise CheckpointError(f"{name} is not quantized by smoothq")
    stored = SmoothqConfig(**quantization)
    stored.check_format()
    return stored
