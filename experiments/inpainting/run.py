"""What a raster cannot do, run: the upper half from the lower, left from right, the centre from the rim.

    python -m experiments.inpainting.run --config=configs/digits.py --out=runs/compare

Systems: VAR, and next-token along every order of `var_jax.transformer.positions`, all with learned
positions.  They are runs of `experiments.next_token.run` under the same OUT: those that are there are used,
those that are missing are trained, by the same functions and for the same FLOPs.  Of each held-out image a
part is unknown, and each system makes it, as its run samples, without a class and told the class.  Nothing of
the unknown part is told to any system (`partial_images.py`).

Figures, by system and task: how often a classifier calls the image made what it is; and PSNR inside the known
and the unknown part, of the squared error over all images, so that a few empty rims do not decide.  A drawn
part is one of many that fit: its PSNR stays below that of a blur.  Beside each system stands how much of the
known part it sees when it makes the unknown one.  The tokenizers' reconstructions are the ceiling; the images
with nothing made, and the most frequent class, the floor.

Three variants show what the rules of `partial_images.py` do to VAR: cells up to half unknown kept; known
tokens of all maps encoded at once; and both, with the 1x1 maps of the painted image kept too, which is what
`LoadedVAR.inpaint` makes of that image.

Writes `generality.md` (a table a task), `generality.json` and `generality.png`.
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
from var_jax.transformer.positions import ORDERS

FLAGS = flags.FLAGS
VAR = "VAR, learned_1d"
SYSTEMS = (VAR, *(f"{order}, learned_1d" for order in ORDERS))
# Of a system: which cells are made anew, and whether known tokens are encoded at once.
METHODS = {"": (partial_images.touching_tokens, False)}
VAR_METHODS = METHODS | {
    "; half-known cells kept": (partial_images.mostly_unknown_tokens, False),
    "; encoded at once": (partial_images.touching_tokens, True),
    "; as inpaint does": (partial_images.published_tokens, True),
}
NUM_SHOWN = 4  # images in the picture: the first of each of as many classes, at equal distances


def psnr(made: np.ndarray, truth: np.ndarray, where: np.ndarray) -> float:
    """PSNR in dB inside a part of images, of the mean squared error over all of them.

    Args:
      made, truth: uint8 [N, H, W, 3].
      where: bool [H, W].
    """
    error = (made[:, where].astype(np.float64) - truth[:, where]) ** 2
    return float(10 * np.log10(255**2 / max(error.mean(), 1e-6)))


def score_images(made: np.ndarray, truth: np.ndarray, mask: np.ndarray, right: np.ndarray) -> dict:
    """PSNR of images made in both parts, and the share of `right` bool [N], those called what they are."""
    return {
        "right": float(right.mean()),
        "psnr_known": psnr(made, truth, ~mask),
        "psnr_unknown": psnr(made, truth, mask),
    }


def score_bounds(
    bases: dict[str, ConfigDict], classifier: Classifier, images: np.ndarray, labels: np.ndarray
) -> dict:
    """Rows beside the systems, by task: whole images through the tokenizers, and images with nothing made.

    Args:
      bases: as `next_token.bases_of` gives them.
      images: held out, uint8 [N, H, W, 3].
      labels: int [N].
    """
    whole = {}
    names = {"next_scale": "tokenizer, all maps (VAR)", "next_token": "tokenizer, one map (next-token)"}
    for task, name in names.items():
        tokenizer = var_jax.load_tokenizer(bases[task].tokenizer)
        whole[name] = to_uint8(tokenizer.decode(tokenizer.encode(images.astype(np.float32) / 255)))
    result = {}
    for task, mask in partial_images.unknown_masks(images.shape[1]).items():
        rows = {**whole, "nothing made": partial_images.mask_with_median(images, mask)}
        result[task] = {
            name: score_images(made, images, mask, classifier.classes(made) == labels)
            for name, made in rows.items()
        }
        del result[task]["nothing made"]["psnr_known"]  # it is the truth
    return result


def fill_and_score(
    model: var_jax.LoadedVAR,
    way: tuple,
    classifier: Classifier,
    held_out: tuple[np.ndarray, np.ndarray],
    seed: int,
    draws: int,
) -> tuple[dict, dict]:
    """Figures of a trained system by task; and what it made of each image first, without a class.

    Args:
      model: VAR or next-token.
      way: of `VAR_WAYS`.
      held_out: images uint8 [N, H, W, 3] and labels int [N].
      seed: of the draws.
      draws: of each image.

    Returns:
      Task -> figures, and task -> uint8 [N, H, W, 3].
    """
    (cells, once), (images, labels) = way, held_out
    truth, asked = np.tile(images, (draws, 1, 1, 1)), np.tile(labels, draws)
    figures, first = {}, {}
    for task, mask in partial_images.unknown_masks(images.shape[1]).items():
        resample = cells(mask, model.module.config.schedule)
        known = partial_images.mask_with_median(truth, mask)
        made, _ = partial_images.fill_unknown(
            model, known, resample, np.full_like(asked, model.num_classes), seed, once
        )
        told, _ = partial_images.fill_unknown(model, known, resample, asked, seed, once)
        figures[task] = {
            **score_images(made, truth, mask, classifier.classes(made) == asked),
            "right_told": float((classifier.classes(told) == asked).mean()),
            "seen": partial_images.share_of_known_seen(model.module.config, resample),
        }
        first[task] = made[: len(images)]
    return figures, first


def evaluate_run(
    workdir: Path, stage: ConfigDict, ways: dict, held_out: tuple, classifier: Classifier, draws: int
):
    """`made_by` of a trained run in several ways, which is kept in its directory and made once.

    Returns:
      Way -> task -> figures, and way -> task -> uint8 [N, H, W, 3].
    """
    path, asked = workdir / "generality.json", {"draws": draws, "ways": list(ways)}
    if path.exists() and (kept := json.loads(path.read_text()))["asked"] == asked:
        with np.load(workdir / "generality.npz") as pictures:
            return kept["figures"], {n: {t: pictures[n + t] for t in x} for n, x in kept["figures"].items()}
    model = var_jax.load_var(workdir, tokenizer=var_jax.load_tokenizer(stage.tokenizer))
    make = partial(
        fill_and_score, model, classifier=classifier, held_out=held_out, seed=stage.seed, draws=draws
    )
    result = {name: make(way=way) for name, way in ways.items()}
    figures, pictures = ({name: both[i] for name, both in result.items()} for i in (0, 1))
    flat = {name + task: images for name, made in pictures.items() for task, images in made.items()}
    np.savez_compressed(workdir / "generality.npz", **flat)
    path.write_text(json.dumps({"asked": asked, "figures": figures}))
    return figures, pictures


def compare_inpainting(
    bases: dict[str, ConfigDict], systems: list[str], seeds: list[int], out: Path, steps: int, draws: int
) -> tuple[dict, dict]:
    """Trains what is not there yet, and lets every run make the unknown parts.

    Args:
      bases: as `next_token.bases_of` gives them.
      systems: some of `SYSTEMS`.
      seeds: each system's runs.
      out: directory of the runs.
      steps: of VAR, as for `compare`.
      draws: of each held-out image.

    Returns:
      All figures; and by task and name, pictures uint8 [SHOWN, H, W, 3] of a few images, the truth first.
    """
    base = bases["next_scale"]
    task = next_token.make_task(base)
    budget = steps * task.flops_per_image()
    splits = (base.data.train_split, base.data.eval_split)
    seen, held_out = (next_token.load_images(base, task.image_size, split) for split in splits)
    classifier, (images, labels) = Classifier(*seen), held_out
    result = {
        "images": len(images),
        "draws": draws,
        "classifier_right": float((classifier.classes(images) == labels).mean()),
        "chance": float(np.bincount(labels).max() / len(labels)),
        "bounds": score_bounds(bases, classifier, images, labels),
        "systems": {},
    }
    some = np.unique(labels, return_index=True)[1][:: max(len(set(labels)) // NUM_SHOWN, 1)][:NUM_SHOWN]
    pictures = {name: {"truth": images[some]} for name in partial_images.unknown_masks(task.image_size)}
    for system in systems:
        for seed in seeds:
            print(f"--- {system}, seed {seed}", flush=True)
            stage = next_token.system_config(bases, system, seed, budget)
            workdir = out / next_token.system_folder(system) / str(seed)
            stages.run(stage, workdir)
            ways = VAR_METHODS if system == VAR else METHODS
            figures, made = evaluate_run(workdir, stage, ways, held_out, classifier, draws)
            for name in ways:
                result["systems"].setdefault(system + name, {})[str(seed)] = figures[name]
                print(report.format_accuracy(system + name, figures[name]), flush=True)
                for part, first in made[name].items():
                    pictures[part].setdefault(system + name, first[some])
    return result, pictures


def main(_):
    systems, seeds = next_token.select_systems(FLAGS.systems, SYSTEMS), cli.numbers("seeds", int)
    out = cli.local_folder("out")
    bases = next_token.prepare_bases(FLAGS.config, out)
    result, pictures = compare_inpainting(bases, systems, seeds, out, FLAGS.steps, FLAGS.draws)
    (out / "generality.json").write_text(json.dumps(result, indent=1))
    (out / "generality.md").write_text(report.format_tasks(result) + "\n")
    report.plot_images(pictures, out / "generality.png")
    print((out / "generality.md").read_text() + f"\nwhat was made: {out / 'generality.png'}")


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", help_string="With the stages tokenizer and next_scale")
    flags.DEFINE_string("out", None, "Directory of the runs of compare, and of the results", required=True)
    flags.DEFINE_list("systems", None, "Some of the systems, by their directories' names")
    flags.DEFINE_list("seeds", ["0"], "Of the runs of each system")
    flags.DEFINE_integer("steps", 400, "Of VAR; the others take as many as cost the same", lower_bound=1)
    flags.DEFINE_integer("draws", 2, "Of every unknown part", lower_bound=1)
    flags.mark_flag_as_required("config")
    cli.run(main)
