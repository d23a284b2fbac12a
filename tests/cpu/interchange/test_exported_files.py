"""What stands in an exported folder: to the bit what was saved, in files of the size asked for; and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from moue_dist.config import Config, ConfigError
from moue_dist.config.load import dump_config
from moue_dist.interchange.outgoing import entries
from moue_dist.interchange.outgoing.export import export
from tests.cpu.interchange.trained import BFLOAT, MOUE, PLAIN, Folders, Made


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def read_back(theirs: dict[str, Tensor], config: Config, form: str) -> dict[str, Tensor]:
    """Our weights by global name from a folder's tensors, each of which must be used once."""
    m, e, left, ours = config.model, config.moe, dict(theirs), {}
    groups = m.kv_heads or m.heads
    ours["embedding.word_embeddings.weight"] = left.pop("model.embed_tokens.weight")
    ours["decoder.final_layernorm.weight"] = left.pop("model.norm.weight")
    if not m.tied_head:
        ours["output_layer.weight"] = left.pop("lm_head.weight")
    pool: dict[int, Tensor] = {}
    for i in range(m.layers):
        a, b = f"model.layers.{i}.", f"decoder.layers.{i}."
        ours[b + "input_layernorm.weight"] = left.pop(a + "input_layernorm.weight")
        ours[b + "pre_mlp_layernorm.weight"] = left.pop(a + "post_attention_layernorm.weight")
        q, k, v = (left.pop(f"{a}self_attn.{x}_proj.weight").chunk(groups) for x in "qkv")
        ours[b + "self_attention.linear_qkv.weight"] = torch.cat([x for g in range(groups) for x in (q[g], k[g], v[g])])
        ours[b + "self_attention.linear_proj.weight"] = left.pop(a + "self_attn.o_proj.weight")
        for x in "qk" if m.qk_norm != "none" else "":
            ours[f"{b}self_attention.{x}_layernorm.weight"] = left.pop(f"{a}self_attn.{x}_norm.weight")
        ffn = [(a + "mlp.", b + "mlp.")] if i < m.dense_layers else []
        if i >= m.dense_layers and e.shared_expert_width:
            ffn = [(a + "mlp.shared_expert.", b + "mlp.shared_expert.")]
        for x, y in ffn:
            ours[y + "linear_fc1.weight"] = torch.cat([left.pop(f"{x}{n}_proj.weight") for n in ("gate", "up")])
            ours[y + "linear_fc2.weight"] = left.pop(x + "down_proj.weight")
        for name in [n for n in left if n.startswith(a + "mlp.gate.") and not n.endswith(".mask")]:
            ours[f"{b}mlp.router.{name.rpartition('.')[2]}"] = left.pop(name)
        if form == "plain" and i >= m.dense_layers:
            for column, expert in enumerate(config.topology().windows[i - m.dense_layers]):
                parts = [left.pop(f"{a}mlp.experts.{column}.{n}_proj.weight") for n in ("gate", "up", "down")]
                row = torch.cat([p.flatten() for p in parts])
                assert torch.equal(pool.setdefault(expert, row), row), "layers differ in an expert that they share"
    if form != "plain":
        gate_up, down = left.pop("model.experts.gate_up_proj"), left.pop("model.experts.down_proj")
        pool = {i: torch.cat([gate_up[i].flatten(), down[i].flatten()]) for i in range(e.pool)}
    ours["pool.weight"] = torch.stack([pool[i] for i in range(e.pool)])
    for name in ("keys", "transition", "w_ih", "w_hh"):
        if f"model.shared_router.{name}" in left:
            ours[f"shared_router.{name}"] = left.pop(f"model.shared_router.{name}")
    extra = {"model.shared_router.bias"} | {f"model.layers.{i}.mlp.gate.mask" for i in range(m.layers)}
    assert set(left) <= extra, set(left) - extra
    return ours


def differing(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name in a if a[name].dtype != b[name].dtype or not torch.equal(a[name], b[name])]


@pytest.mark.parametrize("name", MOUE)
def test_what_was_saved_comes_back_to_the_bit(name: str, folders: Folders) -> None:
    made, theirs = folders.made[name], tensors_of(folders.exported[name, "moue"].folder)
    assert differing(read_back(theirs, made.config, "moue"), made.weights) == []
    if made.config.balance.bias:
        assert torch.equal(theirs["model.shared_router.bias"], made.bias_p) and made.bias_p.any()


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_folder_has_each_window_as_experts(name: str, folders: Folders) -> None:
    made, done = folders.made[name], folders.exported[name, "plain"]
    config, theirs = made.config, tensors_of(folders.exported[name, "plain"].folder)
    f, d, scale = config.moe.expert_width, config.model.hidden_size, config.moe.route_scale
    expected = {n: w.clone() for n, w in made.weights.items()}
    expected["pool.weight"][:, 2 * f * d :] *= scale
    assert differing(read_back(theirs, config, "plain"), expected) == []
    experts = sum(t.numel() for n, t in theirs.items() if ".experts." in n)
    assert experts == pytest.approx(done.size_factor * made.weights["pool.weight"].numel())


