"""The commands, each run in a process."""

import re

import numpy as np
import pytest
from PIL import Image

from tests.helpers.commands import REPOSITORY, command


def test_sample_writes_grid_strips_npz_and_single_pngs(tiny_run, tmp_path):
    flags = ("--num_per_class=3", "--batch=8", "--seed=2", "--pngs", f"--out={tmp_path}")
    done = command("sample.py", f"--workdir={tiny_run}", *flags)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "30 images" in done.stdout and "image/s" in done.stderr
    with np.load(tmp_path / "samples.npz") as samples:
        images, labels = samples["arr_0"], samples["arr_1"]
    assert images.shape == (30, 8, 8, 3) and images.dtype == np.uint8 and labels.dtype == np.int64
    assert labels.tolist() == list(range(10)) * 3  # every part of ten has all classes
    grid = Image.open(tmp_path / "samples.png")
    assert grid.size == (3 * 50 + 2, 10 * 50 + 2)
    for c, j in ((0, 0), (0, 2), (4, 1), (9, 2)):  # a class a row
        cell = np.asarray(grid)[2 + 50 * c : 50 + 50 * c : 6, 2 + 50 * j : 50 + 50 * j : 6]
        np.testing.assert_array_equal(cell, images[labels == c][j])
    strips = np.asarray(Image.open(tmp_path / "scales.png"))
    assert strips.shape == (10 * 50 + 2, 3 * 50 + 2, 3)  # a map a column
    last = strips[2 + 50 * 7 : 50 + 50 * 7 : 6, 102:150:6].astype(int)
    assert np.abs(last - images[7]).max() <= 1  # of the first image of class 7
    single = np.asarray(Image.open(tmp_path / "images" / "000014_class0004.png"))
    np.testing.assert_array_equal(single, images[14])


def test_sample_from_published_files(goldens, tmp_path):
    flags = ("--scales=1,2,3,4", "--labels=3,9", "--top_k=1", f"--out={tmp_path}")
    files = (f"--tokenizer={goldens}/vae.pth", f"--checkpoint={goldens}/var.pth")
    done = command("sample.py", *files, *flags, "--guidance=4")
    assert done.returncode == 0, done.stderr[-2000:]
    with np.load(tmp_path / "samples.npz") as samples, np.load(goldens / "var.npz") as golden:
        want = golden["cfg4.0_image"].transpose(0, 2, 3, 1)[[2, 1]] * 255
        assert np.abs(samples["arr_0"] - want).max() <= 0.51
        assert samples["arr_1"].tolist() == [3, 9]


def test_a_wrong_config_is_a_line_and_a_bug_a_traceback(digits_dir, tmp_path):
    """Both start as a ValueError."""
    flags = (
        "--config=configs/digits.py",
        f"--workdir={tmp_path}/run",
        f"--config.tokenizer.data.dir={digits_dir}",
        f"--config.next_scale.data.dir={digits_dir}",
    )
    done = command("train.py", *flags, "--config.tokenizer.train.grad_accum_steps=7")
    assert done.returncode == 1
    assert re.search(r"^train.py: train.batch=64 must be a multiple of 7: ", done.stderr, re.M), done.stderr
    assert "Traceback" not in done.stderr
    bug = (
        "import train; from absl import app, flags\n"
        "def run(*_): raise ValueError('operands could not be broadcast together')\n"
        "train.stages.run = run; app.run(train.main)"
    )
    done = command("-c", bug, *flags)
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "ValueError: operands could not be broadcast" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sample.py",), "give --workdir of a run, or --tokenizer and --checkpoint"),
        (("sample.py", "--workdir=nowhere"), "no checkpoints under .*/nowhere/tokenizer/checkpoints"),
        (("train.py", "--workdir=x"), "--config"),
        (("train.py", "--workdir=x", "--config=configs/none.py"), "configs/none.py"),
        (
            ("train.py", "--workdir=x", "--config=configs/var.py:d16", "--config.train.bach=3"),
            'train.py: no such field of the config: .*Did you mean "batch"',
        ),
        (("train.py", "--workdir=x", "--config=configs/var.py:d16", "--config.train.batch=three"), "batch"),
        (
            ("train.py", "--workdir=x", "--config=configs/digits.py", "--config.model.depth=3"),
            "no such field of the config: 'model'; in a config with stages give the stage, too",
        ),
        (
            ("train.py", "--workdir=x", "--config=configs/var.py:d16", "--config.data.dir=/nowhere"),
            "tfds build",
        ),
    ],
)
def test_wrong_command_lines_say_what_is_wrong(arguments, message):
    done = command(*arguments)
    assert done.returncode != 0
    assert re.search(message, done.stderr + done.stdout), (done.stderr + done.stdout)[-2000:]
    assert not (REPOSITORY / "x").exists()


def test_a_label_that_is_no_class_is_named(tiny_run, tmp_path):
    done = command("sample.py", f"--workdir={tiny_run}", "--labels=3,99", f"--out={tmp_path}")
    assert done.returncode != 0 and "labels must be in 0 .. 10" in done.stderr + done.stdout
