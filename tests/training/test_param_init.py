import dataclasses
import shutil

import chex
import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from tests.helpers.arrays import GOLDEN_SCALES, TRANSFORMERS
from tests.helpers.tiny import tiny_config
from tests.training.test_resume import logged
from var_jax.interop.load import read_network, tokenizer_shapes, transformer_shapes
from var_jax.sharding import make_mesh
from var_jax.stages import run
from var_jax.tokenizer.config import TokenizerConfig
from var_jax.training.checkpoint import CheckpointMissing, load_params
from var_jax.training.param_init import match_params
from var_jax.training.state import create_state
from var_jax.training.transformer_task import NextScaleTask
from var_jax.transformer.config import NextScaleConfig


def load_into(path, kind, **changes):
    """Return pretrained parameters, those of a changed network loaded from them (else zeros), and notes."""
    config, params = read_network(path, kind)
    target_config = dataclasses.replace(config, **changes)
    shapes = transformer_shapes(target_config) if kind == "next_scale" else tokenizer_shapes(target_config)
    shapes.pop("code_hits", None)
    init_values, notes = match_params(params, config, shapes, target_config)
    ours = {path: np.zeros(leaf.shape, np.float32) for path, leaf in flatten_dict(shapes, sep="/").items()}
    for path, leaf in init_values.items():
        ours[path][slice(None) if leaf.rows is None else leaf.rows] = leaf.values
    return flatten_dict(params, sep="/"), ours, notes


def assert_equal_except(ours: dict, pretrained: dict, *paths: str) -> None:
    assert set(ours) == set(pretrained) and set(paths) <= set(ours)
    for path in set(ours) - set(paths):
        np.testing.assert_array_equal(ours[path], pretrained[path], err_msg=path)


# --- Matching of parameters


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_other_classes_keep_all_but_their_embedding(goldens, name):
    pretrained, ours, notes = load_into(goldens / f"{name}.pth", "next_scale", num_classes=4)
    assert_equal_except(ours, pretrained, "class_embedding")
    np.testing.assert_array_equal(ours["class_embedding"][4], pretrained["class_embedding"][10])
    assert not ours["class_embedding"][:4].any()
    (note,) = notes
    assert note.startswith("class_embedding is [11, 192] in init_from, [5, 192] in this run: ")
    assert note.endswith(": 1 of 5 rows loaded, the others initialized")


def test_other_scales_keep_the_rows_of_equal_maps(goldens):
    path = goldens / "var.pth"
    pretrained, ours, notes = load_into(path, "next_scale", scales=(1, 1, 3, 4, 5))
    assert_equal_except(ours, pretrained, "level_embedding", "position_embedding")
    level, position = ours["level_embedding"], ours["position_embedding"]
    np.testing.assert_array_equal(level[[0, 2, 3]], pretrained["level_embedding"][[0, 2, 3]])
    np.testing.assert_array_equal(position[0], pretrained["position_embedding"][0])
    np.testing.assert_array_equal(position[2:27], pretrained["position_embedding"][5:30])  # sides 3 and 4
    assert not level[[1, 4]].any() and not position[1].any() and not position[27:].any()
    shapes = "level_embedding is [4, 192] in init_from, [5, 192] in this run"
    assert f"{shapes}: 3 of 5 rows loaded, the others initialized" in notes
    # As many positions, but of other maps.
    pretrained, ours, notes = load_into(path, "next_scale", scales=(1, 2, 5))
    np.testing.assert_array_equal(ours["position_embedding"][:5], pretrained["position_embedding"][:5])
    assert not ours["position_embedding"][5:].any()
    assert "position_embedding is of other maps: 5 of 30 rows loaded, the others initialized" in notes
    _, ours, notes = load_into(path, "next_scale", scales=(2, 6))
    assert not ours["start_embedding"].any()
    assert "start_embedding is [1, 192] in init_from, [4, 192] in this run: initialized" in notes


