import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import var_jax
from tests.helpers import pickles
from tests.helpers.arrays import GOLDEN_SCALES, TRANSFORMERS
from tests.helpers.commands import REPOSITORY
from tests.helpers.tiny import tiny_config
from tests.interop.test_published import assert_identical
from var_jax.errors import ConfigError
from var_jax.interop.load import load_tokenizer, load_transformer, read_network
from var_jax.interop.tensor_files import read_networks, read_tensors, write_safetensors
from var_jax.sampling.options import SamplingOptions
from var_jax.scales import SCALES_512, Scales
from var_jax.stages import _other_tokenizer, initial_params
from var_jax.tools.convert import check_path, convert, to_file, to_run
from var_jax.training.checkpoint import CHECKPOINT_DIR, load_config
from var_jax.training.transformer_task import NextScaleTask

DATA = REPOSITORY / "tests" / "interop" / "data"


def round_trip(source, tmp_path, stage) -> dict:
    """Convert a file to a run and back, and return its tensors."""
    convert(source, tmp_path / "run", None, GOLDEN_SCALES, "latest")
    target = check_path(str(tmp_path / "back.safetensors"), "DST")  # as the command has it
    (line,) = convert(tmp_path / "run", target, stage, None, "latest")
    assert line.endswith(" MiB")
    return read_tensors(target, stage)


def test_a_tokenizer_goes_to_a_run_and_back_unchanged(goldens, tmp_path):
    got = round_trip(goldens / "vae.pth", tmp_path, "tokenizer")
    assert_identical(got, read_tensors(goldens / "vae.pth", "tokenizer"))


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_transformer_goes_to_a_run_and_back_unchanged(name, goldens, tmp_path):
    got = round_trip(goldens / f"{name}.pth", tmp_path, "next_scale")
    assert_identical(got, read_tensors(goldens / f"{name}.pth", "next_scale"))


def test_a_converted_run_draws_what_the_files_do(goldens, golden_tokenizer, tmp_path):
    for name in ("vae", "var"):
        to_run(goldens / f"{name}.pth", tmp_path, GOLDEN_SCALES)
    tokenizer = var_jax.load_tokenizer(tmp_path)
    model = var_jax.load_var(tmp_path, tokenizer=tokenizer)
    want = var_jax.load_var(goldens / "var.pth", tokenizer=golden_tokenizer)
    np.testing.assert_array_equal(model.generate([1, 2]), want.generate([1, 2]))
    with pytest.raises(ValueError, match="has tokenizer and next_scale: choose one with --stage"):
        to_file(tmp_path, None, tmp_path / "x.safetensors")
    with pytest.raises(FileExistsError, match="holds checkpoints already"):
        to_run(goldens / "vae.pth", tmp_path, GOLDEN_SCALES)


def test_a_trained_run_of_a_layout_that_the_published_one_cannot_express(tiny_run, tmp_path):
    with pytest.raises(ValueError, match="norm_groups is 4, must be 32"):
        to_file(tiny_run, "tokenizer", tmp_path / "x.safetensors")


def test_a_trained_transformer_goes_to_a_file_and_back(tiny_run, tmp_path):
    to_file(tiny_run, "next_scale", tmp_path / "x.safetensors")
    tokenizer = var_jax.load_tokenizer(tiny_run)
    model = var_jax.load_var(tmp_path / "x.safetensors", tokenizer=tokenizer)
    want = var_jax.load_var(tiny_run, tokenizer=tokenizer)
    np.testing.assert_array_equal(model.params["head"]["kernel"], want.params["head"]["kernel"])
    assert model.module.config.num_heads == want.module.config.num_heads == 4


def test_checkpoints_of_the_published_trainer(goldens, golden_tokenizer, tmp_path):
    """Both networks, nested next to the optimizer state."""
    trainer = {
        "config": {"label_smooth": 0.0},
        "vae_local": read_tensors(goldens / "vae.pth", "tokenizer"),
        "var_wo_ddp": read_tensors(goldens / "var.pth", "next_scale"),
        "var_opt": {"optimizer": {"state": {0: {"step": np.float32([5])}}}},
    }
    nested = {"epoch": 3, "args": {"bs": 768, "pn": "256"}, "trainer": trainer}
    path = pickles.save(tmp_path / "ar-ckpt-last.pth", nested)
    assert len(to_run(path, tmp_path / "run", GOLDEN_SCALES)) == 2
    tokenizer = var_jax.load_tokenizer(tmp_path / "run")
    np.testing.assert_array_equal(
        tokenizer.params["quantizer"]["codebook"], golden_tokenizer.params["quantizer"]["codebook"]
    )
    assert var_jax.load_var(path, tokenizer=tokenizer).depth == 3
    # Errors of either network are raised before anything is written.
    broken = {name: t for name, t in trainer["var_wo_ddp"].items() if name != "blocks.1.attn.q_bias"}
    pickles.save(path, {"trainer": {**trainer, "var_wo_ddp": broken}})
    with pytest.raises(ValueError, match="ar-ckpt-last.pth: .*\n.*missing: blocks.1.attn.q_bias"):
        to_run(path, tmp_path / "other", GOLDEN_SCALES)
    assert not (tmp_path / "other").exists()
    del trainer["vae_local"]
    pickles.save(path, nested)
    with pytest.raises(ValueError, match="holds next_scale of the published trainer, but no tokenizer"):
        var_jax.load_tokenizer(path)


