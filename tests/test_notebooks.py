"""The notebooks run from top to bottom, and are stored with the outputs of such a run."""

import base64
import os
import re

import nbformat
import pytest

from notebooks.execute import GITHUB_OWNER, execute, notebook_paths, set_parameters
from tests.helpers.commands import REPOSITORY
from tests.helpers.xla_flags import QUICK

MAX_IMAGE_BYTES = 150_000  # of all images of a notebook
SMALL = {
    "read_a_tokenizer": {"NUM_IMAGES": 40},
    "sample_and_edit": {},
    "your_own_pictures": {
        "NUM_PICTURES": 80,
        "TOKENIZER_STEPS": 2,
        "VAR_STEPS": 2,
        "SCALES": (1, 4),
        "CH_MULT": (1,),
        "DEPTH": 1,
    },
}
every_notebook = pytest.mark.parametrize("path", notebook_paths(), ids=lambda path: path.stem)


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def images(notebook) -> list[bytes]:
    outputs = [output.get("data", {}) for cell in code_cells(notebook) for output in cell.outputs]
    return [base64.b64decode(data["image/png"]) for data in outputs if "image/png" in data]


def was_run_in_order(notebook) -> bool:
    counts = [cell.execution_count for cell in code_cells(notebook)]
    return counts == list(range(1, len(counts) + 1))


def test_every_notebook_has_small_parameters():
    assert {path.stem for path in notebook_paths()} == SMALL.keys()


@every_notebook
def test_runs_top_to_bottom_and_draws_as_many_pictures_as_are_stored(path, request, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    stored = len(images(notebook))
    for cell in code_cells(notebook):
        cell.outputs, cell.execution_count = [], None
    set_parameters(notebook, SMALL[path.stem])
    if path.stem == "sample_and_edit":  # a tiny run compiles faster than the digits
        set_parameters(notebook, {"MODEL": str(request.getfixturevalue("tiny_run"))})
    execute(notebook, tmp_path, {**os.environ, "XLA_FLAGS": QUICK})
    assert was_run_in_order(notebook) and len(images(notebook)) == stored


@every_notebook
def test_is_stored_valid_with_small_outputs_of_a_run_without_errors(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert was_run_in_order(notebook)
    kinds = {output.output_type for cell in code_cells(notebook) for output in cell.outputs}
    assert kinds <= {"stream", "display_data", "execute_result"}  # no error
    assert len(images(notebook)) >= 4 and sum(map(len, images(notebook))) <= MAX_IMAGE_BYTES


@every_notebook
def test_names_the_repository_in_its_badge_and_its_setup(path):
    cells = nbformat.read(path, as_version=4).cells
    badge = f"colab.research.google.com/github/{GITHUB_OWNER}/var_jax/blob/main/notebooks/{path.name}"
    assert badge in cells[0].source
    assert f"https://github.com/{GITHUB_OWNER}/var_jax" in cells[1].source


@every_notebook
def test_names_files_that_exist(path):
    text = "".join(cell.source for cell in nbformat.read(path, as_version=4).cells)
    files = re.findall(r"[`(]((?:docs|var_jax|configs)/[\w/]+\.(?:md|py)|\w+\.ipynb|\.\./\S+)[`)]", text)
    assert len(files) >= 3
    for file in files:
        assert (path.parent / file).exists() or (REPOSITORY / file).exists(), file


def test_a_parameter_that_the_notebook_lacks_is_refused():
    notebook = nbformat.read(notebook_paths()[0], as_version=4)
    with pytest.raises(ValueError, match="assign STEPS once, got 0"):
        set_parameters(notebook, {"STEPS": 1})
