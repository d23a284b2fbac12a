# mypy: disable-error-code="override, assignment"
"""One rank of a large grid, alone on one device: a torch.distributed backend whose other ranks are echoes.

Everything of the rank is real: its layers, its part of the pool, its kernels, its memory, its schedule. Collectives
are answered from the rank's own data, as if all others held the same, and a GPU is kept from going on for as long as
the bytes that would cross the link take at a given bandwidth (a kernel that waits on one SM, on a stream of the
collective's own). So memory is measured, compute is measured, transfers are modelled; what is missing is waiting for
slower ranks, the pipeline's bubbles included. Losses mean nothing.

Uneven exchanges are echoed row by row: what a rank sends is what it receives, which is what balanced routing gives on
average. What neighbours in the pipeline send is random, but of ordinary size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

BACKEND = "rehearsal"


@dataclass(frozen=True)
class Link:
    """The way to other ranks: bytes a second out of a GPU, and seconds that a transfer takes at least.

    The defaults fit NCCL's all-to-all between H200s on NVLink: 33, 121 and 268 MB out of a GPU in 0.18, 0.50, 1.04 ms.
    """

    bytes_per_second: float = 278e9
    latency: float = 70e-6

    def seconds(self, size: float) -> float:
        """Of `size` bytes that leave the GPU; nothing leaves a group of one."""
        return self.latency + size / self.bytes_per_second if size else 0.0


class Echo(dist.ProcessGroup):
    """A group in which every other rank holds what this one holds."""

    def __init__(self, rank: int, size: int, link: Link, ticks: Callable[[float], int]) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]
        self._rank, self._size, self._link, self._ticks = rank, size, link, ticks
        self._name = ""
        self._stream: torch.cuda.Stream | None = None
        self.answer: Callable[[Tensor], None] | None = None  # fills what an all-to-all of whole numbers brings, if set

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return self._rank

    @property
    def pg_name(self) -> str:
        # asked again when the group is destroyed and its name already forgotten
        self._name = dist.distributed_c10d._world.pg_names.get(self, self._name)
        return self._name

    @property
    def group_name(self) -> str:
        return self.pg_name

    def getBackendName(self) -> str:  # noqa: N802  torch's name
        return BACKEND

    def _do(self, device: torch.device, size: float, fill: Callable[[], None]) -> dist.Work:
        """`fill` the outputs and let `size` bytes cross the link, beside the caller's stream."""
        if device.type != "cuda":
            fill()
            return _Done(None)
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            fill()
            if ticks := self._ticks(self._link.seconds(size)):
                torch.cuda._sleep(ticks)
            return _Done(torch.cuda.current_stream(device).record_event())

    def _others(self, tensor: Tensor, ranks: float | None = None) -> float:
        """Bytes of `tensor` that belong to other ranks, where all have an equal part of it."""
        return tensor.numel() * tensor.element_size() * ((self._size - 1) / self._size if ranks is None else ranks)

    def all_to_all_single(
        self, out: Tensor, given: Tensor, receive: Sequence[int], send: Sequence[int], opts: Any = None
    ) -> dist.Work:
        """Uneven splits are echoed by their order; of what differs in number the rest is zero."""
        send = [int(n) for n in send]  # megatron-core hands over an array
        mine = send[self._rank] / max(sum(send), 1) if send else 1 / self._size

        def fill() -> None:
            if self.answer is not None and not out.is_floating_point():
                self.answer(out)
                return
            rows = min(len(out), len(given))
            out[:rows].copy_(given[:rows])
            out[rows:].zero_()

        return self._do(out.device, self._others(given, 1 - mine), fill)

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> dist.Work:
        return self._do(tensors[0].device, 2 * sum(map(self._others, tensors)), lambda: None)

    def allgather(self, outs: list[list[Tensor]], given: list[Tensor], opts: Any = None) -> dist.Work:
        def fill() -> None:
            for parts, mine in zip(outs, given, strict=True):
                for part in parts:
                    part.copy_(mine)

        return self._do(given[0].device, sum(self._others(x, self._size - 1) for x in given), fill)

    def all_gather_single(self, out: Tensor, given: Tensor, opts: Any = None) -> dist.Work:
        # out of place: `given` may be this rank's part of `out`
        mine = given.clone() if given.device.type != "cuda" else given
        return self._do(out.device, self._others(out), lambda: self._repeat(out, mine))

    def _repeat(self, out: Tensor, mine: Tensor) -> None:
        for part in out.view(self._size, -1):
            if part.data_ptr() != mine.data_ptr():
                part.copy_(mine.reshape(-1))

    def reduce_scatter(self, outs: list[Tensor], given: list[list[Tensor]], opts: Any = None) -> dist.Work:
        def fill() -> None:
            for out, parts in zip(outs, given, strict=True):
                out.copy_(parts[self._rank])

        return self._do(outs[0].device, sum(self._others(p, 1) for p in given[0]) * (1 - 1 / self._size), fill)

    def reduce_scatter_single(self, out: Tensor, given: Tensor, opts: Any = None) -> dist.Work:
        part = given.view(self._size, -1)[self._rank].view(out.shape)
        return self._do(
            out.device, self._others(given), lambda: None if part.data_ptr() == out.data_ptr() else _copy(out, part)
        )

    def broadcast(self, tensors: list[Tensor], opts: Any = None) -> dist.Work:
        return self._do(tensors[0].device, sum(self._others(x, 1) for x in tensors), lambda: None)

    def gather(self, outs: list[list[Tensor]], given: list[Tensor], opts: Any = None) -> dist.Work:
        return self.allgather(outs, given) if outs else self._do(given[0].device, 0, lambda: None)

    def barrier(self, opts: Any = None) -> dist.Work:
        return _Done(None)

    def send(self, tensors: list[Tensor], to: int, tag: int = 0) -> dist.Work:
        return self._do(tensors[0].device, self._others(tensors[0], 1), lambda: None)

    def recv(self, tensors: list[Tensor], source: int, tag: int = 0) -> dist.Work:
        @torch.no_grad()  # megatron-core receives into tensors that want a gradient
        def fill() -> None:
            for x in tensors:
                if x.is_floating_point():
                    x.normal_()

        return self._do(tensors[0].device, self._others(tensors[0], 1), fill)

    def allreduce_coalesced(self, tensors: list[Tensor], opts: Any = None) -> dist.Work:
        return self.allreduce(tensors)

    def all_gather_single_coalesced(self, outs: list[Tensor], given: list[Tensor], opts: Any = None) -> dist.Work:
        return [self.all_gather_single(o, g) for o, g in zip(outs, given, strict=True)][-1]

    def reduce_scatter_single_coalesced(self, outs: list[Tensor], given: list[Tensor], opts: Any = None) -> dist.Work:
        return [self.reduce_scatter_single(o, g) for o, g in zip(outs, given, strict=True)][-1]

    # The names that these calls have before PyTorch 2.13.
    alltoall_base = all_to_all_single
    _allgather_base = all_gather_single
    _reduce_scatter_base = reduce_scatter_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced


