"""The lock file, the images and the docs name versions within the ranges of pyproject.toml."""

import re
import shlex
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.helpers.commands import REPOSITORY

METADATA = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
PROJECT = METADATA["project"]
EXTRAS = PROJECT["optional-dependencies"]
PYTHONS = ("3.11", "3.12", "3.13")
DOCKERFILES = ("gpu", "tpu")


def locked(python: str) -> dict[str, Requirement]:
    """Packages that the lock file pins for a Python on Linux."""
    text = (REPOSITORY / "requirements" / "demo.txt").read_text().replace("\\\n", " ")
    environment = {"python_version": python, "python_full_version": f"{python}.1", "sys_platform": "linux"}
    pins = {}
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        requirement, *hashes = re.split(r"\s+--hash=", line)
        assert hashes and all(re.fullmatch(r"sha256:[0-9a-f]{64}\s*", digest) for digest in hashes), line
        pin = Requirement(requirement)
        if pin.marker is None or pin.marker.evaluate(environment):
            name = canonicalize_name(pin.name)
            assert name not in pins and str(pin.specifier).startswith("=="), line
            pins[name] = pin
    return pins


def version(pin: Requirement) -> str:
    return str(pin.specifier).removeprefix("==")


@pytest.mark.parametrize("python", PYTHONS)
def test_the_lock_file_pins_every_dependency_within_its_range(python):
    pins = locked(python)
    for text in (*PROJECT["dependencies"], *METADATA["build-system"]["requires"]):
        requirement = Requirement(text)
        pin = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version(pin)), f"{pin} is not in {requirement}: run `make lock`"
    assert pins["jax"].specifier == pins["jaxlib"].specifier
    assert version(pins["jax"]).startswith("0.10" if python == "3.11" else "0.11")


def instructions(image: str) -> list[tuple[str, str]]:
    text = (REPOSITORY / "docker" / f"{image}.Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in lines]


@pytest.mark.parametrize("image", DOCKERFILES)
def test_images_are_of_files_that_exist_and_versions_that_are_locked(image):
    steps = instructions(image)
    words = [word for word, _ in steps]
    python = re.fullmatch(r"python:(3\.\d+)-slim-bookworm", dict(steps)["FROM"])[1]
    assert f"Programming Language :: Python :: {python}" in PROJECT["classifiers"]
    assert dict(steps)["ARG"] == f"JAX_VERSION={version(locked(python)['jax'])}"
    ignored = (REPOSITORY / ".dockerignore").read_text().splitlines()
    for source in [value.split()[0] for word, value in steps if word == "COPY"]:
        assert (REPOSITORY / source).exists() and source not in ignored
    runs = [shlex.split(value) for word, value in steps if word == "RUN"]
    for file in [run[i + 1] for run in runs for i, part in enumerate(run) if part == "-r"]:
        assert (REPOSITORY / file).is_file()
    (extra,) = re.findall(
        r'jax\[(\w+)\]=="?\$\{JAX_VERSION\}', (REPOSITORY / f"docker/{image}.Dockerfile").read_text()
    )
    assert EXTRAS[extra] == [f"jax[{extra}]"]
    assert words.index("USER") > max(i for i, word in enumerate(words) if word == "RUN")
    assert dict(steps)["USER"] == "1000"


def test_the_extra_all_has_no_pytorch_and_no_accelerator():
    (requirement,) = map(Requirement, EXTRAS["all"])
    assert requirement.name == PROJECT["name"] and requirement.extras == {"app", "gcs", "hub", "wandb"}
    assert EXTRAS["cuda"] == ["var_jax[cuda12]"]


def test_the_table_of_versions_has_those_that_are_locked():
    text = (REPOSITORY / "docs" / "installation.md").read_text()
    for python in PYTHONS:
        pins = locked(python)
        names = ("jax", "jaxlib", "flax", "orbax-checkpoint")
        row = f"| {python} | " + " | ".join(version(pins[name]) for name in names)
        assert row in text, f"docs/installation.md has no row {row!r}"
