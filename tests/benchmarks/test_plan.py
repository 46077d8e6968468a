"""Test plans: programs compiled ahead of time, whether they fit, and their traffic between chips."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from benchmarks.cloud import launch_command
from benchmarks.compile_ahead import CompiledProgram, topology_devices
from benchmarks.gpus import GPUS
from benchmarks.plan import fit_fields, make_planned_task
from benchmarks.programs import training_programs
from benchmarks.roofline import Step, best_mesh, bound, link_bytes
from benchmarks.workload import make_task, make_tokenizer_task, vgg_shapes
from configs import next_token, var
from tests.helpers.commands import REPOSITORY, command
from tests.helpers.tiny import tiny_config
from var_jax.sharding import make_mesh
from var_jax.tokenizer.lpips import perceptual_distance
from var_jax.training.hardware import CHIPS, memory_bytes
from var_jax.transformer.config import NextScaleConfig
from var_jax.transformer.flops import matrix_parameters, training_flops

D16 = NextScaleConfig()
STEP = Step(768, 1, 1, 16, 1, remat="none", itemsize=2, ema=False, other_flops=0.0)
# Width 256 over 8 chips, from tokens; batch, width and number of codes differ, so shapes tell arrays apart.
SMALL = ["--config=configs/var.py:d16", "--from_tokens", "--topology=v5e:2x4", "--config.train.batch=40"]
SMALL += ["--programs=step"]  # evaluation and previews include the tokenizer, which compiles slowly
SMALL += ["--config.model.depth=2", "--config.model.width=256", "--config.model.num_heads=4"]


def plan(tmp_path, *flags: str) -> tuple[dict, str]:
    """Run the command; return its row and the text of the compiled program."""
    arguments = [sys.executable, "-m", "benchmarks.plan", *SMALL, *flags, f"--hlo={tmp_path}/"]
    # Else the compiler decomposes collectives into steps around a ring of chips.
    no_ring = {"LIBTPU_INIT_ARGS": "--xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000"}
    env = (
        os.environ | no_ring | {"JAX_EXEC_TIME_OPTIMIZATION_EFFORT": "-1.0"}
    )  # compiles in a third of the time
    process = subprocess.run(arguments, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, process.stderr[-3000:]
    (row,) = json.loads(process.stdout.splitlines()[-1])["rows"]
    return row, (tmp_path / "v5e_2x4_step.txt").read_text()


def collective_shapes(text: str) -> dict[str, set[str]]:
    """Find the result shapes of each kind of collective in a program."""
    kinds = "all-gather|reduce-scatter|all-reduce|all-to-all|collective-permute"
    result = {kind: set() for kind in kinds.split("|")}
    for shapes, kind in re.findall(rf" = (.*?) ({kinds})(?:-start)?\(", text):
        result[kind] |= set(re.findall(r"\w+\[[\d,]*\]", shapes))
    # A reduce-scatter of the TPU is a computation of this name around an all-reduce.
    for shapes in re.findall(r"%all-reduce-scatter\S* \(.*\) -> (.*) {", text):
        result["reduce-scatter"] |= set(re.findall(r"\w+\[[\d,]*\]", shapes))
    return result


def is_of_images(shape: str) -> bool:
    """Return True for an array of more than one axis whose first is the global or the local batch."""
    sizes = re.findall(r"\d+", shape.split("[")[1])
    return len(sizes) > 1 and sizes[0] in ("40", "5")


def test_libtpu_is_the_one_that_jax_asks_for():
    """With a newer libtpu, JAX's profiler crashes the process (signal 11)."""
    (requirement,) = [line for line in importlib.metadata.requires("jax") if line.startswith("libtpu")]
    release = re.match(r"libtpu==([\d.]+)\.\*", requirement)[1]
    assert importlib.metadata.version("libtpu").startswith(f"{release}.")