def _copy(out: Tensor, part: Tensor) -> None:
    out.copy_(part)


class _Done(dist.Work):
    """Waiting makes the current stream wait for `event`, as with NCCL."""

    def __init__(self, event: torch.cuda.Event | None) -> None:
        super().__init__()
        self._event = event

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)
        return True

    def is_completed(self) -> bool:
        return self._event is None or self._event.query()


class _NoStore(dist.Store):
    """Groups that never talk need no meeting point."""


@contextmanager
def rehearse(rank: int, world: int, link: Link) -> Iterator[None]:
    """torch.distributed as rank `rank` of `world`, in this process alone. The device is set."""
    ticks = _ticks_of(link)

    def make(_: Any, group_rank: int, size: int, __: Any) -> Echo:
        return Echo(group_rank, size, link, ticks)

    dist.Backend.register_backend(BACKEND, make, devices=["cpu", "cuda"])
    dist.init_process_group(BACKEND, rank=rank, world_size=world, store=_NoStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def _ticks_of(link: Link) -> Callable[[float], int]:
    """Seconds -> what torch.cuda._sleep takes; 0 without a GPU."""
    if not torch.cuda.is_initialized():
        return lambda seconds: 0
    start, end, cycles = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True), 20_000_000
    for _ in range(2):  # the first is the warm-up
        start.record()
        torch.cuda._sleep(cycles)
        end.record()
        end.synchronize()
    per_second = cycles / (start.elapsed_time(end) / 1e3)
    return lambda seconds: int(seconds * per_second)
