"""Imported once by the fork server of `spawn.py`: every rank then starts with torch and megatron-core in memory."""

import gc

from moue_dist.parallel.megatron import cpu_host

cpu_host.install()

import megatron.core.models.gpt  # noqa: E402
import megatron.core.parallel_state  # noqa: E402, F401
import torch  # noqa: E402, F401

gc.collect()
gc.freeze()  # ranks collect after every case: what all of them start with need not be looked at each time
