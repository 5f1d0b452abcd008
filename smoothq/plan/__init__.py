"""What a recipe comes to for one model, and the modules of that."""

from ..moved import names_of

__getattr__ = names_of(
    __name__, "plan.resolve", "plan.plan", "plan.wiring", "plan.install", "runtime.device"
)
