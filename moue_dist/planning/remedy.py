"""What to change in a plan that does not fit: the change that costs least time among those that make it fit.

Times are predictions by arithmetic, good for an order and not for a benchmark: model FLOPs at ACHIEVED of the device's
peak, stretched by the pipeline's bubble, by recompute and by GEMMs of few rows; messages at a link's rate, not hidden
behind anything; the optimizer in host memory at the rate of its bus and of the host's memory.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator

from moue_dist.config import Config
from moue_dist.config.devices import Device
from moue_dist.planning.answers import Plan
from moue_dist.planning.memory.peak import RESERVE
from moue_dist.planning.memory.sizes import GIB
from moue_dist.planning.pool import with_placement

ACHIEVED = 0.4  # of peak FLOP/s
PEAK_TFLOPS = 500.0  # where the device's is unknown
NODE = 8  # GPUs whose messages need no network
WIRE, NETWORK = 300e9, 50e9  # bytes per second and GPU within a node, and between nodes
BUS, HOST_MEMORY = 25e9, 20e9  # bytes per second and GPU
FEW_ROWS = 128  # rows of an expert at which its GEMM takes twice the time that its FLOPs need

PlanOf = Callable[[Config, int], Plan | None]


@dataclasses.dataclass(frozen=True)
class Change:
    """A changed configuration, on `world` processes, and what to say of it."""

    words: tuple[str, ...]
    config: Config
    world: int


def cheapest_change(config: Config, world: int, device: Device, plan: Plan, plan_of: PlanOf) -> str:
    """The cheapest change that makes `plan` fit, in words.

    `plan_of` plans a changed configuration; None where it is refused. Single changes come before pairs and those before
    more; changes that need no further process before those that do; then the predicted time decides.
    """
    now = step_seconds(config, plan, device) * world
    for found in _by_size(config, world, plan_of):
        fitting = [(c, p) for c, p in found if p.fits]
        if not fitting:
            continue
        change, then = min(
            fitting, key=lambda pair: (pair[0].world, step_seconds(pair[0].config, pair[1], device), pair[0].words)
        )
        slower = step_seconds(change.config, then, device) * change.world / now
        more = f" on {change.world} processes" if change.world > world else ""
        return (
            f"the cheapest change that fits is {' and '.join(change.words)}{more}: "
            f"{(then.worst.total_bytes + RESERVE) / GIB:.1f} GiB, "
            f"and about {slower:.2f} x the {plan.per} time of a step"
        )
    return "no change that was tried makes it fit: use a larger parallel.pipeline_parallel or a smaller model"


def step_seconds(config: Config, plan: Plan, device: Device) -> float:
    """A rough prediction; see the top of this file."""
    p, t, world = config.parallel, config.train, plan.grid["world"]
    microbatches, stages = plan.derived["microbatches per step"], plan.grid["pipeline"]
    flops = plan.flops.total * plan.derived["tokens per step"] * (4 / 3 if p.recompute == "full" else 1)
    busy = flops / (world * ACHIEVED * 1e12 * (device.peak_tflops(t.precision) or PEAK_TFLOPS))
    bubble = 1 + (stages - 1) / (p.virtual_stages * microbatches)
    rows = plan.derived["rows per layer and expert rank"] * p.expert_parallel / plan.derived["window"]
    traffic = plan.pool.traffic
    across, within = (WIRE if ranks <= NODE else NETWORK for ranks in (world, world // stages))
    moved = (traffic.across + traffic.sync_across) / across + (traffic.within + traffic.sync_within) / within
    held = max(s.host_bytes for s in plan.stages)
    return busy * bubble * (1 + FEW_ROWS / rows) + moved / world + held * (0.5 / BUS + 2 / HOST_MEMORY)


def _by_size(config: Config, world: int, plan_of: PlanOf) -> Iterator[list[tuple[Change, Plan]]]:
    """Planned changes: single ones, then two, three and four at once, then those that need more processes."""
    start = Change((), config, world)
    steps = (_home, _on_host, _recompute, _smaller_batches)

    def planned(changes: list[Change]) -> list[tuple[Change, Plan]]:
        plans = [(c, plan_of(c.config, c.world)) for c in changes]
        return [(c, p) for c, p in plans if p is not None]

    singles = planned([c for step in steps for c in step(start)])
    homes = [(c, p) for c, p in singles if p.fits and c.config.parallel.placement == "home"]
    wider = list(_more_expert_parallel(start))
    hybrids = [c for home, p in homes for c in _hybrid(home, p)]
    yield singles + planned([*hybrids, *(c for c in wider if c.world == world)])
    for many in range(2, len(steps) + 1):
        changes = []
        for chosen in itertools.combinations(steps, many):
            made = [start]
            for step in chosen:
                made = [c for before in made for c in list(step(before))[-1:]]
            changes += made
        yield planned(changes)
    yield planned([c for c in wider if c.world > world])


def _set(change: Change, words: str, **options: object) -> Change:
    config = change.config
    for key, value in options.items():
        section = "train" if key == "micro_batch_size" else "parallel"
        part = dataclasses.replace(getattr(config, section), **{key: value})
        config = dataclasses.replace(config, **{section: part})
    return Change((*change.words, words), config, change.world)


def _home(change: Change) -> Iterator[Change]:
    if change.config.parallel.pipeline_parallel > 1 and change.config.parallel.placement != "home":
        config = with_placement(change.config, "home")
        yield Change((*change.words, "parallel.placement=home"), config, change.world)


def _hybrid(home: Change, plan: Plan) -> Iterator[Change]:
    """Budgets of most of the room that `home` leaves; the last GiB also take what copies change elsewhere."""
    pool = max(sum(v for k, v in s.memory_bytes.items() if k.startswith("pool")) for s in plan.stages)
    room = plan.memory_gib * GIB - RESERVE - plan.worst.total_bytes
    for part in (1.0, 0.75, 0.5):
        budget = int((pool + part * room) / GIB * 10) / 10
        if budget * GIB > pool:
            words = f"parallel.placement=hybrid and parallel.pool_budget_gib={budget:g}"
            yield Change((*home.words[:-1], words), with_placement(home.config, "hybrid", budget), home.world)


def _on_host(change: Change) -> Iterator[Change]:
    if change.config.parallel.pool_optimizer == "device":
        yield _set(change, "parallel.pool_optimizer=host", pool_optimizer="host")


def _recompute(change: Change) -> Iterator[Change]:
    if change.config.parallel.recompute != "full":
        yield _set(change, "parallel.recompute=full", recompute="full")


def _smaller_batches(change: Change) -> Iterator[Change]:
    size = change.config.train.micro_batch_size
    for smaller in range(size - 1, 0, -1):
        if size % smaller == 0:
            yield _set(change, f"train.micro_batch_size={smaller}", micro_batch_size=smaller)


def _more_expert_parallel(change: Change) -> Iterator[Change]:
    """Twice, four times, ... as many expert ranks, on more processes where a stage has too few."""
    p = change.config.parallel
    for times in (2, 4, 8, 16):
        degree = p.expert_parallel * times
        plane = change.world // p.pipeline_parallel
        world = change.world if plane % degree == 0 else change.world * times
        made = _set(change, f"parallel.expert_parallel={degree}", expert_parallel=degree)
        yield Change(made.words, made.config, world)
