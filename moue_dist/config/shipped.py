"""The configurations that come with the package, by name: `moue train tiny` needs no file and no checkout.

They are the files of configs/, in a checkout through the symlink moue_dist/configs, in an installed package as data.
"""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "configs"


def shipped_names() -> list[str]:
    """The names that `find_config` knows, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def about_shipped() -> str:
    """What is shipped and where it lies, in lines of up to 100 characters."""
    names = textwrap.fill(f"Shipped configurations: {', '.join(shipped_names())}", 100, subsequent_indent="  ")
    return f"{names}\nTheir files: {FOLDER}\nJob scripts for Slurm: {FOLDER.with_name('slurm')}"


def is_name(text: str) -> bool:
    """Whether this may be a configuration's name: one word, no folder, no suffix."""
    return re.fullmatch(r"\w+", text) is not None


def find_config(text: str | Path, folder: Path = Path()) -> Path:
    """The path `text`, relative to `folder`; where nothing is there and `text` is a shipped name, the shipped file."""
    path, shipped = folder / text, FOLDER / f"{text}.yaml"
    return shipped if is_name(str(text)) and not path.exists() and shipped.is_file() else path
