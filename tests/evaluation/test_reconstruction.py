import json

import numpy as np
import pytest
from PIL import Image

from tests.helpers.commands import command
from var_jax.evaluation.frechet import Moments, frechet_distance
from var_jax.evaluation.reconstruction import evaluate_reconstruction
from var_jax.tokenizer.model import decode, encode


def test_metrics_are_those_of_the_reconstructions(tiny_tokenizer):
    module, params = tiny_tokenizer
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
    valid = np.array([[1] * 12, [1] * 8 + [0] * 4], np.float32)
    padded = np.resize(images[12:], (12, 8, 8, 3))
    batches = [{"image": images[:12], "valid": valid[0]}, {"image": padded, "valid": valid[1]}]
    features = lambda x: x.mean((1, 2))
    metrics, worst, best = evaluate_reconstruction(module, params, batches, 20, features=features)
    real = images.astype(np.float32) / 127.5 - 1
    tokens = encode(module, params, real)
    recon = np.asarray(decode(module, params, tokens))
    moments = (Moments(), Moments())
    rounded = np.floor((recon / 2 + 0.5) * 255 + 0.5) / 127.5 - 1
    for accumulator, pixels in zip(moments, (real, rounded), strict=True):
        accumulator.add(features(pixels))
    assert metrics["rfid"] == pytest.approx(frechet_distance(*moments), rel=1e-3)
    error = ((recon - real) ** 2).mean((1, 2, 3))
    psnr = 10 * np.log10(4 / error)
    assert metrics["l2"] == pytest.approx(error.mean(), rel=1e-5)
    assert metrics["psnr"] == pytest.approx(psnr.mean(), rel=1e-5)
    assert -1 < metrics["ssim"] < 1
    np.testing.assert_allclose(worst.psnr, np.sort(psnr)[:8], rtol=1e-5)
    np.testing.assert_allclose(best.psnr, np.sort(psnr)[::-1][:8], rtol=1e-5)
    np.testing.assert_array_equal(worst.images[0], images[psnr.argmin()])
    assert metrics["distinct"] == len(np.unique(tokens)) and metrics["most_0"] == 16
    assert metrics["bits_per_pixel"] == pytest.approx(21 * 4 / 64)
    assert 0 < metrics["bits_per_pixel_coded"] <= metrics["bits_per_pixel"]


def test_equal_images_use_one_code_of_the_first_map(tiny_tokenizer):
    module, params = tiny_tokenizer
    flat = np.full((4, 8, 8, 3), 128, np.uint8)
    metrics, *_ = evaluate_reconstruction(module, params, [{"image": flat, "valid": np.ones(4)}], 4)
    assert metrics["distinct_0"] == 1 and metrics["perplexity_0"] == 1


# A bug in the evaluation itself must show its traceback, not a message for users.
FAULTY = """
import evaluate
from absl import app

def evaluate_reconstruction(*_):
    raise ValueError("of another shape")

evaluate.evaluate_reconstruction = evaluate_reconstruction
app.run(evaluate.main)
"""


def test_the_script_on_a_run(tiny_run, tmp_path):
    flags = (f"--workdir={tiny_run}", f"--out={tmp_path}", f"--data_dir={tmp_path}/data")
    done = command("evaluate.py", *flags)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "355 images of digits/test" in done.stdout and "most possible" in done.stdout
    metrics = json.loads((tmp_path / "reconstruction.json").read_text())
    assert metrics["most"] == 16 and metrics["psnr"] > 0
    assert Image.open(tmp_path / "reconstruction_extremes.png").size == (8 * 50 + 2, 4 * 50 + 2)
    done = command("evaluate.py", *flags, "--step=7")
    assert done.returncode != 0 and "evaluate.py: no checkpoint of step 7 under" in done.stderr
    done = command("evaluate.py", *flags, "--data=nothing")
    assert done.returncode != 0 and "data set 'nothing' is not prepared" in done.stderr
    done = command("evaluate.py")
    assert done.returncode != 0 and "give --workdir of a run, or --tokenizer" in done.stderr + done.stdout
    done = command("-c", FAULTY, *flags)
    assert done.returncode != 0 and "Traceback" in done.stderr and "of another shape" in done.stderr
