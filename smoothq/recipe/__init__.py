"""What to do with a model: bits, transforms, rounding, calibration."""

from ..moved import names_of

__getattr__ = names_of(__name__, "recipe.recipe", "recipe.presets")
