"""Files of the repository that no program reads here: they parse, and say the same as the code."""

import re
import tomllib

import yaml

import var_jax
from tests.helpers.commands import REPOSITORY

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


def read_yaml(path: str) -> dict:
    return yaml.safe_load((REPOSITORY / path).read_text())


def test_version_and_license_are_the_same_everywhere():
    citation = read_yaml("CITATION.cff")
    assert citation["version"] == var_jax.__version__ and citation["title"] == PROJECT["name"]
    assert citation["license"] == PROJECT["license"] == "Apache-2.0"
    assert citation["references"][0]["identifiers"][0]["value"] == "arXiv:2404.02905"
    newest = re.search(r"^## \[(.+?)\]", (REPOSITORY / "CHANGELOG.md").read_text(), re.M)
    assert newest[1] == var_jax.__version__


def test_the_workflow_runs_what_the_makefile_has_on_versions_that_the_package_names():
    jobs = read_yaml(".github/workflows/ci.yml")["jobs"]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    targets = re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(), re.M)
    made = [command.split()[1] for command in commands if command.startswith("make ")]
    assert made == ["test", "check-gpu", "docs"] and set(made) <= {*targets}
    for version in jobs["test"]["strategy"]["matrix"]["python"]:
        assert f"Programming Language :: Python :: {version}" in PROJECT["classifiers"]


def test_hooks_before_a_commit_are_of_fixed_versions():
    hooks = {
        hook["id"]: repo["rev"]
        for repo in read_yaml(".pre-commit-config.yaml")["repos"]
        for hook in repo["hooks"]
    }
    assert hooks.keys() == {"ruff-check", "ruff-format", "codespell"}
    assert all(re.fullmatch(r"v\d+\.\d+\.\d+", version) for version in hooks.values())


def test_files_that_the_recipes_for_contributors_name_exist():
    text = (REPOSITORY / "CONTRIBUTING.md").read_text()
    paths = re.findall(r"`((?:var_jax|tests|benchmarks|experiments)/[\w/.]+)`", text)
    assert len(paths) > 15
    for path in paths:
        assert "NAME" in path or (REPOSITORY / path).exists(), path
