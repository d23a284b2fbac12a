"""Boxes in layers, arrows downwards: a small layout for tests/draw_rooms.py, the same on every machine.

The usual steps (Sugiyama): turn round what closes a circle, leave out what is implied, layers by longest path from the
top, a slot in every layer that an arrow passes, orders with few crossings, places near neighbours. Arrows bend only
between layers and pass a layer in slots of their own, so none runs through a box.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from html import escape
from itertools import combinations, pairwise
from random import Random

Edge = tuple[str, str]
INK, SOFT, LINE, BACK = "#1f2933", "#52606d", "#7b8794", "#c2410c"
PAD, HEAD, SPACE, SLOT = 14, 46, 22, 14  # px: around an inner diagram; of a box's title; between boxes; of an arrow


@dataclass
class Box:
    """A titled box, perhaps with a diagram inside."""

    title: str
    text: str
    fill: str
    inner: Diagram | None = None

    @property
    def width(self) -> int:
        own = 36 + 8 * max(len(self.title), round(0.82 * len(self.text)))
        return max(own, self.inner.width + 2 * PAD) if self.inner else own

    @property
    def height(self) -> int:
        return HEAD + (self.inner.height + PAD if self.inner else 0)


@dataclass
class Diagram:
    """Boxes at places (left, top) and arrows as points; `back` are arrows against the order, `both` have two heads."""

    places: list[tuple[Box, int, int]] = field(default_factory=list)
    arrows: list[tuple[list[tuple[int, int]], str]] = field(default_factory=list)  # points; down, up or both
    width: int = 0
    height: int = 0


def stack(
    boxes: Mapping[str, Box], imports: Mapping[Edge, int], *, gap: int, against: Collection[Edge] = ()
) -> Diagram:
    """The diagram of `boxes`, with an arrow for each of `imports` (weights say which way a circle is cut)."""
    down, up = acyclic(imports, against)
    down = reduced(down)
    up = {edge for edge in up if (edge[1], edge[0]) not in down}
    both = {(b, a) for a, b in imports if (b, a) in down}
    flow = down | {(b, a) for a, b in up}
    layer = layers(list(boxes), flow)
    chains = {edge: chain(edge, layer) for edge in sorted(flow)}
    order = ordered([[n for n in sorted(boxes) if layer[n] == i] for i in range(max(layer.values()) + 1)], chains)
    links = [pair for nodes in chains.values() for pair in pairwise(nodes)]
    width = {node: boxes[node].width if node in boxes else SLOT for row in order for node in row}
    middle = spread(order, links, width)
    heights = [max(boxes[node].height for node in row if node in boxes) for row in order]
    tops = [sum(heights[:i]) + gap * i for i in range(len(order))]

    made = Diagram(width=round(max(middle[n] + width[n] / 2 for n in middle)), height=tops[-1] + heights[-1])
    for i, row in enumerate(order):
        for node in row:
            if node in boxes:
                left, top = middle[node] - width[node] / 2, tops[i] + (heights[i] - boxes[node].height) // 2
                made.places.append((boxes[node], round(left), top))
    where = {box.title: (left, top) for box, left, top in made.places}
    ends = ports(chains, middle, boxes)
    for edge, nodes in chains.items():
        start, end = ends[edge, 0], ends[edge, 1]
        points = [(start, where[nodes[0]][1] + boxes[nodes[0]].height)]
        for node, nxt in pairwise(nodes):
            i = layer[edge[0]] + nodes.index(node)
            points += [(points[-1][0], tops[i] + heights[i])]
            x = end if nxt == nodes[-1] else round(middle[nxt])
            points += [(x, tops[i + 1])]
        points += [(end, where[nodes[-1]][1])]
        made.arrows.append((points, "up" if (edge[1], edge[0]) in up else "both" if edge in both else "down"))
    return made


# Which arrows


def acyclic(imports: Mapping[Edge, int], against: Collection[Edge]) -> tuple[set[Edge], set[Edge]]:
    """(arrows without circles, the others: those of `against`, and of each circle the lightest).

    The heavier come first, so the others run from below to above: each would close a circle with those kept.
    """
    down: set[Edge] = set()
    for edge in sorted(set(imports) - set(against), key=lambda edge: (-imports[edge], edge)):
        if edge[0] not in reached(edge[1], down):
            down.add(edge)
    return down, set(imports) - down


def reached(start: str, edges: Collection[Edge]) -> set[str]:
    found, todo = {start}, [start]
    while todo:
        node = todo.pop()
        new = {b for a, b in edges if a == node} - found
        found |= new
        todo += new
    return found


def reduced(edges: set[Edge]) -> set[Edge]:
    """Without the arrows that a longer path of others implies."""
    return {(a, b) for a, b in edges if not any(b in reached(c, edges) for x, c in edges if x == a and c != b)}


# Where boxes stand


def layers(nodes: list[str], edges: Collection[Edge]) -> dict[str, int]:
    """The longest path from the top to each node."""
    depth = dict.fromkeys(nodes, 0)
    for _ in nodes:
        for a, b in edges:
            depth[b] = max(depth[b], depth[a] + 1)
    return depth


def chain(edge: Edge, layer: Mapping[str, int]) -> list[str]:
    """The nodes that an arrow touches: its ends and a slot in every layer between."""
    a, b = edge
    return [a, *(f"{a} > {b} @{i}" for i in range(layer[a] + 1, layer[b])), b]


def ordered(rows: list[list[str]], chains: Mapping[Edge, list[str]]) -> list[list[str]]:
    """The rows with slots, each in an order with few crossings and short arrows: the best of several starts."""
    first = {node: i for i, row in enumerate(rows) for node in row}
    rows = [list(row) for row in rows]
    links: list[list[Edge]] = [[] for _ in rows]  # from a row to the next one
    for nodes in chains.values():
        for i, (node, nxt) in enumerate(pairwise(nodes), first[nodes[0]]):
            links[i].append((node, nxt))
            if nxt != nodes[-1]:
                rows[i + 1].append(nxt)

    def cost(rows: list[list[str]], among: Iterable[int]) -> tuple[int, float]:
        """Crossings, and how far arrows go sideways, between these rows and their next ones."""
        crossings, length = 0, 0.0
        for i in among:
            if 0 <= i < len(rows) - 1:
                at = {node: (j, (j + 0.5) / len(row)) for row in rows[i : i + 2] for j, node in enumerate(row)}
                ends = [(at[a], at[b]) for a, b in links[i]]
                crossings += sum(a < c and b > d for a, b in ends for c, d in ends)
                length += sum(abs(a[1] - b[1]) for a, b in ends)
        return crossings, round(length, 6)

    def improved(rows: list[list[str]]) -> list[list[str]]:
        """Swap any two of a row while that helps."""
        better = True
        while better:
            better = False
            for i, row in enumerate(rows):
                for a, b in combinations(range(len(row)), 2):
                    before = cost(rows, (i - 1, i))
                    row[a], row[b] = row[b], row[a]
                    if cost(rows, (i - 1, i)) < before:
                        better = True
                    else:
                        row[a], row[b] = row[b], row[a]
        return rows

    starts = [[Random(seed).sample(row, len(row)) for row in rows] for seed in range(40)]
    return min((improved(start) for start in starts), key=lambda rows: (cost(rows, range(len(rows))), rows))


def spread(rows: list[list[str]], links: Iterable[Edge], width: Mapping[str, int]) -> dict[str, float]:
    """The middle of each node: near its neighbours' mean, boxes apart, the leftmost edge at 0."""
    near: dict[str, list[tuple[str, int]]] = {node: [] for row in rows for node in row}
    for a, b in links:
        weight = 1 + 3 * ("@" in a) + 3 * ("@" in b)  # slots of one arrow above each other
        near[a].append((b, weight))
        near[b].append((a, weight))
    middle: dict[str, float] = {}
    for row in rows:
        total = sum(width[n] + SPACE for n in row)
        x = -total / 2
        for node in row:
            middle[node] = x + (width[node] + SPACE) / 2
            x += width[node] + SPACE

    def wish(node: str) -> tuple[float, float]:
        """Where its neighbours want it, and how much."""
        weight = sum(weight for _, weight in near[node])
        if not weight:  # beside the others
            return sum(middle[n] for n in near if near[n]) / max(1, sum(map(bool, near.values()))), 1e-3
        return sum(middle[n] * w for n, w in near[node]) / weight, weight

    for _ in range(1000):
        for row in rows:
            middle.update(zip(row, apart(row, [wish(node) for node in row], width), strict=True))
    left = min(middle[n] - width[n] / 2 for n in middle)
    return {node: round(x - left, 3) for node, x in middle.items()}


