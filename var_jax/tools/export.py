"""Export a run as a folder to share: `model.safetensors`, `config.json`, a model card, and pictures.

    python -m var_jax.tools.export runs/digits digits --dtype=bfloat16
    python -m var_jax.tools.export runs/digits digits --push=owner/name    # extra `hub`

`var_jax.load_var("digits")` then loads the folder, and `var_jax.load_var("hf://owner/name")` what was pushed.
Training cannot go on from it: it holds the parameters to sample with, and no state of the optimizer.
"""

import json
import os
from pathlib import Path

from absl import flags

from var_jax import cli
from var_jax.errors import ConfigError, config_errors
from var_jax.interop.exported import CONFIGS, TRANSFORMERS, write_exported
from var_jax.paths import as_path, local_path, write_atomic
from var_jax.sampling.options import SamplingOptions
from var_jax.training.checkpoint import CHECKPOINT_DIR, CheckpointMissing, load_params
from var_jax.training.task import compute_dtype

FLAGS = flags.FLAGS
PICTURES = {  # file of a run -> its caption in the card
    "samples.png": "Samples, a class or caption a row",
    "scales.png": "Samples after 1, 2, ... all maps",
    "reconstructions.png": "Held-out images next to their reconstructions",
}


def read_run(run: Path, step: int | str) -> dict[str, tuple[dict, dict]]:
    """Return parameters (host arrays) and record of each network of a run.

    Raises:
      CheckpointMissing: if it has no tokenizer or no transformer.
    """
    networks = {
        kind: load_params(run / kind / CHECKPOINT_DIR, step)
        for kind in CONFIGS
        if (run / kind / CHECKPOINT_DIR).exists()
    }
    if "tokenizer" not in networks or len(networks) < 2:
        names = " and ".join(networks) or "neither"
        raise CheckpointMissing(
            f"{run} must hold a tokenizer and a transformer to be exported; it has {names}"
        )
    return networks


def scores_table(run: Path) -> str:
    """Return the scores of `evaluate.py` as a table in Markdown; "" if the run has none."""
    path = run / "scores.json"
    if not path.exists():
        return ""
    scores = json.loads(path.read_text())
    rows = [f"| {name} | {value:.4g} |" for name, value in scores.items() if isinstance(value, int | float)]
    rows.append(f"| features of | {scores.get('inception', 'unknown')} |")
    return "\n".join(["| metric | value |", "| --- | --- |", *rows])


def describe_conditions(record: dict) -> tuple[str, str]:
    """Return a sentence on what images are conditioned on, and an example of the arguments of `sample`."""
    model = record["model"]
    match model.get("condition", "label"):
        case "caption":
            return f"Words of captions: {', '.join(model['vocabulary'])}.", 'prompt="WORDS"'
        case "embedding":
            size = f"[up to {model['condition_length']}, {model['condition_width']}]"
            return f"Conditioned on embeddings {size} of an image.", "embeddings=EMBEDDINGS"
    names = ", ".join(record.get("class_names", ())) or f"0 .. {model['num_classes'] - 1}"
    return f"Classes: {names}.", "[0, 1, 2]"


def model_card(title: str, record: dict, table: str, pictures: list[str]) -> str:
    """Return the README of an exported model, with the front matter of the Hugging Face hub.

    Args:
      title: name of the model.
      record: of its transformer.
      table: measured scores in Markdown; "" for none.
      pictures: names of the files beside the card.
    """
    model, sampling = record["model"], record["stage"]["sampling"]
    options = ", ".join(f"{name} {value}" for name, value in sampling.items() if value is not None)
    conditions, example = describe_conditions(record)
    # The hub has no task for images of classes.
    is_captioned = model.get("condition") == "caption"
    task = "text-to-image" if is_captioned else "unconditional-image-generation"
    images = "\n\n".join(f"![{PICTURES[name]}]({name})\n\n*{PICTURES[name]}*" for name in pictures)
    return f"""---
library_name: var_jax
pipeline_tag: {task}
tags: [jax, flax, visual-autoregressive-modeling]
---

# {title}

A tokenizer and a transformer of {model["depth"]} blocks of width {model["width"]}, which predict an image as
token maps of the sides {", ".join(map(str, model["scales"]))}. {conditions}

```python
import var_jax

model = var_jax.load_var("{title}")  # the path of this folder, or hf://owner/name
images = model.sample({example})  # float32 [B, H, W, 3] in [0, 1]
```

Sampling options of the run: {options}.

## Scores

{table or "Not measured."}

{images}
"""


def export(run: Path, folder: Path, dtype: str, step: int | str) -> list[str]:
    """Write a run as an exported model; return a line for each file.

    Raises:
      CheckpointMissing: if the run lacks a network or the step.
    """
    networks = read_run(run, step)
    kind = next(kind for kind in TRANSFORMERS if kind in networks)
    record = networks[kind][1]
    exported = {name: (CONFIGS[name](**rec["model"]), params) for name, (params, rec) in networks.items()}
    exported = {name: exported[name] for name in ("tokenizer", kind)}
    options = SamplingOptions(**record["stage"]["sampling"])
    source = {
        name: {"steps": rec.get("steps"), "data": rec["stage"].get("data", {}).get("name")}
        for name, (_, rec) in networks.items()
    }
    class_names = tuple(record.get("class_names", ()))
    write_exported(folder, exported, options, class_names, source, compute_dtype(dtype))
    pictures = [name for name in PICTURES if (run / name).exists()]
    for name in pictures:
        write_atomic(folder / name, (run / name).read_bytes())
    card = model_card(folder.name, record, scores_table(run), pictures)
    write_atomic(folder / "README.md", card.encode())
    return [f"{path}: {os.path.getsize(path) / 1024:.0f} KiB" for path in sorted(folder.iterdir())]


def push(folder: Path, name: str) -> str:
    """Upload an exported model to the Hugging Face hub; return its address.

    Raises:
      ConfigError: without huggingface_hub, or if the hub refuses.
    """
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ModuleNotFoundError as error:
        raise ConfigError("--push needs huggingface_hub: pip install 'var_jax[hub]'") from error
    hub = huggingface_hub.HfApi()
    try:
        hub.create_repo(name, exist_ok=True)
        commit = hub.upload_folder(repo_id=name, folder_path=str(folder))
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        raise ConfigError(f"--push={name}: {str(error).strip() or type(error).__name__}") from error
    return str(commit.commit_url)


def main(argv):
    with config_errors(OSError):
        run, folder = as_path(argv[1]), Path(local_path(argv[2], "DST"))
        step = int(FLAGS.step) if FLAGS.step.isdigit() else FLAGS.step
        print("\n".join(export(run, folder, FLAGS.dtype, step)))
        if FLAGS.push:
            print(push(folder, FLAGS.push))


if __name__ == "__main__":
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the matrices; the rest is float32")
    flags.DEFINE_string("step", "latest", "Checkpoint of the run: a step, latest or best")
    flags.DEFINE_string("push", None, "Also upload to this repository, OWNER/NAME, of the Hugging Face hub")
    cli.run(main, arguments=("RUN", "DST"))
