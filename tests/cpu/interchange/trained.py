"""Small trained checkpoints of ours for the tests of models out: made in a rank, told in full to the test process."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moue_dist.config import Config
from moue_dist.config.load import dump_config
from moue_dist.interchange.outgoing.export import Exported
from tests.ranks import parity
from tests.ranks.cases import Case
from tests.ranks.spawn import RankPool
from tests.reference import Reference

STEPS, SEED = 2, 0
needs_transformers = pytest.mark.skipif(
    find_spec("transformers") is None, reason="transformers is not installed: pip install -e '.[hf]'"
)

# Every router, topology and form of a layer at least once.
MOUE = (
    *("plain", "mixtral", "qwen", "deepseek", "unipool", "moue", "recurrent", "dense first", "tied head"),
    *("softmax on full", "norm on rotational", "moue, full"),
    *("olmoe", "qwen3", "converted", "converted, sigmoid"),
)
PLAIN = ("plain", "softmax on full", "qwen3", "renormalised ring", "scaled block")
BFLOAT = "moue in bf16"


def config_of(name: str, layout: str = "") -> Config:
    """A model of tests/ranks/cases.py, or one that nothing keeps out of a plain folder."""
    if name == BFLOAT:
        config = config_of("moue", layout)
        return replace(config, train=replace(config.train, precision="bf16"))
    if name == "renormalised ring":
        config = Case(layout, "qwen").config
        return replace(config, moe=replace(config.moe, shared_expert_width=0))
    if name == "scaled block":  # with a dense layer, a tied head, and a softmax over the chosen
        config = Case(layout, "mixtral").config
        model = replace(config.model, layers=5, dense_layers=1, tied_head=True)
        return replace(config, model=model, balance=replace(config.balance, bias=0.0))
    return Case(layout, name).config


@dataclass(frozen=True)
class Made:
    """A run's folder, the weights and the bias that it was saved with, and what the trainer says to `tokens_bs`."""

    config: Config
    run: Path
    weights: dict[str, Tensor]
    bias_p: Tensor
    logits_bsv: Tensor | None  # of one rank alone


@dataclass(frozen=True)
class Folders:
    """Trained models by name, and their folders by name and form."""

    made: dict[str, Made]
    exported: dict[tuple[str, str], Exported]


def tokens_bs(config: Config) -> Tensor:
    return parity.tokens_of(config, 1, 7)[0, :2, :-1].contiguous()


def train_and_save(config: Config, run: Path) -> tuple[parity.Trained, Tensor | None]:
    """Inside the ranks: two steps, a checkpoint; the logits of the model that it loads as (of one rank alone)."""
    import torch.distributed as dist

    trained = parity.train(config, SEED, stop=STEPS, save=run / "checkpoints")
    if dist.get_world_size() > 1:
        return trained, None
    from moue_dist.checkpoint import store
    from moue_dist.checkpoint.description import newest
    from moue_dist.parallel.megatron import adapter as megatron

    system = parity.build(config)
    try:
        path = newest(run / "checkpoints")
        assert path is not None
        store.load(system, path)
        system.context.pool.ready()
        (chunk,) = system.chunk_modules()
        tokens = tokens_bs(config)
        with torch.no_grad():
            return trained, chunk.eval()(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), None).float()
    finally:
        megatron.shut_down()


def make(name: str, pool: RankPool, run: Path, layout: str = "") -> Made:
    """Train, save, and write the run's config.yaml beside it."""
    config = config_of(name, layout)
    parts = pool.run(train_and_save, config, run)
    (run / "config.yaml").write_text(dump_config(config))
    return Made(config, run, parity.merge([p for p, _ in parts], "final"), parts[0][0].bias, parts[0][1])


def reference_logits(made: Made) -> Tensor:
    """What tests/reference.py says to the same tokens, in fp32."""
    reference = Reference(parity.one_process(made.config))
    reference.load({name: w.float() for name, w in made.weights.items()})
    reference.bias_p, reference.hidden_lw, reference.step = made.bias_p, parity.hidden(made.config), STEPS
    with torch.no_grad():
        return reference(tokens_bs(made.config))[0]


def in_transformers(questions: dict[str, tuple[Path, Tensor]], folder: Path) -> dict[str, dict[str, Any]]:
    """What transformers says, in a process of its own: after a CPU host was installed it would be wrong."""
    asked, answered = folder / "questions.pt", folder / "answers.pt"
    torch.save({name: (str(at), tokens) for name, (at, tokens) in questions.items()}, asked)
    words = [sys.executable, Path(__file__).with_name("hub_program.py"), asked, answered]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return torch.load(answered)
