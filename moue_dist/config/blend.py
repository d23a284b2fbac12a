"""`data.blend` as its user writes it: weights and prefixes in turn, or one prefix alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from moue_dist.config.errors import ConfigError


@dataclass(frozen=True)
class Share:
    """A part of a blend: `<prefix>.bin` and `<prefix>.idx`; all weights of a blend sum to 1."""

    weight: float
    prefix: str


def parse_blend(words: Sequence[str]) -> list[Share]:
    """['3', 'web', '1', 'code'] -> web with weight 0.75, code with 0.25; ['web'] -> web alone. Raises ConfigError."""
    said = " ".join(words)
    if len(words) == 1 and _number(words[0]) is None:
        return [Share(1.0, _bare(words[0]))]
    weights = [_number(word) for word in words[::2]]
    prefixes = [_bare(word) for word in words[1::2]]
    if len(weights) != len(prefixes) or None in weights:
        raise ConfigError(
            f"data.blend={said}: expected weights and prefixes in turn, such as 0.7 data/web 0.3 data/code, or one "
            "prefix"
        )
    known = [weight for weight in weights if weight is not None]
    if not all(math.isfinite(weight) and weight > 0 for weight in known):
        raise ConfigError(f"data.blend={said}: weights must be above 0; leave out what shall not be read")
    if twice := [prefix for prefix in prefixes if prefixes.count(prefix) > 1]:
        raise ConfigError(f"data.blend names {twice[0]} twice; add its weights up")
    return [Share(weight / sum(known), prefix) for weight, prefix in zip(known, prefixes, strict=True)]


def _bare(prefix: str) -> str:
    """data/web.bin and data/web.idx are data/web."""
    return prefix[:-4] if prefix.endswith((".bin", ".idx")) else prefix


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None
