"""Integrations: transformers' quantizers, vLLM's plugin, lm-eval's models."""
