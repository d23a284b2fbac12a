"""The packages keep the order of rooms, without circles, and their sizes; and the checks would find it otherwise."""

from __future__ import annotations

import ast
import re

import pytest

from tests.cpu.project.rooms import (
    MOST_ENTRIES,
    MOST_LINES,
    ROOMS,
    ROOT,
    TOP,
    circles,
    false_lightness,
    texts,
    too_large,
    wrong_ways,
)

PLACE = re.compile(r"(LOCAL_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)|(SLURM|OMPI|PMI|MPI)_\w+")  # environment variables


@pytest.mark.parametrize("top", TOP)
def test_imports_go_one_way(top: str) -> None:
    mine = {path: text for path, text in texts().items() if path.startswith(top + "/")}
    assert mine, top
    wrong = [fault for path, text in mine.items() for fault in wrong_ways(path, text)]
    assert not wrong, "\n".join(wrong)


def test_no_file_imports_itself_by_a_round() -> None:
    assert not circles(texts())


def test_what_says_that_it_is_free_of_torch_is() -> None:
    wrong = false_lightness(texts())
    assert not wrong, "\n".join(wrong)


def test_files_and_folders_keep_their_size() -> None:
    wrong = too_large(texts())
    assert not wrong, "\n".join(wrong)


def test_the_rooms_are_these() -> None:
    folders = {path.name for path in (ROOT / "moue_dist").iterdir() if path.is_dir() and path.name[0] not in "._"}
    linked = ("parallel", "kernels", "launchers", "configs", "slurm")
    assert folders == {*ROOMS, *linked}
    for name in linked:
        link = ROOT / "moue_dist" / name
        assert link.is_symlink() and link.resolve() == ROOT / name
        assert not (ROOT / name / "__init__.py").exists()


def test_only_one_file_reads_where_a_process_stands() -> None:
    readers = []
    for name, text in texts().items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and PLACE.fullmatch(node.value):
                readers.append((name, node.value))
    assert {name for name, _ in readers} == {"launchers/env.py"}, readers
    assert len(set(readers)) > 15  # the pattern finds them


def test_what_trains_leans_on_no_stand_in_of_a_gpu() -> None:
    """cpu_host answers megatron-core's calls of torch.cuda; ours go through parallel/device.py, or say 'cuda' first."""
    rooms = ("model", "checkpoint", "training", "bench")
    mine = {path: text for path, text in texts().items() if path.startswith(tuple(f"moue_dist/{r}/" for r in rooms))}
    found = {path for path, text in mine.items() if "torch.cuda." in text}
    assert found == {"moue_dist/training/run.py", "moue_dist/bench/timing/contest.py"}


# The checks, on inputs that they must and must not object to


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("kernels/a.py", "import moue_dist.parallel.mesh"),
        ("kernels/a.py", "from moue_dist import planning"),
        ("parallel/a.py", "def f():\n    from moue_dist.model.moe import MoELayer"),
        ("parallel/a.py", "from moue_dist import launchers"),
        ("parallel/a.py", "from kernels import permute"),
        ("moue_dist/training/step.py", "from moue_dist.launchers.local import launch"),
        ("moue_dist/training/step.py", "from moue_dist.report.html import show"),
        ("moue_dist/training/step.py", "if TYPE_CHECKING:\n    from moue_dist.bench.run import run"),
        ("moue_dist/planning/memory/peak.py", "from moue_dist import model"),
        ("moue_dist/measuring/a.py", "import moue_dist.refusals.validate"),
        ("moue_dist/config/a.py", "from moue_dist.kernels.sizes import check_sizes"),
        ("moue_dist/report/a.py", "from tests.reference import Reference"),
    ],
)
def test_a_wrong_way_is_found(path: str, text: str) -> None:
    assert wrong_ways(path, text)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("kernels/a.py", "from moue_dist.config import ConfigError\nimport torch"),
        ("launchers/a.py", "from moue_dist.cli import main\nfrom moue_dist.launchers.env import export"),
        ("moue_dist/cli/a.py", "from moue_dist.launchers.env import read_env"),
        ("moue_dist/__main__.py", "from moue_dist.cli import main"),
        (
            "moue_dist/planning/memory/peak.py",
            "from moue_dist.planning import flops\nimport moue_dist.refusals.a",
        ),
        ("moue_dist/bench/a.py", "from moue_dist.training.run import run\nfrom moue_dist.parallel import mesh"),
    ],
)
def test_a_right_way_is_not(path: str, text: str) -> None:
    assert wrong_ways(path, text) == []


A, B, C = (f"moue_dist/model/{name}.py" for name in "abc")


@pytest.mark.parametrize(
    ("files", "rings"),
    [
        ({A: "import moue_dist.model.b", B: "import moue_dist.model.c", C: ""}, []),
        ({A: "import moue_dist.model.b", B: "def f():\n    from moue_dist.model.a import g", C: ""}, [{A, B}]),
        ({A: "from moue_dist.model import b", B: "import moue_dist.model.c.d", C: "", "x.py": ""}, []),
        (
            {
                A: "from moue_dist.model import b",
                B: "if TYPE_CHECKING:\n    from moue_dist.model.c import g",
                C: "from moue_dist.model.a import h",
            },
            [{A, B, C}],
        ),
        ({"kernels/a.py": "import moue_dist.kernels.b", "kernels/b.py": "from moue_dist.kernels.a import f"}, 1),
    ],
)
def test_a_circle_is_found(files: dict[str, str], rings: list[set[str]] | int) -> None:
    assert circles(files) == rings or len(circles(files)) == rings


@pytest.mark.parametrize(
    ("files", "wrong"),
    [
        ({A: '"""Free of torch."""\nimport moue_dist.model.b', B: "def f():\n    import torch"}, False),
        ({A: '"""Free of torch."""\nimport moue_dist.model.b', B: "import torch.nn"}, True),
        ({A: '"""Free of torch."""\nif TYPE_CHECKING:\n    import torch', B: "import torch"}, False),
        ({A: "import torch", "moue_dist/model/__init__.py": '"""All free of\ntorch."""'}, True),
        (
            {A: '"""Free of torch."""', "moue_dist/model/__init__.py": "import torch"},
            True,
        ),
        (
            {
                A: '"""Free of torch."""\nimport moue_dist.data.b',
                "moue_dist/data/b.py": "",
                "moue_dist/data/__init__.py": "from megatron import core",
            },
            True,
        ),
    ],
)
def test_a_heavy_import_is_found(files: dict[str, str], wrong: bool) -> None:
    assert bool(false_lightness(files)) == wrong


def test_what_is_too_large_is_found() -> None:
    full = {f"parallel/pool/{n}.py": "" for n in range(MOST_ENTRIES)} | {"parallel/pool/__init__.py": ""}
    assert too_large(full | {A: "x\n" * MOST_LINES}) == []
    assert too_large(full | {"parallel/pool/deep/a.py": ""}) == ["parallel/pool/ has 11 entries"]
    assert too_large({A: "x\n" * (MOST_LINES + 1)}) == [f"{A} has {MOST_LINES + 1} lines"]
