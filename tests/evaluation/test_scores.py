"""Test scores of good and broken samples, reference files, and the command."""

import json
import time

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image
from scipy.ndimage import gaussian_filter

from tests.evaluation.test_inception import arrays, inception_rule, weights  # noqa: F401  (fixtures)
from tests.helpers.arrays import close
from tests.helpers.commands import Command, command
from tests.helpers.hosts import ended, start
from var_jax.data.loader import eval_batches
from var_jax.data.sources import open_source
from var_jax.data.transforms import ToPixels
from var_jax.errors import ConfigError
from var_jax.evaluation.classifier import Classifier
from var_jax.evaluation.extractors import classifier_extractor, extract_features, inception_extractor
from var_jax.evaluation.scores import Reference, read_images, read_reference, reference_of_data, score
from var_jax.interop.inception_weights import load_inception


@pytest.fixture(scope="module")
def digits(digits_dir):
    """Return images and labels of both splits."""

    def split(name):
        batches = list(
            eval_batches(open_source("digits", name, digits_dir), ToPixels(name, 8, 1.0, False), 64)
        )
        join = lambda key: np.concatenate([batch[key][batch["valid"] > 0] for batch in batches])
        return join("image"), join("label")

    return {name: split(name) for name in ("train", "test")}


@pytest.fixture(scope="module")
def extractor(digits):
    return classifier_extractor(Classifier(*digits["train"]))


@pytest.fixture(scope="module")
def reference(digits, extractor) -> Reference:
    images = digits["train"][0]
    batches = [{"image": part, "valid": np.ones(len(part))} for part in np.array_split(images, 5)]
    return reference_of_data(batches, len(images), extractor)


def test_broken_samples_get_worse_scores_of_the_right_kind(digits, extractor, reference):
    images, labels = digits["test"]
    rng = np.random.default_rng(0)

    def scores(images, labels=labels):
        return score(extract_features(extractor, images, 64, "samples"), reference, labels)

    real = scores(images)
    assert real["precision"] > 0.85 and real["recall"] > 0.85 and 0.35 < real["authenticity"] < 0.65
    assert real["accuracy"] > 0.9 and real["num_samples"] == 355 and real["num_reference"] == 1442
    assert "sfid" not in real
    shuffled = scores(images, rng.permutation(labels))
    assert shuffled["accuracy"] < 0.2 and shuffled | {"accuracy": real["accuracy"]} == real
    dropped = scores(images[labels != 4], labels[labels != 4])
    assert dropped["fid"] > 3 * real["fid"] and dropped["recall"] < real["recall"] - 0.04
    assert dropped["precision"] > real["precision"] - 0.02 and dropped["accuracy"] > 0.9
    copies = scores(*(x[::4] for x in digits["train"]))
    assert copies["authenticity"] == 0 and copies["precision"] == 1
    assert copies["fid"] < 1.5 * real["fid"]  # which does not notice
    blurred = scores(gaussian_filter(images, (0, 1.5, 1.5, 0)))
    assert blurred["fid"] > 10 * real["fid"] and blurred["precision"] < 0.5 * real["precision"]
    assert blurred["kid"] > real["kid"] and blurred["inception_score"] < real["inception_score"]


