"""Outliers in the inputs of a model's linears, and what quantizing each site alone costs."""
