"""DeepSpeed's CPU Adam operator: C++ that is compiled on first use, for this machine, and kept by PyTorch.

The ranks of a host build it once between them. A build that is killed leaves PyTorch's lock behind, a file for which
everybody after it would wait for ever; ours is the kernel's and ends with its process, so that whoever has it alone
knows that PyTorch's belongs to nobody.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

from moue_dist.config import ConfigError

OPTION = "parallel.pool_optimizer=host"
INSTEAD = "or set parallel.pool_optimizer=device"
NAME = "cpu_adam"  # of DeepSpeed's operator, and so of PyTorch's folder for it


def load_operator() -> Any:
    """DeepSpeedCPUAdam, its operator built if this machine has not built it yet: a minute, once.

    Raises ConfigError where deepspeed, a C++ compiler or ninja is missing, or the build fails.
    """
    if find_spec("deepspeed") is None:
        raise ConfigError(f"{OPTION} needs DeepSpeed, which is not installed: install the extra 'gpu', {INSTEAD}")
    said, errors = io.StringIO(), sys.stderr
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), _scripts_on_path():
        try:
            from deepspeed.git_version_info import installed_ops
            from deepspeed.ops.adam import DeepSpeedCPUAdam
            from deepspeed.ops.op_builder import CPUAdamBuilder

            if installed_ops.get(NAME):  # built with the package
                CPUAdamBuilder().load(verbose=False)
            else:
                _check_tools()
                with _locked(errors):
                    CPUAdamBuilder().load(verbose=False)
        except ConfigError:
            raise
        except Exception as error:  # whatever DeepSpeed, the compiler or the loader has to say
            lines = [line for line in f"{said.getvalue()}\n{error}".splitlines() if line.strip()]
            told = "\n  ".join(lines[-8:])
            raise ConfigError(
                f"{OPTION}: DeepSpeed's CPU Adam could not be built or loaded; mend what follows, {INSTEAD}:\n  {told}"
            ) from None
    return DeepSpeedCPUAdam


def build_folder() -> Path:
    """Where PyTorch keeps the operator for this user, Python and device; TORCH_EXTENSIONS_DIR moves it."""
    from torch.utils.cpp_extension import _get_build_directory

    return Path(_get_build_directory(NAME, False))


@contextlib.contextmanager
def _locked(say_to: TextIO) -> Iterator[None]:
    """Build alone, load together."""
    folder = build_folder()
    pytorchs, built = folder / "lock", (folder / f"{NAME}.so").exists()
    alone = not built or pytorchs.exists()
    with (folder / "moue-dist.lock").open("w") as ours:
        with contextlib.suppress(OSError):  # a file system without locks has PyTorch's alone
            fcntl.flock(ours, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
            if alone:
                pytorchs.unlink(missing_ok=True)
        if not (folder / f"{NAME}.so").exists():
            print("building DeepSpeed's CPU Adam for this machine, once: about a minute", file=say_to, flush=True)
        yield


def _check_tools() -> None:
    compiler = (os.environ.get("CXX") or "c++").split()[0]
    for tool, way_out in (
        (compiler, "install a C++ compiler (Debian: g++), or name yours in CXX"),
        ("ninja", "install ninja (pip install ninja)"),
    ):
        if shutil.which(tool) is None:
            raise ConfigError(
                f"{OPTION}: DeepSpeed builds its CPU Adam on first use, but PATH has no {tool}: {way_out}, {INSTEAD}"
            )


@contextlib.contextmanager
def _scripts_on_path() -> Iterator[None]:
    """PATH with this interpreter's scripts: pip's ninja stands there, in an environment that is not activated, too."""
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join([before, sysconfig.get_path("scripts"), os.path.dirname(sys.executable)])
    try:
        yield
    finally:
        os.environ["PATH"] = before