def test_bf16_is_the_model_that_was_trained_and_fp32_its_masters(folders: Folders, tmp_path: Path) -> None:
    made = folders.made[BFLOAT]
    done = export(made.run, tmp_path / "out", show_progress=False)
    assert done.dtype == "bf16"
    exact = read_back(tensors_of(folders.exported[BFLOAT, "moue"].folder), made.config, "moue")
    half = read_back(tensors_of(done.folder), made.config, "moue")
    assert differing(half, made.weights) == []
    assert {t.dtype for t in exact.values()} == {torch.float32}
    assert differing({n: t.to(made.weights[n].dtype) for n, t in exact.items()}, made.weights) == []
    finer = [n for n, t in exact.items() if not torch.equal(t, made.weights[n].float())]
    assert {"pool.weight", "output_layer.weight", "decoder.layers.0.self_attention.linear_qkv.weight"} <= set(finer)


def test_files_are_cut_and_indexed(folders: Folders) -> None:
    done, whole = folders.exported["moue", "sharded"], folders.exported["moue", "moue"]
    index = json.loads((done.folder / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 4 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    for file in files:
        inside = load_file(done.folder / file)
        assert {n for n, f in index["weight_map"].items() if f == file} == set(inside)
        assert len(inside) == 1 or sum(t.nbytes for t in inside.values()) <= 30_000
    assert differing(tensors_of(done.folder), tensors_of(whole.folder)) == []
    assert index["metadata"]["total_size"] == done.bytes == whole.bytes
    assert not (whole.folder / "model.safetensors.index.json").exists()


def test_rows_of_the_pool_pass_through_one_by_one(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(entries, "PIECE", 1)
    export(folders.made["moue"].run, tmp_path / "out", show_progress=False)
    mine, whole = tmp_path / "out" / "model.safetensors", folders.exported["moue", "moue"].folder / "model.safetensors"
    assert mine.read_bytes() == whole.read_bytes()


# refusals


def copy_of(made: Made, to: Path, config: Config | None = None) -> Path:
    shutil.copytree(made.run, to)
    if config is not None:
        (to / "config.yaml").write_text(dump_config(config))
    return to


def refused(source: Path, out: Path, form: str = "moue") -> str:
    """Why an export is refused; it leaves nothing behind."""
    before = set(out.parent.iterdir())
    with pytest.raises(ConfigError) as error:
        export(source, out, form, show_progress=False)  # type: ignore[arg-type]
    assert set(out.parent.iterdir()) == before
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("moue", "moe.router=universal"),
        ("recurrent", "moe.router=recurrent"),
        ("unipool", "moe.router=norm"),
        ("deepseek", "moe.router=sigmoid"),
        ("qwen", "moe.shared_expert_width=16"),
        ("mixtral", "balance.bias"),
        ("olmoe", "model.qk_norm=all"),
        ("converted", "moe.mask_steps=4"),
    ],
)
def test_what_qwen3_moe_is_not_is_refused(name: str, says: str, folders: Folders, tmp_path: Path) -> None:
    message = refused(folders.made[name].run, tmp_path / "out", "plain")
    assert says in message and "--form moue" in message


def test_a_folder_that_is_there_is_left_alone(folders: Folders, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert "is there already" in refused(folders.made["plain"].run, tmp_path / "out")


def test_what_is_no_run_is_refused(folders: Folders, tmp_path: Path) -> None:
    assert "no such folder" in refused(tmp_path / "gone", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    assert "no checkpoint in" in refused(tmp_path / "empty", tmp_path / "out")
    run = copy_of(folders.made["plain"], tmp_path / "run")
    (run / "config.yaml").unlink()
    assert "config.yaml is missing" in refused(run, tmp_path / "out")


def test_a_checkpoint_that_is_not_whole_is_refused(folders: Folders, tmp_path: Path) -> None:
    run = copy_of(folders.made["deepseek"], tmp_path / "run")
    (step,) = (run / "checkpoints").glob("step_*")
    for name, says in (("common.pt", "common.pt cannot be read"), (".metadata", ".metadata cannot be read")):
        kept = (step / name).read_bytes()
        (step / name).write_bytes(kept[: len(kept) // 2])
        assert says in refused(run, tmp_path / "out")
        (step / name).write_bytes(kept)
    for part in step.glob("*.distcp"):
        part.write_bytes(part.read_bytes()[: part.stat().st_size // 3])
    assert "is broken: " in refused(run, tmp_path / "out")
    half = step.with_name(f".writing_{step.name}")
    step.rename(half)
    (half / "moue.json").unlink()
    assert "not a complete checkpoint" in refused(half, tmp_path / "out")
    assert "not a complete checkpoint" in refused(run, tmp_path / "out")  # `latest` names it


def test_a_configuration_of_another_model_is_refused(folders: Folders, tmp_path: Path) -> None:
    made = folders.made["dense first"]
    wider = replace(made.config, model=replace(made.config.model, ffn_hidden_size=48))
    assert "linear_fc1.weight in the shape" in refused(copy_of(made, tmp_path / "a", wider), tmp_path / "out")
    deeper = replace(made.config, model=replace(made.config.model, layers=5))
    assert "model.layers=4" in refused(copy_of(made, tmp_path / "b", deeper), tmp_path / "out")
    random = replace(made.config, moe=replace(made.config.moe, force_balance=True))
    assert "moe.force_balance" in refused(copy_of(made, tmp_path / "c", random), tmp_path / "out")


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(folders: Folders, tmp_path: Path) -> None:
    from moue_dist.interchange.outgoing import vocabulary
    from moue_dist.interchange.outgoing.export import _check_vocabulary

    config = folders.made["plain"].config
    small = replace(config, model=replace(config.model, vocab_size=255))
    with pytest.raises(ConfigError, match=r"256 tokens, more than model\.vocab_size=255"):
        _check_vocabulary(small, vocabulary.of_bytes())
