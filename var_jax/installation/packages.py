"""Check the versions of installed packages against the ranges that var_jax and JAX declare."""

import dataclasses
import importlib.metadata
import platform
from collections.abc import Iterator, Mapping

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from var_jax.installation.check import Check, fail, ok, warn

PROJECT = "var-jax"
NEWEST_TESTED_PYTHON = "3.13"
# Packages of an accelerator, and the extra of var_jax (and of JAX) that brings them.
PLUGINS = {"jax-cuda12-plugin": "cuda12", "jax-cuda13-plugin": "cuda13", "libtpu": "tpu"}
USER_EXTRAS = ("app", "gcs", "hub", "torch", "wandb", "cuda12", "cuda13", "tpu")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Package:
    """Metadata of an installed distribution.

    Attributes:
      version: its version.
      requires: its requirements, with their markers.
      requires_python: range of Python versions; empty for any.
    """

    version: str
    requires: tuple[Requirement, ...] = ()
    requires_python: str = ""


def installed_packages() -> dict[str, Package]:
    """Return all installed distributions by their normalized names."""
    packages: dict[str, Package] = {}
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata.get("Name")
        if name and canonicalize_name(name) not in packages:  # the first on the path is the one imported
            packages[canonicalize_name(name)] = Package(
                version=distribution.version,
                requires=tuple(map(Requirement, distribution.requires or ())),
                requires_python=distribution.metadata.get("Requires-Python", ""),
            )
    return packages


def check_packages() -> list[Check]:
    """Check Python, the dependencies, JAX's plugins, and list the extras."""
    packages = installed_packages()
    if PROJECT not in packages:
        return [fail("packages", "var_jax is not installed: the ranges are unknown", "pip install -e .")]
    return [
        check_python(packages[PROJECT].requires_python, platform.python_version()),
        *check_dependencies(packages),
        *check_plugins(packages),
        list_extras(packages),
    ]


def check_python(requires_python: str, version: str) -> Check:
    """Check the version of Python."""
    if not SpecifierSet(requires_python).contains(version, prereleases=True):
        advice = f"make an environment with Python 3.11 to {NEWEST_TESTED_PYTHON}"
        return fail("Python", f"{version}; var_jax needs {requires_python}", advice)
    if Version(version).release[:2] > Version(NEWEST_TESTED_PYTHON).release:
        return warn(
            "Python",
            f"{version} is newer than any that was tested",
            f"prefer Python {NEWEST_TESTED_PYTHON}",
        )
    return ok("Python", version)


def requirements(package: Package, extras: frozenset[str] = frozenset()) -> Iterator[Requirement]:
    """Yield the requirements of a package that apply here, with those of some of its extras."""
    for requirement in package.requires:
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras | {""}):
            yield requirement


def mismatch(requirement: Requirement, packages: Mapping[str, Package]) -> str | None:
    """Return how an installed package differs from a requirement; None if it meets it."""
    package = packages.get(canonicalize_name(requirement.name))
    if package is None:
        return "is missing"
    if not requirement.specifier.contains(package.version, prereleases=True):
        return f"{package.version} is installed"
    return None


def check_dependencies(packages: Mapping[str, Package]) -> list[Check]:
    """Check the dependencies, and theirs: direct ones and those of JAX must fit, others should."""
    unmet: dict[str, list[tuple[str, Requirement]]] = {}
    queue = [(PROJECT, frozenset[str]())]
    visited = set(queue)
    for name, extras in queue:  # grows
        for requirement in requirements(packages[name], extras):
            dependency = canonicalize_name(requirement.name)
            if mismatch(requirement, packages):
                unmet.setdefault(dependency, []).append((name, requirement))
            node = (dependency, frozenset(requirement.extras))
            if dependency in packages and node not in visited:
                visited.add(node)
                queue.append(node)
    if unmet:
        return [describe_unmet(name, needs, packages) for name, needs in unmet.items()]
    versions = ", ".join(f"{name} {packages[name].version}" for name in ("jax", "jaxlib", "flax"))
    return [ok("packages", f"{len({name for name, _ in visited}) - 1} dependencies fit: {versions}")]


def describe_unmet(name: str, needs: list[tuple[str, Requirement]], packages: Mapping[str, Package]) -> Check:
    """Return the check of a package that does not meet `needs`: pairs of a package and its requirement."""
    direct = [(user, requirement) for user, requirement in needs if user in (PROJECT, "jax")]
    ranges = SpecifierSet(",".join(str(requirement.specifier) for _, requirement in direct or needs))
    users = ", ".join(sorted({user.replace(PROJECT, "var_jax") for user, _ in direct or needs}))
    message = f"{mismatch(needs[0][1], packages)}; {users} needs {ranges or 'any version'}"
    return (fail if direct else warn)(name, message, f"pip install '{name}{ranges}'")


def cuda_plugins(packages: Mapping[str, Package]) -> list[int]:
    """Return the major versions of CUDA whose plugins are installed."""
    return [major for major in (12, 13) if f"jax-cuda{major}-plugin" in packages]


def check_plugins(packages: Mapping[str, Package]) -> list[Check]:
    """Check that the installed plugins of JAX, and libraries of NVIDIA, are of versions that fit."""
    if "jax" not in packages:
        return []
    checks = []
    for plugin, extra in PLUGINS.items():
        if plugin not in packages:
            continue
        wanted = [
            requirement
            for requirement in requirements(packages["jax"], frozenset({extra}))
            if canonicalize_name(requirement.name) == plugin
        ]
        # With a CUDA of the system, the wheels of NVIDIA are not installed.
        libraries = [
            requirement
            for requirement in requirements(packages[plugin], frozenset({"with-cuda"}))
            if canonicalize_name(requirement.name) in packages or "pjrt" in requirement.name
        ]
        problems = [
            f"{requirement.name} {problem}, needed is {requirement.specifier}"
            for requirement in (*wanted, *libraries)
            if (problem := mismatch(requirement, packages))
        ]
        jax_version = packages["jax"].version
        if problems:
            advice = f"pip install 'jax[{extra}]=={jax_version}'"
            checks += [fail(plugin, problem, advice) for problem in problems]
        else:
            checks.append(ok(plugin, f"{packages[plugin].version} fits jax {jax_version}"))
    if len(cuda_plugins(packages)) > 1:
        advice = "pip uninstall the packages of one of them (jax-cuda12-plugin and jax-cuda12-pjrt)"
        checks.append(fail("CUDA", "the plugins of CUDA 12 and of CUDA 13 are both installed", advice))
    return checks


def list_extras(packages: Mapping[str, Package]) -> Check:
    """List which extras of var_jax are installed; none of them is needed."""
    base = {str(requirement) for requirement in requirements(packages[PROJECT])}
    present, absent = [], []
    for extra in USER_EXTRAS:
        wanted = [r for r in requirements(packages[PROJECT], frozenset({extra})) if str(r) not in base]
        if extra in PLUGINS.values():
            (plugin,) = (name for name, value in PLUGINS.items() if value == extra)
            is_present = plugin in packages
        else:
            is_present = bool(wanted) and not any(mismatch(requirement, packages) for requirement in wanted)
        (present if is_present else absent).append(extra)
    return ok("extras", f"present: {', '.join(present) or 'none'}; absent: {', '.join(absent) or 'none'}")
