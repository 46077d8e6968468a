"""Programs compiled for TPU slices with no TPU: what fits, and what moves between the chips."""

import json
import os
import re
import subprocess
import sys

import pytest

from configs import var
from tests.conftest import REPOSITORY
from var_jax.benchmarks.roofline import Step, best_mesh, bound, link_bytes
from var_jax.training.chips import CHIPS
from var_jax.transformer.config import NextScaleConfig
from var_jax.transformer.flops import matrix_parameters, training_flops

D16 = NextScaleConfig()
STEP = Step(768, 1, 1, 16, 1, remat="none", itemsize=2, ema=False, other_flops=0.0)
# Width 256 over 8 chips, from tokens; batch, width and codes are unlike, so that shapes tell what is moved.
SMALL = ["--config=configs/var.py:d16", "--from_tokens", "--topology=v5e:2x4", "--config.train.batch=96"]
SMALL += ["--config.model.depth=2", "--config.model.width=256", "--config.model.num_heads=4"]


def plan(tmp_path, *flags: str) -> tuple[dict, str]:
    """The row, and the text of the program."""
    command = [sys.executable, "-m", "var_jax.benchmarks.plan", *SMALL, *flags, f"--hlo={tmp_path}/"]
    # Else products take weights round a ring of chips, piece by piece, which says the same less plainly.
    plain = {"LIBTPU_INIT_ARGS": "--xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000"}
    env = os.environ | plain
    done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    (row,) = json.loads(done.stdout.splitlines()[-1])["rows"]
    return row, (tmp_path / "v5e_2x4.txt").read_text()


def moved(text: str) -> dict[str, set[str]]:
    """Shapes that each kind of collective in a program gives."""
    kinds = "all-gather|reduce-scatter|all-reduce|all-to-all|collective-permute"
    found = {kind: set() for kind in kinds.split("|")}
    for shapes, kind in re.findall(rf" = (.*?) ({kinds})(?:-start)?\(", text):
        found[kind] |= set(re.findall(r"\w+\[[\d,]*\]", shapes))
    # A reduce-scatter of the TPU is a computation of this name around an all-reduce.
    for shapes in re.findall(r"%all-reduce-scatter\S* \(.*\) -> (.*) {", text):
        found["reduce-scatter"] |= set(re.findall(r"\w+\[[\d,]*\]", shapes))
    return found


def is_of_images(shape: str) -> bool:
    """Whether it is led by all images or those of a chip, and has more axes."""
    sizes = re.findall(r"\d+", shape.split("[")[1])
    return len(sizes) > 1 and sizes[0] in ("96", "12")


@pytest.mark.compiles_for_tpu
def test_fsdp_gathers_and_scatters_parameters_alone(tmp_path):
    row, text = plan(tmp_path)
    assert row["fits"] and row["attention"] == "splash" and row["mesh"] == "fsdp 8"
    assert 0 < row["parameters_gib"] * 8 < 0.05 and row["optimiser_gib"] == pytest.approx(
        2 * row["parameters_gib"], rel=0.01
    )
    assert row["gib"] == pytest.approx(
        sum(row[f"{p}_gib"] for p in ("arguments", "unread", "outputs", "temporaries", "program"))
    )
    assert row["outputs_gib"] < 1e-4  # the state is donated
    assert row["unread_gib"] > 0.3  # encoder and decoder, in a step from tokens
    found = moved(text)
    # In 16 bits, those of one block of the scan at a time: qkv, projection, MLP.
    assert {f"bf16[1,{n}]" for n in ("256,768", "256,256", "256,1024", "1024,256")} <= found["all-gather"]
    assert {f"bf16[{n}]" for n in ("32,768", "256,32", "32,1024", "1024,32")} <= found["reduce-scatter"]
    assert not any(shape.startswith("bf16[2,") for shape in found["all-gather"])  # all blocks at once
    assert not [s for shapes in found.values() for s in shapes if is_of_images(s)]


@pytest.mark.compiles_for_tpu
def test_data_parallel_sums_gradients_alone(tmp_path):
    _, text = plan(tmp_path, "--config.train.mesh.data=8", "--config.train.mesh.fsdp=1")
    found = moved(text)
    assert {kind for kind, shapes in found.items() if shapes} == {"all-reduce"}
    assert {"bf16[1,256,1024]", "bf16[1,256,768]", "f32[1001,256]"} <= found["all-reduce"]
    assert not [s for shapes in found.values() for s in shapes if is_of_images(s)]


def test_what_cannot_be_planned_is_said():
    command = [sys.executable, "-m", "var_jax.benchmarks.plan", "--config=configs/var.py:d16"]
    done = subprocess.run([*command, "--topology=v5e:3x7"], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 1 and "--topology=v5e:3x7: cannot be compiled for" in done.stderr


def test_bounds_of_d16_on_paper():
    found = bound(D16, STEP, CHIPS["TPU v5e"])
    flops = 768 * training_flops(D16)
    assert found["compute_s"] == pytest.approx(flops / (16 * 197e12))
    assert found["step_s"] == found["compute_s"] and found["mfu"] == pytest.approx(1)
    again = bound(D16, Step(**{**vars(STEP), "remat": "full"}), CHIPS["TPU v5e"])
    assert again["mfu"] == pytest.approx(0.75)
    assert link_bytes(D16, STEP) == pytest.approx(3 * 2 * matrix_parameters(D16) * 15 / 16)


def test_the_mesh_with_the_least_traffic_that_holds_the_state():
    state = 16 * matrix_parameters(D16)
    best = lambda room: best_mesh(D16, STEP, CHIPS["TPU v5e"], room, lambda _: "mlp")  # noqa: E731
    assert best(state) == ({"data": 16, "fsdp": 1, "tensor": 1}, "mlp")
    assert best(state / 3) == ({"data": 4, "fsdp": 4, "tensor": 1}, "mlp")
    assert best(0) == ({"data": 1, "fsdp": 16, "tensor": 1}, "mlp")


def test_a_mesh_that_leaves_room_for_activations_goes_before_one_with_less_traffic():
    remat = lambda sizes: "full" if sizes["fsdp"] < 8 else "flat_qkv"  # noqa: E731
    found = best_mesh(D16, STEP, CHIPS["TPU v5e"], 16 * matrix_parameters(D16), remat)
    assert found == ({"data": 2, "fsdp": 8, "tensor": 1}, "flat_qkv")


def test_a_width_that_the_chips_do_not_divide_is_split_over_fewer():
    many = Step(**{**vars(STEP), "fsdp": 256})
    sizes, _ = best_mesh(NextScaleConfig(depth=30), many, CHIPS["TPU v5e"], 0, lambda _: "full")
    assert sizes == {"data": 2, "fsdp": 128, "tensor": 1}


def test_parameters_on_paper_are_those_of_the_published_sizes():
    for name, millions in (("d16", 310), ("d20", 600), ("d24", 1000), ("d30", 2000)):
        fields = var.get_config(name).model.to_dict()
        assert matrix_parameters(NextScaleConfig(**fields)) / 1e6 == pytest.approx(millions, rel=0.05)
