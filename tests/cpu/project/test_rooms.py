"""docs/rooms.svg is what the code says, and no picture that its layout draws is a muddle."""

from __future__ import annotations

import random
import re
import xml.etree.ElementTree as ET
from itertools import combinations, pairwise

import pytest

from tests.cpu.project.rooms import ROOMS, texts
from tests.draw_rooms import PICTURE, ROOT, against, picture, read_rooms
from tests.layers import Box, Diagram, acyclic, reduced, stack

HOUSE = read_rooms(texts())


def test_the_picture_is_that_of_the_code() -> None:
    assert PICTURE.read_text(encoding="utf-8") == picture(HOUSE), "the rooms have changed: run make rooms"


def described() -> dict[str, str]:
    """The rooms of the table in docs/architecture.md, from the top down, with what they may import."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = re.search(r"^## Rooms\n(.*?)^## ", text, re.M | re.S)
    assert section and "](rooms.svg)" in section.group(1)
    rows = re.findall(r"^\| `(?:moue_dist/)?(\w+)/` \| .* \| (.*) \|$", section.group(1), re.M)
    assert len(rows) == len(dict(rows))
    return dict(rows)


def allowed(room: str, rooms: dict[str, str]) -> set[str]:
    """What the words `all below`, `x and below`, `x, y` and `nothing` allow."""
    below, found = list(rooms)[list(rooms).index(room) + 1 :], set[str]()
    for words in rooms[room].split(", "):
        if words == "all below":
            found |= set(below)
        elif words.endswith(" and below"):
            found |= set(below[below.index(words.removesuffix(" and below")) :])
        elif words != "nothing":
            assert words in rooms, words
            found.add(words)
    return found


def test_every_room_is_described_and_imports_what_it_may() -> None:
    rooms = described()
    assert set(rooms) == set(HOUSE.inside)
    assert not [(a, b) for a, b in HOUSE.imports if b not in allowed(a, rooms)]
    assert [room for room in rooms if room in ROOMS] == [*reversed(ROOMS[1:]), ROOMS[0]]
    lower = {(a, b) for a in rooms for b in allowed(a, rooms) if list(rooms).index(b) < list(rooms).index(a)}
    assert lower == {("cli", "launchers")}


def test_what_a_room_may_import_is_read() -> None:
    rooms = {"a": "all below", "b": "d and below, a", "c": "e", "d": "nothing", "e": "nothing"}
    assert [allowed(room, rooms) for room in rooms] == [{"b", "c", "d", "e"}, {"d", "e", "a"}, {"e"}, set(), set()]


def test_it_is_a_picture_of_all_rooms() -> None:
    drawn = [element.text for element in ET.fromstring(picture(HOUSE)).iter() if element.tag.endswith("text")]
    inner = [name for room in HOUSE.inside.values() for name in room.inside]
    assert {*HOUSE.inside, *inner, "launchers/", "kernels/"} <= set(drawn)


def test_rooms_are_read_from_the_imports() -> None:
    house = read_rooms(
        {
            "launchers/local.py": "from moue_dist.cli.main import main\n",
            "moue_dist/__main__.py": "from moue_dist.cli import main\n",
            "moue_dist/cli/__init__.py": "from moue_dist.cli.main import main\n",
            "moue_dist/cli/main.py": "def main():\n    from moue_dist.launchers import local\n"
            "    import moue_dist.model.moe\n",
            "moue_dist/model/moe.py": "import json\nfrom moue_dist.parallel.pool import rows\n"
            "from moue_dist.model import x\n",
            "moue_dist/model/x.py": "from moue_dist.kernels.experts.mlp import experts\n",
            "parallel/pool/rows.py": "from moue_dist.parallel.mesh import Mesh, ranks\n",
            "parallel/mesh.py": "",
            "kernels/experts/mlp.py": "",
            "kernels/swiglu.py": "",
            "kernels/swiglu_triton.py": "",
        }
    )
    assert set(house.imports) == {
        *(("launchers", "cli"), ("cli", "launchers"), ("cli", "model"), ("model", "parallel"), ("model", "kernels")),
    }
    assert against(house) == {("cli", "launchers")}
    assert (house.inside["model"].files, house.inside["model"].inside) == (2, {})
    assert house.inside["parallel"].imports == {("pool", "mesh"): 2}
    assert {name: room.files for name, room in house.inside["kernels"].inside.items()} == {"experts": 1, "swiglu": 2}


def test_arrows_that_others_imply_are_left_out() -> None:
    assert reduced({("a", "b"), ("b", "c"), ("a", "c"), ("a", "d")}) == {("a", "b"), ("b", "c"), ("a", "d")}


def test_a_circle_is_cut_at_its_lightest_arrow_and_shown() -> None:
    imports = {("a", "b"): 3, ("b", "c"): 2, ("c", "a"): 1, ("c", "d"): 1}
    assert acyclic(imports, ()) == ({("a", "b"), ("b", "c"), ("c", "d")}, {("c", "a")})
    kinds = [kind for _, kind in stack({n: Box(n, "", "") for n in "abcd"}, imports, gap=40).arrows]
    assert sorted(kinds) == ["down", "down", "down", "up"]
    pair = stack({n: Box(n, "", "") for n in "ab"}, {("a", "b"): 2, ("b", "a"): 1}, gap=40)
    assert [kind for _, kind in pair.arrows] == ["both"]


def muddles(diagram: Diagram) -> list[str]:
    """Boxes that overlap or stick out, and arrows that run through one."""
    found = []
    areas = {box.title: (left, top, left + box.width, top + box.height) for box, left, top in diagram.places}
    for (a, p), (b, q) in combinations(areas.items(), 2):
        if p[0] < q[2] and q[0] < p[2] and p[1] < q[3] and q[1] < p[3]:
            found.append(f"{a} lies on {b}")
    for name, (left, top, right, bottom) in areas.items():
        if left < 0 or top < 0 or right > diagram.width + 1 or bottom > diagram.height:
            found.append(f"{name} sticks out")
        for points, _ in diagram.arrows:
            for (x, y), (to_x, to_y) in pairwise(points):
                for i in range(21):  # a bent piece stays between its ends
                    t = i / 20
                    at_x, at_y = x + (to_x - x) * (3 - 2 * t) * t * t, y + (to_y - y) * (3 - 2 * t) * t * t
                    if left < at_x < right and top < at_y < bottom:
                        found.append(f"an arrow runs through {name}")
    for box, _, _ in diagram.places:
        found += muddles(box.inner) if box.inner else []
    return found


@pytest.mark.parametrize("seed", range(20))
def test_boxes_and_arrows_keep_apart(seed: int) -> None:
    chance = random.Random(seed)
    names = [f"room{i}" + "x" * chance.randrange(9) for i in range(chance.randrange(2, 13))]
    imports = {(a, b): chance.randrange(1, 9) for a in names for b in names if a != b and chance.random() < 0.15}
    assert not muddles(stack({name: Box(name, "9 files", "") for name in names}, imports, gap=40))


def test_muddles_are_found() -> None:
    a, b = Box("a", "", ""), Box("b", "", "")
    through = Diagram([(a, 0, 0), (b, 0, 200)], [([(20, -20), (20, 80)], "down")], 60, 300)
    assert muddles(through) == ["an arrow runs through a"] * len(muddles(through)) != []
    assert muddles(Diagram([(a, 0, 0), (b, 10, 10)], [], 200, 200)) == ["a lies on b"]
    assert muddles(Diagram([(a, -5, 0)], [], 200, 200)) == ["a sticks out"]
