"""What transformers and lm-eval learn of smoothq, each when it is imported, before or after us."""

from importlib import import_module
from types import ModuleType

from wrapt import when_imported


def register() -> None:
    """Have both register us as soon as they are there; neither is imported for that."""
    when_imported("transformers.quantizers.auto")(_register_format)
    when_imported("lm_eval.models")(_register_model)


def _register_format(quantizers: ModuleType) -> None:
    import_module("smoothq.integrations.transformers")


def _register_model(models: ModuleType) -> None:
    """The name alone: what it stands for is imported when lm-eval is first asked for it."""
    from lm_eval.api.registry import model_registry

    if "smoothq" not in model_registry:
        model_registry.register("smoothq", target="smoothq.integrations.lm_eval:SmoothqLM")
