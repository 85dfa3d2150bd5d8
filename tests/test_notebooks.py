"""The notebooks of examples/notebooks run from top to bottom, offline, and are saved with what they print and draw."""

import re
from pathlib import Path

import pytest


nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

NOTEBOOKS = sorted((Path(__file__).parents[1] / "examples" / "notebooks").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path):
    """A reader who runs its cells in order must not meet an error, a warning, or a cell that shows nothing where text refers to it."""
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any(output.output_type in ("stream", "execute_result") for output in outputs)
    said = "".join(output.text for output in outputs if output.get("name") == "stderr")
    # tqdm's is about ipywidgets, which nothing here needs.
    warned = [line for line in said.splitlines() if "Warning" in line and "TqdmWarning" not in line]
    assert not warned, warned[0]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_saved_with_results_alone(path):
    """Most people read a notebook where it can't be run. (Paths of one machine: tests/test_package.py.)"""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in code:
        compile(cell.source, path.name, "exec")
        assert cell.execution_count is None
        said = [output.get("text", "") for output in cell.outputs]
        assert all(output.get("name") != "stderr" and output.output_type != "error" for output in cell.outputs)
        assert not re.search(r"Warning|it/s|object at 0x", "".join(said))
        assert cell.outputs or "print(" not in cell.source, f"run python scripts/run_notebooks.py: {cell.source[:60]}"
    assert sum(len(cell.outputs) > 0 for cell in code) >= 3
    assert sum(cell.cell_type == "markdown" for cell in notebook.cells) >= 4
