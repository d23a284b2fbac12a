"""The README.md of an exported folder: what the model is, where it comes from, how to load it."""

from __future__ import annotations

from moue_dist import __version__
from moue_dist.interchange.outgoing.saved import Saved
from moue_dist.planning.flops import parameters

_MOUE = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("this/folder", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("this/folder", trust_remote_code=True)
```

`trust_remote_code`: transformers does not know this kind of model, so its code came along, in `modeling_moue.py`.
"""
_PLAIN = """\
A plain Qwen3-MoE: what serves such models takes it as it is. Every layer has the experts that it sees as its own, so
the folder is larger than the model that was trained.
"""


def model_card(saved: Saved, form: str, dtype: str, size: int) -> str:
    """Markdown. `size`: bytes of the tensors."""
    config, counts = saved.config, parameters(saved.config)
    m, e = config.model, config.moe
    window = config.topology().window
    experts = f"{e.pool} experts in one pool, `{e.topology}`: each layer sees {window}, a token takes {e.top_k}"
    rows = {
        "parameters": f"{counts.total:,}, of which a token uses {counts.activated:,}",
        "layers": f"{m.layers}, {m.dense_layers} of them dense" if m.dense_layers else f"{m.layers}",
        "width": f"{m.hidden_size}, {m.heads} heads, {m.groups} key-value heads",
        "experts": experts if config.moe_layers else "none",
        "router": e.router if config.moe_layers else "none",
        "vocabulary": f"{m.vocab_size:,}",
        "trained on": f"{saved.position.tokens:,} tokens in sequences of {m.sequence_length:,}",
        "steps": f"{saved.position.step:,}",
        "weights": f"{dtype}, {size / 1e9:.3g} GB",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return (
        f"---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n# {config.name}\n\n"
        f"A Mixture of Universal Experts, exported by moue-dist {__version__}.\n\n| | |\n|---|---|\n{table}\n\n"
        f"{_MOUE if form == 'moue' else _PLAIN}"
    )
