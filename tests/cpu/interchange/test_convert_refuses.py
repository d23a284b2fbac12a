"""`moue convert` on folders that are wrong: one clear line, nothing written, nothing lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moue_dist.cli.main import main
from moue_dist.config.load import load_config

D, F, E, V, LAYERS = 8, 6, 4, 256, 2
CONFIG: dict[str, Any] = {
    "model_type": "qwen3_moe", "hidden_size": D, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4,
    "num_hidden_layers": LAYERS, "vocab_size": V, "max_position_embeddings": 32, "rms_norm_eps": 1e-6,
    "num_experts": E, "num_experts_per_tok": 2, "moe_intermediate_size": F, "norm_topk_prob": True,
    "intermediate_size": 24, "rope_theta": 10000.0, "tie_word_embeddings": False, "hidden_act": "silu",
}  # fmt: skip
LLAMA = {"model_type": "llama", "intermediate_size": F}


def tensors() -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (V, D), "lm_head.weight": (V, D), "model.norm.weight": (D,),
    }  # fmt: skip
    for i in range(LAYERS):
        a = f"model.layers.{i}."
        shapes |= {a + "input_layernorm.weight": (D,), a + "post_attention_layernorm.weight": (D,)}
        shapes |= {a + f"self_attn.{x}_proj.weight": (8 if x == "q" else 4, D) for x in "qkv"}
        shapes |= {a + "self_attn.o_proj.weight": (D, 8), a + "mlp.gate.weight": (E, D)}
        shapes |= {a + f"self_attn.{x}_norm.weight": (4,) for x in "qk"}
        for e in range(E):
            b = f"{a}mlp.experts.{e}."
            shapes |= {b + "gate_proj.weight": (F, D), b + "up_proj.weight": (F, D), b + "down_proj.weight": (D, F)}
    g = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}


def dense() -> dict[str, Tensor]:
    kept = {n: t for n, t in tensors().items() if "_norm." not in n and ".gate." not in n and ".experts." not in n}
    for i in range(LAYERS):
        b = f"model.layers.{i}.mlp."
        kept |= {f"{b}{x}_proj.weight": torch.ones((D, F) if x == "down" else (F, D)) for x in ("gate", "up", "down")}
    return kept


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text("{}")
    save_file(tensors(), folder / "model.safetensors")
    return folder


def config(folder: Path, changes: dict[str, Any]) -> None:
    """Change keys of config.json; ... takes one out."""
    values = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))


def weights(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    held = load_file(folder / "model.safetensors")
    change(held)
    save_file(held, folder / "model.safetensors")


def run(source: Path, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    code = main(["convert", str(source), str(source.parent / "out"), *words])
    return code, capsys.readouterr().err


def refused(source: Path, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    before = sorted(source.parent.rglob("*"))
    code, said = run(source, capsys, *words)
    assert code == 2
    (line,) = said.strip().splitlines()
    assert line.startswith("moue: ")
    assert sorted(source.parent.rglob("*")) == before, "something was written"
    return line


def test_a_good_folder(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = run(source, capsys)
    assert code == 0, said
    out = source.parent / "out"
    made = load_config(out / "config.yaml")
    assert (made.moe.pool, made.moe.topology, made.moe.top_k, made.moe.renormalise) == (8, "private", 2, True)
    assert (made.model.head_width, made.model.groups, made.model.qk_norm) == (4, 1, "head")
    assert {f.name for f in out.iterdir()} == {"checkpoints", "config.yaml", "tokenizer.json"}
    assert (out / "checkpoints" / "latest").read_text() == "step_00000000\n"
    assert [f.name for f in source.parent.iterdir() if f.name.startswith(".")] == []


def test_what_is_there_is_kept(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = source.parent / "out"
    out.mkdir()
    (out / "mine").write_text("x")
    assert "out is there already" in refused(source, capsys)
    config(source, {"rms_norm_eps": ...})
    assert "rms_norm_eps" in refused(source, capsys, "--overwrite"), "an error loses nothing"
    config(source, {"rms_norm_eps": 1e-6})
    assert run(source, capsys, "--overwrite")[0] == 0
    assert not (out / "mine").exists() and (out / "config.yaml").exists()


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        *(({name: ...}, f"config.json has no {name}") for name in (
            "model_type", "hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size", "rms_norm_eps",
            "max_position_embeddings", "moe_intermediate_size", "num_experts_per_tok", "norm_topk_prob", "rope_theta",
        )),
        ({"num_experts": ...}, "config.json has no num_experts or num_local_experts"),
        ({"num_experts": "four"}, "num_experts or num_local_experts is 'four'"),
        ({"model_type": "deepseek_v3"}, "latent (MLA)"),
        ({"model_type": "gpt_oss"}, "sinks"),
        ({"model_type": "bert"}, "model_type=bert cannot be converted: known are llama"),
        ({"kv_lora_rank": 512}, "MLA"),
        ({"n_group": 8}, "groups of experts"),
        ({"attention_bias": True}, "biases in attention (attention_bias)"),
        ({"sliding_window": 128}, "a sliding window (sliding_window=128)"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layers of other kinds (sliding_attention)"),
        ({"hidden_act": "gelu"}, "the activation gelu"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "RoPE is scaled (rope_type=yarn)"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "RoPE is scaled (rope_type=linear)"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "a RoPE for each kind of layer"),
        ({"rope_theta": 10000.5}, "rope_theta=10000.5 is no whole number"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"mlp_only_layers": [1]}, "layers [1] are dense"),
        ({"num_experts": 5}, "mlp.gate.weight has shape [4, 8], config.json says [5, 8]"),
        ({"moe_intermediate_size": 7}, "has shape [6, 8], config.json says [7, 8]"),
        ({"vocab_size": 300}, "model.embed_tokens.weight has shape [256, 8], config.json says [300, 8]"),
        ({"num_experts_per_tok": 5}, "moe.top_k=5 is larger than the window"),
        ({"num_hidden_layers": 3}, "lacks the tensor model.layers.2."),
        ({"num_hidden_layers": 1}, "has the tensor model.layers.1."),
    ],
)  # fmt: skip
def test_a_config_that_does_not_fit(
    changes: dict[str, Any], found: str, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config(source, changes)
    assert found in refused(source, capsys)


def test_settings_that_change_nothing(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Keys of both versions of transformers."""
    config(source, {
        "rope_theta": ..., "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "num_experts": ...,
        "num_local_experts": E, "use_sliding_window": False, "sliding_window": 4096, "mlp_only_layers": [],
        "decoder_sparse_step": 1, "layer_types": ["full_attention"] * 2, "tie_word_embeddings": ...,
    })  # fmt: skip
    assert run(source, capsys)[0] == 0
    made = load_config(source.parent / "out" / "config.yaml")
    assert made.model.rope_base == 5e5 and made.model.tied_head is False


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda t: t.pop("model.norm.weight"), "lacks the tensor model.norm.weight, expected in shape [8]"),
        (lambda t: t.pop("model.layers.1.mlp.experts.3.up_proj.weight"), "layers.1.mlp.experts.3.up_proj.weight"),
        (lambda t: t.pop("model.embed_tokens.weight"), "lacks the tensor model.embed_tokens.weight"),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.weight": torch.ones(6, D)}),
            "q_proj.weight has shape [6, 8], config.json says [8, 8]",
        ),
        (
            lambda t: t.update({"model.layers.0.mlp.gate.weight": torch.ones(E, D, dtype=torch.int64)}),
            "model.layers.0.mlp.gate.weight is of type I64; expected one of F32, F16, BF16",
        ),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(8)}),
            "q_proj.bias, which no qwen3_moe",
        ),
        (lambda t: t.update({"model.layers.0.self_attn.sinks": torch.ones(2)}), "attention sinks"),
    ],
)
def test_tensors_that_do_not_fit(
    change: Callable[[dict[str, Tensor]], Any], found: str, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights(source, change)
    assert found in refused(source, capsys)


def test_files_that_are_none(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, index = source / "model.safetensors", source / "model.safetensors.index.json"
    whole = file.read_bytes()
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "model-00002.safetensors"}}))
    assert "names model-00002.safetensors, which is not there" in refused(source, capsys)
    index.write_text(json.dumps({"weight_map": {"model.gone": "model.safetensors"}}))
    assert "lacks the tensor model.gone" in refused(source, capsys)
    index.write_text("{")
    assert "no readable weight_map" in refused(source, capsys)
    index.unlink()
    file.write_bytes(whole[:1000])
    assert "is no whole safetensors file" in refused(source, capsys)
    file.rename(source / "pytorch_model.bin")
    assert "is a pickle" in refused(source, capsys)
    (source / "pytorch_model.bin").unlink()
    assert "has no *.safetensors" in refused(source, capsys)
    (source / "config.json").write_text("{")
    assert "cannot read" in refused(source, capsys)
    (source / "config.json").write_text("[]")
    assert "not a mapping" in refused(source, capsys)
    (source / "config.json").unlink()
    assert "has no config.json" in refused(source, capsys)
    assert "is no folder" in refused(source / "gone", capsys)


