import json
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs import digits, next_token
from experiments.next_token import report
from experiments.next_token.run import SYSTEMS, system_folder
from tests.helpers.commands import Command, command

CONFIG = """
from tests.helpers.tiny import tiny_config

def get_config():
    config = tiny_config({data!r}, steps=2)
    config.tokenizer.adversarial.weight = 0.0
    config.tokenizer.model.update(dict(patch=2, num_phis=0))  # compiles at once
    return config
"""


@pytest.fixture(scope="module")
def resumed(digits_dir, tmp_path_factory):
    """Run a comparison, killed while the second system trains, and resume it; return OUT and stdout."""
    folder = tmp_path_factory.mktemp("compare")
    out = folder / "out"
    (folder / "config.py").write_text(CONFIG.format(data=str(digits_dir)))
    flags = ["-m", "experiments.next_token.run", f"--config={folder}/config.py", f"--out={out}", "--seeds=0"]
    flags += ["--steps=4", "--per_class=2", "--systems=raster-learned_1d-axial,VAR-rotary_2d"]
    killed = Command(*flags)
    while not list(out.glob("VAR-rotary_2d/0/next_scale/checkpoints/2/commit_success.txt")):
        assert killed.poll() is None, killed.communicate()[1][-2000:]
        time.sleep(0.02)
    killed.kill()
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert not (out / "compare.json").exists()
    process = command(*flags)
    assert process.returncode == 0, process.stderr[-2000:]
    return out, process.stdout


def test_systems_cost_the_same_and_are_judged(resumed):
    out, _ = resumed
    result = json.loads((out / "compare.json").read_text())
    assert result["tokenizers"]["maps"]["tokens"] == 21 and result["tokenizers"]["map"]["tokens"] == 16
    token, scale = (result["systems"][name]["0"] for name in ("raster, learned_1d, axial", "VAR, rotary_2d"))
    assert scale["steps"] == 4 and token["steps"] > scale["steps"]
    step = token["training_flops"] / token["steps"]
    assert abs(token["training_flops"] - scale["training_flops"]) <= step / 2  # to the nearest step
    assert token["parameters"] == pytest.approx(scale["parameters"], rel=0.02)
    assert (token["sampling_steps"], scale["sampling_steps"]) == (16, 3)
    for run in (token, scale):
        assert 0 <= run["called_right"] <= 1 and run["frechet"] > result["held_out"]["frechet"] > 0
        assert run["bits_per_pixel"] == min(bits for _, bits in run["evaluations"])
    assert result["held_out"]["spread"] == pytest.approx(1, abs=0.1) and result["held_out"]["nearest"] == 1
    with np.load(out / "VAR-rotary_2d" / "0" / "samples.npz") as samples:
        assert samples["arr_0"].shape == (20, 8, 8, 3) and (np.bincount(samples["arr_1"]) == 2).all()


def test_a_killed_comparison_resumes(resumed):
    out, printed = resumed
    assert (
        printed.count("tokenizer: already trained for") == 2 and "next_token: already trained for" in printed
    )
    assert re.search(r"next_scale: .* steps 2\.\.4,", printed)
    table = (out / "compare.md").read_text()
    assert table.count("\n| raster, learned_1d, axial |") == 1 and "| VAR, rotary_2d |" in table
    for name in ("compare.png", "samples.png"):
        assert len(np.unique(np.asarray(Image.open(out / name).convert("L")))) > 20


def test_the_table_has_mean_and_deviation_over_the_seeds():
    run = dict.fromkeys((key for _, key, *_ in report.RUN_COLUMNS), 1.0)
    runs = {"0": run, "1": run | {"called_right": 0.5}}
    real = dict.fromkeys(("called_right", "frechet", "spread", "nearest"), 0.25)
    tokenizers = {"maps": {"tokens": 31, "psnr": 25.0, **real}}
    table = report.format_comparison({"systems": {"VAR": runs}, "tokenizers": tokenizers, "held_out": real})
    assert "| 75.0% ± 35.4% |" in table and "| through the tokenizer of VAR | 31 | 25.00 | 25.0% |" in table
    for part in table.split("\n\n")[::2]:
        assert len({line.count("|") for line in part.splitlines()}) == 1


def test_systems_differ_in_the_fields_that_name_them_alone():
    flat = next_token.flattened(digits.get_config())
    assert tuple(flat.tokenizer.model.scales) == (4,) and flat.tokenizer.model.num_phis == 0
    for fields in SYSTEMS.values():
        assert set(fields) <= set(flat.next_token.model)
    ours, theirs = flat.next_token.to_dict(), digits.get_config().next_scale.to_dict()
    assert {name for name in theirs if ours.get(name) != theirs[name]} == {
        "task",
        "model",
        "correction",
        "loss",
    }
    sequence = dict(order="raster", order_seed=0, mask="causal", mask_radius=1)
    assert ours["model"] == theirs["model"] | sequence
    assert len({system_folder(system) for system in SYSTEMS}) == 9 == len(SYSTEMS)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config=configs/var.py"], "must have the stages tokenizer and next_scale"),
        (
            ["--config=configs/digits.py", "--config.next_scale.tokenizer=nowhere"],
            "next_token: no checkpoints",
        ),
        (["--config=configs/digits.py", "--systems=diagonal"], "--systems must be among raster-learned_1d"),
    ],
)
def test_errors_are_named(flags, message, tmp_path):
    process = command("-m", "experiments.next_token.run", *flags, f"--out={tmp_path}/out")
    assert process.returncode != 0 and message in process.stderr + process.stdout
    assert not Path(tmp_path / "out").exists()
