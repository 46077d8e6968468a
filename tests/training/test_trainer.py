"""Training loop: its order, unfinished work of a stopped run, and previews that fail."""

import json
import os
import shutil
import signal
import time
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tests.helpers.toy import Toy, toy_stage
from var_jax.data.sources import open_source
from var_jax.sharding import make_mesh
from var_jax.training import trainer
from var_jax.training.checkpoint import Checkpoints, load_config
from var_jax.training.jit_steps import jit_train_step
from var_jax.training.metrics import Log
from var_jax.training.state import create_state
from var_jax.training.trainer import Preempted, train


@pytest.fixture(scope="module")
def sources(digits_dir):
    return tuple(open_source("digits", split, digits_dir) for split in ("train", "test"))


class Drawing(Toy):
    """Toy with predefined scores of its evaluations, and a preview."""

    def __init__(self, scores=(1.0,) * 100, draw=lambda: None, **fields):
        super().__init__(**fields)
        self.scores, self.draw = iter(scores), draw

    def summarize(self, sums):
        return {"loss": next(self.scores)}

    def preview_programs(self, mesh, params, frozen):
        return {"dot": (None, ()), "samples": (None, ())}

    def preview(self, programs, params, frozen, images):
        self.draw()
        noise = np.random.default_rng(0).integers(0, 256, (100, 100, 3), np.uint8)
        return {"dot": Image.fromarray(noise)}  # 30 kB


class Scorer:
    """Scorer of samples with predefined scores."""

    def __init__(self, *scores):
        self.scores = iter(scores)

    def score(self, *_):
        return {"fid": next(self.scores, None) or crash(), "num_samples": 10}


def stage_of(data_dir, every=2, **train):
    stage = toy_stage(data_dir, every)
    stage.train.update(dict(eval_every=every, preview_every=every, **train))
    return stage


def lines(workdir, kind) -> list[tuple[int, float]]:
    result = [json.loads(line) for line in (workdir / "toy" / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in result if line["kind"] == kind]


def steps_under(workdir) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "toy" / "checkpoints").iterdir())


def wait_for_checkpoint(workdir, step) -> list[int]:
    """Wait for the checkpoint of a step; return the steps of all complete checkpoints."""
    deadline = time.monotonic() + 60
    while not (workdir / "toy" / "checkpoints" / str(step)).exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    return sorted(int(path.name) for path in (workdir / "toy" / "checkpoints").glob("[0-9]"))


class Crash(Exception):
    """Simulated crash of the process."""


def crash(*_):
    raise Crash


@pytest.mark.parametrize("where", ["evaluation", "pictures"])
def test_a_crash_after_a_checkpoint_loses_nothing_and_what_was_owed_is_done_later(
    digits_dir, sources, tmp_path, where
):
    """End the process in the evaluation or preview after the last checkpoint of a run."""
    task = Drawing(draw=crash) if where == "pictures" else Drawing(scores=map(crash, "x"))
    with pytest.raises(Crash):
        train(task, stage_of(digits_dir), 2, tmp_path, sources)
    assert wait_for_checkpoint(tmp_path, 2) == [2]
    train(Drawing(scores=(5.0,)), stage_of(digits_dir), 2, tmp_path, sources)
    assert lines(tmp_path, "eval") == [(2, 1.0 if where == "pictures" else 5.0)]  # once
    assert (tmp_path / "dot.png").exists() and (tmp_path / "toy" / "previews" / "dot_0000002.png").exists()
    assert load_config(tmp_path / "toy" / "checkpoints", "best")[0] == 2
    train(Drawing(scores=(), draw=crash), stage_of(digits_dir), 2, tmp_path, sources)  # nothing is unfinished


