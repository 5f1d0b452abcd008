"""Reading models block by block, and writing quantized ones."""