def apart(row: list[str], wishes: list[tuple[float, float]], width: Mapping[str, int]) -> list[float]:
    """The places nearest to the weighted wishes, in this order and without overlap (isotonic regression)."""
    offset, shift = [], 0.0
    for i, node in enumerate(row):
        shift += 0 if i == 0 else (width[row[i - 1]] + width[node]) / 2 + SPACE
        offset.append(shift)
    blocks: list[tuple[float, float, int]] = []  # (weighted sum, weight, how many)
    for (x, weight), o in zip(wishes, offset, strict=True):
        blocks.append(((x - o) * weight, weight, 1))
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            last, before = blocks.pop(), blocks.pop()
            blocks.append((before[0] + last[0], before[1] + last[1], before[2] + last[2]))
    flat = [total / weight for total, weight, many in blocks for _ in range(many)]
    return [x + o for x, o in zip(flat, offset, strict=True)]


def ports(
    chains: Mapping[Edge, list[str]], middle: Mapping[str, float], boxes: Mapping[str, Box]
) -> dict[tuple[Edge, int], int]:
    """Where each arrow leaves its upper box (0) and meets its lower one (1): side by side, as the other ends lie."""
    found = {}
    for name, box in boxes.items():
        for end, at in ((0, 1), (1, -2)):
            mine = [edge for edge in chains if edge[end] == name]
            mine.sort(key=lambda edge: (middle[chains[edge][at]], edge))
            step = min(26.0, (box.width - 40) / max(1, len(mine) - 1))
            for i, edge in enumerate(mine):
                found[edge, end] = round(middle[name] + (i - (len(mine) - 1) / 2) * step)
    return found


