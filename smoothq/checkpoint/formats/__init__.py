"""Formats of weights that are quantized already: a file each, decoded while a model is read."""
