"""Imports go one way: launchers -> moue_dist -> parallel -> kernels. Only the entry point picks a launcher."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("launchers", "moue_dist", "parallel", "kernels")  # a room imports only from itself and from later ones
LEAVES = ("moue_dist.config",)  # plain data, free for all
ENTRY = ("moue_dist/cli/", "moue_dist/__main__.py")
PLACE = re.compile(r"(LOCAL_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)|(SLURM|OMPI|PMI|MPI)_\w+")  # environment variables


def files(room: str) -> list[Path]:
    found = sorted((ROOT / room).rglob("*.py"))
    return [f for f in found if not (room == "moue_dist" and f.relative_to(ROOT).parts[1] in ROOMS)]


def room_of(module: str) -> str | None:
    parts = module.split(".")
    if parts[0] != "moue_dist":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else "moue_dist"


def imports(tree: ast.Module) -> list[tuple[int, str]]:
    """Every imported module with its line, also those inside functions and those only for type checkers."""
    found: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            for alias in node.names:  # `from moue_dist.parallel import mesh` means the module below, too
                found.append((node.lineno, f"{node.module}.{alias.name}"))
    return found


def is_part_of(module: str, names: tuple[str, ...]) -> bool:
    return any(module == name or module.startswith(name + ".") for name in names)


def faults(path: str, text: str) -> list[str]:
    """What in this file goes against the order of the rooms."""
    room = Path(path).parts[0]
    wrong = []
    for line, module in imports(ast.parse(text)):
        other = room_of(module)
        if module.split(".")[0] in ("parallel", "kernels", "launchers", "tests"):
            wrong.append(f"{path}:{line} imports {module}; say moue_dist.{module}")
        elif other is None or path.startswith(ENTRY) or is_part_of(module, LEAVES):
            continue
        elif ROOMS.index(other) < ROOMS.index(room):
            wrong.append(f"{path}:{line} imports {module}: {room} stands below {other}")
    return wrong


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_one_way(room: str) -> None:
    assert files(room), room
    wrong = [fault for f in files(room) for fault in faults(str(f.relative_to(ROOT)), f.read_text())]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("kernels/a.py", "import moue_dist.parallel.mesh"),
        ("parallel/a.py", "def f():\n    from moue_dist.model.moe import MoELayer"),
        ("parallel/a.py", "from moue_dist import launchers"),
        ("moue_dist/training/step.py", "from moue_dist.launchers.local import launch"),
        ("parallel/a.py", "from kernels import permute"),
    ],
)
def test_the_check_finds_what_it_should(path: str, text: str) -> None:
    assert faults(path, text)


def test_only_one_file_reads_where_a_process_stands() -> None:
    readers = []
    for path in (f for room in ROOMS for f in files(room)):
        name = str(path.relative_to(ROOT))
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and PLACE.fullmatch(node.value):
                readers.append((name, node.value))
    assert {name for name, _ in readers} == {"launchers/env.py"}, readers
    assert len(set(readers)) > 15  # the pattern finds them


def test_the_three_rooms_are_symlinks_without_init() -> None:
    for room in ("parallel", "kernels", "launchers"):
        link = ROOT / "moue_dist" / room
        assert link.is_symlink() and link.resolve() == ROOT / room
        assert not (ROOT / room / "__init__.py").exists()
