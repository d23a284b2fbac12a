"""One run -> `report.html`: what it was, how it ended, and its pictures, in one file that needs nothing else."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from moue_dist.config import ConfigError
from moue_dist.config.devices import rank_word
from moue_dist.config.load import load_config
from moue_dist.measuring.measured_use import measured_use
from moue_dist.measuring.run_folder import Run, number, read_run
from moue_dist.parallel.mesh import build_mesh
from moue_dist.parallel.placement.of_config import place_pool
from moue_dist.parallel.placement.placement import Placement
from moue_dist.report import figures, html
from moue_dist.report.gantt import picture_of_time
from moue_dist.report.html import Picture, share, show
from moue_dist.report.ring import describe_ring, draw_ring
from moue_dist.report.usage import heat_map, latest_usage, pool_use


def write_run_report(run_dir: Path, output: Path | None = None) -> Path:
    """Write the report of the run in `run_dir` to `output` (default: report.html in the run folder); gives its path.

    Raises ConfigError where `run_dir` is no run folder or the report cannot be written.
    """
    run = read_run(Path(run_dir))
    path = Path(output) if output else run.folder / "report.html"
    write_text(path, render_run(run))
    return path


def write_text(path: Path, text: str) -> None:
    """Write a file and its folders; raises ConfigError where that is not possible."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}; name another file with --output") from None


def render_run(run: Run) -> str:
    """The page of a run, as HTML text."""
    usage = latest_usage(run)
    pictures = [
        figures.loss(run),
        pool_use(usage),
        heat_map(run, usage),
        figures.balance(run),
        figures.step_time(run),
        figures.rate_and_norm(run),
        ring_picture(run),
        picture_of_time(run),
    ]
    body = [
        html.headline(headline(run)),
        html.notes([*run.notes, *_not_finite(run)], "Worth knowing about this run"),
        "<h2>Pictures</h2>",
        f'<div class="pictures">{"".join(picture.html() for picture in pictures if picture)}</div>',
        "<h2>Facts</h2>",
        html.facts_table(facts(run)),
        html.details("Resolved configuration (config.yaml)", _yaml(run.config) or "config.yaml is missing."),
        html.details("Versions and machine (run.json)", json.dumps(run.facts, indent=2, ensure_ascii=False)),
    ]
    if run.events:
        told = "\n".join(f"step {line['step']}: {line.get('what', '')}" for line in run.events)
        body.append(html.details(f"Events ({len(run.events)})", told))
    return html.page(run.name, _lead(run), body)


def headline(run: Run) -> list[tuple[str, str, str]]:
    """The cards at the top of the page: (label, value, small print)."""
    last = run.train[-1] if run.train else {}
    wanted, done = run.option("train.steps"), number(last, "step")
    small = "" if not run.config else "finished" if done >= wanted else f"of {wanted}: not finished"
    cards = [("Steps", f"{done:,.0f}" if math.isfinite(done) else "none", small)]
    losses = [number(line, "loss") for line in run.train]
    note = "nats per token" if losses and math.isfinite(losses[-1]) else "no finite loss at the last step"
    cards.append(("Final training loss", show(losses[-1], 4) if losses else "–", note if losses else ""))
    valid = [(number(line, "loss"), number(line, "step")) for line in run.valid]
    if valid:
        lowest = min((v for v in valid if math.isfinite(v[0])), default=(math.nan, 0.0))
        small = f"at step {valid[-1][1]:,.0f}"
        small += ", its lowest" if lowest == valid[-1] else f"; lowest {show(lowest[0], 4)} at {lowest[1]:,.0f}"
        cards.append(("Validation loss", show(valid[-1][0], 4), small))
    else:
        cards.append(("Validation loss", "–", "no validation in this run"))
    rate = run.steady_median("tokens_per_s_per_gpu")
    per = _word(run)
    cards.append((f"Tokens/s/{per}", show(rate), "median of steady steps" + ("; CPU ranks" if per == "rank" else "")))
    flops = run.steady_median("tflops_per_gpu")
    cards.append((f"TFLOP/s/{per}", show(flops), "model FLOPs, median"))
    mfu = run.steady_median("mfu")
    notes = [str(line["mfu_note"]) for line in run.train if line.get("mfu_note")]
    why = notes[-1] if notes else "not recorded"
    cards.append(("MFU", share(mfu), "" if math.isfinite(mfu) else why))
    return cards


