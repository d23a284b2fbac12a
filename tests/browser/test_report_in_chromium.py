"""The report pages as a browser lays them out: headless Chromium, light and dark, on a phone's width and a desk's.

A measuring page of the same origin holds each report in frames, reads their layout, and leaves what it found as JSON;
the little server that hands out the files remembers what was asked for.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moue_dist.cli.report import main
from moue_dist.report.ring import write_pool_picture
from tests.cpu.report.test_report import CONFIG, write_run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium binary: apt-get install chromium")

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-quic", "--hide-scrollbars",
)  # fmt: skip
SCHEMES = {"light": (), "dark": ("--blink-settings=preferredColorScheme=0",)}
PAGES = ("tiny/report.html", "empty/report.html", "scaling.html")
WIDTHS = (400, 1200)

MEASURE = """<!doctype html><meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">
<style>iframe { border: 0; height: 900px; display: block; }</style>
%s
<pre id="found"></pre>
<script>
addEventListener("load", async () => {
  const found = [];
  for (const frame of document.querySelectorAll("iframe")) {
    const page = frame.contentDocument, images = [...page.images];
    await Promise.all(images.map(image => image.decode().catch(() => null)));
    const inside = node => node.closest("picture, pre");
    found.push({
      page: frame.getAttribute("src"), width: frame.clientWidth, scroll: page.documentElement.scrollWidth,
      background: frame.contentWindow.getComputedStyle(page.body).backgroundColor,
      broken: images.filter(image => image.naturalWidth === 0).length, images: images.length,
      sources: images.map(image => image.currentSrc),
      over: [...page.querySelectorAll("main *")].filter(node => !inside(node)
        && node.getBoundingClientRect().right > frame.clientWidth + 0.5).map(node => node.tagName),
      first: page.body.querySelector("h1").getBoundingClientRect().top,
    });
  }
  document.getElementById("found").textContent = JSON.stringify(found);
});
</script>"""


@dataclass
class Site:
    """A folder of reports behind a server on this machine. `asked` are the paths that a browser asked for."""

    folder: Path
    address: str
    asked: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    runs = [
        write_run(folder / f"gpu{n}", replace(CONFIG, name=f"a_rather_long_name_of_gpu{n}"), world=n) for n in (1, 8)
    ]
    assert main([*map(str, runs), "--output", str(folder / "scaling.html")]) == 0
    assert main([str(write_run(folder / "tiny", device="A device with a name that does not end soon, 80GB HBM3"))]) == 0
    assert main([str(write_run(folder / "empty", lines=[], tail='{"ki'))]) == 0
    write_pool_picture(folder / "pool.svg")
    frames = (f'<iframe src="{page}" style="width: {width}px"></iframe>' for page in PAGES for width in WIDTHS)
    (folder / "measure.html").write_text(MEASURE % "\n".join(frames))

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *words: Any) -> None:
            made.asked.append(self.path)

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    made = Site(folder, f"http://127.0.0.1:{server.server_port}")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield made
    server.shutdown()
    server.server_close()


def chromium(profile: Path, *arguments: str) -> str:
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.fixture(scope="module")
def found(site: Site, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What the measuring page found, by colour scheme."""
    result = {}
    for scheme, flags in SCHEMES.items():
        profile = tmp_path_factory.mktemp(f"profile_{scheme}")
        text = chromium(profile, *flags, "--virtual-time-budget=20000", "--dump-dom", f"{site.address}/measure.html")
        match = re.search(r'<pre id="found">(.+?)</pre>', text, re.S)
        assert match, text[:2000]
        result[scheme] = json.loads(html.unescape(match[1]))
        assert len(result[scheme]) == len(PAGES) * len(WIDTHS)
    return result


@pytest.mark.parametrize("scheme", SCHEMES)
def test_nothing_runs_over_the_edge_of_the_page(found: dict[str, list[dict[str, Any]]], scheme: str) -> None:
    for frame in found[scheme]:
        assert frame["scroll"] <= frame["width"], (frame["page"], frame["over"])
        assert frame["over"] == [], frame["page"]
        assert frame["first"] < 60  # the title comes first


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_picture_is_decoded(found: dict[str, list[dict[str, Any]]], scheme: str) -> None:
    assert [frame["images"] for frame in found[scheme]] == [7, 7, 1, 1, 2, 2]
    assert all(frame["broken"] == 0 for frame in found[scheme])


def test_dark_readers_get_a_dark_page_with_its_own_pictures(found: dict[str, list[dict[str, Any]]]) -> None:
    for light, dark in zip(found["light"], found["dark"], strict=True):
        assert light["background"] == "rgb(255, 255, 255)"
        assert dark["background"] == "rgb(18, 22, 28)"
        assert not set(light["sources"]) & set(dark["sources"])


def test_pages_ask_for_nothing_else(site: Site, found: dict[str, list[dict[str, Any]]]) -> None:
    assert set(site.asked) == {"/measure.html", *(f"/{page}" for page in PAGES)}


@pytest.mark.parametrize(("scheme", "dark"), [("light", False), ("dark", True)])
def test_screenshots_show_ink_on_the_right_ground(site: Site, tmp_path: Path, scheme: str, dark: bool) -> None:
    from PIL import Image

    picture = tmp_path / "page.png"
    page = (site.folder / "tiny" / "report.html").as_uri()
    chromium(tmp_path / "profile", *SCHEMES[scheme], "--window-size=1200,1600", f"--screenshot={picture}", page)
    pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    ground = np.median(pixels.reshape(-1, 3), axis=0).mean()
    assert (ground < 60) if dark else (ground > 200)
    grey = pixels.mean(axis=2)
    ink = (grey > 180).mean() if dark else (grey < 90).mean()
    assert 0.003 < ink < 0.3  # text and lines are there, and stand out
    colourful = (pixels.max(axis=2) - pixels.min(axis=2) > 80).mean()
    assert colourful > 0.01  # the pictures are there


def test_the_pool_picture_can_be_read_on_light_and_dark_pages(site: Site, tmp_path: Path) -> None:
    from PIL import Image

    for name, ground in (("light", "#ffffff"), ("dark", "#0d1117")):
        page = tmp_path / f"{name}.html"
        address = (site.folder / "pool.svg").as_uri()
        page.write_text(f'<body style="margin:0;background:{ground}"><img src="{address}" style="width:600px">')
        picture = tmp_path / f"{name}.png"
        chromium(tmp_path / f"profile_{name}", "--window-size=600,620", f"--screenshot={picture}", page.as_uri())
        grey = np.asarray(Image.open(picture).convert("L")).astype(int)
        assert (abs(grey - int(np.median(grey))) > 60).mean() > 0.02
