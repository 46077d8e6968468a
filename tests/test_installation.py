"""The wheel, installed where there is no checkout: the API and the commands, in an empty folder."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import numpy as np
import pytest

import var_jax
from tests.helpers.arrays import all_tokens
from tests.helpers.commands import REPOSITORY
from tests.helpers.xla_flags import QUICK

FOLDERS = ("var_jax", "benchmarks", "experiments", "examples", "configs", "tests")
TOOLS = ("prepare", "encode_dataset", "convert", "export", "edit", "vary", "judge_digits", "report")


def checked(*command, **more) -> str:
    """Output of a command that must succeed."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600, **more)
    assert done.returncode == 0, f"{command}: {done.stdout[-1000:]}{done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Build from links to the checkout: it stays clean, and its old builds are not reused."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for path in (*FOLDERS, "pyproject.toml", "setup.py", "README.md", "LICENSE"):
        (source / path).symlink_to(REPOSITORY / path)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input")
    checked(*pip, "wheel", "--no-deps", "--wheel-dir", folder, source)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """Runs Python of a fresh environment that has the wheel, and the dependencies of the running one."""
    folder = tmp_path_factory.mktemp("installation")
    checked(sys.executable, "-m", "venv", "--without-pip", folder / "venv")
    executable = folder / "venv" / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "--python", executable)
    checked(*pip, "install", "--no-deps", "--no-compile", wheel)
    site = Path(checked(executable, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # Files *.pth in the folders that are named here are not read: an editable installation stays unseen.
    paths = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
    (site / "dependencies.pth").write_text("\n".join(sorted(paths)))
    (folder / "empty").mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["XLA_FLAGS"] = QUICK

    def start(*arguments) -> subprocess.Popen:
        return subprocess.Popen(
            [executable, *arguments],
            cwd=folder / "empty",
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    return start


def test_the_wheel_holds_the_library_alone_and_says_that_it_has_types(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    version = var_jax.__version__
    assert wheel.name == f"var_jax-{version}-py3-none-any.whl"
    assert {name.split("/")[0] for name in names} == {"var_jax", f"var_jax-{version}.dist-info"}
    assert {"var_jax/py.typed", "var_jax/tools/report.css"} <= {*names}
    modules = {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "var_jax").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules


def test_published_files_are_sampled_from(python, goldens):
    """Greedy tokens are the golden ones."""
    program = f"""if True:
        from importlib.metadata import version
        import numpy as np
        import var_jax
        tokenizer = var_jax.load_tokenizer("{goldens}/vae.pth", scales=(1, 2, 3, 4))
        model = var_jax.load_var("{goldens}/var.pth", tokenizer=tokenizer)
        label = np.load("{goldens}/var.npz")["label"]
        images, tokens = model.generate(label, guidance=1.5, top_k=1, top_p=0, return_tokens=True)
        assert images.shape == (3, 64, 64, 3), images.shape
        print(var_jax.__file__, var_jax.__version__, version("var_jax"), *tokens.ravel())"""
    process = python("-W", "error::DeprecationWarning:var_jax", "-c", program)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    file, *versions, tokens = output.split(maxsplit=3)
    assert "/venv/lib/" in file and versions == [var_jax.__version__] * 2
    with np.load(goldens / "var.npz") as arrays:
        want = all_tokens(arrays, "cfg1.5_tokens")
    np.testing.assert_array_equal(np.array(tokens.split(), int).reshape(want.shape), want)


def test_every_tool_explains_itself(python):
    folder = REPOSITORY / "var_jax" / "tools"
    assert {path.stem for path in folder.glob("*.py") if "__main__" in path.read_text()} == {*TOOLS}
    processes = {tool: python("-m", f"var_jax.tools.{tool}", "--help") for tool in TOOLS}
    for tool, process in processes.items():
        output, _ = process.communicate(timeout=600)
        assert "Traceback" not in output and f"python -m var_jax.tools.{tool}" in output, output
        assert process.returncode in (0, 1), output  # absl ends --help with 1
