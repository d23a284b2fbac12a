"""Models of transformers, converted: our trainer's logits are theirs, in every form and layout.

Bound: 2e-6 in fp32, absolute, on logits of about 1 to 3. A single expert that is 1% larger is far above it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moue_dist.checkpoint.description import find, start_of
from moue_dist.config import Config, ParallelConfig, TrainConfig
from moue_dist.config.load import load_config
from moue_dist.interchange.incoming.convert import convert
from moue_dist.interchange.incoming.forms import Form
from tests import foreign
from tests.ranks import parity
from tests.ranks.spawn import RankPool

BOUND = 2e-6
RING, FULL, BLOCK = Form("rotational"), Form("full"), Form("block", group=2)
FORMS = [
    *((name, Form()) for name in foreign.MODELS),
    ("olmoe", RING),
    ("olmoe", FULL),
    ("olmoe", Form("rotational", window=9, stride=6)),
    ("qwen3_moe", RING),
    ("qwen3_moe", BLOCK),
    ("qwen3_moe, dense first", FULL),
    ("mixtral", RING),
    ("mixtral", Form("rotational", window=12, stride=8, group=2)),
    ("llama", FULL),
    ("llama", Form(upcycle=4)),
    ("llama", Form(upcycle=4, split=True)),
    ("qwen3", Form("rotational", upcycle=3, top_k=1)),
    ("qwen3", Form("full", upcycle=2, split=True)),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers", reason="transformers is not installed: pip install -e '.[hf]' to prove imports")
    folder = tmp_path_factory.mktemp("foreign")
    foreign.make(folder)
    return folder


def trained_here(out: Path, **parallel: Any) -> Config:
    """The configuration that `convert` wrote, on the batches of these tests."""
    config = load_config(out / "config.yaml")
    return replace(
        config,
        model=replace(config.model, sequence_length=16),
        train=TrainConfig(global_batch_size=4, micro_batch_size=1, steps=2, start_from=config.train.start_from),
        parallel=ParallelConfig(**parallel),
    )


def logits_of(config: Config, louder: tuple[int, float] | None = None) -> Tensor:
    """In one rank: logits of `foreign.tokens()`, [2, 16, V]; `louder` multiplies an expert."""
    from moue_dist.checkpoint.start import start
    from moue_dist.parallel.megatron import adapter as megatron

    system = parity.build(config)
    try:
        path = start_of(config, Path("nowhere"))
        assert path is not None and dist.get_world_size() == 1
        start(system, path)
        if louder is not None:
            system.context.pool.buffer.weight.view(config.moe.pool, -1)[louder[0]] *= louder[1]
        system.context.pool.ready()
        inputs = foreign.tokens()[:, :-1].contiguous()
        (chunk,) = system.chunk_modules()
        with torch.no_grad():
            found: Tensor = chunk.eval()(inputs, torch.arange(16).expand_as(inputs), None)
        return found.clone()
    finally:
        megatron.shut_down()


def name_of(value: Any) -> str:
    if not isinstance(value, Form):
        return str(value).replace(" ", "_")
    changed = {k: v for k, v in vars(value).items() if v != getattr(Form(), k)}
    return "-".join(f"{k}={v}" for k, v in changed.items()) or "private"


@pytest.mark.parametrize(("name", "form"), FORMS, ids=name_of)
def test_logits_are_the_sources(
    name: str, form: Form, made: Path, ranks: Callable[[int], RankPool], tmp_path: Path
) -> None:
    convert(made / name, tmp_path / "out", form)
    (ours,) = ranks(1).run(logits_of, trained_here(tmp_path / "out"))
    theirs = torch.load(made / f"{name}.pt")
    assert theirs.abs().max() > 0.5
    assert float((ours - theirs).abs().max()) < BOUND
    (off,) = ranks(1).run(logits_of, trained_here(tmp_path / "out"), (0, 1.01))
    assert float((off - theirs).abs().max()) > 50 * BOUND, "one expert x 1.01 does not show"


def test_without_its_mask_a_pool_is_another_model(made: Path, ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
    convert(made / "olmoe", tmp_path / "out", FULL)
    config = trained_here(tmp_path / "out")
    (bare,) = ranks(1).run(logits_of, replace(config, moe=replace(config.moe, mask_start=0.0, mask_steps=0)))
    assert float((bare - torch.load(made / "olmoe.pt")).abs().max()) > 1e-2


LAYOUTS: list[tuple[str, Form, dict[str, Any], int]] = [
    ("olmoe", FULL, {"pipeline_parallel": 2, "expert_parallel": 2}, 4),
    ("olmoe", Form(), {"pipeline_parallel": 2, "expert_parallel": 2, "tensor_parallel": 2}, 4),
    ("qwen3_moe", RING, {"pipeline_parallel": 2, "expert_parallel": 2, "placement": "home"}, 4),
    ("mixtral", BLOCK, {"pipeline_parallel": 2, "expert_parallel": 2}, 4),
    ("llama", Form(), {"pipeline_parallel": 2}, 2),
    ("qwen3", Form("rotational", upcycle=4), {"pipeline_parallel": 2, "virtual_stages": 2}, 2),
]


@pytest.mark.parametrize(("name", "form", "layout", "world"), LAYOUTS, ids=name_of)
def test_the_first_steps_in_a_layout_are_one_processes(
    name: str,
    form: Form,
    layout: dict[str, Any],
    world: int,
    made: Path,
    ranks: Callable[[int], RankPool],
    tmp_path: Path,
) -> None:
    convert(made / name, tmp_path / "out", form)
    path = find(tmp_path / "out")
    one = ranks(1).run(parity.train, parity.one_process(trained_here(tmp_path / "out")), 0, stop=2, begin=path)
    parts = ranks(world).run(parity.train, trained_here(tmp_path / "out", **layout), 0, stop=2, begin=path)
    assert parts[0].losses == pytest.approx(one[0].losses, rel=1e-6)
    assert parts[0].norms == pytest.approx(one[0].norms, rel=1e-5)


def resaved(made: Path, folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    """The OLMoE folder with other tensors."""
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(made / "olmoe", folder)
    tensors = change(load_file(folder / "model.safetensors"))
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")
    return folder


def fused(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Experts of a layer in one tensor, as transformers 5 has them in memory."""
    out = {name: t for name, t in tensors.items() if ".experts." not in name}
    for i in range(4):
        before = f"model.layers.{i}.mlp.experts."
        gate, up, down = (
            torch.stack([tensors[f"{before}{e}.{x}_proj.weight"] for e in range(6)]) for x in ("gate", "up", "down")
        )
        out |= {before + "gate_up_proj": torch.cat([gate, up], 1), before + "down_proj": down}
    return out


