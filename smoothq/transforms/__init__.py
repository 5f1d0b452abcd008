"""Rewrites of float weights that keep the model's function."""
