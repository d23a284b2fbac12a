"""Configuration: strict reading, overrides, and every refusal with its message and exit code."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moue_dist.cli import main
from moue_dist.config import Config, ConfigError, MoEConfig, ParallelConfig
from moue_dist.config.devices import Device, describe_device, find_device, fp8_recipes
from moue_dist.config.load import all_keys, dump_config, load_config
from moue_dist.refusals.machine import MERGED
from moue_dist.refusals.validate import validate
from tests.ranks.spawn import ROOT

TINY = str(ROOT / "configs" / "tiny.yaml")
H200 = find_device("NVIDIA H200")
A100 = find_device("NVIDIA A100-SXM4-80GB")


def write(folder: Path, text: str, name: str = "run.yaml") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


# Reading


def test_defaults_round_trip(tmp_path: Path) -> None:
    changed = load_config(TINY, ["--parallel.stage-layers", "3", "1", "--train.transformer-engine", "off"])
    for config in (Config(), changed):
        assert load_config(write(tmp_path, dump_config(config))) == config


def test_yaml_numbers_and_words_as_people_read_them(tmp_path: Path) -> None:
    text = "optim: {lr: 1e-3, eps: 1.e-8, weight_decay: 0}\ntrain: {transformer_engine: off, steps: 1_000}"
    config = load_config(write(tmp_path, text))
    assert (config.optim.lr, config.optim.eps, config.optim.weight_decay) == (1e-3, 1e-8, 0.0)
    assert isinstance(config.optim.weight_decay, float)
    assert (config.train.transformer_engine, config.train.steps) == ("off", 1000)


def test_base_is_extended_not_replaced(tmp_path: Path) -> None:
    write(tmp_path, "name: below\nmodel: {layers: 6, heads: 8}", "below.yaml")
    config = load_config(write(tmp_path, "base: below.yaml\nmodel: {heads: 2}"))
    assert (config.name, config.model.layers, config.model.heads) == ("below", 6, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("moe: {pol: 3}", "unknown key moe.pol; perhaps you meant moe.pool"),
        ("mode: {layers: 3}", "unknown key mode; perhaps you meant model"),
        ("layers: 3", "unknown key layers; perhaps you meant model.layers"),
        ("model: {layers: true}", "model.layers: expected a whole number, not True (bool)"),
        ("model: {layers: 3.5}", "model.layers: expected a whole number, not 3.5 (float)"),
        ("model: {layers: '3'}", "model.layers: expected a whole number, not '3' (str)"),
        ("model: {tied_head: 1}", "model.tied_head: expected true or false, not 1 (int)"),
        ("optim: {lr: true}", "optim.lr: expected a number, not True (bool)"),
        ("optim: {lr: 1:30}", "optim.lr: expected a number, not '1:30' (str)"),
        ("optim: {lr: }", "optim.lr: expected a number, not nothing"),
        ("name: 3", "name: expected text, not 3 (int)"),
        ("moe: {router: softmx}", "moe.router: expected one of softmax, sigmoid"),
        ("moe: {router: softmx}", "perhaps you meant softmax"),
        ("parallel: {stage_layers: 3}", "parallel.stage_layers: expected a list such as [2, 2], not 3 (int)"),
        ("parallel: {stage_layers: [1, a]}", "parallel.stage_layers[1]: expected a whole number, not 'a' (str)"),
        ("model: 3", "model is a section"),
        ("model:", "model is a section"),
        ("[1]", "expected sections such as 'model:'"),
        ("model: {? [1]: 3}", "a key must be a word"),
        ("model:\n  layers: 3\n  layers: 4", "'layers' stands twice in one section (line 3)"),
        ("a: [", "is not valid YAML"),
        ("base: 3", "base: expected the path"),
        ("base: run.yaml", "base goes round in a circle: run.yaml -> run.yaml"),
        ("base: gone.yaml", "no configuration file"),
    ],
)
def test_bad_yaml_names_the_key_and_the_way_out(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refusal:
        load_config(write(tmp_path, text))
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_missing_file_suggests_its_neighbour(tmp_path: Path) -> None:
    write(tmp_path, "", "tiny.yaml")
    with pytest.raises(ConfigError, match=r"no configuration file .*perhaps you meant .*tiny\.yaml"):
        load_config(tmp_path / "tin.yaml")


def test_a_shipped_configuration_goes_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config("plain_tiny") == load_config(ROOT / "configs" / "plain_tiny.yaml")
    assert load_config("tiny", ["--train.steps", "3"]).train.steps == 3
    (tmp_path / "mine.yaml").write_text("base: tiny\nname: mine\n")
    assert load_config("mine.yaml") == replace(load_config("tiny"), name="mine")


def test_a_file_wins_over_a_shipped_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny").write_text("name: ours")
    assert load_config("tiny").name == "ours"
    (tmp_path / "over.yaml").write_text("base: tiny")
    assert load_config("over.yaml").name == "ours"
    Path("moue_7b").mkdir()
    with pytest.raises(ConfigError, match="cannot read the configuration file moue_7b"):
        load_config("moue_7b")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tinny", r"^no configuration file tinny; by name there are debug_gpu, .*, plain_tiny, .*, unipool_tiny$"),
        ("tiny.yaml", r"^no configuration file tiny\.yaml; the shipped one goes by its name: tiny$"),
        ("configs/tiny.yaml", r"^no configuration file configs/tiny\.yaml; the shipped one goes by its name: tiny$"),
        ("../tiny", "^no configuration file"),
        ("gone.yaml", r"^no configuration file gone\.yaml$"),
    ],
)
def test_an_unknown_name_says_what_there_is(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        load_config(name)


@pytest.mark.parametrize("spelling", ["--parallel.pipeline-parallel", "--parallel.pipeline_parallel"])
def test_overrides_are_typed(spelling: str) -> None:
    config = load_config(None, [spelling, "2", "--optim.lr=1e-4", "--parallel.stage-layers", "3", "1"])
    assert (config.parallel.pipeline_parallel, config.optim.lr) == (2, 1e-4)
    assert config.parallel.stage_layers == (3, 1)


@pytest.mark.parametrize(
    "words",
    [
        ["--train.record-slots", "false"],
        ["--train.no-record-slots"],
        ["--train.record-slots=False"],
    ],
)
def test_switches_take_a_value_or_a_no(words: list[str]) -> None:
    assert load_config(None, words).train.record_slots is False
    assert load_config(None, ["--parallel.overlap-grad-reduce"]).parallel.overlap_grad_reduce is True


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        (["--model.qk-norm", "false"], "none"),
        (["--model.no-qk-norm"], "none"),
        (["--model.qk-norm=True"], "head"),
        (["--model.qk-norm"], "head"),
        (["--model.qk-norm", "all"], "all"),
        ([], "head"),
    ],
)
def test_a_switch_that_became_a_choice_is_still_read(words: list[str], kind: str, tmp_path: Path) -> None:
    assert load_config(None, words).model.qk_norm == kind
    for value in {"true": "head", "false": "none", "all": "all"}.items():
        path = tmp_path / "c.yaml"
        path.write_text(f"model: {{qk_norm: {value[0]}}}")
        assert load_config(path).model.qk_norm == value[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--parallel.pipline-parallel", "2"], "perhaps you meant --parallel.pipeline-parallel"),
        (["--steps", "2"], "unknown option --steps; perhaps you meant --train.steps"),
        (["--train.steps", "x"], "--train.steps: expected a whole number, not x"),
        (["--name", "a", "--train.steps", "1.5"], "--train.steps: expected a whole number, not 1.5"),
        (["--train.steps"], "--train.steps: expected a whole number, not nothing"),
        (["--optim.lr", "fast"], "--optim.lr: expected a number, not fast"),
        (["--model.tied-head", "maybe"], "--model.tied-head: expected true or false, not maybe"),
        (["--moe.router", "univ"], "--moe.router: expected one of softmax, sigmoid, norm, universal, recurrent"),
        (["--parallel.stage-layers", "2", "b"], "--parallel.stage-layers: expected whole numbers, such as 2 2, not"),
        (["--data.split", "95", "b"], "--data.split: expected numbers, such as 95 5, not 95 b"),
        (["steps=3"], "unexpected 'steps=3'"),
    ],
)
def test_bad_overrides_are_one_line(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        load_config(None, words)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


# Refusals


def refusal(words: str, world: int | None = None, base: str | None = None, **machine: object) -> str:
    config = load_config(base, words.split())
    with pytest.raises(ConfigError) as found:
        validate(config, world, **{"cuda": False, **machine})  # type: ignore[arg-type]
    return str(found.value)


ON_H200 = {"cuda": True, "device": H200, "transformer_engine": True}
ON_B200 = {"cuda": True, "device": Device("B200", (10, 0), 178.0), "transformer_engine": True}
HOME, TE = "--parallel.placement home", "--moe.experts te --moe.expert-width 128"
ROTATION = "--moe.topology rotational --moe.window 16 --moe.stride 8"


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("--model.layers 0", ("model.layers=0 must be at least 1",)),
        ("--model.vocab-size 100", ("model.vocab_size=100 must be at least 256",)),
        ("--moe.state-decay 1.5", ("moe.state_decay=1.5",)),
        ("--optim.lr 0", ("optim.lr=0.0 must be above 0",)),
        ("--optim.lr nan", ("optim.lr=nan must be a finite number",)),
        ("--optim.beta2 1", ("optim.beta2=1.0 must be below 1",)),
        ("--optim.min-lr 1", ("optim.min_lr=1.0", "optim.lr")),
        ("--optim.decay-steps 10", ("optim.decay_steps=10", "wsd")),
        ("--optim.schedule wsd --optim.decay-steps 101", ("optim.decay_steps=101", "train.steps=100")),
        ("--data.valid-percent 100", ("data.valid_percent=100.0",)),
        ("--data.blend 0.5 a 0.5", ("data.blend=0.5 a 0.5: expected weights and prefixes in turn",)),
        ("--data.blend 0 a 1 b", ("data.blend=0 a 1 b: weights must be above 0",)),
        ("--data.blend 1 a 1 a.idx", ("data.blend names a twice",)),
        ("--data.blend a --data.source b", ("data.blend beside data.source=b",)),
        ("--data.tokenizer bytes", ("data.tokenizer=bytes is for data.blend", "moue data prepare")),
        ("--data.split 95", ("data.split=95: expected the shares",)),
        ("--data.split 90 5 4 1", ("data.split=90 5 4 1: expected the shares",)),
        ("--data.split 0 5", ("data.split=0 5 leaves nothing to train on",)),
        ("--data.split 95 -5", ("data.split=95 -5: expected the shares",)),
        ("--data.split nan 5", ("data.split=nan 5: expected the shares",)),
        ("--data.split 95 5 --data.valid-percent 1", ("data.split=95 5 beside data.valid_percent=1",)),
        ("--name a/b", ("name='a/b'", "output")),
        ("--model.heads 3", ("model.hidden_size=128", "model.heads=3")),
        ("--model.rope-base 1.5", ("model.rope_base=1.5",)),
        ("--model.head-dim 7", ("model.head_dim=7", "even")),
        ("--moe.mask-start 3 --moe.mask-steps 5", ("moe.mask_start=3", "below 0")),
        ("--moe.mask-start -16", ("moe.mask_start=-16 and moe.mask_steps=0", "set both")),
        ("--moe.mask-steps 5", ("moe.mask_start=0 and moe.mask_steps=5", "set both")),
        ("--moe.mask-start -16 --moe.mask-steps 5", ("moe.mask_steps=5", "train.start_from")),
        (
            "--moe.mask-start -16 --moe.mask-steps 5 --train.start-from x --moe.router norm",
            ("moe.mask_steps=5", "moe.router=softmax or sigmoid, not norm"),
        ),
        ("--model.kv-heads 3", ("model.kv_heads=3", "model.heads=4")),
        ("--model.dense-layers 4", ("model.dense_layers=4", "model.layers=4")),
        ("--moe.pool 30", ("moe.pool=30 is not divisible by 4",)),
        ("--moe.group 0", ("moe.group=0 must be at least 1",)),
        ("--moe.group 2", ("moe.group=2", "block or rotational")),
        ("--moe.window 4", ("moe.window=4 is only for moe.topology=rotational",)),
        ("--moe.topology full --moe.stride 4", ("moe.stride=4 is only for moe.topology=rotational",)),
        (ROTATION.replace("16", "33"), ("moe.window=33 is larger than moe.pool=32",)),
        (ROTATION.replace("stride 8", "stride 4"), ("4 of the 32 experts", "moe.window=16", "moe.stride=4")),
        ("--moe.top-k 9", ("moe.top_k=9 is larger than the window of 8",)),
        (f"{ROTATION} --moe.top-k 17", ("moe.top_k=17 is larger than the window of 16",)),
        ("--moe.router norm --moe.score topk_softmax", ("moe.score=topk_softmax", "not norm")),
        ("--moe.router sigmoid --moe.renormalise", ("moe.renormalise", "not sigmoid")),
        ("--moe.score topk_softmax --moe.renormalise", ("moe.renormalise has no effect",)),
        ("--moe.router norm --balance.bias 0.001", ("balance.bias=0.001", "not norm", "balance.uelb")),
        ("--moe.force-balance --balance.uelb 0.01", ("moe.force_balance", "balance.uelb")),
        ("--parallel.expert-parallel 5", ("moe.pool=32 is not divisible by parallel.expert_parallel=5",)),
        ("--parallel.expert-parallel 32 --parallel.pipeline-parallel 4", ("stage 0 sees 8 experts", "24 of")),
        ("--parallel.virtual-stages 2", ("parallel.virtual_stages=2", "parallel.pipeline_parallel")),
        ("--parallel.pipeline-parallel 8", ("parallel.pipeline_parallel=8 makes 8 stages", "model.layers=4")),
        ("--parallel.pipeline-parallel 4 --parallel.virtual-stages 2", ("makes 8 stages", "model.layers=4")),
        ("--parallel.pipeline-parallel 3", ("model.layers=4 do not split evenly", "parallel.stage_layers")),
        ("--parallel.pipeline-parallel 2 --parallel.stage-layers 2 1", ("sums to 3", "model.layers=4")),
        ("--parallel.pipeline-parallel 2 --parallel.stage-layers 4 0", ("[4, 0]: every stage needs at least one",)),
        ("--parallel.pipeline-parallel 2 --parallel.stage-layers 4", ("[4] names 1 stages", "makes 2")),
        ("--parallel.tensor-parallel 3", ("model.heads=4 is not divisible by parallel.tensor_parallel=3",)),
        ("--parallel.tensor-parallel 2 --model.kv-heads 1", ("model.kv_heads=1 is not divisible",)),
        ("--parallel.tensor-parallel 2 --model.sequence-length 127", ("model.sequence_length=127 is not divisible",)),
        ("--parallel.tensor-parallel 2 --model.vocab-size 257", ("model.vocab_size=257 is not divisible",)),
        ("--parallel.tensor-parallel 2 --moe.shared-expert-width 3", ("moe.shared_expert_width=3 is not divisible",)),
        ("--train.device cuda", ("train.device=cuda", "no CUDA device", "train.device=auto or cpu")),
        ("--train.precision fp8", ("train.precision=fp8 needs a GPU", "fp32 or bf16")),
        ("--train.transformer-engine on", ("train.transformer_engine=on needs a GPU",)),
        ("--train.fp8-recipe mxfp8", ("train.fp8_recipe=mxfp8 is only for train.precision=fp8",)),
        ("--moe.experts te", ("moe.experts=te needs a GPU",)),
        ("--moe.experts torch --moe.expert-width 63", ("moe.experts=torch needs", "moe.expert_width=63")),
    ],
)
def test_refused_on_any_number_of_processes(words: str, parts: tuple[str, ...]) -> None:
    message = refusal(words)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("words", "world", "parts"),
    [
        ("--parallel.pipeline-parallel 2 --parallel.tensor-parallel 2", 3, ("too few processes", "needs at least 4")),
        ("--parallel.pipeline-parallel 2", 5, ("5 processes are not a multiple",)),
        ("--parallel.expert-parallel 4", 2, ("too few processes", "parallel.expert_parallel=4")),
        ("--parallel.expert-parallel 4", 6, ("parallel.expert_parallel=4 does not divide the 6 ranks",)),
        ("", 3, ("train.global_batch_size=16 is not divisible", "3 data-parallel ranks")),
        ("--train.micro-batch-size 3", 1, ("train.micro_batch_size=3",)),
        (
            "--parallel.pipeline-parallel 2 --parallel.virtual-stages 2 --train.global-batch-size 6",
            2,
            ("3 microbatches a step", "parallel.virtual_stages=2"),
        ),
    ],
)
def test_refused_on_these_processes(words: str, world: int, parts: tuple[str, ...]) -> None:
    message = refusal(words, world)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("words", "machine", "parts"),
    [
        ("", {"cuda": True, "device": A100, "transformer_engine": True}, ("A100", "does not compute in FP8", "bf16")),
        ("", {"cuda": True, "device": None, "transformer_engine": True}, ("this GPU does not compute in FP8",)),
        ("", {"cuda": True, "device": H200}, ("Transformer Engine", "extra 'gpu'")),
        ("--train.transformer-engine off", ON_H200, ("Transformer Engine", "train.transformer_engine")),
        ("--train.fp8-recipe mxfp8", ON_H200, ("train.fp8_recipe=mxfp8", "blockwise")),
        (f"{TE} --parallel.recompute selective", ON_H200, ("selective is not proven", "moe.experts=te", "Hopper")),
        ("--moe.experts te --moe.expert-width 64", ON_H200, ("moe.expert_width=64 is not a multiple of 128",)),
        ("--moe.expert-width 72", ON_H200, ("moe.expert_width=72 is not a multiple of 16",)),
        ("--moe.expert-width 72 --train.fp8-recipe tensorwise", ON_H200, ("moe.expert_width=72", "multiple of 16")),
        ("--moe.experts torch", ON_H200, ("moe.experts=torch cannot compute in FP8", "moe.experts=auto, fp8 or te")),
        ("--moe.experts fp8", ON_B200, ("moe.experts=fp8 needs a Hopper GPU, which B200 is not", "moe.experts=te")),
        (f"{TE} {HOME}", ON_H200, ("parallel.placement=home and moe.experts=te", "moe.experts=fp8")),
        (HOME, ON_B200, ("parallel.placement=home and moe.experts=te", "parallel.placement=replicate")),
        (f"{HOME} --train.fp8-recipe tensorwise", ON_H200, ("home and train.fp8_recipe=tensorwise", "use blockwise")),
        (f"{HOME} --parallel.recompute full", ON_H200, ("parallel.recompute=full", "parallel.lag=0")),
    ],
)
def test_fp8_is_refused_where_it_is_not_computed(words: str, machine: dict, parts: tuple[str, ...]) -> None:
    message = refusal(f"--train.precision fp8 {words}", None, **machine)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("parallel", "moe", "expected"),
    [
        ({}, {}, "gathered"),
        ({"expert_parallel": 2}, {}, "gathered"),
        ({"expert_parallel": 4}, {}, "all_to_all"),  # two choices a token: four copies of it would be more
        ({"expert_parallel": 4}, {"dispatch": "gathered"}, "gathered"),
        ({"expert_parallel": 2}, {"dispatch": "all_to_all"}, "all_to_all"),
        ({"pipeline_parallel": 2, "placement": "home"}, {}, "lockstep"),
    ],
)
def test_dispatch_sends_what_is_less(parallel: dict[str, Any], moe: dict[str, Any], expected: str) -> None:
    config = Config(parallel=ParallelConfig(**parallel), moe=MoEConfig(**moe))
    assert validate(config, 4, cuda=False).dispatch == expected


@pytest.mark.parametrize(
    ("parallel", "moe", "message"),
    [
        ({"pipeline_parallel": 2, "placement": "home"}, {"dispatch": "gathered"}, "an exchange of its own"),
        ({"pipeline_parallel": 2, "placement": "home"}, {"dispatch": "all_to_all"}, "an exchange of its own"),
        ({}, {"headroom": 0.9}, "moe.headroom=0.9 must be at least 1"),
    ],
)
def test_dispatch_that_does_not_fit_is_refused(parallel: dict[str, Any], moe: dict[str, Any], message: str) -> None:
    config = Config(parallel=ParallelConfig(**parallel), moe=MoEConfig(**moe))
    with pytest.raises(ConfigError, match=message):
        validate(config, 4, cuda=False)


def test_auto_becomes_what_the_machine_has() -> None:
    assert validate(Config(), 1, cuda=False)[:4] == ("cpu", False, "loop", None)
    wide = ["--moe.expert-width", "128"]
    bf16 = load_config(None, ["--train.precision", "bf16", *wide])
    assert validate(bf16, 1, **ON_H200)[:4] == ("cuda", True, "torch", None)  # type: ignore[arg-type]
    assert validate(bf16, 1, cuda=False)[:4] == ("cpu", False, "loop", None)
    fp8 = load_config(None, ["--train.precision", "fp8", *wide])
    assert validate(fp8, 1, **ON_H200)[:4] == ("cuda", True, "fp8", "blockwise")  # type: ignore[arg-type]
    assert validate(fp8, 1, **ON_H200).dispatch == "gathered"  # type: ignore[arg-type]
    assert validate(fp8, 1, **ON_B200)[:4] == ("cuda", True, "te", "mxfp8")  # type: ignore[arg-type]
    shared = load_config(None, ["--train.precision", "fp8", "--moe.topology", "full"])
    assert validate(shared, 1, **ON_H200).merge_wgrad == MERGED  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "words",
    [
        "--parallel.recompute selective",
        "--moe.expert-width 48",
        HOME,
        "--parallel.placement hybrid --parallel.pool-budget-gib 1",
        f"{HOME} --parallel.recompute full --parallel.lag 0",
        "--moe.experts te --moe.expert-width 128 --parallel.recompute full",
    ],
)
def test_fp8_goes_with_what_is_proven_of_it(words: str) -> None:
    config = load_config(None, f"--train.precision fp8 {words}".split())
    assert validate(config, 1, **ON_H200).fp8_recipe == "blockwise"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("words", "machine", "experts"),
    [
        ("", {"cuda": False}, "loop"),
        ("--train.precision bf16", {"cuda": False}, "loop"),
        ("", ON_H200, "loop"),
        ("--train.precision bf16", ON_H200, "torch"),
        ("--train.precision bf16 --moe.expert-width 68", ON_H200, "loop"),  # 136 bytes
        ("--train.precision bf16 --model.hidden-size 132 --model.heads 1", ON_H200, "loop"),
        ("--train.precision fp8", ON_H200, "fp8"),
        ("--train.precision fp8 --moe.expert-width 128", ON_B200, "te"),
        ("--train.precision fp8 --moe.expert-width 128 --moe.experts te", ON_H200, "te"),
        ("--moe.experts torch", {"cuda": False}, "torch"),
        ("--moe.experts loop --train.precision bf16", ON_H200, "loop"),
        ("--moe.experts te --train.precision bf16", ON_H200, "te"),
    ],
)
def test_experts_are_computed_by(words: str, machine: dict, experts: str) -> None:
    assert validate(load_config(None, words.split()), 1, **machine).experts == experts


@pytest.mark.parametrize(
    ("words", "machine", "part"),
    [
        ("--moe.experts torch", ON_H200, "train.precision=bf16"),
        ("--moe.experts torch --moe.expert-width 66", {"cuda": False}, "multiples of 4"),
        ("--moe.experts torch --moe.expert-width 68 --train.precision bf16", ON_H200, "multiples of 8"),
        ("--moe.experts te --moe.expert-width 72 --train.precision bf16", ON_H200, "multiples of 16"),
        ("--moe.experts te", ON_H200, "moe.experts=loop"),
        ("--moe.experts fp8 --train.precision bf16", ON_H200, "moe.experts=fp8 is for train.precision=fp8, not bf16"),
        ("--moe.experts fp8", {"cuda": False}, "moe.experts=fp8 is for train.precision=fp8, not fp32"),
        ("--moe.experts te --train.precision bf16", {"cuda": True, "device": H200}, "extra 'gpu'"),
    ],
)
def test_experts_that_cannot_compute_are_refused(words: str, machine: dict, part: str) -> None:
    message = refusal(words, None, **machine)
    assert part in message and "moe.experts=" in message


# Devices


@pytest.mark.parametrize(
    ("name", "capability", "recipe"),
    [
        ("NVIDIA H200", (9, 0), "blockwise"),
        ("NVIDIA H100 80GB HBM3", (9, 0), "blockwise"),
        ("NVIDIA B200", (10, 0), "mxfp8"),
        ("NVIDIA L40S", (8, 9), "tensorwise"),
        ("NVIDIA A100-SXM4-40GB", (8, 0), None),
    ],
)
def test_devices_are_found_by_their_drivers_name(name: str, capability: tuple[int, int], recipe: str | None) -> None:
    device = find_device(name)
    assert device is not None
    assert device.capability == capability
    assert (fp8_recipes(capability) or (None,))[0] == recipe
    assert (device.fp8_tflops is None) == (recipe is None)


def test_similar_names_are_told_apart() -> None:
    sxm, pcie = find_device("NVIDIA H100 80GB HBM3"), find_device("NVIDIA H100 PCIe")
    assert sxm and pcie and (sxm.bf16_tflops or 0) > (pcie.bf16_tflops or 0)
    small = find_device("NVIDIA A100-PCIE-40GB")
    assert small and small.memory_gib < 41
    assert find_device("NVIDIA H200 MIG 1g.18gb") is None
    assert find_device("NVIDIA GeForce RTX 4090 Laptop GPU") is None
    assert find_device("Some Future GPU") is None


def test_an_unknown_device_keeps_the_drivers_facts() -> None:
    assert describe_device("Some Future GPU", (11, 0), 12.0) == Device("Some Future GPU", (11, 0), 12.0)
    known = describe_device("NVIDIA H200", (9, 0), 139.0)
    assert (known.memory_gib, known.peak_tflops("bf16"), known.peak_tflops("fp32")) == (139.0, 989.4, None)


# The command line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["plan", TINY, "--train.stpes", "3"], "perhaps you meant --train.steps"),
        (["plan", TINY, "--train.steps", "many"], "--train.steps: expected a whole number"),
        (["plan", TINY, "--world", "3"], "3 processes are not a multiple"),
        (["plan", TINY, "--world", "2"], "too few processes"),
        (["plan", TINY, "--device", "abacus"], "--device abacus: unknown; known are"),
        (["plan", "--train.steps", "5", TINY], "the configuration file comes first"),
        (["plan", "nowhere.yaml"], "no configuration file nowhere.yaml"),
        (["train", TINY, "--nproc", "3"], "3 processes are not a multiple"),
        (["train", TINY, "--moe.window", "40"], "moe.window=40 is larger than moe.pool=32"),
        (["train", TINY, "--moe.top-k", "20"], "moe.top_k=20 is larger than the window of 16"),
        (["train", TINY, "--moe.pool", "31"], "moe.pool=31 is not divisible by parallel.expert_parallel=2"),
        (["train", TINY, "--parallel.pipeline-parallel", "8"], "more than model.layers=4"),
        (["train", TINY, "--train.device", "cpu", "--train.precision", "fp8"], "train.precision=fp8 needs a GPU"),
    ],
)
def test_the_command_refuses_with_exit_code_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    written = capsys.readouterr()
    assert message in written.err
    assert written.err.startswith("moue: ") and written.err.count("\n") == 1
    assert written.out == ""


def test_only_the_first_rank_complains(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    place = {"WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29511"}
    for rank, lines in (("0", 1), ("1", 0)):
        for name, value in {**place, "RANK": rank, "LOCAL_RANK": rank}.items():
            monkeypatch.setenv(name, value)
        assert main(["train", TINY, "--moe.top-k", "0x"]) == 2
        assert capsys.readouterr().err.count("\n") == lines
    assert main(["train", TINY, "--nproc", "2"]) == 2  # the ranks are up already


def cli(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "moue_dist", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("train", TINY, "--moe.rooter", "norm"), "unknown option --moe.rooter; perhaps you meant --moe.router"),
        (("plan", TINY, "--world", "6"), "parallel.expert_parallel=2 does not divide the 3 ranks"),
    ],
)
def test_the_real_command_ends_without_a_traceback(words: tuple[str, ...], message: str) -> None:
    ended = cli(*words)
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"moue: {message}")
    assert "Traceback" not in ended.stderr


def test_document_masks_are_for_cpu_ranks() -> None:
    said = refusal("--data.document-mask true", **ON_H200)
    assert "data.document_mask=true is proven on CPU ranks only" in said and "set it to false" in said
    validate(load_config(None, ["--data.document-mask", "true"]), None, cuda=False)


def test_a_blend_may_be_written_with_numbers(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "data: {blend: [0.7, data/web, 3, data/code], split: [99, 1]}"))
    assert config.data.blend == ("0.7", "data/web", "3", "data/code")
    assert (config.data.split, config.data.shares) == ((99.0, 1.0), (99.0, 1.0, 0.0))
    assert load_config(write(tmp_path, dump_config(config))) == config
    assert load_config(None, ["--data.blend", "0.7", "data/web", "3", "data/code"]).data.blend == config.data.blend
    with pytest.raises(ConfigError, match=r"data\.blend\[0\]: expected text, not True"):
        load_config(write(tmp_path, "data: {blend: [true, a]}"))


def test_cuda_asked_for_and_absent() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    ended = cli("train", TINY, "--train.device", "cuda")
    assert ended.returncode == 2
    assert "train.device=cuda, but this machine shows no CUDA device" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_help_loads_nothing_heavy_and_plan_no_torch() -> None:
    code = f"""
import sys
from moue_dist.cli import main
assert main([]) == 2  # shows the help
heavy = {{"torch", "megatron", "numpy", "rich", "tyro", "yaml", "matplotlib"}} & sys.modules.keys()
assert not heavy, f"the help imports {{heavy}}"
assert main(["plan", {TINY!r}, "--train.steps", "7"]) == 0
assert "torch" not in sys.modules and "megatron" not in sys.modules, "torch was imported"
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert all(word in ended.stdout for word in ("moue plan tiny", "train", "report", "unipool_7b"))


def test_options_lists_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["options"])
    assert not ended.value.code
    shown = capsys.readouterr().out
    assert [key for key in all_keys() if f"--{key.replace('_', '-')}" not in shown.replace("no-", "")] == []
