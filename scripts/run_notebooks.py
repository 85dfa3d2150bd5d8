"""Run the notebooks of examples/notebooks and save them with what they print and draw, free of this machine:

python scripts/run_notebooks.py
"""

import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient


NOTEBOOKS = Path(__file__).parents[1] / "examples" / "notebooks"


def main() -> None:
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        with tempfile.TemporaryDirectory() as folder:
            client = NotebookClient(
                notebook, timeout=600, record_timing=False, resources={"metadata": {"path": folder}}
            )
            client.execute()
        clean(notebook)
        nbformat.write(notebook, path)
        print(path.name)


def clean(notebook: nbformat.NotebookNode) -> None:
    """Only results stay: no progress or warning, no number of the run, no version of this Python."""
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.execution_count = None
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                output.pop("execution_count", None)
                if output.output_type == "execute_result":
                    output.execution_count = None


if __name__ == "__main__":
    main()
