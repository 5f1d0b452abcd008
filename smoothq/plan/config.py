"""The `quantization_config` of a checkpoint, and the plan that it stands for.

transformers imports this while it is being imported itself (see `integrations.register`), so what
needs its models is imported where it is used.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from ..errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from ..recipe.recipe import Recipe
    from .plan import Plan

METHOD = "smoothq"
FORMAT = 3  # of the tensors: the residual rotation is in none outside the blocks
READABLE = (2, FORMAT)  # in 2 it was in the ends of some models: see `SmoothqConfig.plan_for`


class SmoothqConfig(QuantizationConfigMixin):
    """The `quantization_config` of a checkpoint.

    recipe: the whole Recipe as a mapping. version: of smoothq that wrote it. rotations: the
    construction and hash of every matrix that runs online. format: how the tensors are laid out.
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
        """The config that a plan's checkpoint carries."""
        rotations = [rotation.to_dict() for rotation in plan.online_rotations]
        return cls(plan.recipe.model_dump(mode="json"), version, rotations, FORMAT)

    def check_format(self) -> None:
        """Raise CheckpointError where the tensors lie as another version has them."""
        if self.format not in READABLE:
            raise self._foreign()

    def plan_for(self, model: PreTrainedModel) -> Plan:
        """The plan that a checkpoint of this config was made by, for its float model's skeleton.

        Raises CheckpointError where the checkpoint's tensors are not those of that plan.
        """
        from ..architectures.graph import is_tied
        from .resolve import make_plan

        self.check_format()
        plan = make_plan(model, self.parsed_recipe())
        parts, tied = plan.parts, is_tied(model)
        folded = not tied and parts.entry_norm is None and parts.folds_head(model)
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
        """The recipe. Raises RecipeError naming the field at fault."""
        from ..recipe.recipe import recipe_from_dict

        return recipe_from_dict(self.recipe)


def quantization_of(config: PretrainedConfig, name: str) -> SmoothqConfig:
    """How a checkpoint's config says it is quantized.

    Raises CheckpointError where it is none of ours, or one that is read no more.
    """
    quantization = getattr(config, "quantization_config", None)
    if not isinstance(quantization, dict) or quantization.get("quant_method") != METHOD:
        raise CheckpointError(f"{name} is not quantized by smoothq")
    stored = SmoothqConfig(**quantization)
    stored.check_format()
    return stored
