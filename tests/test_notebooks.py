"""The notebooks of examples/notebooks run from top to bottom, offline, and are saved without outputs."""

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
def test_notebook_is_saved_without_outputs(path):
    """Outputs are of one machine and one day, make every change unreadable, and may hold paths of a home folder."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None
            compile(cell.source, path.name, "exec")
    assert sum(cell.cell_type == "markdown" for cell in notebook.cells) >= 4