def test_a_stage_that_is_there_already_stops_the_other_one_too(goldens, tmp_path):
    """The tokenizer of a trainer checkpoint used to be written before the transformer was checked."""
    _, advice = to_run(goldens / "var.pth", tmp_path / "run", GOLDEN_SCALES)
    assert advice.startswith(f"{tmp_path / 'run'} has no tokenizer yet: convert the tokenizer's file")
    with pytest.raises(FileNotFoundError, match="run has no tokenizer: convert .* or give .* --tokenizer"):
        load_tokenizer(tmp_path / "run")
    networks = {"vae_local": "vae", "var_wo_ddp": "var"}
    tensors = {name: read_tensors(goldens / f"{file}.pth", "") for name, file in networks.items()}
    path = pickles.save(tmp_path / "ar-ckpt-last.pth", tensors)
    with pytest.raises(FileExistsError, match="run/next_scale/checkpoints holds checkpoints already"):
        to_run(path, tmp_path / "run", GOLDEN_SCALES)
    assert not (tmp_path / "run" / "tokenizer").exists()


def test_a_transformer_is_read_from_what_pytorch_wrote(tiny_tokenizer):
    config = tiny_tokenizer[0].config
    for name in ("trainer", "trainer_legacy"):
        path = DATA / f"{name}.pth"
        module, params, *_ = load_transformer(path, config)
        assert (module.config.depth, module.config.width, module.config.num_classes) == (1, 4, 5)
        np.testing.assert_array_equal(
            params["blocks"]["layers_0"]["attention"]["qkv"]["kernel"].T,
            read_tensors(path, "next_scale")["blocks.0.attn.mat_qkv.weight"],
        )
        with pytest.raises(ValueError, match=f"{name}.pth: no published tokenizer: it has no tensor encoder"):
            load_tokenizer(path)


def test_parameters_stay_on_the_host_until_they_are_cast(goldens, tmp_path, monkeypatch):
    """A chip that fits the bfloat16 parameters need not fit the float32 parameters, too."""
    monkeypatch.setattr("var_jax.interop.load.compute_dtype", lambda name: jnp.dtype(jnp.bfloat16))
    to_run(goldens / "vae.pth", tmp_path, GOLDEN_SCALES)
    to_run(goldens / "var.pth", tmp_path, GOLDEN_SCALES)
    for tokenizer_path, path in ((goldens / "vae.pth", goldens / "var.pth"), (tmp_path, tmp_path)):
        tokenizer, params = load_tokenizer(tokenizer_path, GOLDEN_SCALES)
        model, more, *_ = load_transformer(path, tokenizer.config)
        assert {type(leaf) for leaf in jax.tree.leaves((params, more))} == {np.ndarray}
        loaded = var_jax.LoadedTokenizer(tokenizer, params)
        var = var_jax.LoadedVAR(model, more, SamplingOptions(), loaded)
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves((loaded.params, var.params)))
        assert var.params["head"]["kernel"].dtype == jnp.bfloat16
        np.testing.assert_array_equal(
            var.params["head"]["kernel"], jnp.asarray(more["head"]["kernel"]).astype(jnp.bfloat16)
        )


def test_a_converted_run_can_be_started_from(goldens, golden_tokenizer, tmp_path):
    """Convert both files, then train from the run, whose fingerprint of the tokenizer is known."""
    for name in ("vae", "var"):
        to_run(goldens / f"{name}.pth", tmp_path / "run", GOLDEN_SCALES)
    to_run(goldens / "var.pth", tmp_path / "without", GOLDEN_SCALES)
    stage = tiny_config("none").next_scale
    stage.model.update(dict(depth=3, width=192, num_heads=3))
    module, params = load_tokenizer(tmp_path / "run")
    task = NextScaleTask(stage, 6, module, params, classes=10)
    assert load_config(tmp_path / "run" / "next_scale" / CHECKPOINT_DIR)[1]["tokenizer"] == task.fingerprint
    for run in ("run", "without"):
        stage.init_from = str(tmp_path / run)
        initial = initial_params(stage, task, tmp_path / "new")
        np.testing.assert_array_equal(
            initial["head/kernel"].values, read_network(stage.init_from, "next_scale")[1]["head"]["kernel"]
        )
    params["quantizer"]["codebook"] = params["quantizer"]["codebook"] + 1
    other = NextScaleTask(stage, 6, module, params, classes=10)
    stage.init_from = str(tmp_path / "run")
    (note,) = _other_tokenizer(stage.init_from, other)
    assert note.startswith(f"it was trained on another tokenizer ({task.fingerprint})")
    assert _other_tokenizer(str(tmp_path / "without"), other) == []


