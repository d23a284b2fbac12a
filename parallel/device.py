"""The device that this process trains on, and the questions that our own code asks it.

A CPU is a device, too: it has always done its work, and tells nothing of its memory. What megatron-core asks a host
without a GPU is answered in `megatron/cpu_host.py`, and for megatron-core alone.
"""

from __future__ import annotations

import functools

import torch


@functools.cache
def has_cuda() -> bool:
    """Whether a CUDA device is usable; asked once, before `cpu_host.install()` changes what `torch.cuda` says."""
    return torch.cuda.is_available()


def this_device() -> torch.device:
    """This process's current CUDA device, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if has_cuda() else torch.device("cpu")


def settle() -> None:
    """Wait until the device has done all work that it was given."""
    if has_cuda():
        torch.cuda.synchronize()


def peak_bytes() -> int:
    """The most that was allocated on the device since `forget_peak`, or ever; 0 on a CPU."""
    return torch.cuda.max_memory_allocated() if has_cuda() else 0


def forget_peak() -> None:
    if has_cuda():
        torch.cuda.reset_peak_memory_stats()


def free_unused() -> None:
    """Give memory that the allocator keeps for later back to the device."""
    if has_cuda():
        torch.cuda.empty_cache()
