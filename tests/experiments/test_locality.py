import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import var_jax
from experiments.locality.report import summarize_distances
from experiments.locality.run import (
    MAX_GROUPS,
    check_map,
    distances_by_order,
    finest_tokens,
    measure_information,
)
from tests.helpers.commands import command
from var_jax.data.decoding import decode_image
from var_jax.data.loader import batch_indices
from var_jax.data.sources import open_source
from var_jax.transformer.orders import ORDERS

MODULE = ("-m", "experiments.locality.run")


def test_the_command_writes_tables_numbers_and_pictures(tiny_run, digits_dir, tmp_path):
    flags = (f"--workdir={tiny_run}", f"--data_dir={digits_dir}", "--images=100", f"--out={tmp_path}/out")
    process = command(*MODULE, *flags)
    assert process.returncode == 0, process.stderr[-2000:]
    assert "| raster | 1 / 1 / 1 | 4 / 4 / 4 | 2.5 / 4 / 4 |" in process.stdout
    assert "(100 images of digits/train, 4 x 4 map" in process.stdout
    assert (tmp_path / "out" / "locality.md").read_text().strip() in process.stdout
    result = json.loads((tmp_path / "out" / "locality.json").read_text())
    assert result["side"] == 4 and list(result["distances"]) == list(ORDERS)
    assert result["distances"]["hilbert"]["horizontal"]["max"] == 13
    assert len(result["information"]["image"]) == 6
    assert {name: len(bits) for name, bits in result["information"]["lag"].items()} == dict.fromkeys(
        ORDERS, 15
    )
    for name in ("orders.png", "locality.png"):
        picture = np.asarray(Image.open(tmp_path / "out" / name).convert("RGB"))
        assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 50


def test_without_a_tokenizer_only_distances_are_written(tmp_path):
    process = command(*MODULE, "--side=5", f"--out={tmp_path}")
    assert process.returncode == 0, process.stderr[-2000:]
    assert "| column | 5 / 5 / 5 | 1 / 1 / 1 | 3 / 5 / 5 |" in process.stdout and "bits" not in process.stdout
    result = json.loads((tmp_path / "locality.json").read_text())
    assert result["side"] == 5 and result["information"] is None
    assert (tmp_path / "orders.png").exists() and (tmp_path / "locality.png").exists()


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--workdir=nowhere", "locality: no checkpoints under"),
        ("--data=flowers", "locality: data set 'flowers' is not prepared"),
        ("--side=1", "--side=1"),
    ],
)
def test_errors_are_named_and_nothing_is_written(flag, message, tiny_run, digits_dir, tmp_path):
    flags = (f"--workdir={tiny_run}", f"--data_dir={digits_dir}", f"--out={tmp_path}/out", flag)
    process = command(*MODULE, *flags)
    assert process.returncode != 0 and message in process.stderr + process.stdout, process.stderr[-2000:]
    assert "Traceback" not in process.stderr and not (tmp_path / "out").exists()


def test_tokens_are_those_of_the_last_map_of_random_images(tiny_run, digits_dir):
    tokenizer, source = var_jax.load_tokenizer(tiny_run), open_source("digits", "train", digits_dir)
    result = finest_tokens(tokenizer, source, 70)  # more than a batch
    indices = batch_indices(len(source), 64, 0, 0)[[0, 5]]
    images = np.stack([np.asarray(decode_image(source[i]["image"])) for i in indices])
    np.testing.assert_array_equal(result[[0, 5]], tokenizer.encode(images / np.float32(255))[:, 5:])
    assert result.shape == (70, 16)
    with pytest.raises(ValueError, match=r"last map of scales \(1, 1\) has one token"):
        check_map(SimpleNamespace(scales=(1, 1)))


def test_information_falls_with_distance_where_tokens_copy_their_neighbors(tiny_run):
    tokenizer, rng = var_jax.load_tokenizer(tiny_run), np.random.default_rng(0)
    tokens = np.zeros((2000, 4, 4), np.int32)
    for column in range(4):  # each row a chain of its own, from left to right
        resample = rng.random((2000, 4)) < 0.3
        before = tokens[:, :, column - 1] if column else 0
        tokens[:, :, column] = np.where(resample, rng.integers(16, size=(2000, 4)), before)
    result = measure_information(tokenizer, tokens.reshape(2000, 16))
    assert result["images"] == 2000 and result["side"] == 4 and 1 < result["groups"] <= MAX_GROUPS
    raster, column = result["lag"]["raster"], result["lag"]["column"]
    assert result["image"][0] > 2 * result["image"][1] > 0
    assert raster[0] > 1 and abs(column[0]) < 0.02 < 1 < column[3]  # the last: the cell on the left


def test_mean_95th_percentile_and_maximum():
    assert summarize_distances(np.arange(1, 101)) == {"mean": 50.5, "p95": 95, "max": 100}
    assert summarize_distances(distances_by_order(16)["snake"]["vertical"]) == {
        "mean": 16.0,
        "p95": 31,
        "max": 31,
    }
