"""Compare VAR with next-token systems at inpainting: the upper half, the left half, and the center.

    python -m experiments.inpainting.run --config=configs/digits.py --out=runs/compare

Systems: VAR, and next-token along every order of `var_jax.transformer.positions`, all with learned
positions.  They are runs of `experiments.next_token.run` under the same OUT: existing runs are used, and
missing ones are trained by the same functions for the same FLOPs.  Each system fills the unknown part of
every held-out image, with the sampling options of its run, without a class and with it.  No system sees any
of the unknown part (`partial_images.py`).

Figures by system and task: how often a classifier recognizes the class of the filled image; the PSNR inside
the known and the unknown part, of the mean squared error over all images, so that a few empty borders do not
dominate; and the share of the known part that precedes the unknown part.  A sampled part is one of many that
fit, so its PSNR is below that of a blur.  The tokenizers' reconstructions are the upper limit; images whose
unknown part is not filled, and the most frequent class, are the lower limit.

Three variants show the effect of the rules of `partial_images.py` on VAR: keep cells up to half unknown;
encode the known tokens of all maps at once; and both, also keeping the 1x1 maps of the painted image, which
is what `LoadedVAR.inpaint` does with that image.

Writes `inpainting.md` (a table per task), `inpainting.json` and `inpainting.png`.
"""

import json
from functools import partial
from pathlib import Path

import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags

import var_jax
from experiments.inpainting import partial_images, report
from experiments.next_token import run as next_token
from var_jax import cli, stages
from var_jax.evaluation.classifier import Classifier
from var_jax.images import to_uint8
from var_jax.transformer.orders import ORDERS

FLAGS = flags.FLAGS
VAR = "VAR, learned_1d"
SYSTEMS = (VAR, *(f"{order}, learned_1d" for order in ORDERS))
# Suffix of a system's name -> rule for the tokens to resample, and whether known tokens are encoded at once.
METHODS = {"": (partial_images.touching_tokens, False)}
VAR_METHODS = METHODS | {
    "; half-known cells kept": (partial_images.mostly_unknown_tokens, False),
    "; encoded at once": (partial_images.touching_tokens, True),
    "; as inpaint does": (partial_images.published_tokens, True),
}
NUM_SHOWN = 4  # images in the plot: the first of each of so many classes


def psnr(filled: np.ndarray, truth: np.ndarray, part: np.ndarray) -> float:
    """Compute the PSNR in dB inside a part of images, from the mean squared error over all of them.

    Args:
      filled, truth: uint8 [N, H, W, 3].
      part: bool [H, W].
    """
    error = (filled[:, part].astype(np.float64) - truth[:, part]) ** 2
    return float(10 * np.log10(255**2 / max(error.mean(), 1e-6)))


def score_images(filled: np.ndarray, truth: np.ndarray, mask: np.ndarray, right: np.ndarray) -> dict:
    """Compute the PSNR of filled images in both parts, and the mean of `right` bool [N]."""
    return {
        "right": float(right.mean()),
        "psnr_known": psnr(filled, truth, ~mask),
        "psnr_unknown": psnr(filled, truth, mask),
    }


def score_bounds(
    bases: dict[str, ConfigDict], classifier: Classifier, images: np.ndarray, labels: np.ndarray
) -> dict:
    """Score reconstructions by the tokenizers, and images without a filled part, by task.

    Args:
      bases: from `next_token.prepare_bases`.
      classifier: of the images.
      images: held out, uint8 [N, H, W, 3].
      labels: int [N].
    """
    reconstructions = {}
    names = {"next_scale": "tokenizer, all maps (VAR)", "next_token": "tokenizer, one map (next-token)"}
    for task, name in names.items():
        tokenizer = var_jax.load_tokenizer(bases[task].tokenizer)
        reconstructions[name] = to_uint8(tokenizer.decode(tokenizer.encode(images.astype(np.float32) / 255)))
    result = {}
    for task, mask in partial_images.unknown_masks(images.shape[1]).items():
        rows = {**reconstructions, "nothing made": partial_images.mask_with_median(images, mask)}
        result[task] = {
            name: score_images(filled, images, mask, classifier.classes(filled) == labels)
            for name, filled in rows.items()
        }
        del result[task]["nothing made"]["psnr_known"]  # the known part is the truth
    return result


def fill_and_score(
    model: var_jax.LoadedVAR,
    method: tuple,
    classifier: Classifier,
    held_out: tuple[np.ndarray, np.ndarray],
    seed: int,
    draws: int,
) -> tuple[dict, dict]:
    """Fill the unknown parts with a trained system, and score them by task.

    Args:
      model: VAR or next-token.
      method: value of `VAR_METHODS`: rule for the tokens to resample, and whether to encode them at once.
      classifier: of the images.
      held_out: images uint8 [N, H, W, 3] and labels int [N].
      seed: of the draws.
      draws: number of draws of each image.

    Returns:
      Task -> figures, and task -> the first draw of each image without a class, uint8 [N, H, W, 3].
    """
    select_tokens, once = method
    images, labels = held_out
    truth, classes = np.tile(images, (draws, 1, 1, 1)), np.tile(labels, draws)
    no_class = np.full_like(classes, model.num_classes)
    figures, first = {}, {}
    for task, mask in partial_images.unknown_masks(images.shape[1]).items():
        resample = select_tokens(mask, model.module.config.schedule)
        known = partial_images.mask_with_median(truth, mask)
        filled, _ = partial_images.fill_unknown(model, known, resample, no_class, seed, once)
        filled_with_class, _ = partial_images.fill_unknown(model, known, resample, classes, seed, once)
        figures[task] = {
            **score_images(filled, truth, mask, classifier.classes(filled) == classes),
            "right_told": float((classifier.classes(filled_with_class) == classes).mean()),
            "seen": partial_images.share_of_known_seen(model.module.config, resample),
        }
        first[task] = filled[: len(images)]
    return figures, first


