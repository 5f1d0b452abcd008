"""Perplexity, agreement with a reference model, lm-eval's tasks, and comparisons of models."""