def test_512_pixels_are_known_by_the_length(tmp_path):
    from var_jax.interop.published import next_scale_config

    tensors = {
        "pos_1LC": np.zeros((1, Scales(SCALES_512).length, 64), np.float32),
        "word_embed.weight": np.zeros((64, 32)),
        "blocks.0.attn.q_bias": np.zeros(64),
        "class_emb.weight": np.zeros((1001, 64)),
        "head.weight": np.zeros((4096, 64)),
    }
    assert next_scale_config(tensors).scales == SCALES_512
    tensors["pos_1LC"] = np.zeros((1, 30, 64))
    with pytest.raises(ValueError, match=r"\(1, 30, 64\), not the 680 or 2240 positions.*give scales"):
        next_scale_config(tensors)


def test_files_and_runs_are_told_apart(goldens, tiny_run, tmp_path):
    with pytest.raises(ValueError, match="is a file, so the target must be the directory of a run"):
        convert(goldens / "vae.pth", tmp_path / "x.pth", None, None, "latest")
    with pytest.raises(ValueError, match="is a run, so the target must be a .pth or .pt or"):
        convert(tiny_run, tmp_path / "x", None, None, "latest")
    with pytest.raises(FileNotFoundError, match="no such file: .*nothing.pth"):
        convert(tmp_path / "nothing.pth", tmp_path / "run", None, None, "latest")
    with pytest.raises(FileNotFoundError, match="is not a run: it has neither tokenizer nor next_scale"):
        convert(tmp_path, tmp_path / "x.pth", None, None, "latest")


def test_a_url_is_no_local_folder():
    """A URL used to become the local folder `gs:/bucket/run`, lost with the machine."""
    for url, message in (
        (
            "s3://bucket/run",
            "DST=s3://bucket/run: Orbax keeps checkpoints in local directories and under gs:// only",
        ),
        ("gs://bucket/vae.pth", "DST=gs://bucket/vae.pth: must be a local path"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_path(url, "DST")
    assert check_path("run", "DST") == Path.cwd() / "run"


def test_truncated_and_foreign_files_leave_no_run(goldens, tmp_path):
    cut = tmp_path / "cut.pth"
    cut.write_bytes((goldens / "vae.pth").read_bytes()[:-500])
    foreign = tmp_path / "foreign.safetensors"
    save_file({"resnet.weight": np.zeros(3, np.float32)}, foreign)
    for path, message in (
        (cut, "cut.pth cannot be read: not a zip archive"),
        (foreign, "no published VAR transformer"),
    ):
        with pytest.raises(ValueError, match=message):
            to_run(path, tmp_path / "run", GOLDEN_SCALES)
    assert not (tmp_path / "run").exists()


def test_leftovers_of_a_kill_are_removed(goldens, tmp_path):
    (tmp_path / "next_scale" / "checkpoints" / "0.orbax-checkpoint-tmp-1").mkdir(parents=True)
    to_run(goldens / "var.pth", tmp_path, GOLDEN_SCALES)
    names = [path.name for path in (tmp_path / "next_scale" / "checkpoints").iterdir()]
    assert "0" in names and not any("tmp" in name for name in names)


def test_a_file_that_could_not_be_finished_is_not_there(tmp_path):
    def tensors():
        yield "a", np.zeros(3, np.float32)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_safetensors(tmp_path / "x.safetensors", {"a": (3,), "b": (2,)}, tensors(), {})
    with pytest.raises(ValueError, match="declared but not given: b"):
        write_safetensors(
            tmp_path / "x.safetensors", {"a": (3,), "b": (2,)}, iter([("a", np.zeros(3, np.float32))]), {}
        )
    assert not list(tmp_path.iterdir())


def test_pth_is_written_by_pytorch_alone(goldens, tmp_path):
    """With the extra `torch` the file reads back the same; without it the message says what to install."""
    to_run(goldens / "var.pth", tmp_path / "run", GOLDEN_SCALES)
    target = tmp_path / "var.pth"
    try:
        import torch  # noqa: F401
    except ModuleNotFoundError:
        with pytest.raises(ModuleNotFoundError, match=re.escape("pip install -e '.[torch]'")):
            to_file(tmp_path / "run", "next_scale", target)
        assert not target.exists()
        return
    to_file(tmp_path / "run", "next_scale", target)
    assert_identical(read_networks(target)[None], read_tensors(goldens / "var.pth", "next_scale"))