def evaluate_run(
    workdir: Path, stage: ConfigDict, methods: dict, held_out: tuple, classifier: Classifier, draws: int
):
    """Score a trained run by several methods; results are cached in its directory.

    Args:
      workdir: directory of the run.
      stage: config of the run.
      methods: some of `VAR_METHODS`.
      held_out: images uint8 [N, H, W, 3] and labels int [N].
      classifier: of the images.
      draws: number of draws of each image.

    Returns:
      Method -> task -> figures, and method -> task -> uint8 [N, H, W, 3].
    """
    path = workdir / "inpainting.json"
    request = {"draws": draws, "ways": list(methods)}
    if path.exists() and (cached := json.loads(path.read_text()))["asked"] == request:
        figures = cached["figures"]
        with np.load(workdir / "inpainting.npz") as file:
            pictures = {name: {task: file[name + task] for task in figures[name]} for name in figures}
        return figures, pictures
    model = var_jax.load_var(workdir, tokenizer=var_jax.load_tokenizer(stage.tokenizer))
    score = partial(
        fill_and_score, model, classifier=classifier, held_out=held_out, seed=stage.seed, draws=draws
    )
    results = {name: score(method=method) for name, method in methods.items()}
    figures, pictures = ({name: both[i] for name, both in results.items()} for i in (0, 1))
    flat = {name + task: images for name, tasks in pictures.items() for task, images in tasks.items()}
    np.savez_compressed(workdir / "inpainting.npz", **flat)
    path.write_text(json.dumps({"asked": request, "figures": figures}))
    return figures, pictures


def compare_inpainting(
    bases: dict[str, ConfigDict], systems: list[str], seeds: list[int], out: Path, steps: int, draws: int
) -> tuple[dict, dict]:
    """Train missing runs, and score every run at filling the unknown parts.

    Args:
      bases: from `next_token.prepare_bases`.
      systems: some of `SYSTEMS`.
      seeds: one run of each system per seed.
      out: directory of the runs.
      steps: training steps of VAR, as in `experiments.next_token.run`.
      draws: number of draws of each held-out image.

    Returns:
      All figures; and task -> name -> a few images uint8 [NUM_SHOWN, H, W, 3], the truth first.
    """
    base = bases["next_scale"]
    task = next_token.build_stage_task(base)
    budget = steps * task.flops_per_image()
    splits = (base.data.train_split, base.data.eval_split)
    train, held_out = (next_token.load_images(base, task.image_size, split) for split in splits)
    classifier, (images, labels) = Classifier(*train), held_out
    result = {
        "images": len(images),
        "draws": draws,
        "classifier_right": float((classifier.classes(images) == labels).mean()),
        "chance": float(np.bincount(labels).max() / len(labels)),
        "bounds": score_bounds(bases, classifier, images, labels),
        "systems": {},
    }
    shown = np.unique(labels, return_index=True)[1][:: max(len(set(labels)) // NUM_SHOWN, 1)][:NUM_SHOWN]
    pictures = {name: {"truth": images[shown]} for name in partial_images.unknown_masks(task.image_size)}
    for system in systems:
        for seed in seeds:
            print(f"--- {system}, seed {seed}", flush=True)
            stage = next_token.system_config(bases, system, seed, budget)
            workdir = out / next_token.system_folder(system) / str(seed)
            stages.run(stage, workdir)
            methods = VAR_METHODS if system == VAR else METHODS
            figures, filled = evaluate_run(workdir, stage, methods, held_out, classifier, draws)
            for name in methods:
                result["systems"].setdefault(system + name, {})[str(seed)] = figures[name]
                print(report.format_accuracy(system + name, figures[name]), flush=True)
                for part, first in filled[name].items():
                    pictures[part].setdefault(system + name, first[shown])
    return result, pictures


def main(_):
    systems, seeds = next_token.select_systems(FLAGS.systems, SYSTEMS), cli.numbers("seeds", int)
    out = cli.local_folder("out")
    bases = next_token.prepare_bases(FLAGS.config, out)
    result, pictures = compare_inpainting(bases, systems, seeds, out, FLAGS.steps, FLAGS.draws)
    (out / "inpainting.json").write_text(json.dumps(result, indent=1))
    (out / "inpainting.md").write_text(report.format_tasks(result) + "\n")
    report.plot_images(pictures, out / "inpainting.png")
    print((out / "inpainting.md").read_text() + f"\nimages: {out / 'inpainting.png'}")


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", help_string="Config with the stages tokenizer and next_scale")
    flags.DEFINE_string(
        "out", None, "Directory of the runs of experiments.next_token, and of the results", required=True
    )
    flags.DEFINE_list("systems", None, "Systems by their directories' names; default: all")
    flags.DEFINE_list("seeds", ["0"], "Seeds of the runs of each system")
    flags.DEFINE_integer(
        "steps", 400, "Training steps of VAR; the others train for the same FLOPs", lower_bound=1
    )
    flags.DEFINE_integer("draws", 2, "Number of draws of each unknown part", lower_bound=1)
    flags.mark_flag_as_required("config")
    cli.run(main)
