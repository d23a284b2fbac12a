"""The page: plain semantic HTML in one file, readable at phone width, in light and dark, without JavaScript.

Pieces are strings of finished HTML; whatever comes from a run goes through `escape`.
"""

from __future__ import annotations

import html
import math
from base64 import b64encode
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

STYLE = """
:root { color-scheme: light dark; --page: #fff; --card: #f5f6f8; --line: #d9dde2; --ink: #1c2128; --soft: #57606a;
  --link: #0b5cad; --warn: #fff4e0; --warn-line: #c77700; }
@media (prefers-color-scheme: dark) { :root { --page: #12161c; --card: #1b2129; --line: #323a45; --ink: #e3e8ee;
  --soft: #a3adb8; --link: #6cb6ff; --warn: #2b2414; --warn-line: #d69a2d; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 72rem; background: var(--page); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
  overflow-wrap: anywhere; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; }
p.lead { margin: .35rem 0 1.5rem; color: var(--soft); }
a { color: var(--link); }
dl.headline { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.25rem, 1fr)); gap: .75rem; margin: 0; }
dl.headline div { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .8rem; }
dl.headline dt { color: var(--soft); font-size: .85rem; }
dl.headline dd { margin: 0; font-size: 1.3rem; font-weight: 600; font-variant-numeric: tabular-nums; }
dl.headline small { display: block; font-size: .8rem; font-weight: 400; color: var(--soft); }
.notes { background: var(--warn); border-left: .25rem solid var(--warn-line); border-radius: .25rem; margin: 1.25rem 0;
  padding: .6rem 1rem; }
.notes ul { margin: .25rem 0; padding-left: 1.1rem; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem; }
figure { margin: 0; padding: .75rem; background: var(--card); border: 1px solid var(--line); border-radius: .5rem;
  min-width: 0; }
figure.wide { grid-column: 1 / -1; }
figure.wide picture { display: block; overflow-x: auto; }
figure.wide img { min-width: 36rem; }
figure h3 { font-size: 1rem; margin: 0 0 .4rem; }
figure img { display: block; width: 100%; height: auto; }
figure p { margin: .5rem 0 1rem; color: var(--soft); }
figcaption { color: var(--soft); font-size: .9rem; margin-top: .5rem; }
figure.ring img { max-width: 30rem; margin: 0 auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); font-size: .9rem; padding-bottom: .4rem; }
th, td { text-align: left; padding: .35rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
table.facts th { font-weight: 400; color: var(--soft); width: 14rem; }
table.runs { font-size: .875rem; }
table.runs td.number, table.runs th.number { text-align: right; overflow-wrap: normal; }
table.runs thead th { vertical-align: bottom; color: var(--soft); font-weight: 500; }
details { border: 1px solid var(--line); border-radius: .5rem; margin: 1rem 0; background: var(--card); }
summary { cursor: pointer; padding: .6rem .8rem; font-weight: 600; }
pre { margin: 0; padding: .8rem; overflow-x: auto; font-size: .85rem; border-top: 1px solid var(--line); }
footer { margin-top: 3rem; color: var(--soft); font-size: .85rem; }
@media (max-width: 60rem) {
  table.runs, table.runs tbody, table.runs tr, table.runs td, table.runs caption { display: block; }
  table.runs thead { display: none; }
  table.runs tr { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; margin: .75rem 0;
    padding: .4rem .8rem; }
  table.runs td, table.runs td.number { display: flex; justify-content: space-between; gap: 1rem; text-align: right;
    border: 0; padding: .15rem 0; }
  table.runs td::before { content: attr(data-label); color: var(--soft); text-align: left; flex: none; }
}
@media (max-width: 40rem) { table.facts th, table.facts td { display: block; width: auto; }
  table.facts th { border: 0; padding-bottom: 0; } }
"""


