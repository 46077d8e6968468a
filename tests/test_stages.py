import pytest

from configs import digits, var
from configs import tokenizer as tokenizer_config
from tests.helpers.tiny import tiny_config
from var_jax import stages
from var_jax.data.sources import DataSetMissing
from var_jax.errors import ConfigError
from var_jax.stages import num_steps, run, stages_of
from var_jax.training.checkpoint import CheckpointMissing, load_config
from var_jax.training.resume import check_resume_compatible


def test_stages_of_a_config():
    config = digits.get_config()
    assert [stage.task for stage in stages_of(config)] == ["tokenizer", "next_scale"]
    config.stages = ("next_scale",)
    assert [stage.task for stage in stages_of(config)] == ["next_scale"]
    single = var.get_config("d16")
    assert stages_of(single) == [single]
    config.stages = ("tokeniser",)
    with pytest.raises(
        ValueError, match=r"must name some of \['next_scale', 'tokenizer'\], got \('tokeniser',\)"
    ):
        stages_of(config)


@pytest.mark.parametrize("config", [var.get_config("d16"), tokenizer_config.get_config()])
def test_published_configs_without_data_stop_at_once(config, tmp_path):
    config.data.dir = str(tmp_path)
    with pytest.raises(DataSetMissing) as error:
        run(config, tmp_path / "run")
    for words in ("imagenet2012", "tfds build", "configs/digits.py"):
        assert words in str(error.value)


def test_a_transformer_without_a_tokenizer_stops_at_once(digits_dir, tmp_path):
    config = tiny_config(digits_dir)
    config.stages = ("next_scale",)
    with pytest.raises(CheckpointMissing) as error:
        run(config, tmp_path)
    for words in (
        "no tokenizer at",
        "--config.tokenizer=",
        "--config=configs/tokenizer.py",
        "configs/digits.py",
    ):
        assert words in str(error.value)


def add(section, **fields):
    """Add new fields to a locked config section."""
    with section.unlocked():
        section.update(fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: add(c.model, hidden=3), "config.model has no field hidden; it has .*ch_mult"),
        (lambda c: add(c.loss, gan=1.0), r"config.loss weighs unknown terms \['gan'\]"),
        (lambda c: c.train.update(batch=30), "train.batch=30 must be a multiple of 8"),
        (lambda c: c.train.update(batch=2000), "fewer than one batch of 2000"),
        (lambda c: c.train.update(log_every=0), "train.log_every must be at least 1, got 0"),
        (lambda c: c.train.update(ema_decay=1.0), r"train.ema_decay must be in \[0, 1\)"),
        (lambda c: c.train.update(dtype="float17"), "train.dtype must be auto, float32 or bfloat16"),
        (lambda c: c.train.update(lr_schedule="up"), "train.lr_schedule must be one of"),
        (lambda c: c.train.update(steps=0, epochs=0), "make no step"),
        (
            lambda c: c.update(task="gan"),
            "config.task must be one of tokenizer, next_scale, next_token, align; got 'gan'",
        ),
        (lambda c: c.data.update(eval_split="dev"), "no split 'dev'"),
        (lambda c: c.train.mesh.update(data=3), "does not fit 8 devices"),
        (lambda c: c.model.update(scales=(1, 4, 2)), "2 follows 4"),
        (lambda c: c.data.update(resize=0.5), "data.resize must be at least 1"),
        (
            lambda c: (c.loss.update(perceptual=1.0), c.update(perceptual_weights="/no/vgg.pth")),
            "config.perceptual_weights: .*/no/vgg.pth",
        ),
    ],
)
def test_wrong_fields_are_named_before_anything_runs(digits_dir, tmp_path, change, message):
    stage = tiny_config(digits_dir).tokenizer
    change(stage)
    with pytest.raises(ConfigError, match=message):
        run(stage, tmp_path)
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.model.update(num_heads=3), "num_heads=3 must be positive and divide width=32"),
        (lambda c: c.sampling.update(top_p=2.0), r"top_p must be in \[0, 1\]"),
        (lambda c: c.train.update(batch=9), "train.batch=9 must be a multiple of 8"),
    ],
)
def test_a_later_stage_is_checked_before_the_first_one_trains(digits_dir, tmp_path, change, message):
    config = tiny_config(digits_dir)
    change(config.next_scale)
    with pytest.raises(ConfigError, match=message):
        run(config, tmp_path)
    assert not (tmp_path / "tokenizer").exists()


def test_steps_from_epochs():
    config = var.get_config("d16").train
    assert num_steps(config, 1_281_167) == 200 * 1_281_167 // 768
    config.steps = 7
    assert num_steps(config, 1_281_167) == 7


@pytest.mark.parametrize(("name", "depth"), [("d12", 12), ("d16", 16), ("d20", 20), ("d24", 24), ("d30", 30)])
def test_published_hyperparameters(name, depth):
    config = var.get_config(name)
    assert (config.model.depth, config.model.width, config.model.num_heads) == (depth, 64 * depth, depth)
    assert config.model.drop_path == pytest.approx(0.1 * depth / 24)
    assert not config.model.shared_adaln and sum(s * s for s in config.scales) == 680


def test_512px_and_unknown_sizes():
    config = var.get_config("d36")
    assert config.model.shared_adaln and sum(s * s for s in config.scales) == 2240
    with pytest.raises(ValueError, match="knows d12, d16, d20, d24, d30, d36; got 'd8'"):
        var.get_config("d8")


