import json

import pytest

from configs import tokenizer
from experiments.codebook.report import plot_perplexity, summarize, variants_table
from experiments.codebook.run import BASELINE, RECIPE_FIELDS, VARIANTS, read_logs, variant_config
from var_jax.training.tokenizer_task import TokenizerTask


def flat(variant: str) -> dict:
    """Return the fields of a variant's config that can differ, by dotted name."""
    config = variant_config(variant, "digits", "data", 0, 100).to_dict()
    return {
        f"{section}.{name}": value
        for section in ("model", "codebook", "loss", "adversarial")
        for name, value in config[section].items()
    }


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_a_variant_differs_from_the_baseline_in_its_switch_alone(variant):
    one, other = flat("baseline"), flat(variant)
    different = {name: other[name] for name in one if one[name] != other[name]}
    assert different == VARIANTS[variant] and set(different) <= set(BASELINE)


@pytest.mark.parametrize("variant", ["entropy", "rotation", "recipe_without_dropout"])
def test_a_variant_can_be_trained(variant):
    config = variant_config(variant, "digits", "data", 0, 100)
    assert TokenizerTask(config, 100).config.num_codes == 512  # traces a step


def test_the_recipe_is_that_of_the_config():
    shipped, recipe = tokenizer.get_config().to_dict(), flat("recipe")
    for name in set(RECIPE_FIELDS) - {"codebook.restart_every"}:
        section, field = name.split(".")
        assert recipe[name] == shipped[section][field]
    assert bool(recipe["codebook.restart_every"]) == bool(shipped["codebook"]["restart_every"])
    assert recipe != flat("baseline")


def test_table_and_plot_show_the_logged_metrics(tmp_path):
    for variant, scale in (("baseline", 1), ("recipe", 3)):
        for seed in (0, 1):
            folder = tmp_path / variant / str(seed) / "tokenizer"
            folder.mkdir(parents=True)
            use = {f"{name}_{k}": scale * (k + 1 + seed) for name in ("perplexity", "most") for k in (0, 1)}
            shared = {"l2": 0.1, "psnr": 20.0 + seed, "perplexity": 9.0, "distinct": 8 * scale, **use}
            lines = [{"step": step, "kind": "train", **shared} for step in (1, 2)]
            lines.append({"step": 2, "kind": "eval", **shared})
            (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    runs = read_logs(tmp_path, ["baseline", "ema", "recipe"])
    result = summarize(runs, codes=32, num_scales=2)
    assert result["recipe"]["used"] == [0.75, 0.0] and result["baseline"]["perplexity_1"] == pytest.approx(
        [2.5, 0.5**0.5]
    )
    assert "| recipe (2) | 20.50 ± 0.71 | 75% ± 0% | 4.5 ± 2.1 | 7.5 ± 2.1 |" in variants_table(
        result, (1, 2)
    )
    plot_perplexity(runs, (1, 2), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
