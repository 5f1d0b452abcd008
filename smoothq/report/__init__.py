"""Results as data and as text."""

from ..moved import names_of

__getattr__ = names_of(__name__, "report.figures", "report.model_card")
