"""AdamW whose masters and moments live in host memory, computed by DeepSpeed's CPU Adam beside the device's work.

A step is a pipeline over chunks of this rank's shares, run by one worker thread:

    copy in   gradients, device -> pinned staging, on a stream of its own, one chunk ahead
    compute   DeepSpeed's operator on masters and moments, in blocks; then the weights in model type -> pinned staging
    copy out  pinned staging -> weights on the device, on a second stream

Order: copies in wait for an event of the caller's stream (gradients reduced and clipped); the operator waits on the
host for its chunk's copy; a staging buffer is filled again only after its last copy out has ended. `Pending.wait` ends
the worker's part on the host and lets the caller's stream wait for the last copy out; gradients are all read by then,
too. Between `step` and `wait` nobody may touch weights, gradients or states: `SyncedBuffer.settle` guards that.

Only the staging is pinned. Masters and moments never travel, and PyTorch's pinned allocator rounds to powers of two.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moue_dist.config import ConfigError
from moue_dist.parallel.pool.host_limits import CHUNK, STAGES, adam_bytes, agree
from moue_dist.parallel.pool.host_operator import INSTEAD, OPTION, load_operator

BLOCK = 1 << 20  # elements in one call: the operator holds Python's lock, and fp32 copies of bf16 moments stay in cache


@dataclass(frozen=True)
class Pending:
    """An update under way. Its future holds the event of the last copy to the device."""

    future: Future[Any]

    def wait(self) -> None:
        """Afterwards the caller's stream sees the new weights; raises what the worker raised."""
        torch.cuda.current_stream().wait_event(self.future.result())


class _Staging:
    """Pinned buffers of one chunk in flight."""

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        self.grad = torch.empty(size, dtype=torch.float32, pin_memory=True)
        self.weight = torch.empty(size, dtype=dtype, pin_memory=True)
        self.came, self.left = torch.cuda.Event(), torch.cuda.Event()


