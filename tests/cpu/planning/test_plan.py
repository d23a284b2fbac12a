"""The dry run: rank grids, stage layouts, parameter counts, FLOPs, bytes, exit codes."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from math import prod
from typing import NamedTuple

import pytest

from moue_dist.cli import main
from moue_dist.config import Config, ParallelConfig
from moue_dist.config.devices import Device, find_device
from moue_dist.config.load import load_config
from moue_dist.parallel.mesh import Mesh, build_mesh, layers_of_rank, smallest_world, stage_layout
from moue_dist.planning.flops import flops_per_token, parameters
from moue_dist.planning.memory.in_flight import chunks_in_flight
from moue_dist.planning.memory.sizes import GIB, Share
from moue_dist.planning.memory.weights import dense_parameters
from moue_dist.planning.plan import build_plan, ranges
from moue_dist.refusals.machine import Resolved
from moue_dist.refusals.validate import validate
from tests.ranks.spawn import ROOT, RankPool
from tests.reference import parameter_shapes

CONFIGS = ROOT / "configs"
TINY, SEVEN = str(CONFIGS / "tiny.yaml"), str(CONFIGS / "moue_7b.yaml")
H200 = Device("H200", (9, 0), 139.8)


def tiny(*words: str) -> Config:
    return load_config(TINY, list(words))


# Rank grid


GRIDS = [
    (world, pp, ep, tp)
    for world, pp, ep, tp in itertools.product((1, 4, 8, 16, 24), (1, 2, 4), (1, 2, 4, 3), (1, 2))
    if world % (pp * tp) == 0 and world // pp % ep == 0
]


@pytest.mark.parametrize(("world", "pp", "ep", "tp"), GRIDS)
def test_mesh_is_megatrons(world: int, pp: int, ep: int, tp: int) -> None:
    from megatron.core.parallel_state import RankGenerator

    mesh = build_mesh(world, ParallelConfig(pipeline_parallel=pp, expert_parallel=ep, tensor_parallel=tp))
    order = "tp-cp-ep-dp-pp"
    dense = RankGenerator(tp=tp, ep=1, dp=mesh.data, pp=pp, cp=1, order=order)
    experts = RankGenerator(tp=1, ep=ep, dp=mesh.expert_data, pp=pp, cp=1, order=order)
    assert sorted(dense.get_ranks("tp")) == sorted(mesh.tensor_groups())
    assert sorted(dense.get_ranks("dp")) == sorted(mesh.data_groups())
    assert sorted(dense.get_ranks("pp")) == sorted(mesh.pipeline_groups())
    assert sorted(experts.get_ranks("ep")) == sorted(mesh.expert_groups())
    assert sorted(experts.get_ranks("dp")) == sorted(mesh.expert_data_groups())
    everywhere = sorted(experts.get_ranks("dp-pp"))
    assert everywhere == sorted(sorted(mesh.expert_cells(range(pp), e)) for e in range(ep))
    for rank in range(world):
        c = mesh.coords(rank)
        assert mesh.dense_rank(c.tp, c.dp, c.pp) == rank == mesh.expert_rank(c.ep, c.edp, c.pp)
        assert mesh.expert_coord(rank) == (c.ep, c.edp, c.pp)
        assert rank in mesh.ranks_of_stage(c.pp)


def test_coords_refuse_a_rank_outside() -> None:
    with pytest.raises(ValueError, match="rank 4 is outside"):
        Mesh(4).coords(4)


def test_smallest_world_is_buildable_and_smallest() -> None:
    for pp, ep, tp in itertools.product((1, 2), (1, 2, 3, 4), (1, 2)):
        degrees = ParallelConfig(pipeline_parallel=pp, expert_parallel=ep, tensor_parallel=tp)
        least = smallest_world(degrees)
        build_mesh(least, degrees)
        for world in range(1, least):
            with pytest.raises(ValueError, match="parallel"):
                build_mesh(world, degrees)


def test_stage_layout() -> None:
    assert stage_layout(4, 2) == ((0, 1), (2, 3))
    assert stage_layout(5, 2, stage_layers=(3, 2)) == ((0, 1, 2), (3, 4))
    interleaved = stage_layout(8, 2, 2)
    assert interleaved == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert layers_of_rank(interleaved, 2, 0) == (0, 1, 4, 5)
    assert layers_of_rank(interleaved, 2, 1) == (2, 3, 6, 7)


# Parameters


VARIANTS: dict[str, tuple[str, ...]] = {
    "tiny": (),
    "recurrent, tied": ("--moe.router", "recurrent", "--model.tied-head", "true"),
    "norm, shared expert": ("--moe.router", "norm", "--model.qk-norm", "false", "--moe.shared-expert-width", "64"),
    "dense first": ("--model.dense-layers", "1", "--model.ffn-hidden-size", "96", "--model.kv-heads", "0"),
    "softmax": ("--moe.router", "softmax"),
    "wide heads, norm over all": ("--model.head-dim", "48", "--model.qk-norm", "all"),
    "wide heads": ("--model.head-dim", "48"),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_are_those_of_the_reference(variant: str) -> None:
    config = tiny(*VARIANTS[variant])
    shapes = parameter_shapes(config)
    counts = parameters(config)
    assert counts.total == sum(prod(shape) for shape in shapes.values())
    assert counts.pool == prod(shapes["pool.weight"])
    assert counts.router == sum(prod(shape) for name, shape in shapes.items() if "router" in name)
    per_expert = 3 * config.model.hidden_size * config.moe.expert_width
    assert counts.activated == counts.dense + config.moe_layers * config.moe.top_k * per_expert


class Built(NamedTuple):
    dense: int
    pool: int
    pool_bytes: int
    shared_router: int
    pool_master: int


def built(config: Config) -> Built:
    """In a rank: build the real thing and count."""
    import torch.distributed as dist

    from moue_dist.parallel.megatron import cpu_host

    cpu_host.install()
    from moue_dist.model.build import build_system
    from moue_dist.parallel.megatron import adapter as megatron

    system = build_system(config, dist.get_rank(), dist.get_world_size(), Resolved("cpu", False, "loop", None))
    try:
        pool = system.context.pool.buffer
        return Built(
            dense=sum(p.numel() for chunk in system.chunk_modules() for p in chunk.parameters()),
            pool=pool.weight.numel(),
            pool_bytes=pool.weight.numel() * pool.weight.element_size(),
            shared_router=sum(p.numel() for p in system.context.shared_router.parameters()),
            pool_master=sum(t.numel() for t in system.shared.states(0)["weight"]),
        )
    finally:
        megatron.shut_down()


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_are_those_of_the_model(variant: str, ranks: Callable[[int], RankPool]) -> None:
    config = tiny("--parallel.pipeline-parallel", "1", "--parallel.expert-parallel", "1", *VARIANTS[variant])
    (found,) = ranks(1).run(built, config)
    counts = parameters(config)
    assert found.dense + found.pool + found.shared_router == counts.total
    assert (found.pool, found.shared_router) == (counts.pool, counts.router_shared)


@pytest.mark.parametrize(
    "words",
    [
        ("--moe.shared-expert-width", "64"),
        ("--model.tied-head", "true", "--parallel.stage-layers", "3", "1"),
        ("--parallel.tensor-parallel", "2", "--model.dense-layers", "1", "--moe.stride", "16", "--moe.pool", "48"),
        (
            "--parallel.virtual-stages",
            "2",
        ),
        ("--train.precision", "bf16"),
    ],
)
def test_every_ranks_share_is_as_planned(words: tuple[str, ...], ranks: Callable[[int], RankPool]) -> None:
    config = tiny(*words)
    plan = build_plan(config, 4, H200)
    mesh = build_mesh(4, config.parallel)
    itemsize = 4 if config.train.precision == "fp32" else 2
    for rank, found in enumerate(ranks(4).run(built, config)):
        c = mesh.coords(rank)
        stage = plan.stages[c.pp]
        share = Share(c.pp, stage.chunks, c.ep)
        assert found.dense == dense_parameters(config, mesh, share) == stage.parameters_per_rank
        assert found.pool_bytes == stage.memory_bytes["pool weights"], "the windows here spread evenly over EP ranks"
        assert found.pool * 4 == stage.memory_bytes["pool gradients"]
        optimizer = stage.memory_bytes["pool optimizer"] / (8 if itemsize == 4 else 12)
        assert found.pool_master == pytest.approx(optimizer, rel=0.01)


# FLOPs


def test_flops_of_a_model_counted_by_hand() -> None:
    model = "--model.layers 2 --model.hidden-size 8 --model.heads 2 --model.kv-heads 1 --model.sequence-length 4"
    moe = "--moe.pool 4 --moe.top-k 1 --moe.expert-width 16 --model.dense-layers 1"
    config = load_config(None, f"{model} {moe}".split())
    flops = flops_per_token(config)
    attention = 2 * 8 * (8 + 2 * 4) + 2 * 8 * 8 + 2 * 4 * 8  # q, k and v; output; scores and values of 4/2 tokens
    assert flops.attention == 3 * 2 * attention
    assert flops.router == 3 * 2 * 8 * 4
    assert flops.experts == 3 * 6 * 8 * 16
    assert flops.dense == 3 * 6 * 8 * 32
    assert flops.head == 3 * 2 * 8 * 256
    assert flops.total == flops.attention + flops.router + flops.experts + flops.dense + flops.head


def test_flops_are_six_per_activated_weight_but_for_the_attention_matrix() -> None:
    config = load_config(str(CONFIGS / "moue_7b.yaml"))
    counts, m = parameters(config), config.model
    matmul = counts.activated - m.vocab_size * m.hidden_size - counts.norms - m.layers * 2 * (m.hidden_size // m.heads)
    matrix = 3 * m.layers * 2 * m.sequence_length * m.hidden_size
    assert flops_per_token(config).total == pytest.approx(6 * matmul + matrix)


def test_recompute_and_layout_change_no_model_flops() -> None:
    plain = flops_per_token(tiny())
    assert flops_per_token(tiny("--parallel.recompute", "full", "--parallel.tensor-parallel", "2")) == plain


# Memory


def test_chunks_in_flight() -> None:
    assert [len(chunks_in_flight(Mesh(4, pipeline=4), p, 8)) for p in range(4)] == [4, 3, 2, 1]
    assert len(chunks_in_flight(Mesh(4, pipeline=4), 0, 2)) == 2  # no more microbatches than there are
    assert chunks_in_flight(Mesh(2, pipeline=2, virtual=2), 0, 4) == (0, 0, 1, 1, 0)
    assert chunks_in_flight(Mesh(2, pipeline=2, virtual=2), 1, 4) == (0, 0, 1)


def seven(*words: str, world: int = 4) -> dict[str, int]:
    config = load_config(SEVEN, list(words))
    return build_plan(config, world, H200).worst.memory_bytes


def test_weights_of_the_7b_on_one_gpu_by_hand() -> None:
    """6.4 billion in the pool: 2 bytes of weight, 4 of gradient, 12 of optimizer each."""
    one = seven("--parallel.pipeline-parallel", "1", "--parallel.expert-parallel", "1", world=1)
    pool = 1024 * 3 * 2048 * 1024
    assert (one["pool weights"], one["pool gradients"], one["pool optimizer"]) == (2 * pool, 4 * pool, 12 * pool)


def test_fp8_of_the_7b_on_one_gpu_by_hand() -> None:
    """Our experts hold the pool twice more in a byte; Transformer Engine's hold what each layer and microbatch sees."""
    flat = ("--parallel.pipeline-parallel", "1", "--parallel.expert-parallel", "1")
    flat = (*flat, "--moe.dispatch", "all_to_all", "--train.precision")
    bf16, ours, te = seven(*flat, "bf16"), seven(*flat, "fp8"), seven(*flat, "fp8", "--moe.experts", "te")
    an_expert, scales = 3 * 2048 * 1024, 2 * 1024 + 2048 + 2048 + 1024
    part = "pool weights in FP8"
    assert (bf16[part], te[part], ours[part]) == (0, 0, 1024 * (2 * an_expert + 4 * scales))
    assert ours["pool weights"] == bf16["pool weights"]
    rows = 4096 * 8
    assert ours["activations"] == bf16["activations"], "attention keeps one input in a byte less, another in one more"
    kept_by_te = rows * (1024 - 2048) + 2 * 256 * an_expert  # activations, inputs in a byte less, weights
    assert te["activations"] - ours["activations"] == 16 * kept_by_te


