import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from experiments.alignment import report
from tests.helpers.commands import command

CONFIG = """
from tests.helpers.tiny import tiny_config

def get_config():
    return tiny_config({data!r}, steps=2)
"""


def test_it_aligns_and_compares_what_is_trained(digits_dir, tiny_run, tmp_path):
    (tmp_path / "config.py").write_text(CONFIG.format(data=str(digits_dir)))
    shutil.copytree(tiny_run, tmp_path / "out" / "before" / "1")
    out, flags = tmp_path / "out", ["--seeds=1", "--steps=1", "--guidance=0,2", "--per_class=2"]
    process = command(
        "-m", "experiments.alignment.run", f"--config={tmp_path}/config.py", f"--out={out}", *flags
    )
    assert process.returncode == 0, process.stderr[-2000:]
    rows = json.loads((out / "alignment.json").read_text())["1"]
    before, guided, aligned = (
        rows[name] for name in ("before, guidance 0", "before, guidance 2", "aligned, guidance 0")
    )
    assert aligned["sampling_flops"] == before["sampling_flops"] < guided["sampling_flops"]
    assert before["num_samples"] == 20 and aligned["fid"] > 0 and 0 <= aligned["accuracy"] <= 1
    assert aligned["held_out_loss"] > 0 and rows[report.REAL]["fid"] > 0
    assert f"aligned, guidance 0 | {aligned['fid']:.2f}" in process.stdout
    assert re.search(r"next_scale: starts from .*out/before/1\n", process.stdout)
    for name in ("alignment.png", "samples.png"):
        assert len(np.unique(np.asarray(Image.open(out / name).convert("L")))) > 20


def test_the_best_guidance_has_the_lowest_mean_fid():
    result = {
        seed: {"before, guidance 0": {"fid": 2.0}, "before, guidance 1.5": {"fid": fid}}
        for seed, fid in (("0", 1.0), ("1", 2.5))
    }
    assert report.best_guidance(result, [0.0, 1.5]) == 1.5
    assert report.means(result, "before, guidance 1.5", "fid") == pytest.approx(1.75)