def test_intervals_and_paths_may_change_between_runs_and_nothing_else(tmp_path):
    saved = {"steps": 9, "tokenizer": "codebook 1", "stage": digits.get_config().tokenizer.to_dict()}
    now = digits.get_config().tokenizer
    now.train.update(dict(log_every=1, max_to_keep=9, mesh=dict(data=2)))
    now.data.update(dict(dir="/elsewhere", threads=1))
    check_resume_compatible(saved, {**saved, "stage": now.to_dict()}, tmp_path)
    del saved["stage"]["init_from"], saved["stage"]["model"]["patch"]  # a run older than these fields
    check_resume_compatible(saved, {**saved, "stage": now.to_dict()}, tmp_path)
    now.model.patch = 2
    with pytest.raises(ValueError, match="config.model.patch: None there, 2 now"):
        check_resume_compatible(saved, {**saved, "stage": now.to_dict()}, tmp_path)
    now.model.patch = 0
    now.seed = 5
    with pytest.raises(ValueError, match="config.seed: 1 there, 5 now"):
        check_resume_compatible(saved, {**saved, "stage": now.to_dict()}, tmp_path)
    with pytest.raises(ValueError, match="tokenizer: 'codebook 1' there, 'codebook 2' now"):
        check_resume_compatible(saved, {**saved, "tokenizer": "codebook 2"}, tmp_path)


def record_of(stage, **more) -> dict:
    return {"task": "tokenizer", "stage": stage.to_dict(), "dtype": "float32", "weights": {}, **more}


def test_fields_that_change_no_number_may_change_between_runs(tmp_path):
    stage = tokenizer_config.get_config()
    stage.perceptual_weights = "vgg16.pth"
    saved = record_of(stage, weights={"vgg": "0a1b2c3d"})
    stage.data.update(dict(workers=8, threads=2))
    stage.train.update(dict(remat=False))
    stage.update(dict(init_from="/elsewhere", perceptual_weights="/elsewhere/vgg16.pth"))
    stage.adversarial.dino_weights = "/elsewhere/dino.pth"
    assert check_resume_compatible(saved, record_of(stage, weights={"vgg": "0a1b2c3d"}), tmp_path) == ""
    with pytest.raises(ConfigError, match="weights.vgg: '0a1b2c3d' there, 'ffffffff' now"):
        check_resume_compatible(saved, record_of(stage, weights={"vgg": "ffffffff"}), tmp_path)
    with pytest.raises(ConfigError, match="weights.vgg: '0a1b2c3d' there, None now"):
        check_resume_compatible(saved, record_of(stage), tmp_path)


def test_runs_from_before_fingerprints_and_dtypes_were_recorded_resume(tmp_path):
    stage = tokenizer_config.get_config()
    stage.perceptual_weights = "vgg16.pth"
    saved = {"task": "tokenizer", "stage": stage.to_dict()}
    stage.perceptual_weights = "/elsewhere/vgg16.pth"
    check_resume_compatible(saved, record_of(stage, weights={"vgg": "0a1b2c3d"}), tmp_path)
    stage.perceptual_weights = ""
    with pytest.raises(ConfigError, match="config.perceptual_weights is given: True there, False now"):
        check_resume_compatible(saved, record_of(stage), tmp_path)
    stage.perceptual_weights = "vgg16.pth"
    stage.train.dtype = "bfloat16"
    with pytest.raises(ConfigError, match="config.train.dtype: 'auto' there, 'bfloat16' now"):
        check_resume_compatible(saved, record_of(stage, dtype="bfloat16"), tmp_path)


def test_a_dtype_that_auto_means_elsewhere_is_reported_and_another_choice_rejected(tmp_path):
    """Resume a run of an accelerator on the CPU."""
    stage = tokenizer_config.get_config()
    saved = record_of(stage, dtype="bfloat16")
    notice = check_resume_compatible(saved, record_of(stage), tmp_path)
    assert "began with matrix products in bfloat16; train.dtype=auto is float32 on this platform" in notice
    stage.train.dtype = "bfloat16"  # the dtype of the run, given explicitly
    assert check_resume_compatible(saved, record_of(stage, dtype="bfloat16"), tmp_path) == ""
    stage.train.dtype = "float32"
    with pytest.raises(ConfigError, match="dtype: 'bfloat16' there, 'float32' now"):
        check_resume_compatible(saved, record_of(stage), tmp_path)


def test_a_run_records_its_dtype_and_its_frozen_networks(tiny_run):
    record = load_config(tiny_run / "tokenizer" / "checkpoints")[1]
    assert record["dtype"] == "float32" and record["weights"] == {}


def test_run_does_not_modify_the_callers_config(digits_dir, tiny_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny_run.parent)
    config = tiny_config(digits_dir, steps=1)
    config.stages = ("next_scale",)
    config.next_scale.tokenizer = tiny_run.name
    trained = []
    monkeypatch.setattr(stages, "train", lambda task, stage, *_: trained.append(stage.tokenizer))
    before = config.to_json()
    run(config, tmp_path)
    assert config.to_json() == before and trained == [str(tiny_run)]


def test_a_model_field_newer_than_a_run_has_its_default_in_that_run(tmp_path):
    now = {"model": {"depth": 2, "positions": "learned_1d"}, "stage": {"model": {"positions": "learned_1d"}}}
    saved = {"model": {"depth": 2}, "stage": {"model": {}}}
    defaults = {"depth": 16, "positions": "learned_1d"}
    check_resume_compatible(saved, now, tmp_path, defaults)
    now["model"]["positions"] = "rotary_2d"
    with pytest.raises(ValueError, match="model.positions: 'learned_1d' there, 'rotary_2d' now"):
        check_resume_compatible(saved, now, tmp_path, defaults)
