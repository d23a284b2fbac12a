"""Data that cannot be: blends, shares, and what attention on this machine cannot keep apart."""

from __future__ import annotations

import math

from moue_dist.config import Config, refuse
from moue_dist.config.blend import parse_blend


def check_data(config: Config, cuda: bool) -> None:
    d = config.data
    if d.blend:
        parse_blend(d.blend)
        refuse(
            d.source != "stdlib",
            f"data.blend beside data.source={d.source}: a run reads one of them; remove data.source, or prepare it "
            "with `moue data prepare` and name it in the blend",
        )
    refuse(
        bool(d.tokenizer) and not d.blend,
        f"data.tokenizer={d.tokenizer} is for data.blend; text of data.source is read as bytes: make tokens of it with "
        "`moue data prepare` first, and name them in data.blend",
    )
    if d.split:
        said = " ".join(f"{share:g}" for share in d.split)
        refuse(
            not 2 <= len(d.split) <= 3 or not all(math.isfinite(share) and share >= 0 for share in d.split),
            f"data.split={said}: expected the shares of training, validation and perhaps test, such as 95 5",
        )
        refuse(d.split[0] == 0, f"data.split={said} leaves nothing to train on; give training a share")
        refuse(
            d.valid_percent != type(d)().valid_percent,
            f"data.split={said} beside data.valid_percent={d.valid_percent:g}: both say how much validation gets; "
            "remove data.valid_percent",
        )
    refuse(
        d.document_mask and cuda and config.train.device != "cpu",
        "data.document_mask=true is proven on CPU ranks only: Transformer Engine ignores a mask and takes documents as "
        "packed sequences (thd), which this trainer does not give it yet; set it to false",
    )
