"""The source release, and the wheel built from it, where there is no checkout: the API and the commands."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

import var_jax
from tests.helpers.arrays import all_tokens
from tests.helpers.commands import REPOSITORY
from tests.helpers.xla_flags import QUICK

TOOLS = ("prepare", "encode_dataset", "sample_tokens", "convert", "export", "edit", "vary", "judge_digits")
TOOLS += ("report", "doctor")
NOT_RELEASED = (".ci", ".git", ".github", ".gitignore", ".pre-commit-config.yaml")


def checked(*command, **more) -> str:
    """Output of a command that must succeed."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600, **more)
    assert done.returncode == 0, f"{command}: {done.stdout[-1000:]}{done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def source_release(tmp_path_factory) -> Path:
    """Build from links to the checkout: it stays clean, and its old builds are not reused."""
    folder = tmp_path_factory.mktemp("release")
    source = folder / "source"
    source.mkdir()
    generated = {"build", "data", "dist", "runs", "var_jax.egg-info"}
    for path in REPOSITORY.iterdir():
        if path.name not in generated and not path.name.startswith((".venv", ".git")):
            (source / path.name).symlink_to(path)
    program = "import setuptools.build_meta, sys; setuptools.build_meta.build_sdist(sys.argv[1])"
    checked(sys.executable, "-c", program, folder, cwd=source)
    (built,) = folder.glob("*.tar.gz")
    return built


@pytest.fixture(scope="module")
def unpacked(source_release) -> Path:
    with tarfile.open(source_release) as archive:
        archive.extractall(source_release.parent, filter="data")
    return source_release.parent / source_release.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(source_release) -> Path:
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input")
    options = ("--no-deps", "--no-build-isolation", "--wheel-dir", source_release.parent)
    checked(*pip, "wheel", *options, source_release)
    (built,) = source_release.parent.glob("*.whl")
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

    def start(*arguments, cwd: Path = folder / "empty") -> subprocess.Popen:
        return subprocess.Popen(
            [executable, *arguments],
            cwd=cwd,
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
    package = (REPOSITORY / "var_jax").rglob("*")
    files = {str(path.relative_to(REPOSITORY)): path for path in package if path.is_file()}
    files = {name: path for name, path in files.items() if "__pycache__" not in name}
    assert {name for name in names if name.startswith("var_jax/")} == {*files} > {"var_jax/py.typed"}
    with zipfile.ZipFile(wheel) as archive:
        assert all(archive.read(name) == path.read_bytes() for name, path in files.items())


def test_the_source_release_holds_all_that_is_run_from_a_checkout_and_no_pictures(unpacked):
    names = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
    if not (REPOSITORY / ".git").exists():
        pytest.skip("not a clone")
    listing = checked("git", "ls-files", cwd=REPOSITORY).splitlines()
    tracked = {name for name in listing if name.split("/")[0] not in NOT_RELEASED}
    pictures = {
        name for name in tracked if name.endswith(".png") and name.startswith(("docs/", "experiments/"))
    }
    assert len(pictures) > 20 and not pictures & names
    assert tracked - pictures <= names
    assert sum(path.stat().st_size for path in unpacked.rglob("*")) < 15e6  # 9 of them the two models


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


def test_every_tool_and_a_script_of_the_source_release_explain_themselves(python, unpacked):
    folder = REPOSITORY / "var_jax" / "tools"
    assert {path.stem for path in folder.glob("*.py") if "__main__" in path.read_text()} == {*TOOLS}
    train = python("train.py", "--config=configs/digits.py", "--help", cwd=unpacked)
    processes = {tool: python("-m", f"var_jax.tools.{tool}", "--help") for tool in TOOLS}
    for tool, process in processes.items():
        output, _ = process.communicate(timeout=600)
        assert "Traceback" not in output and f"python -m var_jax.tools.{tool}" in output, output
        assert process.returncode in (0, 1), output  # absl ends --help with 1
    output, _ = train.communicate(timeout=600)
    assert "--workdir" in output and "Traceback" not in output, output
