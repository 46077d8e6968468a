"""The steps of docs/your_own_images.md, from a folder of pictures to samples, at a tiny size."""

import numpy as np

from examples.coloured_shapes import SHAPES, write_folder
from tests.helpers.commands import command

TINY_TOKENIZER = [
    "--config.tokenizer.model.scales=(1, 2, 4)",
    "--config.tokenizer.model.ch_mult=(1, 2)",
    "--config.tokenizer.model.ch=8",
    "--config.tokenizer.model.num_codes=16",
    "--config.tokenizer.adversarial.weight=0.0",
]
TINY_VAR = ["depth=1", "width=32", "num_heads=2"]
TRAIN = ["batch=16", "steps=3", "log_every=1", "eval_every=3", "preview_every=0", "checkpoint_every=3"]


def run(*arguments: str) -> str:
    done = command(*arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_from_a_folder_of_pictures_to_samples(tmp_path):
    write_folder(tmp_path / "pictures", 120)
    data, runs, tokens = (str(tmp_path / name) for name in ("data", "runs", "tokens"))
    output = run(
        "-m", "var_jax.tools.prepare", f"--images={tmp_path}/pictures", "--name=shapes", f"--data_dir={data}",
        "--skip_bad", "--held_out=0.2", "--workers=1",
    )  # fmt: skip
    assert "left out 4 of 124 files" in output
    train = ["train.py", "--config=configs/shapes.py", f"--workdir={runs}"]
    stage = lambda name: [f"--config.{name}.data.dir={data}", *(f"--config.{name}.train.{x}" for x in TRAIN)]
    run(*train, "--config.stages=tokenizer", *stage("tokenizer"), *TINY_TOKENIZER)
    output = run(
        "-m", "var_jax.tools.encode_dataset", f"--workdir={runs}", "--data=shapes", f"--data_dir={data}",
        "--crops=2", "--flip", f"--out={tokens}",
    )  # fmt: skip
    assert "in 2 crops" in output
    model = [f"--config.next_scale.model.{field}" for field in TINY_VAR]
    cached = f"--config.next_scale.data.tokens={tokens}"
    output = run(*train, "--config.stages=next_scale", cached, *stage("next_scale"), *model)
    assert "next_scale eval  3/3" in output
    run("sample.py", f"--workdir={runs}", "--num_per_class=1", f"--out={tmp_path}/out")
    with np.load(tmp_path / "out" / "samples.npz") as samples:
        assert samples["arr_0"].shape == (len(SHAPES), 8, 8, 3) and samples["arr_0"].std() > 1
        np.testing.assert_array_equal(samples["arr_1"], np.arange(len(SHAPES)))
