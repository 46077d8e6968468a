"""Exported models: written from a run, read as files of strangers, sent to a hub and back, in the package."""

import json
import os
import shutil

import ml_dtypes
import numpy as np
import pytest
from sklearn import datasets, svm

import var_jax
from examples.captioned_shapes import COLORS
from tests.helpers import fake_hub
from tests.helpers.commands import command
from var_jax.errors import UserError
from var_jax.interop.exported import CONFIG_FILE, WEIGHTS_FILE, is_exported
from var_jax.interop.load import read_network
from var_jax.interop.model_names import find_model, pretrained_names
from var_jax.interop.tensor_files import read_tensors, write_safetensors
from var_jax.tools.export import export


@pytest.fixture(scope="module")
def exported(tiny_run, tmp_path_factory):
    """Export of the tiny run in float32, with the files that sampling and evaluation leave in a run."""
    run = tmp_path_factory.mktemp("run")
    for stage in ("tokenizer", "next_scale"):
        (run / stage).symlink_to(tiny_run / stage)
    (run / "scores.json").write_text('{"fid": 12.345678, "inception": "random"}')
    (run / "samples.png").write_bytes(b"a picture")
    folder = tmp_path_factory.mktemp("exported") / "tiny"
    assert len(export(run, folder, "float32", "latest")) == 4
    return folder


def test_an_exported_run_draws_what_the_run_does(tiny_run, exported):
    run, model = var_jax.load_var(tiny_run), var_jax.load_var(exported)
    assert (model.options, model.class_names) == (run.options, run.class_names)
    np.testing.assert_array_equal(model.sample([0, 7, 10], seed=2), run.sample([0, 7, 10], seed=2))
    images = np.random.default_rng(0).random((2, 8, 8, 3), np.float32)
    np.testing.assert_array_equal(
        var_jax.load_tokenizer(exported).encode(images), run.tokenizer.encode(images)
    )


def test_the_card_has_the_scores_and_the_pictures_of_the_run(exported):
    card = (exported / "README.md").read_text()
    assert "| fid | 12.35 |\n| features of | random |" in card
    assert "](samples.png)" in card and "](scales.png)" not in card
    assert (exported / "samples.png").read_bytes() == b"a picture"
    assert "Classes: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9." in card


def test_bfloat16_rounds_the_matrices_alone(tiny_run, tmp_path):
    export(tiny_run, tmp_path, "bfloat16", "latest")
    for kind in ("tokenizer", "next_scale"):
        _, params = read_network(tiny_run, kind)
        _, rounded = read_network(tmp_path, kind)
        if kind == "tokenizer":
            np.testing.assert_array_equal(rounded["quantizer"]["codebook"], params["quantizer"]["codebook"])
            params, rounded = (p["decoder"]["conv_in"]["kernel"] for p in (params, rounded))
        else:
            params, rounded = (p["blocks"]["layers"]["mlp"]["fc1"]["kernel"] for p in (params, rounded))
        np.testing.assert_array_equal(rounded, params.astype(ml_dtypes.bfloat16).astype(np.float32))


def test_a_run_without_a_transformer_is_not_exported(tiny_run, tmp_path):
    (tmp_path / "tokenizer").symlink_to(tiny_run / "tokenizer")
    with pytest.raises(
        UserError, match="must hold a tokenizer and a transformer to be exported; it has tokenizer$"
    ):
        export(tmp_path, tmp_path / "out", "float32", "latest")
    assert not (tmp_path / "out").exists()


DAMAGES = {  # path in config.json -> value, and the message
    ("format",): (2, "format must be 1, got 2"),
    ("class_names",): ("abc", "class_names must be a list of names"),
    ("tokenizer",): (None, "describes no tokenizer"),
    ("tokenizer", "scales"): ([1, 2, 100_000], "scales must be sides of at most"),
    ("tokenizer", "shade"): (1, "tokenizer is not a valid architecture: .*shade"),
    ("tokenizer", "ch"): (1 << 20, "a network of these sizes is not in a file of"),
    ("tokenizer", "num_blocks"): (1 << 40, "a network of these sizes is not in a file of"),
    ("tokenizer", "num_codes"): (17, r"quantizer/codebook has shape \(16, 4\), must be \(17, 4\)"),
    ("tokenizer", "norm_groups"): (3, "norm_groups=3 must divide"),
    ("next_scale", "width"): (1 << 40, "a network of these sizes is not in a file of"),
    ("next_scale", "depth"): (3, r"has shape \(2, .* must be \(3, "),
    ("next_scale", "num_codes"): ("many", "next_scale is not a valid architecture"),
    ("sampling", "top_p"): (7, r"sampling is not valid: top_p must be in \[0, 1\]"),
}


