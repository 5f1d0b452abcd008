"""What `smoothq plan` and `smoothq models` print: runners, costs, vLLM's kernels, families."""
