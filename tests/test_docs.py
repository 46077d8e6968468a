"""The README is short and its map of the code is right; links of the docs lead somewhere."""

import ast
import re

import pytest

from tests.helpers.commands import REPOSITORY

README = REPOSITORY / "README.md"
PAGES = [README, *(REPOSITORY / folder / "README.md" for folder in ("launch", "notebooks"))]
PAGES += REPOSITORY.glob("experiments/*/README.md")
PAGES += (REPOSITORY / "docs").rglob("*.md")


def journey(title: str) -> list[str]:
    """Paths of the modules that the README lists under a title of its map of the code."""
    block = README.read_text().split("## Map of the code")[1].split("```")[1]
    lines = block.split(f"{title}\n")[1].split("\n\n")[0].splitlines()
    return [line.split()[0] for line in lines]


def imported_files(path: str) -> set[str]:
    """Files that a module imports, and those that the packages among them import in their `__init__`."""
    names = set()
    for node in ast.walk(ast.parse((REPOSITORY / path).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    bases = [name.replace(".", "/") for name in names]
    files = {f"{base}{end}" for base in bases for end in (".py", "/__init__.py")}
    files = {file for file in files if (REPOSITORY / file).is_file()}
    return files.union(*(imported_files(file) for file in files if file.endswith("__init__.py")))


@pytest.mark.parametrize("title", ["file -> loss", "label -> image"])
def test_the_map_follows_the_imports_and_comes_back_to_a_module_at_most_twice(title):
    modules = journey(title)
    assert 5 <= len(modules) <= 14 and len(set(modules)) == len(modules)
    imported, path, returns = set(), [], dict.fromkeys(modules, 0)
    for i, module in enumerate(modules):
        assert (REPOSITORY / module).is_file(), module
        assert i == 0 or module in imported, f"no module before {module} in {title!r} imports it"
        # The reader comes from the last module on the path that imports it; a method of the networks, which
        # are chosen earlier, is called by the module that was read last.
        importers = [i for i, earlier in enumerate(path) if module in imported_files(earlier)]
        if importers and importers[-1] < len(path) - 1:
            path = path[: importers[-1] + 1]
            returns[path[-1]] += 1
        path.append(module)
        imported |= imported_files(module)
    assert max(returns.values()) <= 2, returns


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_relative_links_resolve(page):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path = target.split("#")[0]
        if path and not re.match(r"[a-z]+:", path):
            assert (page.parent / path).exists(), f"{page}: {target}"


def test_readme_is_short():
    assert len(README.read_text().splitlines()) <= 150
