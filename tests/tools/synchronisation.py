"""Torch calls that wait for the GPU, made errors."""

import contextlib
import warnings

import torch


@contextlib.contextmanager
def no_synchronisation():
    """Raises RuntimeError where the body makes the host wait for the GPU."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype feature")
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
