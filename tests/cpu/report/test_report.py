"""The report room: run folders of every state of health -> pages, and the arithmetic of scaling efficiency."""

from __future__ import annotations

import base64
import csv
import json
import math
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moue_dist.cli.report import main
from moue_dist.config import Config, ConfigError, ModelConfig, MoEConfig, ParallelConfig, TrainConfig
from moue_dist.config.load import dump_config
from moue_dist.config.topology import build_topology
from moue_dist.measuring.run_folder import read_run
from moue_dist.report.html import show
from moue_dist.report.ring import arcs, describe_ring, draw_ring, reached_by, write_pool_picture
from moue_dist.report.run_report import write_run_report
from moue_dist.report.scaling import measure
from moue_dist.report.style import smooth, thin
from moue_dist.report.usage import latest_usage, relative_load

CONFIG = Config(
    name="tiny",
    model=ModelConfig(layers=8),
    moe=MoEConfig(pool=64, top_k=2, topology="rotational", window=16, stride=8, router="universal"),
    parallel=ParallelConfig(pipeline_parallel=2, expert_parallel=2),
    train=TrainConfig(steps=40, eval_interval=10),
)


def train_line(step: int, **changes: Any) -> dict[str, Any]:
    line = {
        "kind": "train", "step": step, "tokens": 2048 * step, "loss": 2.0 + 3.5 * math.exp(-step / 12),
        "aux": {"uelb": 0.01, "z_loss": 0.0}, "grad_norm": 1.0 + 0.2 * math.sin(step), "lr": 1e-3 * min(1.0, step / 5),
        "step_seconds": 0.8 + 0.05 * math.cos(step), "tokens_per_s_per_gpu": 1000.0, "tflops_per_gpu": 0.01,
        "mfu": None, "mfu_note": "unknown device: no peak rate", "memory_gib": 1.25, "power_watts": None,
        "joules_per_token": None, "data_wait": 0.0031,
        "load": {
            "pool_max_over_mean": 1.4 + 1 / step, "layer_max_over_mean": 2.0 + 3 / step, "dead": 0, "entropy": 0.98,
        },
    }  # fmt: skip
    return line | changes


def usage_line(config: Config, step: int, seed: int = 0) -> dict[str, Any]:
    topology = config.topology()
    rng = np.random.default_rng(seed)
    counts = np.zeros((topology.layers, topology.pool), dtype=int)
    for row, window in zip(counts, topology.windows, strict=True):
        row[list(window)] = rng.integers(50, 150, len(window))
    first = config.model.dense_layers + 1
    layers = list(range(first, first + topology.layers))
    return {"kind": "usage", "step": step, "layers": layers, "counts": counts.tolist()}


def metrics(config: Config, steps: int = 40, valid: bool = True, **changes: Any) -> list[dict[str, Any]]:
    """What a healthy run writes; `changes` go to every train line."""
    lines: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        lines.append(train_line(step, **changes))
        if step % 10 == 0:
            lines.append(usage_line(config, step, step))
            if valid:
                lines.append({"kind": "valid", "step": step, "loss": 2.1 + 3.5 * math.exp(-step / 12)})
    return [*lines, {"kind": "event", "step": steps, "what": "saved checkpoint <last>"}]