def test_a_reference_file_has_the_layout_of_adm(reference, extractor, tmp_path):
    reference.save(tmp_path / "digits.npz")
    with np.load(tmp_path / "digits.npz") as file:
        assert set(file.files) == {"arr_0", "mu", "sigma"} and file["arr_0"].dtype == np.uint8
    again = read_reference(tmp_path / "digits.npz", extractor, 100)
    np.testing.assert_array_equal(again.features.vectors, reference.features.vectors)
    np.testing.assert_array_equal(again.pool.covariance, reference.pool.covariance)
    np.savez(tmp_path / "few.npz", arr_0=reference.images[:50], mu=reference.pool.mean, sigma=np.eye(64))
    few = read_reference(
        tmp_path / "few.npz", extractor, 100
    )  # statistics are of more images than the file has
    np.testing.assert_array_equal(few.pool.mean, reference.pool.mean)
    assert few.features.vectors.shape == (50, 64)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (
            dict(arr_0=np.zeros((2, 8, 8, 3), np.float32)),
            r"must be images uint8 .*, got float32 \[2, 8, 8, 3\]",
        ),
        (dict(mu=np.zeros(3)), "arr_0 must be images"),
        (dict(arr_0=np.zeros((4, 8, 8, 3), np.uint8), mu=np.zeros(64)), "both mu and sigma, or neither"),
        (
            dict(arr_0=np.zeros((4, 8, 8, 3), np.uint8), mu=np.zeros(4), sigma=np.eye(5)),
            r"must be \[D\] and \[D, D\], got \[4\] and \[5, 5\]",
        ),
        (
            dict(arr_0=np.zeros((4, 8, 8, 3), np.uint8), mu=np.zeros(7), sigma=np.eye(7)),
            "mu is of 7 features, and the network has 64",
        ),
        (dict(arr_0=np.array([{}])), "is not an .npz file of images"),
    ],
)
def test_a_wrong_reference_file_is_named(content, says, extractor, tmp_path):
    np.savez(tmp_path / "wrong.npz", **content)
    with pytest.raises(ConfigError, match=rf"wrong.npz.*{says}"):
        read_reference(tmp_path / "wrong.npz", extractor, 4)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_images_are_read_in_any_layout_and_mapped_where_they_are_plain(save, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 6, 3), np.uint8)
    save(tmp_path / "images.npz", arr_0=np.asfortranarray(images))
    loaded = read_images(tmp_path / "images.npz")
    np.testing.assert_array_equal(loaded, images)
    assert isinstance(loaded, np.memmap) == (save is np.savez)


def test_a_missing_or_damaged_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"no such file: .*none.npz"):
        read_images(tmp_path / "none.npz")
    (tmp_path / "torn.npz").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(ConfigError, match=r"torn.npz is not an .npz file of images"):
        read_images(tmp_path / "torn.npz")


def test_eight_devices_compute_the_published_features(arrays, weights, tmp_path):  # noqa: F811
    """Extract features of three images in a batch that eight devices share."""
    safetensors.numpy.save_file(weights, tmp_path / "weights.safetensors")
    extract = inception_extractor(load_inception(tmp_path / "weights.safetensors"), 2)
    features = extract(np.repeat(arrays["image_0"][None], 3, 0))
    assert features.pool.shape == (3, 2048) and features.spatial.shape == (3, 2023)
    for got, name in ((features.pool, "pool"), (features.spatial, "spatial")):
        close(got, np.repeat(arrays[name][:1], 3, 0), 1e-4)


# Saves the features of the images that a flag names, on each process.
EXTRACT = """
import numpy as np
from absl import app, flags
from var_jax import cli
from var_jax.evaluation.extractors import inception_extractor
from var_jax.interop.inception_weights import load_inception

flags.DEFINE_string("workdir", None, "Folder.")
cli.define_host_flags()

def main(_):
    cli.initialize_distributed()
    folder = flags.FLAGS.workdir
    extract = inception_extractor(load_inception(folder + "/weights.safetensors"), 2)
    features = extract(np.load(folder + "/images.npy"))
    np.savez(f"{folder}/{flags.FLAGS.process_id}.npz", **vars(features))

app.run(main)
"""


def test_two_processes_compute_the_published_features(arrays, weights, tmp_path):  # noqa: F811
    safetensors.numpy.save_file(weights, tmp_path / "weights.safetensors")
    np.save(tmp_path / "images.npy", np.repeat(arrays["image_0"][None], 3, 0))
    result = ended(start(2, tmp_path, "-c", EXTRACT), within=300)
    assert [code for code, _, _ in result] == [0, 0], result[0][2][-3000:] + result[1][2][-3000:]
    first, second = (np.load(tmp_path / f"{i}.npz") for i in range(2))
    for name in ("pool", "spatial", "log_probs"):
        np.testing.assert_array_equal(first[name], second[name])
    for name in ("pool", "spatial"):
        close(first[name], np.repeat(arrays[name][:1], 3, 0), 1e-4)


