"""`python -m smoothq.lm_eval ARGUMENTS`: lm-eval's own command line, with smoothq imported.

Both `--model smoothq` and `--model hf` then load checkpoints that smoothq wrote.
"""

import sys

from .errors import SmoothqError


def main() -> None:
    """Run lm-eval's command line; an error of ours is one line and exit code 1."""
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        sys.exit(f"smoothq: lm-eval cannot be imported ({error}): pip install 'smoothq[eval]'")
    try:
        cli_evaluate()
    except SmoothqError as error:
        sys.exit(f"smoothq: {error}")


if __name__ == "__main__":
    main()
