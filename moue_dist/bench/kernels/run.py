"""`moue bench kernels`: every kernel of a training step beside another way of the same, in one process."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from moue_dist.bench.kernels.elementwise import elementwise
from moue_dist.bench.kernels.inputs import Bench
from moue_dist.bench.kernels.products import Maker, products
from moue_dist.bench.kernels.rows import rows
from moue_dist.bench.kernels.sizes import sizes_of, small
from moue_dist.bench.options import BenchOptions
from moue_dist.bench.record.about import describe
from moue_dist.bench.record.file import earlier_runs, write
from moue_dist.bench.record.tables import tell
from moue_dist.bench.timing.contest import measure
from moue_dist.config import Config, ConfigError
from moue_dist.kernels.backend import default_impl
from moue_dist.parallel.device import free_unused, this_device
from moue_dist.parallel.megatron import cpu_host
from moue_dist.parallel.mesh import smallest_world
from moue_dist.training.run import resolve_here


@dataclass(frozen=True)
class First:
    """The place whose kernels are timed, the first of the smallest layout; only the configuration is checked by it."""

    world_size: int
    rank: int = 0
    local_rank: int = 0


def run(config: Config, options: BenchOptions) -> int:
    """Measure in this process; exit code 0 if every way worked and agrees. Raises ConfigError."""
    resolved, _ = resolve_here(config, First(smallest_world(config.parallel)))
    cuda = resolved.device == "cuda"
    if cuda and config.train.precision != "bf16":
        raise ConfigError(
            f"moue bench kernels times bf16 on a GPU, not train.precision={config.train.precision}; set it to bf16"
        )
    cpu_host.install()
    path = Path(options.output) if options.output else None
    earlier = earlier_runs(path, options.append) if path else []
    sizes, device = sizes_of(config, resolved.merge_wgrad), this_device()
    bench = Bench(
        sizes=sizes if cuda else small(sizes),
        device=device,
        dtype=torch.bfloat16 if cuda else torch.float32,
        impl=default_impl(device),
        seed=config.train.seed,
    )
    record = describe("kernels", config, options, resolved, 1)
    record |= {"sizes": asdict(bench.sizes), "dtype": str(bench.dtype).removeprefix("torch."), "impl": bench.impl}
    for name, make in contests(bench):
        record["parts"][name] = _guarded(name, make, options.samples, device)
        free_unused()
        if path:
            write(path, [*earlier, record])
    tell(record, options)
    return int(any(not part.get("agree") or _failed(part) for part in record["parts"].values()))


def contests(bench: Bench) -> Iterator[tuple[str, Maker]]:
    yield from products(bench)
    yield from rows(bench)
    yield from elementwise(bench)


def _guarded(name: str, make: Maker, samples: int, device: torch.device) -> dict[str, Any]:
    """The contest's entry, or why it could not be held: the others are held all the same."""
    try:
        return measure(make(), samples, device)
    except Exception as error:
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        print(f"moue: bench: {name} failed: {text}", file=sys.stderr, flush=True)
        return {"error": text}


def _failed(part: dict[str, Any]) -> bool:
    return any("error" in way for way in part["ways"].values())
