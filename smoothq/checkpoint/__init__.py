"""Reading float models tensor by tensor, and writing quantized checkpoints."""
