"""Registers smoothq with transformers and lm-eval when these are imported, before or after it."""

from importlib import import_module
from types import ModuleType

from wrapt import when_imported

from ..compat import stock_experts


def register() -> None:
    """Register now with whichever is imported, else when it is; this imports neither."""
    when_imported("transformers.quantizers.auto")(_register_format)
    when_imported("transformers.integrations.moe")(_register_experts)
    when_imported("lm_eval.models")(_register_model)


def _register_format(quantizers: ModuleType) -> None:
    import_module("smoothq.integrations.transformers")


def _register_experts(interface: ModuleType) -> None:
    """Register the name `smoothq` for experts: quantized ones all at once, where that is possible.

    They run so under every name but `eager`; float experts run as under `eager`.
    """
    interface.ALL_EXPERTS_FUNCTIONS.register("smoothq", stock_experts)


def _register_model(models: ModuleType) -> None:
    """Register the name `smoothq`; lm-eval imports its class on first use."""
    from lm_eval.api.registry import model_registry

    if "smoothq" not in model_registry:
        model_registry.register("smoothq", target="smoothq.integrations.lm_eval:SmoothqLM")
