"""The commit of a checkout, and none where there is no checkout or no git."""

import re
import subprocess

import pytest

from var_jax.training.software import describe_software, git_commit


@pytest.fixture
def checkout(tmp_path):
    """Repository with a committed package, and an installation that is not tracked."""
    for name in ("package", "site-packages"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("")
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    for command in (("init",), ("add", "package"), (*identity, "commit", "--no-verify", "-m", "first")):
        subprocess.run(("git", *command), cwd=tmp_path, check=True, capture_output=True)
    return tmp_path


def test_the_commit_is_that_of_the_checkout_and_says_whether_files_were_changed(checkout):
    commit = git_commit(checkout / "package")
    assert re.fullmatch(r"[0-9a-f]{40}", commit)
    (checkout / "package" / "__init__.py").write_text("changed = 1")
    assert git_commit(checkout / "package") == f"{commit}-dirty"


def test_there_is_no_commit_without_a_checkout_or_without_git(checkout, tmp_path_factory, monkeypatch):
    assert git_commit(checkout / "site-packages") == ""  # in an environment of another repository
    assert git_commit(tmp_path_factory.mktemp("elsewhere")) == ""
    monkeypatch.setenv("PATH", "")
    assert git_commit(checkout / "package") == ""
    assert {"python", "jax", "flax"} <= describe_software().keys() and "commit" not in describe_software()
