"""What a result was made by: versions, the checkout's commit, the machine."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("moue-dist", "torch", "megatron-core", "transformer-engine", "triton", "deepspeed")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter, those that are installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The commit of the checkout this code runs from, with '+' where files differ from it; None outside of one."""
    here = Path(__file__).resolve()
    try:
        git = ["git", "-C", str(here.parent)]
        # An environment may lie in the checkout of another project, whose commit is none of ours.
        subprocess.run([*git, "ls-files", "--error-unmatch", here.name], capture_output=True, check=True)
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def machine(cuda: bool) -> dict[str, Any]:
    """Processor, and where `cuda`: the GPUs of this node by torch, the driver by NVML (None where it does not tell)."""
    found: dict[str, Any] = {"architecture": platform.machine(), "cpu": _processor()}
    if not cuda:
        return found
    facts = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        **found,
        "gpu": facts.name,
        "gpus": torch.cuda.device_count(),
        "gpu_memory_gib": round(facts.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "driver": _driver(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "unknown")


def _driver() -> str | None:
    try:
        import pynvml

        pynvml.nvmlInit()
        version = pynvml.nvmlSystemGetDriverVersion()
        pynvml.nvmlShutdown()
    except Exception:  # absent, or in a container without access: the result is as good without it
        return None
    return version.decode() if isinstance(version, bytes) else str(version)
