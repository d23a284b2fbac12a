"""Whether DeepSpeed's CPU Adam can be built here: a mark for the tests that need it."""

from __future__ import annotations

import os
import shutil
import sysconfig
from importlib.util import find_spec

import pytest


def _missing() -> str:
    path = os.pathsep.join([os.environ.get("PATH", ""), sysconfig.get_path("scripts")])
    if find_spec("deepspeed") is None:
        return "DeepSpeed is not installed (extra 'gpu')"
    for tool in ((os.environ.get("CXX") or "c++").split()[0], "ninja"):
        if shutil.which(tool, path=path) is None:
            return f"DeepSpeed's CPU Adam is built on first use and there is no {tool}"
    return ""


needs_operator = pytest.mark.skipif(bool(_missing()), reason=_missing())
