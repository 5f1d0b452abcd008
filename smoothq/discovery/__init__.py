"""The wiring of an unknown model family, found by experiments on a tiny model and verified."""
