"""This process and its fellows: memory, modes, devices, ranks."""