def facts(run: Run) -> list[tuple[str, str]]:
    """The table of facts: (name, value), without those that are unknown."""
    o, last = run.option, run.train[-1] if run.train else {}
    rows: list[tuple[str, str]] = []
    if run.config:
        rows += [("Model", _model(run)), ("Parameters", parameters(run)), ("Pool", _pool(run))]
        rows.append(("Router", f"{o('moe.router')}, top {o('moe.top_k')}"))
        terms = run.config.get("balance")
        on = [f"{key} {value:g}" for key, value in terms.items() if value] if isinstance(terms, dict) else []
        rows.append(("Balance", ", ".join(on) or "none"))
        batch = f"{o('train.global_batch_size')} sequences of {o('model.sequence_length')} tokens per step, "
        rows.append(("Batch", batch + f"{o('train.micro_batch_size')} per rank and microbatch"))
        rows.append(("Precision", str(o("train.precision"))))
    ranks = f"{run.world_size} rank{'s' if run.world_size != 1 else ''}" if run.world_size else ""
    rows.append(("Grid", ", ".join(part for part in (ranks, grid(run)) if part)))
    rows.append(("Device", run.device))
    versions = run.facts.get("versions")
    if isinstance(versions, Mapping):
        rows.append(("Versions", ", ".join(f"{name} {version}" for name, version in versions.items() if version)))
    rows.append(("Commit", str(run.facts.get("commit") or "")))
    flops = number(run.facts, "flops_per_token")
    rows.append(("Model FLOPs per token", f"{flops:,.0f}" if math.isfinite(flops) else ""))
    tokens = number(last, "tokens")
    rows.append(("Tokens trained on", f"{tokens:,.0f}" if math.isfinite(tokens) else ""))
    memory = peak_memory(run)
    rows.append(("Peak memory", show(memory, 3, f" GiB per {_word(run)}") if math.isfinite(memory) else ""))
    wait = run.steady_median("data_wait")
    rows.append(("Waiting for data", f"{share(wait)} of a step" if math.isfinite(wait) else ""))
    joules = run.steady_median("joules_per_token")
    rows.append(("Energy", show(joules, 3, " joules per token") if math.isfinite(joules) else ""))
    aux = last.get("aux")
    if isinstance(aux, Mapping):
        rows.append(("Auxiliary losses at the end", ", ".join(f"{k} {show(number(last, f'aux.{k}'))}" for k in aux)))
    return [(name, value) for name, value in rows if value]


def ring_picture(run: Run) -> Picture:
    """The ring of the pool with each layer's window."""
    title, topology, stages = "The pool and who sees it", run.topology(), run.layer_to_stage()
    if topology is None or len(stages) != topology.layers:
        return Picture(title, "The configuration gives no pool to draw.")
    caption = "The pool's experts as a ring, clockwise from the top. Each arc is a layer's window, the first outermost"
    if len(set(stages)) > 1:
        caption += ", coloured by pipeline stage; experts that several stages share have the colour of the text"
    placement = _placement(run)
    figure = draw_ring(topology, stages, placement)
    return figures.picture(title, caption + ".", describe_ring(topology, stages, placement), figure, "ring")


def _placement(run: Run) -> Placement | None:
    """Where the run's experts live at its start, as its configuration plans it; None for one stage or broken files."""
    try:
        config = load_config(str(run.folder / "config.yaml"), [])
        mesh = build_mesh(run.world_size or 0, config.parallel)
        return place_pool(config, mesh, measured_use(config)) if mesh.pipeline > 1 else None
    except (ConfigError, ValueError, OSError):
        return None


def grid(run: Run) -> str:
    """The rank grid in short, such as "TP1 EP2 PP2 DP2": from run.json, else from the configuration."""
    given = run.facts.get("grid")
    short = {"tensor": "TP", "expert": "EP", "pipeline": "PP", "data": "DP"}
    if isinstance(given, Mapping):
        degrees = {kind: given.get(kind) for kind in short}
        if isinstance(given.get("virtual_stages"), int) and given["virtual_stages"] > 1:
            short["virtual_stages"], degrees["virtual_stages"] = "VP", given["virtual_stages"]
        return " ".join(f"{short[kind]}{degree}" for kind, degree in degrees.items() if isinstance(degree, int))
    if not run.config:
        return ""
    kinds = ("tensor", "expert", "pipeline")
    return " ".join(f"{short[kind]}{run.option(f'parallel.{kind}_parallel')}" for kind in kinds)


def parameters(run: Run) -> str:
    """Parameters total and activated, such as "6.92 billion, 1.28 billion activated per token"; empty if unknown."""
    total, activated = number(run.facts, "parameters.total"), number(run.facts, "parameters.activated")
    words = [_count(total)] if math.isfinite(total) else []
    words += [f"{_count(activated)} activated per token"] if math.isfinite(activated) else []
    return ", ".join(words)


def peak_memory(run: Run) -> float:
    """The largest memory of any step, GiB; NaN where none was recorded."""
    values = [v for v in run.series("memory_gib")[1] if math.isfinite(v)]
    return max(values, default=math.nan)


def _not_finite(run: Run) -> list[str]:
    """A sentence where the loss was NaN or infinite at some step."""
    steps = [number(line, "step") for line in run.train if not math.isfinite(number(line, "loss"))]
    if not steps:
        return []
    return [f"The training loss was not finite at {len(steps)} of {len(run.train)} steps, first at step {steps[0]:g}."]


def _count(value: float) -> str:
    for size, name in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if value >= size:
            return f"{value / size:.3g} {name}"
    return f"{value:,.0f}"


def _model(run: Run) -> str:
    o = run.option
    dense = f" ({o('model.dense_layers')} of them dense)" if o("model.dense_layers") else ""
    return f"{o('model.layers')} layers{dense}, hidden size {o('model.hidden_size')}, {o('model.heads')} heads"


def _pool(run: Run) -> str:
    topology, o = run.topology(), run.option
    text = f"{o('moe.pool')} experts of width {o('moe.expert_width')}, {o('moe.topology')} topology"
    if topology is None:
        return text
    text += f", each layer sees {topology.window}"
    return text + (f", stride {o('moe.stride')}" if o("moe.topology") == "rotational" else "")


def on_cpu(run: Run) -> bool:
    return run.option("train.device") == "cpu" or "cpu" in run.device.lower()


def _word(run: Run) -> str:
    return rank_word("cpu" if on_cpu(run) else "cuda")


def _lead(run: Run) -> str:
    if not run.config:
        return f"A training run on {run.device}"
    return f"{_pool(run)}; {grid(run)} on {run.device}"


def _yaml(config: dict[str, Any]) -> str:
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True) if config else ""
