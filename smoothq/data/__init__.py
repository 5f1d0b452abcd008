"""Text and data that a model is calibrated and measured on, as tokens."""
