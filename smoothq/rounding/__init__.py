"""From float weights to codes and scales."""
