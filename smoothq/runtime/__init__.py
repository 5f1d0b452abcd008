"""What a run needs of its processes: memory, PyTorch modes, devices, ranks."""