@pytest.mark.compiles_for_tpu
def test_fsdp_gathers_and_scatters_parameters_alone(tmp_path):
    row, text = plan(tmp_path)
    assert row["fits"] and row["attention"] == "splash" and row["mesh"] == "fsdp 8"
    assert 0 < row["parameters_gib"] * 8 < 0.05 and row["optimiser_gib"] == pytest.approx(
        2 * row["parameters_gib"], rel=0.01
    )
    step = row["programs"]["step"]
    assert (
        row["gib"]
        == step["gib"]
        == pytest.approx(
            sum(step[f"{p}_gib"] for p in ("arguments", "unread", "outputs", "temporaries", "program"))
        )
    )
    assert step["outputs_gib"] < 1e-4  # the state is donated
    assert step["unread_gib"] > 0.3  # encoder and decoder, in a step from tokens
    result = collective_shapes(text)
    # In 16 bits, those of one block of the scan at a time: qkv, projection, MLP.
    assert {f"bf16[1,{n}]" for n in ("256,768", "256,256", "256,1024", "1024,256")} <= result["all-gather"]
    assert {f"bf16[{n}]" for n in ("32,768", "256,32", "32,1024", "1024,32")} <= result["reduce-scatter"]
    assert not any(shape.startswith("bf16[2,") for shape in result["all-gather"])  # all blocks at once
    assert not [s for shapes in result.values() for s in shapes if is_of_images(s)]


@pytest.mark.compiles_for_tpu
def test_data_parallel_sums_gradients_alone(tmp_path):
    _, text = plan(tmp_path, "--config.train.mesh.data=8", "--config.train.mesh.fsdp=1")
    result = collective_shapes(text)
    assert {kind for kind, shapes in result.items() if shapes} == {"all-reduce"}
    assert {"bf16[1,256,1024]", "bf16[1,256,768]", "f32[1001,256]"} <= result["all-reduce"]
    assert not [s for shapes in result.values() for s in shapes if is_of_images(s)]


def test_a_run_fits_if_its_largest_program_does():
    """A preview that is too large ends a run just as a step does."""
    result = partial(CompiledProgram, compile_s=1.0, program="compiled")
    step = result(gib=10.0, parts={"temporaries": 4.0})
    preview = result(gib=17.0, parts={"temporaries": 11.0})
    row = fit_fields({"step": step}, 16 * 2**30)
    assert row["fits"] and row["largest"] == "step" and row["room_gib"] == 6
    row = fit_fields({"step": step, "preview samples": preview}, 16 * 2**30)
    assert not row["fits"] and row["largest"] == "preview samples" and row["room_gib"] == -1
    assert row["programs"]["step"]["fits"] and row["programs"]["step"]["temporaries_gib"] == 4
    refused = result(gib=30.0, parts={}, program=None)
    assert not fit_fields({"step": step, "evaluation": refused}, 40 * 2**30)["fits"]


@pytest.mark.parametrize("which", ["transformer", "tokenizer"])
def test_programs_of_a_run_share_its_state(which):
    """State and frozen networks count once in each program."""
    mesh, config = make_mesh(devices=jax.devices()[:2]), tiny_config("unused")
    task = make_task(config, mesh) if which == "transformer" else make_tokenizer_task(config.tokenizer)
    programs, state, frozen = training_programs(task, mesh, from_tokens=False)
    previews = {"transformer": ["samples", "scales"], "tokenizer": ["reconstructions"]}[which]
    assert list(programs) == ["step", "evaluation", *(f"preview {name}" for name in previews)]
    resident = {id(leaf) for leaf in jax.tree.leaves((state, frozen))}
    for name, (_, inputs) in programs.items():
        other = [leaf.size for leaf in jax.tree.leaves(inputs) if id(leaf) not in resident]
        assert sum(other) < 4 * 16 * 8**2 * 3, name  # a batch of 16 images of 8 pixels, and no parameters


def test_shapes_of_vgg_are_those_that_its_features_take():
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    assert jax.eval_shape(perceptual_distance, vgg_shapes(), images, images).shape == (2,)


@pytest.mark.parametrize("gpu", GPUS)
def test_gpus_are_known_by_name_and_data_sheet(gpu):
    spec = GPUS[gpu]
    sheet = next(sheet for name, sheet in CHIPS.items() if name in spec.name)
    assert spec.memory == pytest.approx(sheet.memory, rel=0.08)
    assert spec.bandwidth == pytest.approx(sheet.bandwidth, rel=0.01)
    flops = 2 * 4 * spec.cores * 512 * spec.clock_ghz * 1e9  # four tensor cores of Hopper; half on Ampere
    assert flops / (1 if gpu.startswith("h") else 2) == pytest.approx(sheet.flops, rel=0.09)
    assert f'name: "{spec.name}"' in spec.target_config


def test_gpu_nodes_are_asked_for_from_slurm():
    command = launch_command("h100:2x8", 16)
    assert command == "sbatch --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 launch/slurm.sh"
    assert launch_command("v5e:4x4", 16).startswith("ACCELERATOR=v5litepod-16 ")


