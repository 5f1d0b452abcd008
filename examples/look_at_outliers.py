"""Look at the outliers in what a model's linears are fed, and at what each method makes of them.

python examples/look_at_outliers.py MODEL report.html
"""

import sys
from pathlib import Path

from smoothq import (
    METHODS,
    TextSource,
    calibration_tokens,
    figures,
    inspect_model,
    massive_tokens,
    open_source,
    write_page,
)

source = open_source(sys.argv[1])
tokenizer = source.tokenizer()
assert tokenizer is not None
tokens = calibration_tokens(tokenizer, TextSource("builtin"), 2, 128, seed=0)

inspection = inspect_model(source, tokens)
site = inspection.worst()
for method, profile in site.profiles.items():
    print(f"{METHODS[method]}: largest {profile.largest:.4g}, error {profile.error:.3f}")

drawn, massive = figures(inspection, site), massive_tokens(inspection, site, tokenizer)
write_page(inspection, site, drawn, massive, Path(sys.argv[2]))