def test_the_command_scores_samples_and_names_what_is_missing(digits, digits_dir, tmp_path):
    images, labels = digits["test"]
    np.savez(tmp_path / "samples.npz", arr_0=images, arr_1=labels)
    flags = (f"--samples={tmp_path}/samples.npz", f"--data_dir={digits_dir}")
    done = command("evaluate.py", "samples", *flags)
    assert done.returncode == 0, done.stderr[-2000:]
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["num_samples"] == 355 and scores["accuracy"] > 0.9 and scores["real_halves"]["fid"] > 0
    assert "| samples.npz | " in done.stdout and "classifier of digits" in done.stdout
    assert Image.open(tmp_path / "nearest.png").size == (6 * 50 + 2, 10 * 50 + 2)
    done = command("evaluate.py", "samples", flags[0], "--reference=x.npz")
    assert done.returncode != 0 and "--reference needs --inception=FILE" in done.stderr + done.stdout


# Draws and scores twice in one process: the run's options, and a grid.
SWEEP = """
import evaluate
from absl import app

def main(_):
    evaluate.main(["", "generate-and-score"])
    evaluate.cli.initialize_distributed = lambda: None  # once in a process
    evaluate.FLAGS.out += "/sweep"
    evaluate.FLAGS.num_per_class, evaluate.FLAGS.guidance, evaluate.FLAGS.top_k = 10, ["0", "2"], ["4", "0"]
    evaluate.FLAGS.guidance_schedule = "constant"
    evaluate.main(["", "sweep"])

app.run(main)
"""


@pytest.fixture(scope="module")
def model_flags(tiny_run, digits_dir) -> tuple[str, ...]:
    return (f"--data_dir={digits_dir}", "--num_per_class=100", "--batch=16")


@pytest.fixture(scope="module")
def unbroken(tiny_run, model_flags, tmp_path_factory):
    """Return the folder of the scores of a model, and of a sweep."""
    folder = tmp_path_factory.mktemp("scores")
    done = command("-c", SWEEP, f"--workdir={tiny_run}", f"--out={folder}", *model_flags)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_a_sweep_scores_a_grid_and_draws_it(unbroken):
    rows = json.loads((unbroken / "sweep" / "sweep.json").read_text())
    assert list(rows) == [f"guidance {guidance}, top_k {k}" for guidance in (0, 2) for k in (4, 0)]
    assert len({row["fid"] for row in rows.values()}) > 1  # the model is hardly trained
    point = json.loads((unbroken / "sweep" / "guidance_2-top_k_4" / "scores.json").read_text())
    assert point["job"]["guidance"] == 2 and point["job"]["guidance_schedule"] == "constant"
    for name in ("nearest.png", "sweep/sweep.png", "sweep/guidance_0-top_k_4/nearest.png"):
        assert Image.open(unbroken / name).width > 300


def scores_in(folder) -> dict[str, float]:
    scores = json.loads((folder / "scores.json").read_text())
    assert scores["num_samples"] == 1000 and scores["num_reference"] == 1442 and 0 <= scores["accuracy"] <= 1
    return {name: value for name, value in scores.items() if isinstance(value, int | float)}


def test_killed_three_times_it_gives_the_scores_of_an_unbroken_call(
    tiny_run, model_flags, unbroken, tmp_path
):
    flags = (f"--workdir={tiny_run}", f"--out={tmp_path}", *model_flags)
    for _ in range(3):
        chunks = lambda: len(list((tmp_path / "features.partial").glob("*.npz")))
        before = chunks()
        process = Command("evaluate.py", "generate-and-score", *flags)
        deadline = time.monotonic() + 120
        while chunks() == before and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        process.kill()
        process.communicate()
        assert before < chunks() < 63 and not (tmp_path / "scores.json").exists()
    done = command("evaluate.py", "generate-and-score", *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    assert scores_in(tmp_path) == scores_in(unbroken)
    assert not (tmp_path / "features.partial").exists()


def test_two_processes_give_the_scores_of_one(tiny_run, model_flags, unbroken, tmp_path):
    flags = ("evaluate.py", "generate-and-score", f"--out={tmp_path}", *model_flags)
    result = ended(start(2, tiny_run, *flags), within=300)
    assert [code for code, _, _ in result] == [0, 0], result[0][2][-3000:] + result[1][2][-3000:]
    assert "| samples |" in result[0][1] and "| samples |" not in result[1][1]
    one, two = scores_in(unbroken), scores_in(tmp_path)
    assert one.keys() == two.keys()
    for name, value in one.items():  # of images that differ by 1/255 in a few of 192,000 values
        np.testing.assert_allclose(two[name], value, rtol=1e-5, atol=1e-5, err_msg=name)
