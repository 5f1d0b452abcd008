"""The pass over the blocks, and what it needs."""

from ..moved import names_of

__getattr__ = names_of(
    __name__,
    *("pipeline.run", "pipeline.quantize_block", "pipeline.monitor"),
    *("report.quantize_result", "progress"),
)