@pytest.mark.parametrize("name", ["v5e:3x7", "h100:0x8", "h100"])
def test_an_unknown_topology_is_refused(name):
    with pytest.raises(ValueError, match=rf"{name}: cannot be compiled for .* h100:1x8, h200:1x8, a100:1x8"):
        topology_devices(name)


def test_only_stages_with_a_bound_are_planned():
    with pytest.raises(ValueError, match="stage tokenizer, next_scale or align, got next_token"):
        make_planned_task(next_token.get_config("d16"), make_mesh())


def test_a_request_that_cannot_be_planned_is_named():
    process = command("-m", "benchmarks.plan", "--config=configs/tokenizer.py", "--from_tokens")
    assert process.returncode == 1 and process.stderr.startswith(
        "plan: --from_tokens: a tokenizer is trained on"
    )


def test_a_gpu_has_the_memory_that_jax_takes_of_it(monkeypatch):
    """If `memory_stats` raises, the memory is the allocator's fraction of the data sheet's."""
    gpu = SimpleNamespace(platform="gpu", device_kind="NVIDIA H100 80GB HBM3", memory_stats=no_memory_stats)
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    assert memory_bytes(gpu) == 60e9
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    assert memory_bytes(gpu) == pytest.approx(72e9)


def no_memory_stats():
    raise jax.errors.JaxRuntimeError("MemoryStats is only supported for addressable PjRt devices.")


def test_bounds_of_d16_on_paper():
    result = bound(D16, STEP, CHIPS["TPU v5e"])
    flops = 768 * training_flops(D16)
    assert result["compute_s"] == pytest.approx(flops / (16 * 197e12))
    assert result["step_s"] == result["compute_s"] and result["mfu"] == pytest.approx(1)
    recomputing = bound(D16, Step(**{**vars(STEP), "remat": "full"}), CHIPS["TPU v5e"])
    assert recomputing["mfu"] == pytest.approx(0.75)
    assert link_bytes(D16, STEP) == pytest.approx(3 * 2 * matrix_parameters(D16) * 15 / 16)


def test_the_mesh_with_the_least_traffic_that_holds_the_state():
    state = 16 * matrix_parameters(D16)
    best = lambda room: best_mesh(D16, STEP, CHIPS["TPU v5e"], room, lambda _: "mlp")
    assert best(state) == ({"data": 16, "fsdp": 1, "tensor": 1}, "mlp")
    assert best(state / 3) == ({"data": 4, "fsdp": 4, "tensor": 1}, "mlp")
    assert best(0) == ({"data": 1, "fsdp": 16, "tensor": 1}, "mlp")


def test_a_mesh_that_leaves_room_for_activations_goes_before_one_with_less_traffic():
    remat = lambda sizes: "full" if sizes["fsdp"] < 8 else "flat_qkv"
    result = best_mesh(D16, STEP, CHIPS["TPU v5e"], 16 * matrix_parameters(D16), remat)
    assert result == ({"data": 2, "fsdp": 8, "tensor": 1}, "flat_qkv")


def test_a_mesh_that_the_torus_does_not_have_is_named_and_not_suggested():
    chips = topology_devices("v5p:4x4x4")
    with pytest.raises(ValueError, match="'data': 2, .* does not fit the slice: a size must be a product"):
        make_mesh(data=2, fsdp=32, devices=chips)
    step = Step(**{**vars(STEP), "fsdp": 64})
    on_chips = lambda sizes: "mlp" if make_mesh(**sizes, devices=chips) else ""
    result = best_mesh(D16, step, CHIPS["TPU v5p"], 16 * matrix_parameters(D16) / 2, on_chips)
    assert result == ({"data": 16, "fsdp": 4, "tensor": 1}, "mlp")  # fsdp 2 would do


def test_a_width_that_the_chips_do_not_divide_is_split_over_fewer():
    many = Step(**{**vars(STEP), "fsdp": 256})
    sizes, _ = best_mesh(NextScaleConfig(depth=30), many, CHIPS["TPU v5e"], 0, lambda _: "full")
    assert sizes == {"data": 2, "fsdp": 128, "tensor": 1}


def test_parameters_on_paper_are_those_of_the_published_sizes():
    for name, millions in (("d16", 310), ("d20", 600), ("d24", 1000), ("d30", 2000)):
        fields = var.get_config(name).model.to_dict()
        assert matrix_parameters(NextScaleConfig(**fields)) / 1e6 == pytest.approx(millions, rel=0.05)
