"""The notebook runs from its first cell to its last, on the bundled images and the zoo's models.

And once more, as people do who come back to it.
"""

import os
import sys
from pathlib import Path

import pytest

from helpers import CHECKOUT

nbformat = pytest.importorskip("nbformat", reason='pip install -e ".[dev]" brings nbclient')
nbclient = pytest.importorskip("nbclient", reason='pip install -e ".[dev]" brings nbclient')
pytest.importorskip("ipykernel", reason='pip install -e ".[dev]" brings ipykernel')

PATH = CHECKOUT / "docs" / "own_photos.ipynb"
# what is offline and quick; `gld-zoo` is this environment's
PARAMETERS = (
    'FOLDER, TEACHER, STUDENT = None, "gld_wrn16_2", "gld_wrn16_1"\n'
    'RUN, IMAGE_SIZE, EPOCHS = "my runs/photos", 32, 2'
)


def tagged(notebook, tag):
    (cell,) = (cell for cell in notebook.cells if tag in cell.metadata.get("tags", []))
    return cell


def test_it_is_kept_without_outputs():
    notebook = nbformat.read(PATH, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    assert "pip install" in tagged(notebook, "install").source


@pytest.mark.slow
def test_it_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(CHECKOUT))
    monkeypatch.setenv("GLD_ZOO_CACHE", str(tmp_path / "cache"))
    notebook = nbformat.read(PATH, as_version=4)
    tagged(notebook, "install").source = ""
    tagged(notebook, "parameters").source = PARAMETERS
    printed = executed(notebook, tmp_path)
    assert "10 classes" in printed
    assert "fitting a linear head" in printed
    assert "'apple'" in printed.replace('"', "'")
    assert "agrees %" in printed
    assert "worst 5 classes" in printed
    assert (tmp_path / "hub_folder" / "model.safetensors").is_file()
    assert (tmp_path / "seen.png").is_file()
    again = executed(notebook, tmp_path)
    assert again.count("holds a finished run; nothing to resume") == 2


def executed(notebook, folder):
    """Return what its cells print; none of them, and no command in them, may fail."""
    resources = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(notebook, timeout=200, resources=resources).execute()
    printed = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])
    )
    assert "error:" not in printed, printed
    return printed
