"""The process around us: PyTorch's modes of a thread, and what only one thread may do at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

build_lock = threading.RLock()
"""Held while transformers makes a model: it sets the default dtype of all threads meanwhile, and
has no tie of weights; two threads that overlap would leave both as they found them in the other."""


@contextmanager
def default_modes() -> Iterator[None]:
    """Within it, tensors are made and multiplied as in a fresh process, whatever the caller set.

    Inference mode (whose tensors no gradient ever passes), autocast and the default device are the
    thread's own. The default dtype is the process's, which is why nothing here may depend on it.
    """
    with ExitStack() as modes:
        modes.enter_context(torch.inference_mode(False))
        if torch.get_default_device().type != "cpu":
            modes.enter_context(torch.device("cpu"))
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                modes.enter_context(torch.autocast(kind, enabled=False))
        yield