def test_quantised_weights_take_what_is_planned() -> None:
    import torch

    from moue_dist.kernels.fp8.pool import QuantisedPool
    from tests.cpu.kernels.test_fp8 import Held

    found = QuantisedPool(Held(torch.zeros(5, 3 * 64 * 32)), hidden=64, width=32).tensors()
    assert sum(t.nbytes for t in found) == 5 * (2 * 3 * 64 * 32 + 4 * (3 * 32 + 2 * 64))


def test_what_makes_memory_smaller() -> None:
    flat = ("--parallel.pipeline-parallel", "1", "--parallel.expert-parallel")
    one, four = seven(*flat, "1"), seven(*flat, "4")
    assert four["pool weights"] * 4 == one["pool weights"]
    assert four["pool optimizer"] == one["pool optimizer"], "sharded over replicas or over experts: the same share"
    none, selective, full = (
        seven(*flat, "4", "--parallel.recompute", kind)["activations"] for kind in ("none", "selective", "full")
    )
    assert none > selective > full
    unsharded = seven(*flat, "4", "--parallel.distributed-optimizer", "false")
    assert unsharded["dense optimizer"] == pytest.approx(4 * four["dense optimizer"], abs=8)
    twice = seven(*flat, "4", "--train.micro-batch-size", "2")
    assert twice["activations"] == 2 * four["activations"]