@pytest.mark.parametrize("path", DAMAGES, ids="/".join)
def test_a_config_of_a_stranger_is_checked_before_anything_is_built_from_it(path, exported, tmp_path):
    value, message = DAMAGES[path]
    record = json.loads((exported / CONFIG_FILE).read_text())
    *sections, field = path
    section = record
    for name in sections:
        section = section[name]
    section[field] = value
    (tmp_path / CONFIG_FILE).write_text(json.dumps(record))
    (tmp_path / WEIGHTS_FILE).symlink_to(exported / WEIGHTS_FILE)
    with pytest.raises(ValueError, match=message):
        var_jax.load_var(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"), [("{", "is not JSON"), ("[]", "got 'list'"), ("[" * 10**5, "not JSON")]
)
def test_a_config_that_is_no_record_is_refused(content, message, exported, tmp_path):
    (tmp_path / CONFIG_FILE).write_text(content)
    (tmp_path / WEIGHTS_FILE).symlink_to(exported / WEIGHTS_FILE)
    with pytest.raises(ValueError, match=message):
        var_jax.load_tokenizer(tmp_path)


def test_tensors_that_do_not_fit_are_named(exported, tmp_path):
    shutil.copy(exported / CONFIG_FILE, tmp_path)
    tensors = dict(read_tensors(exported / WEIGHTS_FILE, "tokenizer"))
    tensors["tokenizer/extra"] = tensors.pop("tokenizer/quantizer/codebook")
    tensors["tokenizer/decoder/conv_in/bias"] = np.zeros(8, np.int32)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    write_safetensors(tmp_path / WEIGHTS_FILE, shapes, iter(tensors.items()), dtypes)
    with pytest.raises(ValueError, match="dtype int32.*; extra is unknown; quantizer/codebook is missing"):
        var_jax.load_tokenizer(tmp_path)


def test_a_model_goes_to_the_hub_and_back(tiny_run, exported, tmp_path):
    """In a process of its own, since huggingface_hub reads its settings when it is imported."""
    pytest.importorskip("huggingface_hub")
    program = f"""if True:
        import numpy as np, var_jax
        from pathlib import Path
        from var_jax.interop.model_names import find_model
        from var_jax.tools.export import push
        print(push(Path("{exported}"), "me/tiny"))
        model = var_jax.load_var("hf://me/tiny")
        want = var_jax.load_var("{tiny_run}")
        np.testing.assert_array_equal(model.sample([1], seed=5), want.sample([1], seed=5))
        print(find_model("hf://me/tiny@main/model.safetensors").stat().length)
        for name in ("hf://me/absent", "hf://me/tiny/absent.pth", "hf://tiny"):
            try:
                var_jax.load_var(name)
            except (FileNotFoundError, ValueError) as error:
                print(error)"""
    with fake_hub.serving() as hub:
        os.environ.update(HF_ENDPOINT=hub.address, HF_HOME=str(tmp_path), HF_TOKEN="hf_test")
        done = command("-c", program)
        for name in ("HF_ENDPOINT", "HF_HOME", "HF_TOKEN"):
            del os.environ[name]
        sent = hub.repositories["me/tiny"]
    assert done.returncode == 0, done.stderr[-3000:]
    assert {name: sent[name] for name in sent if name != ".gitattributes"} == {
        path.name: path.read_bytes() for path in exported.iterdir()
    }
    url, size, absent, no_file, malformed = done.stdout.strip().splitlines()
    assert url.startswith(f"{hub.address}/me/tiny/commit/") and int(size) == len(sent[WEIGHTS_FILE])
    assert absent.startswith("hf://me/absent: config.json and model.safetensors could not be downloaded: ")
    assert no_file.startswith("hf://me/tiny/absent.pth: absent.pth could not be downloaded: ")
    assert malformed.startswith("hf://tiny: must be hf://owner/name")


def test_a_file_without_a_tokenizer_says_so(goldens):
    with pytest.raises(ValueError, match=r"var\.pth: no published tokenizer"):
        var_jax.load_var(goldens / "var.pth")


def test_the_models_in_the_package_are_small_and_draw_what_is_asked_for(tmp_path, monkeypatch):
    assert pretrained_names() == ("digits", "shapes")
    for name in pretrained_names():
        assert is_exported(find_model(name))
        assert sum(path.stat().length for path in find_model(name).iterdir()) < 12 * 2**20
    model = var_jax.load_var("digits")
    labels = np.repeat(np.arange(10), 10)
    pixels = lambda images: images.mean(-1).reshape(len(images), -1)
    digits = datasets.load_digits()
    classifier = svm.SVC(gamma=0.02).fit(digits.data / 16, digits.target)
    assert (classifier.predict(pixels(model.sample(labels))) == labels).mean() >= 0.95
    shapes = var_jax.load_var("shapes")
    names = ["blue", "green", "red", "white"]
    images = shapes.sample(prompt=[f"a yellow disc on {name}" for name in names] * 4)
    border, middle = images[:, 0].mean(axis=1), images[:, 12:20, 12:20].mean(axis=(1, 2))
    colors = np.array([COLORS[name] for name in names] * 4)
    assert (abs(border - colors).max(axis=1) < 0.2).mean() >= 0.9
    assert (abs(middle - COLORS["yellow"]).max(axis=1) < 0.3).mean() >= 0.9
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    assert find_model("digits") == tmp_path / "digits"  # a path comes first
