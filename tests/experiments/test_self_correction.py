import shutil

import numpy as np
from PIL import Image

from experiments.self_correction.report import draw_samples, repair_table, variants_table
from experiments.self_correction.run import VARIANTS, Evaluator, repair_errors, variant_config


def test_variants_differ_in_the_correction_alone():
    configs = {name: variant_config(name, "tokenizer", "data", 2, 100).to_dict() for name in VARIANTS}
    corrections = {name: config.pop("correction") for name, config in configs.items()}
    assert configs["none"] == configs["uniform"] == configs["model"] and configs["none"]["seed"] == 2
    assert [c["strength"] for c in corrections.values()] == [0.0, 0.3, 0.3]
    assert [c["source"] for c in corrections.values()] == ["uniform", "uniform", "model"]


def test_a_run_is_evaluated_and_shown(tiny_run, digits_dir, tmp_path):
    for name in ("none", "model"):
        shutil.copytree(tiny_run, tmp_path / name)
    evaluator = Evaluator(str(tiny_run), digits_dir)
    figures = [evaluator.figures(tmp_path / name, seed=1, per_class=2) for name in ("none", "model")]
    assert figures[0] == figures[1]
    assert 2 < figures[0]["loss"] < 4 and figures[0]["loss_replaced"] != figures[0]["loss"]
    table = variants_table({"none": {"1": figures[0], "2": figures[0] | {"loss": figures[0]["loss"] + 1}}})
    assert f"| none (2) | {figures[0]['loss'] + 0.5:.2f} ± 0.71 |" in table
    errors = repair_errors(evaluator.quantizer, evaluator.features)
    clean, requantized, broken = (row[-1] for row in errors.values())
    assert clean < requantized < broken
    assert f"| nothing replaced | {errors['nothing replaced'][0]:.3f} |" in repair_table(errors)
    draw_samples({name: tmp_path / name for name in ("none", "model")}, tmp_path / "samples.png")
    assert Image.open(tmp_path / "samples.png").width > 20 * 32
    assert np.load(tmp_path / "none" / "samples.npz")["arr_0"].shape == (20, 8, 8, 3)
