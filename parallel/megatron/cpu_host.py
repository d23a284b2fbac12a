"""Makes a host without a GPU answer megatron-core's `torch.cuda` calls, so that one code path runs everywhere.

megatron-core 0.16.1 asks for CUDA tensors, streams, events and RNG states by name. Where CUDA is present `install()`
does nothing. Elsewhere it wraps the tensor factories and `Tensor.cuda/to/type/new_*` so that a CUDA device means the
CPU, and puts inert stand-ins behind `torch.cuda`. A `TorchFunctionMode` would be neater but is off during backward and
in other threads. Our own code leans on none of it: it asks `parallel/device.py`.
"""

from __future__ import annotations

import functools
import logging
import os
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

from moue_dist.parallel.device import has_cuda

_CPU = torch.device("cpu")
_LIKE = ("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "randint_like")
_SIZED = ("zeros", "ones", "empty", "full", "rand", "randn", "randint", "randperm", "empty_strided")
_FACTORIES = (*_LIKE, *_SIZED, "tensor", "as_tensor", "arange", "linspace", "eye")
_NEW = ("new_zeros", "new_ones", "new_empty", "new_full", "new_tensor")


@functools.cache
def install() -> None:
    """Prepare this process for megatron-core on the CPU; does nothing where CUDA is present. Call before importing it.

    Triton's interpreter and torch.compile are not touched; TORCHDYNAMO_DISABLE is set because megatron-core compiles
    small fusions that cost a CPU process minutes of start-up.
    """
    if has_cuda():
        return
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed|megatron")
    warnings.filterwarnings("ignore", message=r".*(Transformer Engine and Apex are|Apex is) not installed.*")
    warnings.filterwarnings("ignore", message=r"full scope is deprecated.*")
    warnings.filterwarnings("ignore", message=r".*The \.grad attribute of a Tensor that is not a leaf.*")
    _replace_namespace()
    _redirect_tensors()
    _mend_megatron()


def _names_cuda(where: Any) -> bool:
    """Whether a `device` argument means an accelerator: 'cuda:0', torch.device('cuda'), or a bare index."""
    if isinstance(where, torch.device):
        return where.type == "cuda"
    if isinstance(where, str):
        return where.startswith("cuda")
    return isinstance(where, int) and not isinstance(where, bool)


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return wrapped


class _Stream:
    """A stream whose work is always done already."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> Any:
        return event or _Event()

    def query(self) -> bool:
        return True

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def _nothing(self, *_: Any, **__: Any) -> None:
        pass

    wait_stream = wait_event = synchronize = _nothing


class _Event:
    """An event that reads the host's clock."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.at = 0.0

    def record(self, *_: Any) -> None:
        self.at = time.perf_counter()

    def wait(self, *_: Any) -> None:
        pass

    synchronize = wait

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: _Event) -> float:
        return (other.at - self.at) * 1e3


def _replace_namespace() -> None:
    def constant(value: Any) -> Callable[..., Any]:
        return lambda *_, **__: value

    cuda: Any = torch.cuda
    for name in ["set_device", "synchronize", "empty_cache", "reset_peak_memory_stats"]:
        setattr(cuda, name, constant(None))
    for name in ["memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"]:
        setattr(cuda, name, constant(0))
    cuda.current_device, cuda.device_count = constant(_CPU), constant(1)
    cuda.is_current_stream_capturing = constant(False)
    cuda.nvtx.range_push, cuda.nvtx.range_pop = constant(0), constant(0)
    cuda.Stream, cuda.Event = _Stream, _Event
    cuda.current_stream = cuda.default_stream = cuda.stream = lambda *_, **__: _Stream()
    # Not torch.manual_seed: that calls torch.cuda.manual_seed_all and would come back here for ever.
    cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)
    cuda.get_rng_state = lambda *_, **__: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    cuda.random.get_rng_state, cuda.random.set_rng_state = cuda.get_rng_state, cuda.set_rng_state


def _redirect_tensors() -> None:
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    cls: Any = torch.Tensor
    for name in _NEW:
        setattr(cls, name, _on_cpu(getattr(cls, name)))
    cls.cuda = cls.pin_memory = lambda self, *_, **__: self
    torch.nn.Module.cuda = lambda self, *_, **__: self  # type: ignore[method-assign, assignment]
    plain_to, plain_type = cls.to, cls.type

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and _names_cuda(args[0]):
            args = (_CPU, *args[1:])
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        result: torch.Tensor = plain_to(self, *args, **kwargs)
        return result

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = plain_type(self, *args, **kwargs)
        # megatron-core's optimizer sorts parameters by the string 'torch.cuda.FloatTensor'.
        return answer if args or kwargs else answer.replace("torch.", "torch.cuda.", 1)

    cls.to, cls.type = to, type_


def _mend_megatron() -> None:
    """What megatron-core itself gets wrong without a GPU or without Transformer Engine."""
    from megatron.core import jit
    from megatron.core.tensor_parallel import random as mrandom
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    loose: Any = mrandom
    loose._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    loose._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    # A fork of the 'CUDA' RNG is a fork of the CPU RNG here; megatron-core warns about that at every use.
    logging.getLogger(mrandom.__name__).addFilter(lambda rec: "CPU RNG state changed" not in rec.getMessage())
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    if hasattr(jit, "disable_jit_fuser"):
        jit.disable_jit_fuser()

    def split_sizes(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = split_sizes  # gloo wants sizes on the host, which CPU tensors are