# The picture


def draw(diagram: Diagram, legend: Mapping[str, str]) -> str:
    """The diagram as SVG: filled boxes and grey arrows, for light and dark surroundings."""
    margin, top = 12, 48
    wide, high = diagram.width + 2 * margin, diagram.height + top + margin
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" width="{wide}" height="{high}"',
        '  font-family="Helvetica, Arial, sans-serif" font-size="12" text-anchor="middle">',
        "<defs>",
        *(
            f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
            f'orient="auto-start-reverse"><path d="M0,0.5 L8,4 L0,7.5 Z" fill="{colour}"/></marker>'
            for name, colour in (("head", LINE), ("back", BACK))
        ),
        "</defs>",
        '<g text-anchor="start">',
    ]
    x = margin
    for colour, words in legend.items():
        lines.append(f'<rect x="{x}" y="11" width="14" height="14" rx="3" fill="{colour}" stroke="{LINE}"/>')
        lines.append(f'<text x="{x + 20}" y="22" fill="{LINE}">{escape(words)}</text>')
        x += 46 + 7 * len(words)
    lines += ["</g>", *parts(diagram, margin, top), "</svg>"]
    return "\n".join(lines) + "\n"


def parts(diagram: Diagram, x: int, y: int) -> list[str]:
    lines = []
    for points, kind in diagram.arrows:
        lines.append(arrow([(a + x, b + y) for a, b in points], kind))
    for box, left, top in diagram.places:
        a, b = left + x, top + y
        size, middle = f'width="{box.width}" height="{box.height}"', a + box.width // 2
        title, text = escape(box.title), escape(box.text)
        lines += [
            f'<rect x="{a}" y="{b}" {size} rx="6" fill="{box.fill}" stroke="{LINE}"/>',
            f'<text x="{middle}" y="{b + 20}" fill="{INK}" font-size="14" font-weight="bold">{title}</text>',
            f'<text x="{middle}" y="{b + 37}" fill="{SOFT}">{text}</text>',
        ]
        if box.inner:
            lines += parts(box.inner, a + (box.width - box.inner.width) // 2, b + HEAD)
    return lines


def arrow(points: list[tuple[int, int]], kind: str) -> str:
    """Down the layers: straight through one, bent between two."""
    path = f"M{points[0][0]},{points[0][1]}"
    for (x, y), (to_x, to_y) in pairwise(points):
        if (x, y) == (to_x, to_y):
            continue
        half = (y + to_y) // 2
        path += f" V{to_y}" if x == to_x else f" C{x},{half} {to_x},{half} {to_x},{to_y}"
    name, colour = ("back", BACK) if kind == "up" else ("head", LINE)
    heads = f'marker-start="url(#{name})"' if kind == "up" else f'marker-end="url(#{name})"'
    if kind == "both":
        heads += f' marker-start="url(#{name})"'
    dash = ' stroke-dasharray="5 3"' if kind == "up" else ""
    return f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.4"{dash} {heads}/>'
