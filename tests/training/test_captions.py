"""Training on captions, from a prepared data set and from tokens, and what comes of it."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

import var_jax
from tests.helpers.commands import command
from tests.helpers.tiny import tiny_config
from var_jax.conditions import encode_caption
from var_jax.errors import ConfigError
from var_jax.sharding import make_mesh
from var_jax.stages import run
from var_jax.tools.prepare import prepare
from var_jax.training.align_task import AlignTask
from var_jax.training.state import create_state
from var_jax.training.transformer_task import NextScaleTask

WORDS = ("blue", "red")


def test_from_captions_of_a_folder_to_images_of_prompts(tiny_run, tmp_path):
    rng, lines = np.random.default_rng(0), []
    (tmp_path / "vectors").mkdir()
    for i in range(48):
        name, pixels = f"{i}.png", rng.integers(0, 60, (8, 8, 3))
        pixels[..., 2 * (i % 2)] += 190
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / name)
        np.save(tmp_path / "vectors" / f"{i}.npy", np.full((1 + i % 2, 3), i + 1, np.float32))
        lines.append(json.dumps({"image": name, "caption": f"All {('red', 'blue')[i % 2]}!"}))
    captions = tmp_path / "captions.jsonl"
    captions.write_text("\n".join(lines))
    prepare(tmp_path, "colours", tmp_path / "data", 0.2, False, 1, captions, tmp_path / "vectors")
    stage = tiny_config(tmp_path / "data", steps=8, every=8).next_scale
    stage.data.name, stage.tokenizer = "colours", str(tiny_run)
    stage.model.update(dict(condition="caption", text_depth=1))
    stage.train.update(dict(base_learning_rate=0.1, preview_every=0))
    run(stage, tmp_path / "run")
    losses = [
        json.loads(line)["loss"]
        for line in (tmp_path / "run" / "next_scale" / "metrics.jsonl").read_text().splitlines()
        if json.loads(line)["kind"] == "train"
    ]
    assert len(losses) == 8 and losses[-1] < 0.95 * losses[0]
    config = var_jax.load_var(tmp_path / "run").module.config
    assert (config.vocabulary, config.condition_length) == (("all", "blue", "red"), 2)

    arguments = [f"--workdir={tmp_path}/run", "--num_per_class=2", f"--out={tmp_path}/out"]
    done = command("sample.py", *arguments, "--prompts=all red|All blue.", "--pngs")
    assert done.returncode == 0, done.stderr[-2000:]
    with np.load(tmp_path / "out" / "samples.npz") as samples:
        assert samples["arr_0"].shape == (4, 8, 8, 3)
        assert samples["arr_1"].tolist() == [0, 1, 0, 1]
        assert samples["prompts"].tolist() == ["all red", "All blue."]
    assert (tmp_path / "out" / "images" / "000003_prompt0001.png").exists()

    done = command(
        "evaluate.py", "generate-and-score", f"--workdir={tmp_path}/run", "--num_per_class=30",
        "--data=colours", f"--data_dir={tmp_path}/data", f"--out={tmp_path}/scores",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "scores" / "scores.json").read_text())["num_samples"] == 30

    stage.model.condition = "embedding"
    stage.train.update(dict(steps=1, eval_every=1, checkpoint_every=1))
    run(stage, tmp_path / "embedded")
    (tmp_path / "asked").mkdir()
    for name, length in (("two", 2), ("one", 1)):
        np.save(tmp_path / "asked" / f"{name}.npy", np.ones((length, 3), np.float16))
    arguments = [f"--workdir={tmp_path}/embedded", "--num_per_class=2", f"--out={tmp_path}/drawn"]
    done = command("sample.py", *arguments, f"--embeddings={tmp_path}/asked")
    assert done.returncode == 0, done.stderr[-2000:]
    with np.load(tmp_path / "drawn" / "samples.npz") as samples:
        assert samples["arr_1"].tolist() == [0, 1, 0, 1] and samples["prompts"].tolist() == ["one", "two"]
    np.save(tmp_path / "asked" / "wide.npy", np.ones((1, 4), np.float16))
    done = command("sample.py", *arguments, f"--embeddings={tmp_path}/asked")
    assert done.returncode == 1 and "wide.npy has D = 4" in done.stderr

    stage.model.condition = "label"
    with pytest.raises(ConfigError, match="config.model.condition: 'caption' there, 'label' now"):
        run(stage, tmp_path / "run")


def captioned_task(tiny_tokenizer, cls=NextScaleTask, **fields):
    stage = tiny_config("none").next_scale
    stage.model.update(dict(condition="caption", text_depth=1, class_dropout_prob=0.0))
    stage.update(fields)
    stage.train.base_learning_rate = 0.1
    data = dict(condition_length=2, condition_width=0, vocabulary=WORDS)
    return cls(stage, 20, *tiny_tokenizer, classes=1, condition_fields=data)


def test_steps_on_tokens_learn_what_captions_say(tiny_tokenizer):
    """The tokens of an image are all 3 or all 7, which only its caption tells before the first of them."""
    task = captioned_task(tiny_tokenizer)
    captions = np.stack([encode_caption(WORDS[i % 2], WORDS, 2) for i in range(16)])
    tokens = np.repeat([[3], [7]] * 8, 21, axis=1)
    batch = {"tokens": tokens, "condition": captions, "label": np.zeros(16, np.int32)}
    mesh = make_mesh(devices=jax.devices()[:1])
    state = create_state(task.init, task.optimizer, False, jax.random.key(0), mesh)[0]()
    step = jax.jit(lambda state, batch, key: task.train_step(state, task.frozen, batch, key))
    losses = []
    for i in range(12):
        output = step(state, batch, jax.random.key(i))
        state = output.state
        losses.append(float(output.loss))
    assert losses[-1] < 0.3 * losses[0]
    swapped = batch | {"condition": captions[::-1]}
    right, wrong = (float(step(state, b, jax.random.key(0)).loss) for b in (batch, swapped))
    assert (wrong - right) * 21 > np.log(2)  # in nats of an image


def test_alignment_pairs_images_with_captions_of_others(tiny_tokenizer):
    task = captioned_task(
        tiny_tokenizer,
        AlignTask,
        task="align",
        align=dict(method="cca", beta=0.1, negative_weight=1.0, samples=""),
        correction={},
    )
    captions = np.array([[2, 0], [3, 0], [3, 0], [0, 0]], np.int32)
    batch = {"tokens": np.zeros((4, 21), np.int32), "condition": captions, "label": np.zeros(4, np.int32)}
    pairs = jax.jit(task.make_pairs)(task.frozen, batch, jax.random.key(0))
    np.testing.assert_array_equal(pairs["labels"][:, 0], captions)
    np.testing.assert_array_equal(pairs["labels"][:, 1], captions[[3, 0, 1, 2]])
    assert pairs["is_negative"][:, 1].tolist() == [False, True, False, True]