def test_scores_of_samples_select_the_best_and_are_made_up_for_after_a_crash(digits_dir, sources, tmp_path):
    stage = stage_of(digits_dir, fid_every=2, best_by="fid", max_to_keep=1)
    with pytest.raises(Crash):
        train(Drawing(), stage, 4, tmp_path, sources, scorer=Scorer(3.0))
    wait_for_checkpoint(tmp_path, 4)
    train(Drawing(scores=()), stage, 4, tmp_path, sources, scorer=Scorer(5.0))
    content = (tmp_path / "toy" / "metrics.jsonl").read_text().splitlines()
    scores = [line["fid"] for line in map(json.loads, content) if line["kind"] == "samples"]
    assert scores == [3.0, 5.0] and len(lines(tmp_path, "eval")) == 2
    assert load_config(tmp_path / "toy" / "checkpoints", "best")[0] == 2
    train(Drawing(scores=(), draw=crash), stage, 4, tmp_path, sources, scorer=Scorer())


def test_sigterm_during_an_evaluation_saves_at_once(digits_dir, sources, tmp_path, monkeypatch):
    """Stop at a step without a due checkpoint; the evaluation is cut short and no preview drawn."""
    original, batches = trainer.eval_batches, []

    def terminated(*args):
        for batch in original(*args):
            batches.append(batch)
            os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    monkeypatch.setattr(trainer, "eval_batches", terminated)
    stage = stage_of(digits_dir, every=2, checkpoint_every=100)
    with pytest.raises(Preempted, match="stopped at step 2, saved"):
        train(Drawing(draw=crash), stage, 4, tmp_path, sources)
    assert steps_under(tmp_path) == [2] and len(batches) == 1 and lines(tmp_path, "eval") == []
    with pytest.raises(Preempted, match="stopped at step 2, saved"):  # in the evaluation that is due
        train(Drawing(draw=crash), stage, 4, tmp_path, sources)
    assert len(batches) == 2 and [step for step, _ in lines(tmp_path, "train")] == [1, 2]
    monkeypatch.setattr(trainer, "eval_batches", original)
    train(Drawing(scores=(7.0, 8.0)), stage, 4, tmp_path, sources)
    assert lines(tmp_path, "eval") == [(2, 7.0), (4, 8.0)]
    assert [step for step, _ in lines(tmp_path, "train")] == [1, 2, 3, 4]


def test_sigterm_during_a_step_skips_evaluation_and_pictures(digits_dir, sources, tmp_path, monkeypatch):
    class Terminated(Log):
        def advance(self, step):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(trainer, "Log", Terminated)
    with pytest.raises(Preempted, match="stopped at step 1, saved"):
        train(Drawing(scores=(), draw=crash), stage_of(digits_dir, every=1), 4, tmp_path, sources)
    assert steps_under(tmp_path) == [1] and lines(tmp_path, "eval") == []


def test_scores_come_after_the_checkpoint_and_nan_is_never_the_best(digits_dir, sources, tmp_path):
    scores = (3.0, 1.0, np.nan, 2.0, np.nan)
    train(Drawing(scores), stage_of(digits_dir, every=1, max_to_keep=1), 5, tmp_path, sources)
    assert steps_under(tmp_path) == [2, 5]
    assert load_config(tmp_path / "toy" / "checkpoints", "best")[0] == 2
    assert [step for step, _ in lines(tmp_path, "eval")] == [1, 2, 3, 4, 5]
    saved = Checkpoints(tmp_path / "toy" / "checkpoints", keep=1)
    assert saved.score(2) == 1.0 and saved.score(5) is None
    saved.close()


def test_the_best_of_a_run_whose_scores_were_saved_with_the_checkpoints_stays(digits_dir, sources, tmp_path):
    """Save the score with the checkpoint, as older versions did, then resume."""
    toy, stage = Drawing(), stage_of(digits_dir, every=1, max_to_keep=1)
    train(toy, stage, 2, tmp_path, sources)
    folder = tmp_path / "toy" / "checkpoints"
    state, record = restored(toy, folder, 2)
    shutil.rmtree(folder)
    saved = Checkpoints(folder, keep=1)
    saved.save(2, state, record | {"steps": 4}, score=0.5)
    saved.wait()
    saved.close()
    train(Drawing(scores=(2.0, 3.0)), stage, 4, tmp_path, sources)
    assert steps_under(tmp_path) == [2, 4]
    assert load_config(folder, "best")[0] == 2


