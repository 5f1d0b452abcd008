"""The wiring of a family that has no file, found by experiments and proven."""