class HostAdam:
    """AdamW of torch.optim.AdamW's meaning over `weights`, flat views on the device; `moments` is float32 or bfloat16.

    bf16 moments are kept rounded to nearest and widened to fp32 for each block: DeepSpeed's operator itself takes bf16
    moments only with bf16 masters, in which small updates would be lost. Masters are always fp32. Construction is
    collective: the ranks of a host divide its cores, and ConfigError is raised on all of them where its memory is too
    small or the operator cannot be had.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        *,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        moments: torch.dtype = torch.float32,
    ) -> None:
        self.weights, self.betas, self.eps, self.weight_decay = list(weights), betas, eps, weight_decay
        sizes = [w.numel() for w in self.weights]
        dtype = self.weights[0].dtype if self.weights else torch.float32
        self.threads = _room(adam_bytes(sum(sizes), moment=moments.itemsize, weight=dtype.itemsize))
        make = load_operator()
        self.masters = [torch.empty(n, dtype=torch.float32) for n in sizes]
        self.adopt()
        self._moments = {n: [torch.zeros(s, dtype=moments) for s in sizes] for n in ("exp_avg", "exp_avg_sq")}
        self._steps = 0
        # The object owns the operator's handle; `_run` calls the operator itself, which its own step does per tensor.
        self._adam = make(self.masters, betas=betas, eps=eps, weight_decay=weight_decay, adamw_mode=True)
        self._chunks = [(i, a, min(a + CHUNK, n)) for i, n in enumerate(sizes) for a in range(0, n, CHUNK)]
        longest = max((b - a for _, a, b in self._chunks), default=0)
        self._staging = [_Staging(longest, dtype) for _ in range(STAGES)]
        wide = moments != torch.float32
        self._wide = [torch.empty(min(longest, BLOCK), dtype=torch.float32) for _ in range(2)] if wide else None
        self._streams = torch.cuda.Stream(), torch.cuda.Stream()
        device = torch.cuda.current_device()
        self._worker = ThreadPoolExecutor(1, "host-adam", initializer=_start_thread, initargs=(device, self.threads))

    def states(self) -> dict[str, list[Tensor]]:
        """Per share, in host memory: `weight` (fp32 masters), `exp_avg`, `exp_avg_sq`."""
        return {"weight": list(self.masters), **self._moments}

    def set_steps(self, step: int) -> None:
        self._steps = step

    @torch.no_grad()
    def adopt(self) -> None:
        """Weights -> masters, by chunks: the device holds no fp32 copy of a whole share."""
        for master, weight in zip(self.masters, self.weights, strict=True):
            for to, of in zip(master.split(CHUNK), weight.split(CHUNK), strict=True):
                to.copy_(of)

    @torch.no_grad()
    def publish(self) -> None:
        """Masters -> weights."""
        for master, weight in zip(self.masters, self.weights, strict=True):
            for to, of in zip(weight.split(CHUNK), master.split(CHUNK), strict=True):
                to.copy_(of.to(to.dtype))

    def step(self, grads: Sequence[Tensor], lr: float, clip: float = 1.0) -> Pending:
        """Starts one step from `clip` times `grads`, shaped like the weights, as the current stream leaves them."""
        self._steps += 1
        if clip != 1.0:
            for g in grads:  # on the device, where it costs less than in the worker
                g.mul_(clip)
        ready = torch.cuda.Event()
        ready.record(torch.cuda.current_stream())
        return Pending(self._worker.submit(self._run, list(grads), lr, self._steps, ready))

    @torch.no_grad()
    def _run(self, grads: list[Tensor], lr: float, step: int, ready: Any) -> Any:
        """The worker's step; returns the event of the last copy out."""
        into, out = self._streams
        into.wait_event(ready)
        out.wait_event(ready)  # the weights' last readers
        # A fresh operator takes beta ** step from the step alone. Kept, it multiplies on, and a resumed run would
        # part from an unbroken one in the last bit.
        module, number = self._adam.ds_opt_adam, self._adam.opt_id
        module.create_adam(number, lr, *self.betas, self.eps, self.weight_decay, True, False)
        self._copy_in(0, grads)
        for i, (share, a, b) in enumerate(self._chunks):
            self._copy_in(i + 1, grads)
            stage = self._staging[i % STAGES]
            stage.came.synchronize()
            for at in range(a, b, BLOCK):
                self._block(module, number, step, lr, share, at, min(at + BLOCK, b), stage.grad[at - a :])
            if i >= STAGES:
                stage.left.synchronize()
            stage.weight[: b - a].copy_(self.masters[share][a:b])
            with torch.cuda.stream(out):
                self.weights[share][a:b].copy_(stage.weight[: b - a], non_blocking=True)
                stage.left.record(out)
        done = torch.cuda.Event()
        done.record(out)
        done.synchronize()  # the staging is free for the next step
        return done

    def _copy_in(self, i: int, grads: list[Tensor]) -> None:
        if i == len(self._chunks):
            return
        share, a, b = self._chunks[i]
        stage, into = self._staging[i % STAGES], self._streams[0]
        with torch.cuda.stream(into):
            stage.grad[: b - a].copy_(grads[share][a:b], non_blocking=True)
            stage.came.record(into)

    def _block(self, module: Any, number: int, step: int, lr: float, share: int, a: int, b: int, grad: Tensor) -> None:
        kept = [m[share][a:b] for m in self._moments.values()]
        used = kept
        if self._wide is not None:
            used = [w[: b - a].copy_(k) for w, k in zip(self._wide, kept, strict=True)]
        rates = (lr, *self.betas, self.eps, self.weight_decay)
        module.adam_update(number, step, *rates, True, self.masters[share][a:b], grad[: b - a], *used)
        if self._wide is not None:
            for k, w in zip(kept, used, strict=True):
                k.copy_(w)


def _room(need: int) -> int:
    """Threads for this rank (collective). ConfigError where a host's ranks need more memory than it has free."""
    import torch.distributed as dist

    fits = agree(need)
    for fit in fits:
        if fit.needed > fit.free:
            raise ConfigError(
                f"{OPTION} needs {fit.needed / 2**30:.1f} GiB of host memory for the ranks of one host, which has "
                f"{fit.free / 2**30:.1f} GiB free: set parallel.host_state=bf16, use more hosts, {INSTEAD}"
            )
    return fits[dist.get_rank() if dist.is_initialized() else 0].threads


def _start_thread(device: Any, threads: int) -> None:
    torch.cuda.set_device(device)
    torch.set_num_threads(threads)  # this thread's; a launcher's OMP_NUM_THREADS is meant for the main one