def test_replicas_on_two_stages_share_the_optimizer() -> None:
    """Every stage of the full topology holds the whole pool, and the stages shard its optimizer among them."""
    words = ("--moe.topology", "full", "--moe.window", "0", "--moe.stride", "0", "--parallel.expert-parallel", "1")
    pool = 1024 * 3 * 2048 * 1024
    for pp in (2, 4):
        found = seven(*words, "--parallel.pipeline-parallel", str(pp))
        assert (found["pool weights"], found["pool optimizer"]) == (2 * pool, 12 * pool // 4)


def test_stages_know_their_seams() -> None:
    plan = build_plan(load_config(SEVEN), 8, H200)
    first, second = plan.stages
    assert first.windows[0] == "0-255" and second.windows[-1] == "0-191 960-1023"
    assert first.experts == second.experts == 7 * 64 + 256
    assert first.shared_experts == second.shared_experts == first.experts + second.experts - 1024
    assert first.experts_per_rank == first.experts // 4


def test_ranges() -> None:
    assert ranges((0, 1, 2, 6, 7, 9)) == "0-2 6-7 9"
    assert ranges(()) == ""


# The command


def test_plan_prints_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", SEVEN, "--world", "16"]) == 0
    shown = capsys.readouterr().out
    for part in ("rank grid", "derived", "parameters", "6,925,391,872", "FLOPs", "stages", "pool gradients", "fits"):
        assert part in shown


def test_ranks_of_a_cpu_are_not_called_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    home = ["plan", TINY, "--parallel.placement", "home"]
    assert main([*home, "--train.device", "cpu"]) == 0
    on_cpu = capsys.readouterr().out
    assert "GPU" not in on_cpu and "H200 has" not in on_cpu
    assert "GiB of a rank by stage" in on_cpu and "all ranks, GiB" in on_cpu and "GiB of pool a rank" in on_cpu
    assert main(home) == 0
    assert capsys.readouterr().out.count("GPU") == 4


def test_plan_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", TINY, "--json", "--parallel.stage-layers", "3", "1", "--train.steps", "7"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["grid"]["world"] == 4
    assert plan["fits"] is True
    assert plan["derived"]["tokens in the run"] == 7 * 32 * 128
    assert [stage["chunks"] for stage in plan["stages"]] == [[[0, 1, 2]], [[3]]]
    assert plan["parameters"]["total"] == parameters(tiny()).total
    assert all(stage["total_bytes"] == sum(stage["memory_bytes"].values()) for stage in plan["stages"])


def test_a_misfit_ends_with_1_and_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", SEVEN, "--world", "1", "--parallel.pipeline-parallel", "1", "--parallel.expert-parallel", "1"]
    assert main([*words, "--memory-gib", "40"]) == 1
    said = capsys.readouterr().err
    assert "does not fit" in said and "40.0 GiB" in said and "parallel.expert_parallel" in said
    assert main([*words, "--memory-gib", "400"]) == 0


def test_memory_of_the_device_decides() -> None:
    need = build_plan(load_config(SEVEN), 8, H200).worst.total_bytes / GIB
    assert build_plan(load_config(SEVEN), 8, H200, need + 3.01).fits
    assert not build_plan(load_config(SEVEN), 8, H200, need + 2.99).fits


def test_fp8_is_planned_for_a_device_that_has_it() -> None:
    config = load_config(SEVEN, ["--train.precision", "fp8"])
    assert build_plan(config, 8, H200).derived["precision"] == "fp8 (blockwise)"
    b200 = find_device("b200")
    assert b200 is not None
    assert validate(config, 8, cuda=True, device=b200, transformer_engine=True).fp8_recipe == "mxfp8"
    assert main(["plan", SEVEN, "--device", "a100", "--train.precision", "fp8"]) == 2
