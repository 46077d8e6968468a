"""Execute the notebooks from top to bottom and store them with their outputs.

    python -m notebooks.execute                                  # all of them
    python -m notebooks.execute notebooks/sample_and_edit.ipynb

Needs the extra `test`.  A notebook runs in an empty temporary folder.  Pictures are stored with 256 colors;
what is written to stderr (progress bars) is not stored.
"""

import argparse
import base64
import io
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image

GITHUB_OWNER = "OWNER"  # placeholder; the badges and setup cells get it when the notebooks are executed
FOLDER = Path(__file__).parent
TIMEOUT = 1800  # seconds that a cell may take


def notebook_paths() -> list[Path]:
    """Return the paths of all notebooks."""
    return sorted(FOLDER.glob("*.ipynb"))


def set_owner(notebook: NotebookNode) -> None:
    """Write the owner of the repository into the addresses of a notebook."""
    for cell in notebook.cells:
        cell.source = re.sub(r"(github(?:\.com)?/)[\w-]+(?=/var_jax\b)", rf"\g<1>{GITHUB_OWNER}", cell.source)


def set_parameters(notebook: NotebookNode, parameters: Mapping[str, object]) -> None:
    """Replace values in the cell tagged `parameters`.

    Args:
      notebook: modified in place.
      parameters: values by the name that the cell assigns.

    Raises:
      ValueError: if there is no such cell, or it does not assign a name once.
    """
    cells = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    if len(cells) != 1:
        raise ValueError(f"a notebook must have one cell tagged `parameters`, got {len(cells)}")
    for name, value in parameters.items():
        before, *after = re.split(rf"^{name} = .*$", cells[0].source, flags=re.MULTILINE)
        if len(after) != 1:
            raise ValueError(f"the cell tagged `parameters` must assign {name} once, got {len(after)} times")
        cells[0].source = f"{before}{name} = {value!r}{after[0]}"


def execute(notebook: NotebookNode, folder: Path, environment: Mapping[str, str] | None = None) -> None:
    """Execute all cells in a new kernel, and store the outputs in the notebook.

    Args:
      notebook: modified in place.
      folder: working directory of the kernel.
      environment: of the kernel; by default that of this process, in which the checkout can be imported.

    Raises:
      CellExecutionError: with the traceback, at the first cell that fails.
    """
    environment = dict(os.environ if environment is None else environment)
    paths = [str(FOLDER.parent), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    client = NotebookClient(
        notebook,
        timeout=TIMEOUT,
        kernel_name="python3",
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute(env=environment)


def reduce_colors(png: str) -> str:
    """Reduce a PNG in base64 to 256 colors, a third of its size."""
    content = io.BytesIO()
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    image.quantize(256).save(content, "PNG", optimize=True)
    return base64.b64encode(content.getvalue()).decode()


def clean(notebook: NotebookNode, folder: Path) -> None:
    """Make outputs small, and remove what differs between machines.

    Args:
      notebook: modified in place.
      folder: working directory of its kernel, removed from the paths in its outputs.
    """
    notebook.metadata = NotebookNode(
        kernelspec=dict(name="python3", display_name="Python 3", language="python"),
        language_info=dict(name="python"),
    )
    for cell in notebook.cells:
        cell.metadata = NotebookNode({k: v for k, v in cell.metadata.items() if k == "tags"})
        if cell.cell_type != "code":
            continue
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        for output in cell.outputs:
            if "text" in output:
                output.text = output.text.replace(f"{folder}/", "")
            data = output.get("data", {})
            if "image/png" in data:
                output.data = NotebookNode({"image/png": reduce_colors(data["image/png"])})
                output.metadata = NotebookNode()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("notebooks", type=Path, nargs="*", help="files; by default all")
    for path in parser.parse_args().notebooks or notebook_paths():
        notebook = nbformat.read(path, as_version=4)
        set_owner(notebook)
        with tempfile.TemporaryDirectory() as folder:
            execute(notebook, Path(folder))
            clean(notebook, Path(folder))
        nbformat.validate(notebook)
        nbformat.write(notebook, path)
        print(f"{path}: {sum(cell.cell_type == 'code' for cell in notebook.cells)} cells executed")


if __name__ == "__main__":
    main()
