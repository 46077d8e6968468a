"""Imports point one way: a layer imports layers of earlier lines, and none of its own line but itself."""

import ast

from tests.helpers.commands import REPOSITORY

LAYERS = """errors installation conditions
paths dtypes
scales images sharding
tokenizer transformer
sampling
data
evaluation
training
interop
stages api
cli
tools
app"""
RANK = {layer: number for number, layers in enumerate(LAYERS.splitlines()) for layer in layers.split()}


def test_imports_point_one_way():
    for path in sorted((REPOSITORY / "var_jax").rglob("*.py")):
        layer = path.relative_to(REPOSITORY / "var_jax").parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Import | ast.ImportFrom) or layer == "__init__":
                continue
            names = [a.name for a in node.names]
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{name}" for name in names]
            for name in names:
                top, other = [*name.split("."), "api"][:2]  # var_jax itself has the API
                assert top not in ("configs", "benchmarks", "experiments", "tests"), f"{path} imports {name}"
                if top == "var_jax" and other != layer:
                    assert RANK[other] < RANK[layer], f"{path}: {layer} imports {name}"