def write_run(
    folder: Path,
    config: Config = CONFIG,
    lines: list[dict[str, Any]] | None = None,
    world: int = 4,
    tail: str = "",
    **facts: Any,
) -> Path:
    """A run folder as training leaves it. `tail` is appended to the metrics as it stands."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_config(config))
    run = {
        "versions": {"moue_dist": "0.1.0", "torch": "2.13.0", "megatron_core": "0.16.1"},
        "device": "CPU",
        "world_size": world,
        "grid": {"pipeline": 2, "virtual_stages": 1, "expert": 2, "tensor": 1, "data": 2, "placement": "replicate"},
        "parameters": {"total": 1_600_000, "activated": 400_000},
        "flops_per_token": 2_400_000,
        "commit": "abc1234",
    }
    (folder / "run.json").write_text(json.dumps(run | facts))
    lines = metrics(config) if lines is None else lines
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
    return folder


class Page(HTMLParser):
    """A page as a reader meets it: tags, words, addresses, alternatives; complains where tags do not nest."""

    VOID = frozenset({"meta", "link", "img", "source", "br", "!doctype"})

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.alternatives: list[str] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "srcset", "href"):
                self.addresses.append(value or "")
            if name == "alt":
                self.alternatives.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data

    @property
    def pictures(self) -> list[str]:
        prefix = "data:image/svg+xml;base64,"
        return [base64.b64decode(a[len(prefix) :]).decode() for a in self.addresses if a.startswith(prefix)]


def report(folder: Path) -> Page:
    path = write_run_report(folder)
    assert path == folder / "report.html"
    return Page(path)


# One run


def test_page_holds_facts_and_pictures_and_fetches_nothing(tmp_path: Path) -> None:
    page = report(write_run(tmp_path / "tiny"))
    for word in (
        "tiny", "64 experts", "rotational", "stride 8", "universal, top 2", "megatron_core 0.16.1", "abc1234",
        "TP1 EP2 PP2 DP2", "4 ranks", "1.6 million, 400,000 activated", "unknown device: no peak rate", "finished",
        "saved checkpoint <last>", "1.25 GiB", "81,920", "0.3% of a step",
    ):  # fmt: skip
        assert word in page.text, word
    last = 2.0 + 3.5 * math.exp(-40 / 12)
    assert show(last, 4) in page.text
    assert show(last + 0.1, 4) in page.text
    assert len(page.alternatives) == 7
    assert all(len(text) > 40 for text in page.alternatives)
    assert len(page.pictures) == 14  # each for light and for dark
    assert all(address.startswith("data:") for address in page.addresses)
    assert "script" not in page.tags
    assert page.tags.index("title") < page.tags.index("style")
    for svg in page.pictures:
        root = ET.fromstring(svg)
        links = [v for e in root.iter() for k, v in e.attrib.items() if k.endswith("href")]
        assert all(link.startswith(("#", "data:")) for link in links)


def test_dark_pictures_have_no_dark_ink(tmp_path: Path) -> None:
    pictures = report(write_run(tmp_path / "tiny")).pictures
    dark, light = pictures[::2], pictures[1::2]
    assert all("#24292f" in svg or "#5b6470" in svg for svg in light)
    assert not any("#24292f" in svg or "#5b6470" in svg for svg in dark)


def test_what_the_program_itself_writes_is_read(tmp_path: Path) -> None:
    from moue_dist.measuring.metrics import MetricsLog, StepMeter

    folder = write_run(tmp_path / "real", lines=[])
    (folder / "metrics.jsonl").unlink()
    meter = StepMeter(flops_per_token=1e6, tokens_per_step=2048, gpus=4, device_name="cpu", precision="fp32")
    with MetricsLog(folder) as log:
        for step in range(1, 6):
            loss = math.nan if step == 3 else 5.0 / step
            load = {"pool_max_over_mean": 1.4, "layer_max_over_mean": 2.0, "dead": 0, "entropy": 0.9}
            log.train(
                step, tokens=2048 * step, loss=loss, aux={"uelb": 0.1}, grad_norm=1.0, lr=1e-3, rates=meter.rates(0.5),
                memory_gib=0.5, load=load,
            )  # fmt: skip
        usage = usage_line(CONFIG, 5)
        log.usage(5, usage["layers"], usage["counts"])
        log.valid(5, 1.5)
        log.event(5, "saved checkpoint step_00000005")
    run = read_run(folder)
    assert [line["step"] for line in run.train] == [1, 2, 3, 4, 5]
    assert math.isnan(run.series("loss")[1][2])
    assert run.steady_median("tokens_per_s_per_gpu") == 1024.0
    page = report(folder)
    assert "1,024" in page.text
    assert "not finite" in page.text
    assert len(page.alternatives) == 7


@pytest.mark.parametrize(
    ("lines", "tail", "pictures", "word"),
    [
        ([], "", 1, "No finished step was recorded."),  # the ring needs the configuration only
        ([train_line(1)], "", 5, "No expert use was recorded."),
        (metrics(CONFIG, 3, valid=False), "", 5, "no validation in this run"),
        (metrics(CONFIG, 12), '{"kind": "train", "step": 13, "lo', 7, "cut off"),
        (metrics(CONFIG, 12), "\0\0garbage\n[1]\n", 7, "2 unreadable line(s)"),
        (metrics(CONFIG, 12, loss=math.nan), "", 7, "12 steps whose loss was not finite"),
        (metrics(CONFIG, 12, valid=False, loss=None), "", 6, "No finite loss was recorded."),
        (metrics(CONFIG, 12, load=None, lr=None, grad_norm=None, step_seconds=None), "", 4, "No load was recorded."),
        (metrics(CONFIG, 12, load={"dead": 3}, aux=None, tokens_per_s_per_gpu=math.inf), "", 6, "of 40: not finished"),
    ],
)
def test_sick_runs_get_a_page(tmp_path: Path, lines: list[dict[str, Any]], tail: str, pictures: int, word: str) -> None:
    page = report(write_run(tmp_path / "sick", lines=lines, tail=tail))
    assert word in page.text
    assert len(page.alternatives) == pictures


@pytest.mark.parametrize("missing", ["config.yaml", "run.json", "metrics.jsonl"])
def test_each_file_may_be_missing_or_broken(tmp_path: Path, missing: str) -> None:
    folder = write_run(tmp_path / "gone")
    (folder / missing).unlink()
    assert f"{missing} is missing" in report(folder).text
    (folder / missing).write_text("{: [")
    report(folder)


def test_names_from_a_run_cannot_become_markup(tmp_path: Path) -> None:
    page = report(write_run(tmp_path / "x", replace(CONFIG, name="<script>alert(1)</script>"), device='"><img src=x>'))
    assert "script" not in page.tags
    assert page.tags.count("img") == 7
    assert "<script>alert(1)</script>" in page.text


def test_a_resumed_run_shows_each_step_once(tmp_path: Path) -> None:
    again = [train_line(step, loss=1.0) for step in range(11, 16)]
    folder = write_run(tmp_path / "again", lines=metrics(CONFIG, 20) + again)
    run = read_run(folder)
    assert [line["step"] for line in run.train] == list(range(1, 16))
    assert run.train[10]["loss"] == 1.0
    assert [line["step"] for line in run.valid] == [10]
    assert "went back to step 11" in report(folder).text


def test_heat_map_tells_unseen_from_unused(tmp_path: Path) -> None:
    config = replace(CONFIG, model=replace(CONFIG.model, layers=9, dense_layers=1))
    line = usage_line(config, 10)
    line["counts"][0][3] = 0
    folder = write_run(tmp_path / "run", config, [train_line(10), line])
    usage = latest_usage(read_run(folder))
    assert usage is not None and usage.known and usage.strays == 0 and usage.dead == 0
    assert usage.layers[0] == 2  # a dense layer stands before
    load = relative_load(usage)
    seen = np.isfinite(load)
    assert seen.sum(axis=1).tolist() == [16] * 8
    assert seen[1].nonzero()[0].tolist() == list(range(8, 24))
    assert load[0, 3] == 0.0 and np.isnan(load[0, 16])
    assert np.allclose(np.nansum(load, axis=1), 16)  # an even share is 1
    assert "unused (1 of 128 cells)" in report(folder).text


def test_dead_experts_are_counted_over_the_pool(tmp_path: Path) -> None:
    line = usage_line(CONFIG, 10)
    for row in line["counts"]:
        row[5] = row[40] = 0
    page = report(write_run(tmp_path / "run", lines=[train_line(10), line]))
    assert "2 experts got no token." in page.text
    assert any("2 are dead" in text for text in page.alternatives)


def test_usage_that_does_not_fit_the_configuration_is_said(tmp_path: Path) -> None:
    lines = [train_line(1), {"kind": "usage", "step": 1, "layers": [1, 2], "counts": [[1, 2, 0], [0, 4, 0]]}]
    page = report(write_run(tmp_path / "run", lines=lines))
    assert "The windows are not known" in page.text


def test_stages_of_layers_follow_the_interleaved_schedule(tmp_path: Path) -> None:
    parallel = ParallelConfig(pipeline_parallel=2, virtual_stages=2, stage_layers=(1, 2, 3, 2))
    run = read_run(write_run(tmp_path / "run", replace(CONFIG, parallel=parallel)))
    assert run.layer_to_stage() == [0, 1, 1, 0, 0, 0, 1, 1]


def test_steady_steps_leave_out_the_first_tenth_and_at_least_two(tmp_path: Path) -> None:
    def first_steady(steps: int) -> int:
        run = read_run(write_run(tmp_path / f"run{steps}", lines=[train_line(s) for s in range(1, steps + 1)]))
        return run.steady()[0]["step"]

    assert [first_steady(n) for n in (1, 2, 3, 10, 20, 21, 100)] == [1, 2, 3, 3, 3, 4, 11]


# The ring


def test_arcs_close_over_the_end_of_the_pool() -> None:
    assert arcs([0, 1, 7], 8) == [(7, 3)]
    assert arcs([2, 3], 8) == [(2, 2)]
    assert arcs(range(8), 8) == [(0, 8)]
    assert arcs([0, 1, 4], 8) == [(0, 2), (4, 1)]


@pytest.mark.parametrize("kind", ["private", "block", "full", "rotational"])
@pytest.mark.parametrize("pool", [8, 512])
def test_every_topology_can_be_drawn(kind: Any, pool: int) -> None:
    topology = build_topology(kind, 4, pool, window=pool // 2, stride=3, group=2 if kind == "block" else 1)
    figure = draw_ring(topology, [0, 0, 1, 1])
    texts = {text.get_text() for text in figure.axes[0].texts}
    assert {"1", "2", "3", "4", f"{pool} experts"} <= texts
    assert f"A ring of {pool} experts" in describe_ring(topology, [0, 0, 1, 1])


def test_seams_are_the_experts_that_two_stages_reach() -> None:
    topology = build_topology("rotational", 4, 32, window=16, stride=8)
    shared = [e for e, stages in enumerate(reached_by(topology, [0, 0, 1, 1])) if len(stages) > 1]
    assert shared == [*range(8), *range(16, 24)]  # layers 1-2 see 0..23, layers 3-4 see 16..31 and 0..7
    with pytest.raises(ValueError):
        draw_ring(topology, [0, 1])


def test_the_picture_of_the_documentation_is_reproducible(tmp_path: Path) -> None:
    first = write_pool_picture(tmp_path / "a" / "pool.svg").read_bytes()
    assert write_pool_picture(tmp_path / "pool.svg").read_bytes() == first
    ET.fromstring(first)
    assert b"64 experts" in first


# Several runs


def scaling_runs(tmp_path: Path) -> list[Path]:
    """1, 2 and 4 GPUs at 1000, 900 and 750 tokens/s/GPU; the two first steps are slow and must not count."""
    folders = []
    for gpus, rate in ((4, 750.0), (1, 1000.0), (2, 900.0)):
        lines = [
            train_line(step, tokens_per_s_per_gpu=1.0 if step < 3 else rate + step % 3 - 1) for step in range(1, 21)
        ]
        for line in lines:
            line |= {
                "mfu": 0.4,
                "joules_per_token": 0.5,
                "memory_gib": 10.0 + (line["step"] == 2),
                "tflops_per_gpu": 400.0,
            }
            line["load"] = {"pool_max_over_mean": 1.5, "layer_max_over_mean": 3.0}
        train = replace(CONFIG.train, global_batch_size=16 * gpus)
        config = replace(CONFIG, name=f"gpu{gpus}", train=train)
        facts: dict[str, Any] = {"device": "NVIDIA H200", "grid": {"data": gpus}}
        folders.append(write_run(tmp_path / f"gpu{gpus}", config, lines, world=gpus, **facts))
    return folders


def test_efficiency_is_exact(tmp_path: Path) -> None:
    rows = measure([read_run(folder) for folder in scaling_runs(tmp_path)])
    assert [row.gpus for row in rows] == [1, 2, 4]
    assert [row.tokens_per_s_per_gpu for row in rows] == [1000.0, 900.0, 750.0]
    assert [row.efficiency for row in rows] == [1.0, 0.9, 0.75]
    assert [row.tokens_per_s for row in rows] == [1000.0, 1800.0, 3000.0]
    assert [row.speedup for row in rows] == [1.0, 1.8, 3.0]
    assert rows[0].peak_memory_gib == 11.0  # a peak counts the warm-up too
    assert (rows[0].mfu, rows[0].tflops_per_gpu, rows[0].joules_per_token) == (0.4, 400.0, 0.5)
    assert (rows[0].layer_max_over_mean, rows[0].pool_max_over_mean) == (3.0, 1.5)
    assert {row.steady_steps for row in rows} == {18}


def test_of_several_smallest_runs_the_fastest_is_the_baseline(tmp_path: Path) -> None:
    slow, fast = (
        write_run(
            tmp_path / name, replace(CONFIG, name=name), [train_line(s, tokens_per_s_per_gpu=rate) for s in range(1, 6)]
        )
        for name, rate in (("slow", 500.0), ("fast", 1000.0))
    )
    for order in ([slow, fast], [fast, slow]):
        rows = measure([read_run(folder) for folder in order])
        assert [(row.name, row.efficiency) for row in rows] == [("fast", 1.0), ("slow", 0.5)]


def test_scaling_page_csv_and_terminal_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out" / "scaling.html"
    assert main([*map(str, scaling_runs(tmp_path)), "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    page = Page(output)
    for word in ("gpu1", "gpu4", "DP4", "90.0%", "75.0%", "1.80", "3.00", "40.0%", "3.00 / 1.50"):
        assert word in page.text, word
        assert word in printed, word
    assert "warning" not in printed
    assert "differ in more than their size" not in page.text
    assert len(page.alternatives) == 2
    assert "gpu4 on 4: 75.0%" in page.alternatives[0]
    assert all(address.startswith("data:") for address in page.addresses)
    rows = list(csv.DictReader(output.with_suffix(".csv").open()))
    assert [(row["name"], float(row["efficiency"]), float(row["speedup"])) for row in rows] == [
        ("gpu1", 1.0, 1.0),
        ("gpu2", 0.9, 1.8),
        ("gpu4", 0.75, 3.0),
    ]


@pytest.mark.parametrize(("device", "word"), [("CPU", "rank"), ("NVIDIA H200", "GPU")])
def test_ranks_of_a_cpu_are_not_called_gpus(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], device: str, word: str
) -> None:
    small = write_run(tmp_path / "a", world=1, device=device)
    large = write_run(tmp_path / "b", replace(CONFIG, name="b"), world=2, device=device)
    alone, several = Page(write_run_report(small)), tmp_path / "scaling.html"
    assert main([str(small), str(large), "--output", str(several)]) == 0
    told = " ".join(capsys.readouterr().out.split())
    page = Page(several)
    texts = [alone.text, *alone.alternatives, told, page.text, *page.alternatives, *page.pictures]
    assert any("GPU" in text for text in texts) == (word == "GPU")
    assert f"Tokens/s/{word}" in alone.text and f"1.25 GiB per {word}" in alone.text
    assert f"Tokens/s/{word}" in told and f"1 to 2 {word}s" in page.text and f"b, 2 {word}s" in page.text
    assert f"Not weak scaling: sequences per {word} and step" in told
    (row, _) = csv.DictReader(several.with_suffix(".csv").open())
    assert (row["gpus"], row["device"]) == ("1", device)


def test_numbers_that_a_run_lacks_are_dashes_and_empty(tmp_path: Path) -> None:
    lines = [train_line(s, load=None, memory_gib=None, tflops_per_gpu=None) for s in range(1, 6)]
    folders = [
        write_run(tmp_path / name, replace(CONFIG, name=name), lines, world=n) for n, name in ((1, "a"), (2, "b"))
    ]
    output = tmp_path / "scaling.html"
    assert main([*map(str, folders), "--output", str(output)]) == 0
    row = next(csv.DictReader(output.with_suffix(".csv").open()))
    assert row["mfu"] == row["peak_memory_gib"] == row["joules_per_token"] == row["layer_max_over_mean"] == ""
    assert "nan" not in Page(output).text.lower()


def test_runs_of_different_models_are_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = replace(CONFIG, name="b", moe=replace(CONFIG.moe, window=32))
    folders = [write_run(tmp_path / "a", world=1), write_run(tmp_path / "b", other, world=2, device="NVIDIA H200")]
    output = tmp_path / "scaling.html"
    assert main([*map(str, folders), "--output", str(output)]) == 0
    told = " ".join(capsys.readouterr().out.split())
    for place in (told, Page(output).text):
        assert "moe.window is 16 in tiny, 32 in b" in place
        assert "Different devices: CPU in tiny, NVIDIA H200 in b" in place
        assert "Not weak scaling: sequences per rank and step are 16 in tiny, 8 in b" in place


# The command


def test_one_run_prints_its_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "tiny")
    assert main([str(folder)]) == 0
    assert Path(capsys.readouterr().out.strip()) == folder / "report.html"
    assert main([str(folder), "--output", str(tmp_path / "elsewhere.html")]) == 0
    assert (tmp_path / "elsewhere.html").is_file()


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert "moue report runs/tiny" in text
    assert "fewest ranks is the baseline" in text


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["gone"], "no such run folder"),
        (["."], "is not a run folder"),
        (["good", "empty"], "has no finished step"),
        (["good", "lost"], "does not say world_size"),
        (["good", "rateless"], "recorded no tokens/s"),
        (["good", "./good"], "named twice"),
        (["good", "--output", "page.pdf"], "must end in .html"),
        (["good", "--output", "good/run.json/x.html"], "cannot write"),
        ([], "required"),
        (["good", "--colour"], "unrecognized"),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    word: str,
) -> None:
    write_run(tmp_path / "good")
    write_run(tmp_path / "empty", lines=[])
    write_run(tmp_path / "lost", world_size=None)
    write_run(tmp_path / "rateless", lines=[train_line(1, tokens_per_s_per_gpu=None)])
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert word in captured.err
    assert "Traceback" not in captured.err
    if word not in ("required", "unrecognized"):  # argparse adds its usage
        assert len(captured.err.strip().splitlines()) == 1


# Small parts


def test_thinning_keeps_the_extremes() -> None:
    y = [math.sin(i / 50) for i in range(10_000)]
    y[7777] = 99.0
    y[5] = math.nan
    xs, ys = thin(list(map(float, range(10_000))), y, 400)
    assert len(xs) <= 400 and xs == sorted(xs)
    assert (7777.0, 99.0) in zip(xs, ys, strict=True)
    assert thin([1.0, 2.0], [3.0, math.nan])[0] == [1.0, 2.0]


def test_smoothing_starts_at_the_first_value_and_passes_over_nan() -> None:
    assert smooth([4.0, 4.0, 4.0], 10) == pytest.approx([4.0, 4.0, 4.0])
    result = smooth([1.0, math.nan, 3.0], 2)
    assert result[0] == 1.0 and math.isnan(result[1])
    assert result[2] == pytest.approx((0.25 * 1.0 + 0.5 * 3.0) / 0.75)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"), (1.0, "1.00"), (0.01234, "0.0123"), (12345.6, "12,346"), (99.95, "100.0"), (123.4, "123"),
        (1e-7, "1.00e-07"), (math.nan, "–"), (math.inf, "∞"), (-2.5, "-2.50"),
    ],
)  # fmt: skip
def test_numbers_for_people(value: float, text: str) -> None:
    assert show(value) == text
    assert re.search(r"\d|–|∞", show(value))


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a run folder"):
        write_run_report(tmp_path)
