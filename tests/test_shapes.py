"""The shapes in the annotations of the networks are true: they are checked at run time, in a process."""

from tests.helpers.commands import command

CHECKED = ("var_jax.tokenizer", "var_jax.transformer", "var_jax.sampling")
# The import hook checks modules that are imported after it: before pytest loads conftest.py, which does.
RUN = f"""
import sys
from jaxtyping import install_import_hook
install_import_hook({CHECKED}, "beartype.beartype")
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""


def test_annotated_shapes_hold_and_a_wrong_one_is_named():
    options = ("-q", "-x", "-p", "no:xdist", "-p", "no:cacheprovider")
    done = command("-c", RUN, *options, "tests/helpers/shape_checks.py")
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]
