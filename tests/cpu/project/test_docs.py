"""The documents: links, paths, names, options and command lines in them are those of this repository."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import tomllib
import typing
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

from moue_dist.cli.main import _parser
from moue_dist.cli.report import build_parser
from moue_dist.config import ConfigError
from moue_dist.config.load import all_keys, load_config
from moue_dist.config.shipped import find_config, shipped_names
from tests.ranks.spawn import ROOT

DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").rglob("*.md")])
HOSTS = {"arxiv.org", "github.com"}  # what a document may link to
WRITTEN_BY_RUNS = ("runs/", "checkpoints/", "tensorboard/", "reports/")
ROOMS = (
    *("moue_dist/", "parallel/", "kernels/", "launchers/", "slurm/", "configs/"),
    *("tests/", "benchmarks/", "docs/"),
)
SUFFIXES = (".py", ".md", ".yaml", ".sh", ".toml", ".svg")
SECTIONS = sorted({key.split(".")[0] for key in all_keys() if "." in key})

Check = Callable[[str, Path], list[str]]


# Parts of a Markdown text


def fences(text: str) -> list[str]:
    """The contents of fenced blocks, continued lines joined."""
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", text, re.M | re.S)
    return [re.sub(r"\\\n\s*", "", block) for block in blocks]


def prose(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


def spans(text: str) -> list[str]:
    """Inline code. A span may run over the end of a line."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(text))]


