"""transformers' own common tests, over our models."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_transformers_common_tests_pass(tmp_path):
    """Those of the installed release; skipped, with the reason, where its source distribution can't be had.
    HF_VS2_COMMON_TESTS names a folder that keeps it."""
    script = Path(__file__).parents[2] / "scripts" / "common_tests.py"
    cache = os.environ.get("HF_VS2_COMMON_TESTS", str(tmp_path))
    done = subprocess.run([sys.executable, str(script), "--cache", cache], capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout[-4000:]
