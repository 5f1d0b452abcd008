"""Calibration and evaluation data: texts and data sets, tokenizers, and the tokens of both."""