def headings(text: str) -> set[str]:
    """The anchors that GitHub gives to headings."""
    titles = re.findall(r"^#+ +(.+)$", prose(text), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def figures(text: str) -> list[list[str]]:
    """The cells of every row of every table of figures."""
    tables = re.findall(r"^\| figure \| machine \| date \| record \|\n\|[-|]+\|\n((?:\|.*\n)*)", text, re.M)
    return [[cell.strip() for cell in row.strip("| ").split("|")] for table in tables for row in table.splitlines()]


# What may be wrong in one


def broken_links(text: str, path: Path) -> list[str]:
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
        if re.match(r"https?://", target):
            continue
        file, _, anchor = target.partition("#")
        other = (path.parent / file).resolve() if file else path
        if not other.exists() or not other.is_relative_to(ROOT):
            wrong.append(f"link to {target}: no such file")
        elif anchor and anchor not in headings(text if other == path else other.read_text()):
            wrong.append(f"link to {target}: no such heading")
    return wrong


def missing_paths(text: str, path: Path) -> list[str]:
    """Words in inline code and in commands that look like paths of the repository and are none."""
    words = [word for code in (*spans(text), *"\n".join(fences(text)).splitlines()) for word in code.split()]
    wrong = []
    for word in words:
        word = word.strip("'\",:").removeprefix("CONFIG=")
        if "/" not in word or not re.fullmatch(r"[\w.][\w.\-*/]*", word) or word.startswith(WRITTEN_BY_RUNS):
            continue
        written = re.search(r"--output$", _before(text, word))  # a command's result need not be there yet
        if (word.startswith(ROOMS) or word.endswith(SUFFIXES)) and not written and not any(ROOT.glob(word.rstrip("/"))):
            wrong.append(f"{word}: no such file or folder")
    return wrong


def _before(text: str, word: str) -> str:
    return re.sub(r"\\\n\s*", "", text)[: re.sub(r"\\\n\s*", "", text).find(word)].rstrip()


def missing_modules(text: str, path: Path) -> list[str]:
    """Dotted names such as moue_dist.parallel.mesh that lead to no module, or to a module without that name."""
    wrong = []
    for dotted in set(re.findall(r"\bmoue_dist(?:\.\w+)+", text)):
        at, names = ROOT, dotted.removesuffix(".__file__").split(".")
        while names and (at / names[0]).is_dir():
            at /= names.pop(0)
        if names and (at / f"{names[0]}.py").is_file():
            at /= f"{names.pop(0)}.py"
            if all(re.search(rf"\b{name}\b", at.read_text()) for name in names):
                continue
        if names:
            wrong.append(f"{dotted}: no such module or name")
    return wrong


def bad_options(text: str, path: Path) -> list[str]:
    """Inline `section.option`, `section.option=value` or `section.option: value` that the configuration lacks."""
    keys, wrong = all_keys(), []
    for code in spans(text):
        found = re.match(rf"((?:{'|'.join(SECTIONS)})\.(\w+))(?:(?:=|: ?)([\w.]+))?", code)
        if not found or found.group(2) == "py":
            continue
        key, value = found.group(1), found.group(3)
        if key not in keys:
            wrong.append(f"{code}: no such option")
        elif value and typing.get_origin(keys[key]) is typing.Literal and value not in typing.get_args(keys[key]):
            wrong.append(f"{code}: no such value")
    return wrong


def commands(text: str) -> Iterator[list[str]]:
    """Every command line, in fenced blocks and in inline code, as words."""
    programs = ("moue", "make", "sbatch", "torchrun", "mpirun", "srun", "python")
    for line in (*"\n".join(fences(text)).splitlines(), *spans(text)):
        line = line.strip().removeprefix("$ ").removeprefix(".venv/bin/")
        if line.split(" ")[0] in programs:
            with contextlib.suppress(ValueError):  # no shell line: a quote that is an apostrophe
                yield shlex.split(line, comments=True)


def bad_commands(text: str, path: Path) -> list[str]:
    wrong = []
    for words in commands(text):
        fault = _fault(words)
        if fault:
            wrong.append(f"{shlex.join(words)}: {fault}")
    return wrong


def _fault(words: list[str]) -> str | None:
    """Why a command line would not run; None for a good one and for what is not ours."""
    program, rest = words[0], words[1:]
    if program == "make":
        targets = [word for word in rest if "=" not in word]
        known = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
        config = next((word[7:] for word in rest if word.startswith("CONFIG=")), "configs/tiny.yaml")
        options = next((word[5:] for word in rest if word.startswith("ARGS=")), "") if "train" in targets else ""
        unknown = [target for target in targets if target not in known]
        return f"no such target {unknown[0]}" if unknown else _refused(config, shlex.split(options))
    if program == "sbatch":
        at = next((i for i, word in enumerate(rest) if word.endswith(".sh")), None)
        if at is None:
            return None if not rest else "names no script"
        if not (ROOT / rest[at]).is_file():
            return f"no script {rest[at]}"
        default = re.search(r"MOUE_CONFIG:-([\w./]+)", (ROOT / rest[at]).read_text())
        return _refused(default.group(1), rest[at + 1 :]) if default else None
    if "-m" in rest:
        module, *rest = rest[rest.index("-m") + 1 :]
        if module not in ("moue_dist", "moue_dist.launchers.mpi"):
            return None
    elif program != "moue":
        return None
    return _moue_fault(rest)


def _moue_fault(words: list[str]) -> str | None:
    """Why `moue WORDS` would not run. A word in capitals or dots stands for what the reader puts in."""
    if not words or words == ["options"]:
        return None
    if any(re.fullmatch(r"[A-Z]+(\.\.\.)?|\.\.\.|\[.*", word) for word in words):
        words = words[:1]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            if words[:1] == ["report"]:
                build_parser().parse_args(words[1:] or ["runs/some"])
                return None
            if all(word.isalpha() for word in words):  # the command's name alone
                words = [*words, "--help"]  # which ends in 0 for a command that there is
            known, overrides = _parser().parse_known_args(words)
    except SystemExit as stop:
        return (said.getvalue().strip().splitlines() or [""])[-1] if stop.code else None
    if words and "run" not in known:
        return "no such command"
    return _refused(known.config, overrides) if "config" in known else None


def _refused(config: str, overrides: list[str]) -> str | None:
    try:
        load_config(find_config(config, ROOT), overrides)
    except ConfigError as error:
        return str(error)
    return None


def bad_words(text: str, path: Path) -> list[str]:
    """Places on somebody's machine, hosts that are no reference, and words that belong to no document."""
    wrong = [f"{found}: a path of one machine" for found in re.findall(r"(?<![\w.\])])/(?:\w+)/[\w./]*", text)]
    hosts = re.findall(r"\b(?:[\w-]+\.)+(?:org|com|io|net|co|ai)\b", text)
    wrong += [f"{host}: a host beside {', '.join(sorted(HOSTS))}" for host in hosts if host not in HOSTS]
    wrong += [
        f"{word}: not a word of this project" for word in re.findall(r"(?i)\b(?:sessions?|todo|fixme|tbd)\b", text)
    ]
    return wrong


def bad_figures(text: str, path: Path) -> list[str]:
    """Rows of tables of figures that their record does not bear out: machine, date, or a number in it."""
    rows, wrong = figures(text), []
    for row in rows:
        link = re.fullmatch(r"\[\w+\]\(((?:\.\./)?benchmarks/results/[\w.\-]+\.json)\)", row[-1])
        record = (path.parent / link.group(1)).resolve() if link else path.parent
        if len(row) != 4 or not record.is_file():
            wrong.append(f"no record behind the figure {row}")
            continue
        run = json.loads(record.read_text())["runs"][-1]
        figure, machine, date, _ = row
        if date != run["date"][:10] or not run["command"].startswith("moue bench "):
            wrong.append(f"{date}: the record has {run['date']}, {run['command']}")
        if machine != f"{run['machine']['gpus']} x {run['machine']['gpu'].removeprefix('NVIDIA ')}":
            wrong.append(f"{machine}: the record has {run['machine']['gpu']}")
        known = list(numbers(run))
        for number in re.findall(r"(?<![\w.,])\d[\d,]*(?:\.\d+)?(?![\w.]*\d)", figure):
            digits = len(number.partition(".")[2])
            value = float(number.replace(",", ""))
            if (digits or value >= 100) and all(round(x, digits) != value for x in known):
                wrong.append(f"{number}: not in {record.name}: {figure}")
    return wrong


def numbers(run: dict[str, typing.Any]) -> Iterator[float]:
    """Every number of a run: those of its parts and configuration, their ratios, tokens of a step."""

    def leaves(value: object) -> Iterator[float]:
        if isinstance(value, dict | list):
            for item in value.values() if isinstance(value, dict) else value:
                yield from leaves(item)
        elif isinstance(value, int | float):
            yield value

    yield from leaves([run["parts"], run["config"], run["ratio"]])
    yield run["config"]["train"]["global_batch_size"] * run["config"]["model"]["sequence_length"]
    times = [part["step_ms"] for part in run["parts"].values()]
    yield from (time / times[0] for time in times)


CHECKS: tuple[Check, ...] = (broken_links, missing_paths, missing_modules, bad_options, bad_commands, bad_words)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_documents_say_what_is_there(path: Path, check: Check) -> None:
    assert not check(path.read_text(), path)


@pytest.mark.parametrize(("name", "least", "most"), [("README.md", 1, 6), ("docs/figures.md", 16, 1000)])
def test_figures_have_records(name: str, least: int, most: int) -> None:
    path = ROOT / name
    assert least <= len(figures(path.read_text())) <= most
    assert not bad_figures(path.read_text(), path)


def test_every_record_has_a_figure() -> None:
    text = (ROOT / "docs" / "figures.md").read_text()
    assert {path.name for path in (ROOT / "benchmarks" / "results").glob("*.json")} == set(
        re.findall(r"benchmarks/results/([\w.]+)", text)
    )


def test_the_documents_are_there() -> None:
    names = {str(path.relative_to(ROOT)) for path in DOCUMENTS}
    assert names >= {
        *("README.md", "CONTRIBUTING.md", "benchmarks/README.md"),
        *("docs/architecture.md", "docs/math.md", "docs/log.md", "docs/figures.md", "docs/others.md"),
    }


def test_the_readme_shows_the_ways_to_start() -> None:
    lines = [" ".join(words) for words in commands((ROOT / "README.md").read_text())]
    for wanted in (
        *("make train", "make test", "moue plan *", "moue report runs/tiny", "moue bench step *"),
        "torchrun --nproc-per-node 4 -m moue_dist train configs/tiny.yaml",
        *("sbatch slurm/moue_7b.sh", "sbatch slurm/debug.sh"),
    ):
        assert any(fnmatch(line, wanted) for line in lines), wanted


def test_the_readme_names_every_configuration_and_room() -> None:
    text = (ROOT / "README.md").read_text()
    for name in (*shipped_names(), *ROOMS):
        assert f"`{name}`" in text, name


def test_licence_and_versions_are_those_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    assert project.get("license", "Apache-2.0") == "Apache-2.0"
    text = (ROOT / "README.md").read_text()
    pinned = dict(re.findall(r"^([\w-]+)(.*)$", "\n".join(project["dependencies"]), re.M))
    assert f"megatron-core {pinned['megatron-core'].removeprefix('==')}" in text
    low, high = re.findall(r"2\.(\d+)", pinned["torch"])
    assert f"torch 2.{low} to 2.{int(high) - 1}" in text
    assert all(f"'.[{extra}]'" in text for extra in project["optional-dependencies"])


TABLE = "| figure | machine | date | record |\n|---|---|---|---|\n"
RECORD = "[record](benchmarks/results/moue7b_ep2_bf16.json)"
BAD_ROWS = (
    "| 29,971 | 2 x H200 | 2026-11-23 | [record](benchmarks/results/gone.json) |\n",
    "| 29,971 | 2 x H200 | 2026-11-23 | `moue bench step` |\n",
    f"| 29,971 | 2 x H200 | 2026-11-24 | {RECORD} |\n",
    f"| 29,971 | 8 x H200 | 2026-11-23 | {RECORD} |\n",
    f"| 29,972 | 2 x H200 | 2026-11-23 | {RECORD} |\n",
    f"| EP2: 29,971; 80.5 GiB | 2 x H200 | 2026-11-23 | {RECORD} |\n",
)


@pytest.mark.parametrize(
    ("check", "text"),
    [
        (broken_links, "[x](docs/gone.md)"),
        (broken_links, "[x](README.md#no-such-heading)"),
        (broken_links, "[x](../outside.md)"),
        (missing_paths, "`parallel/gone.py`"),
        (missing_paths, "`gone/away.yaml`"),
        (missing_paths, "`kernels/*_gone.py`"),
        (missing_paths, "```\npytest tests/gone\n```"),
        (missing_modules, "`moue_dist.parallel.gone`"),
        (missing_modules, "`moue_dist.config.Gone`"),
        (bad_options, "`parallel.gone`"),
        (bad_options, "`parallel.recompute=gone`"),
        (bad_options, "`moe.score: gone`"),
        (bad_commands, "`moue gone`"),
        (bad_commands, "`moue train configs/gone.yaml`"),
        (bad_commands, "```bash\nmoue train configs/tiny.yaml --train.gone 1\n```"),
        (bad_commands, "```\nmoue plan configs/tiny.yaml \\\n    --world none\n```"),
        (bad_commands, "`moue report runs/tiny --gone`"),
        (bad_commands, "`moue bench gone configs/tiny.yaml`"),
        (bad_commands, "`torchrun --nproc-per-node 4 -m moue_dist train configs/tiny.yaml --train.steps few`"),
        (bad_commands, "`sbatch slurm/gone.sh`"),
        (bad_commands, "`sbatch slurm/debug.sh --train.gone 1`"),
        (bad_commands, "`make gone`"),
        (bad_commands, '`make train ARGS="--train.gone 1"`'),
        (bad_words, "in /somewhere/else/file"),
        (bad_words, "from packages.example.org"),
        (bad_words, "TODO"),
        *((bad_figures, TABLE + row) for row in BAD_ROWS),
    ],
)
def test_the_checks_find_what_they_should(check: Check, text: str) -> None:
    assert check(text, ROOT / "README.md")


def test_a_good_row_is_none() -> None:
    row = f"| EP2: 29,971 tokens/s/GPU; loss 11.103 to 2.700; 80.4 GiB | 2 x H200 | 2026-11-23 | {RECORD} |\n"
    assert len(figures(TABLE + row)) == 1 and not bad_figures(TABLE + row, ROOT / "README.md")
