"""megatron-core's own schedules, recorded: forward, backward, transfers and the reduction at the end become spans.

The schedules of megatron-core 0.16.1 call `forward_step` and `backward_step` by their module's names, and every send
and receive goes through `P2PCommunicator._communicate`. While a step is recorded these are wrapped; afterwards, and in
every other step, they are megatron-core's own again. Belongs to the adapter (parallel/megatron/).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from megatron.core.pipeline_parallel import schedules
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

from moue_dist.parallel.recording.spans import Kind
from moue_dist.parallel.recording.timeline import Timeline


@contextmanager
def recorded(timeline: Timeline, config: Any) -> Iterator[None]:
    """Record the schedule that runs inside; `config` is the one that the schedule reads (DDP's). Nothing if idle."""
    if not timeline.recording:
        yield
        return
    microbatch_of: dict[int, int | None] = {}  # by the stage's output, which waits for its backward
    forward_step, backward_step = schedules.forward_step, schedules.backward_step
    communicate, finalize = P2PCommunicator._communicate, config.finalize_model_grads_func

    def forward(*args: Any, **kwargs: Any) -> Any:
        microbatch = kwargs.get("current_microbatch")
        with timeline.span("forward", microbatch):
            output, tokens = forward_step(*args, **kwargs)
        microbatch_of[id(_tensor(output))] = microbatch
        return output, tokens

    def backward(input_tensor: Any, output_tensor: Any, *args: Any, **kwargs: Any) -> Any:
        with timeline.span("backward", microbatch_of.pop(id(_tensor(output_tensor)), None)):
            return backward_step(input_tensor, output_tensor, *args, **kwargs)

    def spanned(kind: Kind, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with timeline.span(kind):
                return function(*args, **kwargs)

        return wrapped

    schedules.forward_step, schedules.backward_step = forward, backward
    P2PCommunicator._communicate = spanned("transfer", communicate)
    if finalize is not None:
        config.finalize_model_grads_func = spanned("optimizer", finalize)
    try:
        yield
    finally:
        schedules.forward_step, schedules.backward_step = forward_step, backward_step
        P2PCommunicator._communicate = communicate
        config.finalize_model_grads_func = finalize


def _tensor(output: Any) -> Any:
    """The one tensor of a stage's output, which schedules wrap in a list between stages."""
    return output[0] if isinstance(output, list) else output