def test_other_codes_make_a_new_head_or_codebook(goldens):
    pretrained, ours, notes = load_into(goldens / "var.pth", "next_scale", num_codes=50)
    assert_equal_except(ours, pretrained, "head/kernel", "head/bias")
    assert len(notes) == 2
    assert "head/kernel is [192, 128] in init_from, [192, 50] in this run: initialized" in notes
    pretrained, ours, notes = load_into(
        goldens / "vae.pth", "tokenizer", scales=(1, 2), num_codes=50, num_phis=2
    )
    assert_equal_except(ours, pretrained, "quantizer/codebook", "quantizer/phi_kernel", "quantizer/phi_bias")
    assert len(notes) == 3
    assert "quantizer/codebook is [128, 16] in init_from, [50, 16] in this run: initialized" in notes
    pretrained, ours, notes = load_into(goldens / "vae.pth", "tokenizer", scales=(1, 2), num_phis=0)
    assert pretrained.keys() - ours.keys() == {"quantizer/phi_kernel", "quantizer/phi_bias"}
    assert notes[0].endswith("in init_from, absent in this run: not used")


def test_another_network_is_refused_with_the_fields_that_differ(goldens):
    with pytest.raises(ValueError) as error:
        load_into(goldens / "var.pth", "next_scale", width=96, depth=2, num_classes=4)
    assert "config.model.width must be 192, as in init_from; got 96" in str(error.value)
    assert "config.model.depth must be 3, as in init_from; got 2" in str(error.value)
    assert "kernel" not in str(error.value)  # shapes follow from the fields
    # What no shape shows.
    with pytest.raises(ValueError, match="config.model.num_heads must be 3, as in init_from; got 6"):
        load_into(goldens / "var_plain_attention.pth", "next_scale", num_heads=6)
    with pytest.raises(ValueError, match="config.model.l2_normalized must be False, as in init_from; got"):
        load_into(goldens / "vae.pth", "tokenizer", l2_normalized=True)


# --- In a run


@pytest.mark.parametrize("use_ema", [True, False])
def test_loaded_parameters_are_sharded_like_initial_ones(goldens, golden_tokenizer, digits_dir, use_ema):
    config, params = read_network(goldens / "var.pth", "next_scale")
    stage = tiny_config(digits_dir).next_scale
    stage.model.update(dict(depth=3, width=192, num_heads=3))
    task = NextScaleTask(stage, 6, golden_tokenizer.module, golden_tokenizer.params, classes=4)
    init_values, _ = match_params(params, config, transformer_shapes(task.config), task.config)
    make_state, abstract = create_state(
        task.init, task.optimizer, use_ema, jax.random.key(0), make_mesh(fsdp=4, data=2)
    )
    state = make_state(init_values)
    got = jax.tree.map(lambda leaf: leaf.sharding, state)
    assert got == jax.tree.map(lambda leaf: leaf.sharding, abstract)
    assert not state.params["head"]["kernel"].is_fully_replicated
    ours = flatten_dict(jax.device_get(state.params), sep="/")
    assert_equal_except(ours, flatten_dict(params, sep="/"), "class_embedding")
    np.testing.assert_array_equal(ours["class_embedding"][4], params["class_embedding"][10])
    assert ours["class_embedding"][:4].std() == pytest.approx((1 / (3 * 192)) ** 0.5, rel=0.1)  # initial
    if use_ema:
        chex.assert_trees_all_equal(state.ema, state.params)
        kernels = (tree["head"]["kernel"].addressable_data(0) for tree in (state.ema, state.params))
        assert len({kernel.unsafe_buffer_pointer() for kernel in kernels}) == 2  # or it could not be donated


def evaluation(workdir, stage) -> dict:
    (line,) = (line for line in logged(workdir, stage) if line.pop("kind") == "eval")
    return line


