"""The pipeline that runs for a week."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is measured through /proc")
def test_memory_stays_flat(tmp_path):
    """A server that grows with every request is killed in the end: 4,000 images with 40 label sets take no more than 400 do."""
    script = Path(__file__).parents[2] / "benchmarks" / "soak.py"
    report = tmp_path / "soak.json"
    sizes = ["--num_images", "4000", "--num_label_sets", "40", "--threads", "1", "--device", "cpu"]
    subprocess.run([sys.executable, str(script), *sizes, "--output", str(report)], check=True, timeout=550)
    memory = [row["resident_mb"] for row in json.loads(report.read_text())["rows"]]
    assert len(memory) == 10
    assert memory[-1] - memory[1] < 10, memory