def test_an_index_over_several_files(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held = tensors()
    (source / "model.safetensors").unlink()
    halves = [dict(list(held.items())[i::2]) for i in range(2)]
    for i, half in enumerate(halves):
        save_file(half, source / f"model-{i}.safetensors")
    where = {name: f"model-{i}.safetensors" for i, half in enumerate(halves) for name in half}
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    assert run(source, capsys)[0] == 0


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("--upcycle 2", "--upcycle is for dense models"),
        ("--top-k 3", "--top-k 3 is another model"),
        ("--window 4", "--window and --stride are for --topology rotational"),
        ("--group 2", "--group is for --topology block or rotational"),
        ("--topology rotational --window 4 --stride 1", "MoE layer 1 would not see its own experts"),
        ("--topology rotational --window 99", "moe.window=99 is larger than moe.pool=8"),
        ("--topology full --mask-start 0", "--mask-start must be below 0"),
        ("--train.steps 3", "unexpected '--train.steps'"),
    ],
)
def test_a_form_that_does_not_fit(words: str, found: str, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert found in refused(source, capsys, *words.split())


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("--upcycle 4 --split", "--upcycle 4 --split does not divide the FFN's width 6"),
        ("--split", "--split cuts FFNs into the experts of --upcycle N"),
        ("--upcycle 2 --top-k 3", "--top-k 3 is more than the experts of --upcycle 2"),
        ("--upcycle 2 --split --top-k 1", "--split gives the source's function with all 2 parts"),
        ("--top-k 2", "a dense model's layer has one expert"),
    ],
)
def test_a_dense_models_form_that_does_not_fit(
    words: str, found: str, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config(source, LLAMA)
    save_file(dense(), source / "model.safetensors")
    assert found in refused(source, capsys, *words.split())
    assert run(source, capsys)[0] == 0


def test_memory_is_bounded(source: Path) -> None:
    """The checkpoint is made a tensor at a time: none but the one being written is alive."""
    import gc
    import weakref

    from moue_dist.interchange.incoming import families
    from moue_dist.interchange.incoming.entries import entries
    from moue_dist.interchange.incoming.folder import Folder
    from moue_dist.interchange.incoming.forms import Form, form
    from moue_dist.interchange.incoming.write import write_checkpoint

    folder = Folder(source)
    foreign = families.read(folder)
    formed = form(foreign, Form("full"), "x", torch.float32)
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def watched(make: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            made = make()
            if made.untyped_storage().nbytes() == made.nbytes:  # not one of the file's pages
                alive.append(weakref.ref(made.untyped_storage()))
            return made

        return run

    def wrote(_: int) -> None:
        nonlocal most
        gc.collect()
        most = max(most, sum(ref() is not None for ref in alive))

    made = entries(folder, foreign, formed, torch.float32)
    made = [type(e)(e.key, e.shape, watched(e.make), e.first, e.rows) for e in made]
    write_checkpoint(source.parent / "w", formed.config, made, torch.float32, {}, wrote)
    assert len(alive) > 8 and most <= 2