@dataclass(frozen=True)
class Picture:
    """A picture as two SVG texts, one for light pages and one for dark, with its title and words.

    `alternative` says what the picture shows, with its numbers, for those who cannot see it. A picture without
    numbers to draw has empty `light` and `dark`, and its `caption` says why.
    """

    title: str
    caption: str
    alternative: str = ""
    light: str = ""
    dark: str = ""
    kind: str = ""  # extra CSS classes: "wide", "ring"

    def html(self) -> str:
        title = f"<h3>{escape(self.title)}</h3>"
        if not self.light:
            return f'<figure class="{self.kind}">{title}<p>{escape(self.caption)}</p></figure>'
        return (
            f'<figure class="{self.kind}">{title}<picture>'
            f'<source media="(prefers-color-scheme: dark)" srcset="{data_uri(self.dark)}">'
            f'<img src="{data_uri(self.light)}" alt="{escape(self.alternative)}"></picture>'
            f"<figcaption>{escape(self.caption)}</figcaption></figure>"
        )


def escape(value: object) -> str:
    return html.escape(str(value), quote=True)


def data_uri(svg: str) -> str:
    return "data:image/svg+xml;base64," + b64encode(svg.encode()).decode()


def page(title: str, lead: str, body: Iterable[str]) -> str:
    """A whole document. `title` and `lead` are plain text, `body` finished HTML. Its policy forbids fetching."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>{escape(title)}</title>\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">\n"
        f'<link rel="icon" href="data:,">\n<style>{STYLE}</style>\n</head>\n<body>\n'
        f'<header><h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p></header>\n<main>\n'
        + "\n".join(body)
        + "\n</main>\n<footer>Written by moue report.</footer>\n</body>\n</html>\n"
    )


def headline(facts: Sequence[tuple[str, str, str]]) -> str:
    """Cards of (label, value, small print)."""
    cards = (
        f"<div><dt>{escape(label)}</dt><dd>{escape(value)}"
        + (f"<small>{escape(small)}</small>" if small else "")
        + "</dd></div>"
        for label, value, small in facts
    )
    return f'<dl class="headline">{"".join(cards)}</dl>'


def notes(lines: Sequence[str], heading: str) -> str:
    """A box of remarks; empty without any."""
    if not lines:
        return ""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<section class="notes"><strong>{escape(heading)}</strong><ul>{items}</ul></section>'


def facts_table(rows: Sequence[tuple[str, str]]) -> str:
    body = "".join(f'<tr><th scope="row">{escape(k)}</th><td>{escape(v)}</td></tr>' for k, v in rows)
    return f'<table class="facts"><tbody>{body}</tbody></table>'


def runs_table(caption: str, header: Sequence[str], rows: Sequence[Sequence[str]], words: int) -> str:
    """A table whose rows become cards on narrow screens. The first `words` columns are text, the others numbers.

    The roles keep it a table for screen readers where CSS lays it out as cards.
    """
    classes = ["" if i < words else ' class="number"' for i in range(len(header))]
    head = "".join(
        f'<th scope="col" role="columnheader"{c}>{escape(h)}</th>' for h, c in zip(header, classes, strict=True)
    )
    lines = []
    for row in rows:
        cells = zip(row, header, classes, strict=True)
        line = "".join(f'<td role="cell" data-label="{escape(h)}"{c}>{escape(v)}</td>' for v, h, c in cells)
        lines.append(f'<tr role="row">{line}</tr>')
    return (
        f'<table class="runs" role="table"><caption>{escape(caption)}</caption><thead role="rowgroup"><tr role="row">'
        f'{head}</tr></thead><tbody role="rowgroup">{"".join(lines)}</tbody></table>'
    )


def details(summary: str, text: str) -> str:
    return f"<details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>"


def show(value: float, digits: int = 3, unit: str = "") -> str:
    """A number for people: `digits` significant digits, thousands separated, and a dash where there is none."""
    if not math.isfinite(value):
        return "–" if math.isnan(value) else ("∞" if value > 0 else "-∞")
    if value != 0 and abs(value) < 1e-4:
        text = f"{value:.{digits - 1}e}"
    else:
        decimals = digits - 1 - math.floor(math.log10(abs(value))) if value else 0
        text = f"{value:,.{max(0, decimals)}f}"
    return text + unit


def count(number: int, noun: str) -> str:
    """1 step, 2 steps."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def share(value: float) -> str:
    """A ratio as per cent with one decimal, and a dash where there is none."""
    return f"{100 * value:.1f}%" if math.isfinite(value) else "–"
