"""A pool that moves to another placement between two steps trains on as if it had stayed, moments included."""

from __future__ import annotations

import itertools
import json
import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moue_dist.config import Config
from moue_dist.parallel.mesh import Mesh, build_mesh
from moue_dist.parallel.placement.moving import STATES, owners, plan_move
from moue_dist.parallel.placement.of_config import place_pool
from moue_dist.parallel.placement.placement import Placement, pieces_of_a_row
from moue_dist.refusals.validate import validate
from tests.ranks import parity
from tests.ranks.cases import Case
from tests.ranks.spawn import RankPool

SEED, STEPS, TOLERANCE = 0, 8, 1e-6
Unit = tuple[str, int, int]  # state, expert, piece of `CUT`
CUT = 8  # a row as the test compares it, finer than any placement here


@dataclass
class Told:
    """One rank's view: the run, the state of the units it owns, bytes as sent and as planned, units as planned."""

    trained: parity.Trained
    states: dict[Unit, Tensor]
    sent: list[int]
    planned: list[int]
    owned: list[tuple[set[int], set[int]]]  # after each move: by the buffers, by the plan


def home(config: Config, mesh: Mesh) -> Placement:
    return place_pool(config, mesh)


def rotated(old: Placement) -> Placement:
    """Every expert one stage and one column further."""
    holders = tuple(tuple(sorted((s + 1) % old.pipeline for s in stages)) for stages in old.holders)
    return replace(old, holders=holders, columns=tuple((c + 1) % old.expert_parallel for c in old.columns))


def hybrid(old: Placement) -> Placement:
    """Every third expert on all stages, the others where they are: segments of single rows."""
    everywhere = tuple(range(old.pipeline))
    return replace(old, holders=tuple(everywhere if e % 3 == 0 else s for e, s in enumerate(old.holders)))


