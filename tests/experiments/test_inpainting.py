"""Test inpainting: masks, no leak from the unknown part, and the whole command at tiny size."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

import var_jax
from experiments.inpainting import partial_images
from experiments.inpainting.run import VAR_METHODS, psnr
from tests.helpers.commands import command
from var_jax.scales import Scales
from var_jax.transformer.config import NextScaleConfig, NextTokenConfig

CONFIG = """
from tests.helpers.tiny import tiny_config
def get_config():
    config = tiny_config({data!r}, steps=3)
    config.tokenizer.adversarial.weight = 0.0
    config.tokenizer.model.update(dict(patch=2, num_phis=0))  # compiles at once
    config.next_scale.model.update(dict(depth=1, width=16, num_heads=2))
    return config
"""
SYSTEMS = ("VAR-learned_1d", "spiral_out-learned_1d")


def run_command(run, *flags):
    """Run the command in the directory and with the config of `run`."""
    folder, config = run
    flags = (config, f"--out={folder}", "--steps=4", *flags)
    return command("-m", "experiments.inpainting.run", *flags)


@pytest.fixture(scope="module")
def run(digits_dir, tmp_path_factory):
    """Run the command; return its directory, config flag and output."""
    folder = tmp_path_factory.mktemp("inpainting")
    (folder / "config.py").write_text(CONFIG.format(data=str(digits_dir)))
    directory_and_config = folder / "out", f"--config={folder}/config.py"
    process = run_command(directory_and_config, f"--systems={','.join(SYSTEMS)}", "--draws=1")
    assert process.returncode == 0, process.stderr[-2000:]
    return *directory_and_config, process.stdout


@pytest.fixture(scope="module", params=("VAR", "spiral_out"))
def model(request):
    """Load VAR on a convolutional tokenizer, or a next-token model on patches."""
    if request.param == "VAR":
        folder = request.getfixturevalue("tiny_run")
    else:
        folder = request.getfixturevalue("run")[0] / "spiral_out-learned_1d" / "0"
    return var_jax.load_var(folder, tokenizer=var_jax.load_tokenizer(folder))


def test_masks_are_halves_and_the_center_quarter():
    masks = partial_images.unknown_masks(8)
    assert {name: mask.sum() for name, mask in masks.items()} == {"top": 32, "left": 32, "centre": 16}
    assert masks["top"][:4].all() and masks["left"][:, :4].all() and masks["centre"][2:6, 2:6].all()


def test_cells_that_the_mask_touches_are_resampled():
    scales, masks = Scales((1, 2, 3, 4)), partial_images.unknown_masks(8)
    _, two, three, four = np.split(partial_images.touching_tokens(masks["top"], scales), [1, 5, 14])
    assert two.tolist() == [True, True, False, False] and four.reshape(4, 4).all(1).tolist() == [1, 1, 0, 0]
    assert three.reshape(3, 3).all(1).tolist() == [1, 1, 0]  # the row in the middle is half known
    half = partial_images.mostly_unknown_tokens(masks["centre"], scales)
    assert partial_images.touching_tokens(masks["centre"], scales)[:14].all()
    assert half[:14].tolist() == [True] + [False] * 4 + [False] * 4 + [True] + [False] * 4
    np.testing.assert_array_equal(half[14:], partial_images.touching_tokens(masks["centre"], Scales((4,))))


def test_the_share_of_the_known_part_that_is_seen():
    fields = dict(depth=1, width=8, num_heads=1, num_classes=2, num_codes=4, code_dim=2)
    masks, seen = partial_images.unknown_masks(8), {}
    for order in ("raster", "spiral_in", "spiral_out", "column"):
        config = NextTokenConfig(**fields, scales=(4,), order=order)
        seen[order] = [
            partial_images.share_of_known_seen(config, partial_images.touching_tokens(m, config.schedule))
            for m in masks.values()
        ]
    assert seen["raster"][0] == 0 and seen["column"][1] == 0 and seen["raster"][1] == seen["column"][0]
    assert seen["spiral_in"][2] == 1 and seen["spiral_out"][2] == 0 < seen["raster"][1] < 1
    var = NextScaleConfig(**fields, scales=(1, 2, 4))
    assert partial_images.share_of_known_seen(
        var, partial_images.touching_tokens(masks["top"], var.schedule)
    ) == 2 / (2 + 8)


def test_nothing_of_the_unknown_part_leaks_and_the_known_part_counts(model):
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)
    labels, schedule = np.full(6, model.num_classes), model.module.config.schedule
    for mask in partial_images.unknown_masks(8).values():
        other, differs = images.copy(), images.copy()
        other[:, mask] = 255 - other[:, mask]
        differs[:, ~mask] = 255 - differs[:, ~mask]
        for select_tokens, once in VAR_METHODS.values():
            resample = select_tokens(mask, schedule)
            filled = [
                partial_images.fill_unknown(
                    model, partial_images.mask_with_median(x, mask), resample, labels, seed=3, once=once
                )
                for x in (images, other, differs)
            ]
            for a, b in zip(filled[0], filled[1], strict=True):
                np.testing.assert_array_equal(a, b)
            assert (filled[0][1] != filled[2][1]).any()


def test_known_tokens_are_kept(model):
    images = np.random.default_rng(1).integers(0, 256, (5, 8, 8, 3), np.uint8)
    schedule, mask = model.module.config.schedule, partial_images.unknown_masks(8)["top"]
    resample, labels = partial_images.touching_tokens(mask, schedule), np.arange(5)
    known = partial_images.mask_with_median(images, mask)
    encoded = model.tokenizer.encode(known.astype(np.float32) / 255)
    filled, tokens = partial_images.fill_unknown(model, known, resample, labels, seed=0, once=True)
    np.testing.assert_array_equal(tokens[:, ~resample], encoded[:, ~resample])
    assert (tokens[:, resample] != encoded[:, resample]).any()
    np.testing.assert_allclose(filled / 255, model.tokenizer.decode(tokens), atol=0.51 / 255)
    # Map by map: if everything is known, this is an encoding; else each map encodes a residual.
    nothing = np.zeros_like(resample)
    np.testing.assert_array_equal(
        partial_images.fill_unknown(model, known, nothing, labels, seed=0)[1], encoded
    )
    filled, tokens = partial_images.fill_unknown(model, known, resample, labels, seed=0)
    np.testing.assert_allclose(filled / 255, model.tokenizer.decode(tokens), atol=0.51 / 255)
    all_known = partial_images.fill_unknown(model, known, nothing, labels, seed=0)[1]
    if len(schedule) == 1:
        np.testing.assert_array_equal(tokens[:, ~resample], all_known[:, ~resample])


def test_the_unknown_part_is_painted_in_the_color_of_the_known_part():
    images, mask = np.full((2, 8, 8, 3), 200, np.uint8), partial_images.unknown_masks(8)["left"]
    images[:, :, 4:] = (10, 20, 30)
    images[:, 0, 4:] = 255
    painted = partial_images.mask_with_median(images, mask)
    assert (painted[:, mask] == (10, 20, 30)).all()
    np.testing.assert_array_equal(painted[:, ~mask], images[:, ~mask])


def test_psnr_is_of_one_part():
    truth, mask = np.zeros((2, 8, 8, 3), np.uint8), partial_images.unknown_masks(8)["centre"]
    filled = truth.copy()
    filled[0, 2:6, 2:6] = 51  # a fifth, in one of two images
    assert psnr(filled, truth, mask) == pytest.approx(10 * np.log10(2 / 0.04))
    assert psnr(filled, truth, ~mask) > 100


def test_the_command_writes_tables_figures_and_a_picture(run):
    folder, _, printed = run
    result = json.loads((folder / "inpainting.json").read_text())
    table = (folder / "inpainting.md").read_text()
    assert table in printed and result["images"] == 355 and result["draws"] == 1
    assert list(result["systems"]) == [
        "VAR, learned_1d",
        "VAR, learned_1d; half-known cells kept",
        "VAR, learned_1d; encoded at once",
        "VAR, learned_1d; as inpaint does",
        "spiral_out, learned_1d",
    ]
    for runs in result["systems"].values():
        for figures in runs["0"].values():
            assert 0 <= figures["right"] <= 1 and 0 <= figures["right_told"] <= 1
            assert 0 < figures["psnr_unknown"] < 60 and 0 < figures["psnr_known"] < 60
    assert result["classifier_right"] > 0.9 and 0.1 < result["chance"] < 0.11
    assert result["systems"]["spiral_out, learned_1d"]["0"]["centre"]["seen"] == 0
    assert table.count("| nothing made |") == 3
    assert Image.open(folder / "inpainting.png").width > 300


def test_existing_runs_are_used_wherever_they_are(run, tmp_path):
    shutil.copytree(run[0], tmp_path / "moved")
    process = run_command((tmp_path / "moved", run[1]), "--systems=VAR-learned_1d", "--draws=1")
    assert process.returncode == 0, process.stderr[-2000:]
    assert "next_scale: already trained for 4 steps" in process.stdout
    assert not (tmp_path / "moved" / "raster-learned_1d").exists()
    moved, original = (json.loads((x / "inpainting.json").read_text()) for x in (tmp_path / "moved", run[0]))
    assert moved["systems"].items() <= original["systems"].items()


def test_an_unknown_system_is_named(run):
    process = run_command(run[:2], "--systems=raster")
    assert process.returncode != 0 and "got raster" in process.stderr + process.stdout
