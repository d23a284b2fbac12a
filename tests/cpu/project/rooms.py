"""The order of rooms: who may import whom, without circles; how large a file and a folder may be.

An import inside a function or for type checkers alone counts, too: it is knowledge of another file.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[3]
TOP = ("launchers", "moue_dist", "parallel", "kernels")  # each imports only from itself and from later ones
ROOMS = (  # of moue_dist: each imports only from itself and from earlier ones
    *("config", "measuring", "refusals", "planning", "model", "data"),
    *("checkpoint", "interchange", "training", "report", "bench", "cli"),
)
FREE = "moue_dist.config"  # plain data, for all
ENTRY = ("moue_dist/cli/", "moue_dist/__main__.py")  # what alone may pick a launcher
MOST_LINES, MOST_ENTRIES = 300, 10
HEAVY = {"torch", "megatron"}

Texts = Mapping[str, str]  # of files, by path from the root


def texts() -> dict[str, str]:
    """Every file of the packages, each once: parallel, kernels and launchers are symlinks in moue_dist."""
    found = {}
    for top in TOP:
        for path in sorted((ROOT / top).rglob("*.py")):
            name = path.relative_to(ROOT)
            if not (top == "moue_dist" and name.parts[1] in TOP):
                found[name.as_posix()] = path.read_text()
    return found


def module_of(path: str) -> str:
    """kernels/experts/mlp.py -> moue_dist.kernels.experts.mlp; an __init__.py is its package."""
    parts = PurePosixPath(path).with_suffix("").parts
    parts = parts if parts[0] == "moue_dist" else ("moue_dist", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def place_of(module: str) -> tuple[str, str | None]:
    """Its top-level room and, in moue_dist, the room there; None for moue_dist's own files."""
    second = module.split(".")[1] if "." in module else None
    if second in TOP:
        return second, None
    return "moue_dist", second if second in ROOMS else None


def imports(text: str, *, when_loaded: bool = False) -> Iterator[tuple[int, str]]:
    """Every imported name with its line; `when_loaded`: only what loading the file imports."""
    for node in _when_loaded(ast.parse(text)) if when_loaded else ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            # `from moue_dist.parallel import mesh` means the module below, too
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def _when_loaded(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        typing_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
        if not typing_only and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from _when_loaded(child)


def is_part_of(module: str, name: str) -> bool:
    return module == name or module.startswith(name + ".")


# What may be wrong


def wrong_ways(path: str, text: str) -> list[str]:
    """Imports of this file that go against the order of rooms."""
    top, room = place_of(module_of(path))
    wrong = []
    for line, module in imports(text):
        if module.split(".")[0] in ("parallel", "kernels", "launchers", "tests"):
            wrong.append(f"{path}:{line} imports {module}; say moue_dist.{module}")
        if module.split(".")[0] != "moue_dist" or path == "moue_dist/__main__.py" or is_part_of(module, FREE):
            continue
        other, other_room = place_of(module)
        if other == "launchers" and top != "launchers":
            if not path.startswith(ENTRY):
                wrong.append(f"{path}:{line} imports {module}: only the command line picks a launcher")
        elif TOP.index(other) < TOP.index(top):
            wrong.append(f"{path}:{line} imports {module}: {top} stands below {other}")
        elif room and other_room and ROOMS.index(other_room) > ROOMS.index(room):
            wrong.append(f"{path}:{line} imports {module}: {room} stands below {other_room}")
        if room == FREE.split(".")[1] and other_room != room:
            wrong.append(f"{path}:{line} imports {module}: {FREE} is free for all and knows nobody")
    return wrong


def files_imported(path: str, files: Texts, *, when_loaded: bool = False) -> set[str]:
    """The files that a file imports, by path; with `when_loaded` those that packages bring along, too."""
    by_module = {module_of(p): p for p in files}
    found: set[str] = packages_of(module_of(path)) if when_loaded else set()
    for _, name in imports(files[path], when_loaded=when_loaded):
        module = name if name in by_module else name.rpartition(".")[0]
        found |= {module, *(packages_of(module) if when_loaded else ())}
    return {by_module[m] for m in found if m in by_module} - {path}


def packages_of(module: str) -> set[str]:
    """a.b.c -> a, a.b: what Python loads before it."""
    parts = module.split(".")
    return {".".join(parts[:n]) for n in range(1, len(parts))}


def circles(files: Texts) -> list[set[str]]:
    """Sets of files that import each other, however long the way."""
    ways = {path: files_imported(path, files) for path in files}
    reach = {path: _reachable(path, ways) for path in files}
    found: list[set[str]] = []
    for path in files:
        ring = {other for other in reach[path] if path in reach[other]}
        if ring and ring not in found:
            found.append(ring)
    return found


def _reachable(start: str, ways: Mapping[str, Collection[str]]) -> set[str]:
    seen: set[str] = set()
    ahead = [start]
    while ahead:
        new = set(ways[ahead.pop()]) - seen
        seen |= new
        ahead += new
    return seen


def false_lightness(files: Texts) -> list[str]:
    """Files that call themselves free of torch, or stand in a package that does, and load it none the less."""
    claims = {path for path, text in files.items() if re.search(r"free of\s+torch", _docstring(text), re.I)}
    claims |= {
        path for path in files for claim in claims if claim.endswith("/__init__.py") and path.startswith(claim[:-11])
    }
    ways = {path: files_imported(path, files, when_loaded=True) for path in files}
    wrong = []
    for path in sorted(claims):
        for other in {path} | _reachable(path, ways):
            heavy = {name for _, name in imports(files[other], when_loaded=True) if name.split(".")[0] in HEAVY}
            wrong += [f"{path} loads {name} through {other}" for name in heavy]
    return wrong


def _docstring(text: str) -> str:
    return ast.get_docstring(ast.parse(text)) or ""


def too_large(files: Texts) -> list[str]:
    """Files of too many lines, and folders of too many entries; moue_dist's own entries are the list of rooms."""
    wrong = [f"{p} has {n} lines" for p, text in files.items() if (n := text.count("\n")) > MOST_LINES]
    entries: dict[str, set[str]] = {}
    for path in files:
        parts = path.split("/")
        for depth in range(1, len(parts)):
            entries.setdefault("/".join(parts[:depth]), set()).add(parts[depth])
    for folder, names in entries.items():
        if folder != "moue_dist" and len(names - {"__init__.py"}) > MOST_ENTRIES:
            wrong.append(f"{folder}/ has {len(names - {'__init__.py'})} entries")
    return wrong
