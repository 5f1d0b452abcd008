"""Rounding of float weights to codes and scales: grids, round-to-nearest, GPTQ, packing."""
