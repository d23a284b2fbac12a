"""`make rooms`: reads which room imports which from the code, and draws docs/rooms.svg.

A room is a folder below moue_dist/, or one of launchers/, parallel/ and kernels/; a room with rooms of its own has them
drawn inside, and a file beside those as a small room. Imports are those of the source (also inside functions and for
type checkers only). An arrow that a path of other arrows implies is left out. Lines are counted in hundreds, so that
the picture does not change with every commit.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from tests.cpu.project.rooms import ROOT, TOP, Texts, imports, module_of, texts
from tests.layers import Box, draw, stack

PICTURE = ROOT / "docs" / "rooms.svg"
COLOURS = {"launchers": "#e2e0f5", "moue_dist": "#d3e5f8", "parallel": "#d5efdc", "kernels": "#fbe3c8"}
INNER = {"parallel": "#f0faf2", "kernels": "#fef5ea"}


@dataclass
class Room:
    """Files of a room, the rooms inside it, and how many imports lead from one of those to another."""

    top: str
    files: int = 0
    inside: dict[str, Room] = field(default_factory=dict)
    imports: Counter[tuple[str, str]] = field(default_factory=Counter)


def place(module: str) -> tuple[str, str | None] | None:
    """(room, room inside it) of a module; None for the package's own. A kernel's Triton file is with its reference."""
    parts = module.split(".")[1:]
    if not parts or parts[0] == "__main__":
        return None
    return parts[0], parts[1].removesuffix("_triton") if parts[0] in INNER else None


def read_rooms(files: Texts) -> Room:
    """The house: a room whose `inside` are all rooms."""
    house, known = Room(""), {module_of(path) for path in files}
    for path, text in files.items():
        if (here := place(module_of(path))) is None:
            continue
        name, inner = here
        room = house.inside.setdefault(name, Room(name if name in TOP else "moue_dist"))
        room.files += 1
        if inner:
            room.inside.setdefault(inner, Room(room.top)).files += 1
        for _, other in imports(text):
            module = other if other in known else other.rpartition(".")[0]
            if module not in known or (there := place(module)) is None:
                continue
            if there[0] != name:
                house.imports[name, there[0]] += 1
            elif inner and there[1] and inner != there[1]:
                room.imports[inner, there[1]] += 1
    return house


def against(house: Room) -> set[tuple[str, str]]:
    """Imports from a lower top room into a higher one, such as the command line's choice of a launcher."""
    tops = {name: TOP.index(room.top) for name, room in house.inside.items()}
    return {(a, b) for a, b in house.imports if b != "config" and tops[a] > tops[b]}


def box(name: str, room: Room, fill: str) -> Box:
    text = f"{room.files} files" if room.files > 1 else ""
    if not room.inside:
        return Box(name, text, fill)
    inside = {inner: box(inner, its, INNER[room.top]) for inner, its in room.inside.items()}
    return Box(name, text, fill, stack(inside, room.imports, gap=24))


def picture(house: Room) -> str:
    """The SVG's text."""
    boxes = {name: box(name, room, COLOURS[room.top]) for name, room in house.inside.items()}
    legend = {COLOURS[top]: "rooms of moue_dist/" if top == "moue_dist" else f"{top}/" for top in TOP}
    return draw(stack(boxes, house.imports, gap=34, against=against(house)), legend)


def main() -> None:
    PICTURE.write_text(picture(read_rooms(texts())), encoding="utf-8")
    print(f"written: {PICTURE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