def lopsided(old: Placement) -> Placement:
    """All but the first experts of each column on the last stage."""
    p, ep = old.pipeline, old.expert_parallel
    holders = tuple((e // ep % p,) if e < p * ep else (p - 1,) for e in range(old.pool))
    return Placement(p, ep, holders, tuple(e % ep for e in range(old.pool)))


def journey(config: Config, mesh: Mesh) -> dict[int, Placement]:
    """Finished steps -> where the pool goes then."""
    turned = rotated(home(config, mesh))
    return {2: turned, 3: hybrid(turned), 4: lopsided(turned), 5: home(config, mesh)}


def train(config: Config, seed: int, moves: dict[int, Placement]) -> Told:
    """Inside a rank: train all steps, moving the pool after the steps that `moves` names."""
    from moue_dist.parallel.megatron import adapter as megatron
    from moue_dist.parallel.pool.synced import check_replicas
    from moue_dist.training.move_pool import move_pool
    from moue_dist.training.step import train_step

    system = parity.build(config)
    try:
        initial, tokens, results = parity.collect(system), parity.tokens_of(config, config.train.steps, seed), []
        sent, planned, owned = [], [], []
        for i in range(config.train.steps):
            mine = parity.microbatches(config, tokens[i], system.coord.dp, system.mesh.data)
            results.append(train_step(system, mine, i))
            if i + 1 not in moves:
                continue
            old = system.context.pool
            plan = plan_move(old.placement, moves[i + 1], system.mesh, old.buffer.row)
            moved = move_pool(system, moves[i + 1], i + 1)
            assert not old.buffer.weight.untyped_storage().size(), "the old weights keep their memory"
            sent.append(moved.bytes_sent)
            planned.append(plan.bytes_sent(system.rank))
            owned.append((_held(system), _owned(moves[i + 1], system.mesh, system.rank, old.buffer.row)))
        check_replicas(system.shared.buffers, system.groups.world)
        trained = parity.Trained(
            [r.loss for r in results],
            [r.grad_norm for r in results],
            [r.aux for r in results],
            [r.counts_lp for r in results],
            system.context.balance.bias.clone(),
            initial,
            parity.collect(system),
            system.coord.tp,
        )
        return Told(trained, _states(system), sent, planned, owned)
    finally:
        megatron.shut_down()


def _held(system) -> set[int]:  # type: ignore[no-untyped-def]
    buffer = system.context.pool.buffer
    return {row * buffer.pieces + piece for _, _, _, row, piece in buffer.share_units()}


def _owned(placement: Placement, mesh: Mesh, rank: int, row: int) -> set[int]:
    pieces = pieces_of_a_row(placement, mesh.expert_data, row)
    return set(np.flatnonzero(owners(placement, mesh, pieces) == rank).tolist())


def _states(system) -> dict[Unit, Tensor]:  # type: ignore[no-untyped-def]
    """Masters and moments of this rank's units of the pool, in pieces of the same size whatever the placement."""
    buffer, states, found = system.context.pool.buffer, system.shared.states(0), {}
    finer = CUT // buffer.pieces
    for name in STATES:
        for segment, offset, length, row, piece in buffer.share_units():
            parts = states[name][segment][offset : offset + length].chunk(finer)
            found.update({(name, row, piece * finer + i): part.clone() for i, part in enumerate(parts)})
    return found


def config_of(layout: str, model: str, placement: Literal["replicate", "home", "hybrid"] = "home") -> Config:
    config = Case(layout, model).config
    parallel = replace(config.parallel, placement=placement, pool_budget_gib=1e-3 if placement == "hybrid" else 0.0)
    return replace(config, parallel=parallel, train=replace(config.train, steps=STEPS))


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


@pytest.mark.parametrize(
    ("layout", "model"),
    [("pp2", "moue"), ("pp2 dp2", "moue, full"), ("pp2 ep2 dp2", "moue"), ("pp2 ep2 dp2 full overlap", "deepseek")],
)
def test_a_moved_pool_trains_on_as_if_it_had_stayed(layout: str, model: str, ranks: Callable[[int], RankPool]) -> None:
    case, config = Case(layout, model), config_of(layout, model)
    mesh = build_mesh(case.world, config.parallel)
    validate(config, case.world, cuda=False)
    moves = journey(config, mesh)
    stayed = ranks(case.world).run(train, config, SEED, {})
    told = ranks(case.world).run(train, config, SEED, moves)

    assert told[0].trained.losses == pytest.approx(stayed[0].trained.losses, rel=TOLERANCE)
    assert told[0].trained.norms == pytest.approx(stayed[0].trained.norms, rel=TOLERANCE)
    before, after = (parity.merge([t.trained for t in run], "final") for run in (stayed, told))
    assert before.keys() == after.keys()
    errors = {name: relative(after[name], before[name]) for name in before}
    assert {name: e for name, e in errors.items() if not e < TOLERANCE} == {}

    known, found = (_merge_states(run) for run in (stayed, told))
    assert found.keys() == known.keys() and len(known) == len(STATES) * config.moe.pool * CUT
    for name in STATES:
        whole = [torch.cat([states[u] for u in sorted(states) if u[0] == name]) for states in (found, known)]
        assert relative(*whole) < TOLERANCE, name

    for rank, t in enumerate(told):
        assert t.sent == t.planned, f"rank {rank} sent other bytes than planned"
        assert all(held == planned for held, planned in t.owned), f"rank {rank} owns other units than planned"
    totals = [sum(t.planned[i] for t in told) for i in range(len(moves))]
    places = [home(config, mesh), *moves.values()]
    row = 3 * config.model.hidden_size * config.moe.expert_width
    assert totals == [plan_move(a, b, mesh, row).bytes for a, b in itertools.pairwise(places)]
    assert totals[0] == 3 * 4 * row * config.moe.pool, "a rotated home moves every expert"
    if "dp2" in layout and "ep2" not in layout:
        cut = {pieces_of_a_row(p, mesh.expert_data, row) for p in places}
        assert len(cut) > 1, "no move between coarser and finer shares is tried here"


def test_from_home_to_home_not_a_bit_changes(ranks: Callable[[int], RankPool]) -> None:
    """Every expert computes the same rows in the same order wherever it lives; in bf16 the masters move, too."""
    config = config_of("pp2 ep2 dp2", "moue")
    config = replace(config, train=replace(config.train, precision="bf16"))
    start = home(config, build_mesh(4, config.parallel))
    stayed = ranks(4).run(train, config, SEED, {})
    told = ranks(4).run(train, config, SEED, {2: rotated(start), 5: start})
    assert told[0].trained.losses == stayed[0].trained.losses
    before, after = (parity.merge([t.trained for t in run], "final") for run in (stayed, told))
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    known, found = (_merge_states(run) for run in (stayed, told))
    assert [unit for unit in known if not torch.equal(known[unit], found[unit])] == []


def _merge_states(run: list[Told]) -> dict[Unit, Tensor]:
    out: dict[Unit, Tensor] = {}
    for told in run:
        assert not out.keys() & told.states.keys(), "two ranks own a unit"
        out.update(told.states)
    return out


def disagree(config: Config) -> str:
    """Inside a rank: what happens where the ranks have planned different placements."""
    from moue_dist.parallel.megatron import adapter as megatron
    from moue_dist.parallel.placement.moving import MoveError
    from moue_dist.training.move_pool import move_pool

    system = parity.build(config)
    try:
        old = system.context.pool.placement
        with pytest.raises(MoveError) as error:
            move_pool(system, rotated(old) if dist.get_rank() else old, 0)
        assert system.context.pool.buffer.weight.untyped_storage().size()
        return str(error.value)
    finally:
        megatron.shut_down()


def test_ranks_that_disagree_say_so_instead_of_hanging(ranks: Callable[[int], RankPool]) -> None:
    assert all("different placements" in words for words in ranks(2).run(disagree, config_of("pp2", "moue")))


def loop(config: Config, folder: Path) -> None:
    """Inside a rank: the whole loop, with data and log."""
    from moue_dist.model.build import build_system
    from moue_dist.parallel.megatron import adapter as megatron
    from moue_dist.parallel.megatron import cpu_host
    from moue_dist.refusals.validate import validate
    from moue_dist.training.loop import train_loop

    cpu_host.install()
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined] # as in `parity.train`
    try:
        resolved = validate(config, dist.get_world_size(), cuda=False)
        system = build_system(config, dist.get_rank(), dist.get_world_size(), resolved)
        train_loop(system, folder, device_name="CPU")
    finally:
        megatron.shut_down()


def test_the_loop_moves_the_pool_by_use(ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
    config = config_of("pp2", "moue")
    train_config = replace(config.train, steps=5, eval_interval=2, eval_batches=1)
    data = replace(config.data, max_megabytes=0.2, cache=str(tmp_path / "data"))
    config = replace(config, train=train_config, data=data)
    lines = []
    for interval in (0, 2):
        folder = tmp_path / f"every{interval}"
        (folder / "checkpoints").mkdir(parents=True)
        moving = replace(config, parallel=replace(config.parallel, replace_interval=interval))
        validate(moving, 2, cuda=False)
        ranks(2).run(loop, moving, folder)
        lines.append([json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()])
    still, moved = ([x["loss"] for x in run if x["kind"] in ("train", "valid")] for run in lines)
    assert len(still) == 5 + 3
    assert moved == pytest.approx(still, rel=TOLERANCE)
    events = [x for x in lines[1] if x["kind"] == "event" and "placed the pool anew" in x["what"]]
    assert [x["step"] for x in events] == [2, 4]
    assert all("of 16 experts moved" in x["what"] and "GiB between ranks" in x["what"] for x in events)
    assert not any("placed the pool" in x.get("what", "") for x in lines[0])


@pytest.mark.parametrize("layout", ["pp2 dp2", "pp2 ep2 dp2"])
def test_a_checkpoint_loads_under_another_placement(
    layout: str, ranks: Callable[[int], RankPool], tmp_path: Path
) -> None:
    """Saved under replicate, resumed at home, saved, resumed as hybrid: as one run under replicate."""
    ways: tuple[Literal["replicate", "home", "hybrid"], ...] = ("replicate", "home", "hybrid")
    configs, pool = [config_of(layout, "moue", way) for way in ways], ranks(4)
    assert len({place_pool(c, build_mesh(4, c.parallel)) for c in configs}) > 1
    whole = pool.run(parity.train, configs[0], SEED, stop=6)
    pool.run(parity.train, configs[0], SEED, stop=2, save=tmp_path / "a")
    second = pool.run(parity.train, configs[1], SEED, start=2, stop=4, load=tmp_path / "a", save=tmp_path / "b")
    third = pool.run(parity.train, configs[2], SEED, start=4, stop=6, load=tmp_path / "b")
    assert second[0].losses + third[0].losses == pytest.approx(whole[0].losses[2:], rel=1e-5)
    final, expected = parity.merge(third, "final"), parity.merge(whole, "final")
    assert {n for n, w in final.items() if not relative(w, expected[n]) < 1e-5} == set()
