"""Imports point one way: a room imports rooms of earlier lines, and none of its own line but itself."""

import ast

from tests.helpers.commands import REPOSITORY

ROOMS = """errors
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
tools"""
LINE = {room: number for number, rooms in enumerate(ROOMS.splitlines()) for room in rooms.split()}


def test_imports_point_one_way():
    for path in sorted((REPOSITORY / "var_jax").rglob("*.py")):
        room = path.relative_to(REPOSITORY / "var_jax").parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Import | ast.ImportFrom) or room == "__init__":
                continue
            names = [a.name for a in node.names]
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{name}" for name in names]
            for name in names:
                top, other = [*name.split("."), "api"][:2]  # var_jax itself has the API
                assert top not in ("configs", "benchmarks", "experiments", "tests"), f"{path} imports {name}"
                if top == "var_jax" and other != room:
                    assert LINE[other] < LINE[room], f"{path}: {room} imports {name}"