def test_fused_experts_and_bf16(made: Path, ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
    """The same weights fused, and in bf16: the checkpoint keeps the source's type and numbers."""
    convert(resaved(made, tmp_path / "fused", fused), tmp_path / "a", RING)
    (ours,) = ranks(1).run(logits_of, trained_here(tmp_path / "a"))
    assert float((ours - torch.load(made / "olmoe.pt")).abs().max()) < BOUND

    halves = resaved(made, tmp_path / "bf16", lambda all_: {n: t.bfloat16() for n, t in all_.items()})
    wide = resaved(made, tmp_path / "wide", lambda all_: {n: t.bfloat16().float() for n, t in all_.items()})
    convert(halves, tmp_path / "b", RING)
    convert(wide, tmp_path / "c", RING)
    assert load_config(tmp_path / "b" / "config.yaml").train.precision == "bf16"
    sizes = [sum(f.stat().st_size for f in find(tmp_path / x).glob("*.distcp")) for x in "bc"]
    assert sizes[0] < 0.7 * sizes[1]
    (b,), (c,) = (ranks(1).run(logits_of, trained_here(tmp_path / x)) for x in "bc")
    # the mean row of a router is rounded to bf16 in one and not in the other: it is hidden
    assert float((b - c).abs().max()) < BOUND


def bytes_of(folder: Path) -> Iterator[tuple[str, bytes]]:
    for file in sorted(find(folder).iterdir()):
        yield file.name, file.read_bytes()


def test_converting_again_gives_the_same_numbers(made: Path, tmp_path: Path) -> None:
    for x in "ab":
        convert(made / "qwen3", tmp_path / x, Form("full", upcycle=2))
    (a,), (b,) = ([d for n, d in bytes_of(tmp_path / x) if n.endswith(".distcp")] for x in "ab")
    assert a == b
