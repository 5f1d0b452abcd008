"""PyTorch's global state: default modes of a thread, and a lock for building models."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

build_lock = threading.RLock()
"""Serialises the construction of models by transformers, which changes global state meanwhile: the
default dtype and the tying of weights. Of two threads that overlap, one would restore the temporary
values of the other."""


@contextmanager
def default_modes() -> Iterator[None]:
    """Context in which this thread has PyTorch's default modes, whatever the caller set.

    Inference mode (whose tensors can never take part in autograd) and autocast are off, and the
    default device is the CPU. The default dtype is shared by all threads and left as it is, so the
    code inside must not depend on it.
    """
    with ExitStack() as modes:
        modes.enter_context(torch.inference_mode(False))
        if torch.get_default_device().type != "cpu":
            modes.enter_context(torch.device("cpu"))
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                modes.enter_context(torch.autocast(kind, enabled=False))
        yield