def restored(toy, folder, step):
    _, abstract = create_state(toy.init, toy.optimizer, False, jax.random.key(0), make_mesh())
    saved = Checkpoints(folder, keep=1)
    state, record = saved.restore(step, abstract), saved.config(step)
    saved.close()
    return state, record


def exhausted():
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 64 GiB")


def broken():
    raise jax.errors.JaxRuntimeError("INTERNAL: a kernel is wrong")


def test_a_preview_that_runs_out_of_memory_is_a_warning(digits_dir, sources, tmp_path, caplog):
    train(Drawing(draw=exhausted), stage_of(digits_dir), 4, tmp_path, sources)
    assert [step for step, _ in lines(tmp_path, "eval")] == [2, 4] and steps_under(tmp_path) == [2, 4]
    messages = [
        record.getMessage() for record in caplog.records if "no pictures of step" in record.getMessage()
    ]
    assert len(messages) == 2 and "training goes on. RESOURCE_EXHAUSTED" in messages[0]
    with pytest.raises(jax.errors.JaxRuntimeError, match="a kernel is wrong"):
        train(Drawing(draw=broken), stage_of(digits_dir), 4, tmp_path / "other", sources)
    assert steps_under(tmp_path / "other") == [2]


def test_pictures_that_a_full_disk_refuses_are_a_warning(
    digits_dir, sources, small_disk, caplog, monkeypatch
):
    """Fill the disk when pictures and curves of step 2 are written."""
    filler = small_disk / "filler"

    def fill():
        if wait_for_checkpoint(small_disk, 2) == [2]:
            filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - 20_000))  # room for the log

    save = Checkpoints.save

    def save_with_room(self, *args):
        filler.unlink(missing_ok=True)
        save(self, *args)

    monkeypatch.setattr(Checkpoints, "save", save_with_room)
    train(Drawing(draw=fill), stage_of(digits_dir), 4, small_disk, sources)
    (message,) = (x.getMessage() for x in caplog.records if "could not be written" in x.getMessage())
    assert (
        "pictures of step 2 could not be written; training goes on" in message and "No space left" in message
    )
    assert (small_disk / "toy" / "previews" / "dot_0000004.png").stat().st_size > 0
    assert steps_under(small_disk) == [2, 4] and not list(small_disk.rglob("*.partial"))


def test_metrics_that_break_the_contract_of_a_task_are_named(digits_dir):
    class Other(Toy):
        def train_step(self, *args):
            return super().train_step(*args).replace(metrics={"per_image": jnp.zeros(3)})

    task, stage, mesh = Other(), toy_stage(digits_dir, 1), make_mesh()
    _, state = create_state(task.init, task.optimizer, False, jax.random.key(0), mesh)
    program = jit_train_step(task, stage.train, 5, mesh, state)
    batch = {"image": jax.ShapeDtypeStruct((16, 8, 8, 3), jnp.uint8)}
    with pytest.raises(TypeError, match=r"must be scalars, got shapes {'per_image': \(3,\)}"):
        program.trace(state, {}, batch, jax.random.key(0))


def test_a_checkpoint_records_the_names_of_the_classes(digits_dir, sources, tmp_path):
    stage = stage_of(digits_dir)
    train(Drawing(), stage, 2, tmp_path / "named", sources)
    train(Drawing(), stage, 2, tmp_path / "unnamed", [replace(source, class_names=()) for source in sources])
    for name, want in (("named", list("0123456789")), ("unnamed", [])):
        assert load_config(tmp_path / name / "toy" / "checkpoints")[1]["class_names"] == want
