"""Watts and joules of this process's GPU, from NVML; None where there is no GPU or NVML does not answer."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class PowerReading:
    """Since the last reading: mean power and energy. None where nothing can be measured."""

    watts: float | None
    joules: float | None


class PowerMeter:
    """Reads one GPU. `device_index` is torch's: CUDA_VISIBLE_DEVICES (numbers or UUIDs) and the order of devices are
    already applied to it, and NVML, which knows neither, is asked by the device's UUID. None reads nothing.

    Energy comes from the GPU's own counter; where there is none, from the mean of the powers at both ends.
    """

    def __init__(self, device_index: int | None) -> None:
        self._nvml: Any = None
        self._handle: Any = None
        self.note: str | None = None  # why there are no readings
        if device_index is None or not torch.cuda.is_available():
            self.note = "no GPU"
            return
        try:
            import pynvml

            pynvml.nvmlInit()
        except Exception as error:  # the package or the driver's library is absent, or in a container without access
            self.note = f"no NVML: {error}"
            return
        self._nvml = pynvml
        try:
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(nvml_uuid(device_index))
        except pynvml.NVMLError as error:
            self.note = f"NVML does not know GPU {device_index}: {error}"
            self.close()
            return
        self._counts = self._millijoules() is not None
        self._time, self._energy, self._power = time.perf_counter(), self._millijoules(), self._milliwatts()

    def read(self) -> PowerReading:
        """Mean watts and joules since the last call (the first: since construction)."""
        if self._handle is None:
            return PowerReading(None, None)
        now, energy, power = time.perf_counter(), self._millijoules(), self._milliwatts()
        seconds = now - self._time
        joules = None
        if self._counts and energy is not None and self._energy is not None:
            joules = (energy - self._energy) / 1e3
        elif power is not None and self._power is not None:
            joules = (power + self._power) / 2e3 * seconds
        self._time, self._energy, self._power = now, energy, power
        if joules is None or joules < 0 or seconds <= 0:  # the counter starts again when the driver is reloaded
            return PowerReading(None, None)
        return PowerReading(joules / seconds, joules)

    def close(self) -> None:
        """Lets go of NVML; later readings are None."""
        self._handle = None
        if self._nvml is not None:
            self._nvml.nvmlShutdown()
            self._nvml = None

    def _millijoules(self) -> int | None:
        return self._ask(self._nvml.nvmlDeviceGetTotalEnergyConsumption)

    def _milliwatts(self) -> int | None:
        return self._ask(self._nvml.nvmlDeviceGetPowerUsage)

    def _ask(self, question: Any) -> int | None:
        try:
            return int(question(self._handle))
        except self._nvml.NVMLError:
            return None


def nvml_uuid(device_index: int) -> str:
    """The UUID by which NVML knows torch's device `device_index`, as 'GPU-...'."""
    uuid = str(torch.cuda.get_device_properties(device_index).uuid)
    return uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
