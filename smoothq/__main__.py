"""`python -m smoothq`: the same as the `smoothq` command."""

from .cli import main

main()