@pytest.mark.parametrize(("ema", "stages"), [(0.99, ("tokenizer", "next_scale")), (0.0, ("next_scale",))])
def test_a_run_from_itself_starts_at_the_loss_it_had(tiny_run, digits_dir, tmp_path, capsys, ema, stages):
    config = tiny_config(digits_dir, steps=1)
    config.stages = stages
    config.next_scale.tokenizer = "" if "tokenizer" in stages else str(tiny_run)
    config.tokenizer.adversarial.weight = 0.0  # it has no part in what is asked here
    config.tokenizer.codebook.ema_decay = 0.0  # codes would follow their targets without any learning rate
    for stage in (config.tokenizer, config.next_scale):
        stage.init_from = str(tiny_run)
        stage.train.update(dict(base_learning_rate=0.0, ema_decay=ema, preview_every=0))
    run(config, tmp_path)
    output = capsys.readouterr().out
    for stage in stages:
        assert f"{stage}: starts from {tiny_run}\n" in output
        want, got = evaluation(tiny_run, stage), evaluation(tmp_path, stage)
        assert got["step"] == 1 and want["step"] == 2
        assert {**got, "step": 2} == pytest.approx(want, rel=1e-5)
        want, got = (load_params(folder / stage / "checkpoints")[0] for folder in (tiny_run, tmp_path))
        chex.assert_trees_all_equal(got, want)


def fine_tuning(digits_dir, source):
    """Return the config of the transformer stage: 4 steps, a checkpoint every 2."""
    config = tiny_config(digits_dir, steps=4)
    config.stages = ("next_scale",)
    config.next_scale.tokenizer = str(source)
    config.next_scale.init_from = str(source)
    config.next_scale.train.preview_every = 0
    return config


def test_resumed_equals_unbroken_wherever_the_source_is_by_then(tiny_run, digits_dir, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(tiny_run, source)
    run(fine_tuning(digits_dir, source), tmp_path / "unbroken")
    shutil.copytree(tmp_path / "unbroken", tmp_path / "killed")
    folders = [tmp_path / name / "next_scale" / "checkpoints" for name in ("unbroken", "killed")]
    shutil.rmtree(folders[1] / "4")  # as after a kill at step 3
    shutil.rmtree(source / "next_scale")  # not needed any more
    moved = fine_tuning(digits_dir, source)
    moved.next_scale.init_from = "moved"
    run(moved, tmp_path / "killed")
    want, got = (load_params(folder, 4)[0] for folder in folders)
    chex.assert_trees_all_equal(got, want)
    assert logged(tmp_path / "killed", "next_scale") == logged(tmp_path / "unbroken", "next_scale")


def test_what_cannot_be_started_from_is_found_before_the_first_stage_trains(
    tiny_run, goldens, digits_dir, tmp_path, monkeypatch
):
    config = tiny_config(digits_dir)
    monkeypatch.chdir(tmp_path)
    for init_from, error, message in (
        ("no.pth", CheckpointMissing, f"no next_scale at config.init_from={tmp_path}/no.pth: no such file"),
        ("none", CheckpointMissing, "no checkpoints under .*none/next_scale/checkpoints"),
        (str(goldens / "var.pth"), ValueError, "var.pth: it is another network\n.*depth must be 3, as in"),
        (str(goldens / "vae.pth"), ValueError, "vae.pth: no published VAR transformer"),
    ):
        config.next_scale.init_from = init_from
        with pytest.raises(error, match=message):
            run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_architectures_are_those_of_the_source(goldens, tiny_run):
    config, params = read_network(goldens / "var.pth", "next_scale")
    assert config.scales == GOLDEN_SCALES and params["head"]["kernel"].dtype == np.float32
    config, params = read_network(tiny_run, "tokenizer")
    assert isinstance(config, TokenizerConfig) and config.scales == (1, 2, 4)
    chex.assert_trees_all_equal(params, load_params(tiny_run / "tokenizer" / "checkpoints")[0])
    assert isinstance(read_network(tiny_run, "next_scale")[0], NextScaleConfig)
