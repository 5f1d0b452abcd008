"""The README.md of a quantized checkpoint, and of an export."""

from __future__ import annotations

from .figures import export_rows, remarks, size_rows
from .quantize_result import QuantizeResult
from .results import ExportResult

LOADING, RECIPE = "## Load it", "## Recipe"  # headings


def model_card(result: QuantizeResult) -> str:
    """The README.md of a quantized checkpoint."""
    # Neither time nor memory: a model is the same however long it took to make.
    figures = size_rows(result.recipe, result.bits, result.bytes_before, result.bytes_after)
    table = "\n".join(f"| {label} | {value} |" for label, value in figures)
    notes = "\n".join(f"- {line}" for line in remarks(result, result.name))
    return f"""---
library_name: transformers
base_model: {result.name}
tags:
- smoothq
- quantized
---

# {result.name}, quantized with smoothq

| | |
|---|---|
{table}

{notes}

{LOADING}

```python
import smoothq  # registers the format with transformers
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("PATH")
```

{RECIPE}

```yaml
{result.recipe.to_yaml()}```
"""


def served_card(card: str, exported: ExportResult) -> str:
    """The README.md of an export. card: that of the checkpoint it was made from."""
    figures = "\n".join(f"- {label}: {value}" for label, value in export_rows(exported)[:-1])
    before, _, rest = card.partition(LOADING)
    _, _, recipe = rest.partition(RECIPE)
    return f"""{before}{LOADING}

In the compressed-tensors format, written by smoothq, which is not needed to read it:

{figures}

```python
from transformers import AutoModelForCausalLM  # with: pip install compressed-tensors

model = AutoModelForCausalLM.from_pretrained("PATH")
```

```sh
vllm serve PATH
```

{RECIPE}{recipe}"""
