"""Power from NVML, and batches that arrive on the GPU through pinned memory."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from moue_dist.measuring.power import PowerMeter, nvml_uuid

ASK = "from moue_dist.measuring.power import nvml_uuid; print(nvml_uuid(0))"


def test_joules_are_watts_times_seconds() -> None:
    meter = PowerMeter(0)
    assert meter.note is None
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    start = time.perf_counter()
    while time.perf_counter() - start < 2.0:
        a = (a @ a).clamp(-1, 1)
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    busy = meter.read()
    assert busy.watts is not None and busy.joules is not None
    assert busy.joules == pytest.approx(busy.watts * seconds, rel=0.05)
    assert 50 < busy.watts < 2000
    meter.close()
    assert meter.read().watts is None


@pytest.mark.parametrize("by_uuid", [False, True])
def test_visible_devices_are_followed(by_uuid: bool) -> None:
    """With only the last GPU visible, torch's device 0 is that one, however it was named."""
    last = torch.cuda.device_count() - 1
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if not by_uuid and visible != [""] and not all(name.isdigit() for name in visible):
        pytest.skip("devices are named by UUID here")
    number = visible[last] if visible != [""] else str(last)
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": nvml_uuid(last) if by_uuid else number}
    found = subprocess.run([sys.executable, "-c", ASK], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == nvml_uuid(last)


def test_batches_on_the_gpu_equal_those_on_the_host(tmp_path: Path) -> None:
    from moue_dist.config import Config, DataConfig, ModelConfig, TrainConfig
    from moue_dist.data.batches import Batches
    from moue_dist.data.corpus import prepare_corpus
    from moue_dist.data.datasets import build_datasets

    (tmp_path / "text.txt").write_text("\n".join(f"line {i}" for i in range(5000)))
    config = Config(
        model=ModelConfig(sequence_length=64),
        train=TrainConfig(global_batch_size=8, micro_batch_size=2),
        data=DataConfig(source=str(tmp_path / "text.txt")),
    )
    prepare_corpus(config.data, tmp_path / "data", show_progress=False)
    datasets = build_datasets(config, tmp_path / "data", 64, 8)
    host, device = Batches(*datasets, config), Batches(*datasets, config, "cuda")
    for step in range(8):
        for a, b in zip(host.microbatches(step, 0, 1), device.microbatches(step, 0, 1), strict=True):
            assert b["tokens"].is_cuda and b["position_ids"].is_cuda
            assert all(torch.equal(a[name], b[name].cpu()) for name in a)
    host.close()
    device.close()
