"""Write a report of a run as one HTML file: summary, pictures, scores, curves and configs.

    python -m var_jax.tools.report runs/digits              # writes runs/digits/report.html
    python -m var_jax.tools.report gs://BUCKET/run --out=run.html

The file needs no network and no scripts. The run may be in progress, and of an older version.
"""

import base64
import datetime
import importlib.util
import io
import math
import re
import statistics
from collections.abc import Iterable
from pathlib import Path

from absl import flags
from etils import epath
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

import var_jax
from var_jax import cli
from var_jax.data.decoding import DecodeError, decode_image
from var_jax.errors import config_errors
from var_jax.paths import as_path, write_atomic
from var_jax.tools.charts import Series, line_chart, number
from var_jax.tools.markup import Markup, folded, join, table, tag
from var_jax.tools.run_record import StageRecord, read_json, read_run
from var_jax.training.metrics import duration

FLAGS = flags.FLAGS

PICTURES = {  # of the run, as training, sample.py and evaluate.py write them
    "samples": "samples",
    "scales": "samples after 1, 2, ... K maps",
    "reconstructions": "held-out images, each next to its reconstruction",
    "reconstruction_scales": "reconstructions after 1, 2, ... K maps",
    "nearest": "samples, each followed by the nearest reference images",
    "reconstruction_extremes": "worst images and their reconstructions, best images and theirs",
}
MAX_PICTURE_BYTES = 300_000  # a larger picture becomes a JPEG
MAX_PICTURE_SIDE = 1400  # pixels
NUM_PREVIEWS = 4  # steps shown of each preview
MAX_EVENTS = 50
EVENTS = ("skipped", "spike")
KINDS = {"train": 215, "eval": 25, "samples": 140}  # and the hues of their lines
# Metrics whose curves are open, in this order; those of single maps (loss_0, ...) and the rest are folded.
MAIN_CURVES = (
    *("loss", "l2", "l1", "perceptual", "codebook", "accuracy", "psnr", "perplexity", "fid"),
    *("learning_rate", "gradient_norm", "images_per_s"),
)
_OF_ONE_MAP = re.compile(r"(.+)_(\d+)")
_LESS_IS_BETTER = re.compile(r"(loss|l1|l2|perceptual|codebook|bits_per_pixel|fid)(_.*)?")
_MORE_IS_BETTER = re.compile(r"(accuracy|psnr)(_.*)?")
_NOT_CHARTED = re.compile(r"most(_\d+)?|skipped_in_a_row|num_samples")
CONTENT_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # no scripts, no network
SCHEMA = {  # config.task -> function of configs/schema.py
    "tokenizer": "tokenizer_stage",
    "next_scale": "transformer_stage",
    "next_token": "next_token_stage",
    "align": "align_stage",
}


# --- Parts of the page


def status(stage: StageRecord) -> str:
    """Return how far a stage is."""
    step = max([line["step"] for line in stage.lines] + stage.checkpoints, default=0)
    steps = stage.record.get("steps")
    if not isinstance(steps, int):
        return f"step {step:,}"
    return f"{step:,} of {steps:,} steps" + ("" if step >= steps else ": in progress, or stopped")


def utc(time: str) -> str:
    """Shorten an ISO time to minutes."""
    return f"{time[:16].replace('T', ' ')} UTC"


def training_seconds(stage: StageRecord) -> float:
    """Return the time that the steps took, from the logged rates, without evaluation and compilation."""
    batch, seconds, previous = stage.record.get("stage", {}).get("train", {}).get("batch", 0), 0.0, 0
    for step, rate in stage.points("train", "images_per_s"):
        if rate > 0:
            seconds += (step - previous) * batch / rate
        previous = step
    return seconds


def best(name: str, points: list[tuple[int, float]]) -> tuple[str, str]:
    """Return the best value of a metric and its step; empty if it is not known which value is better."""
    sign = bool(_LESS_IS_BETTER.fullmatch(name)) - bool(_MORE_IS_BETTER.fullmatch(name))
    finite = [(sign * value, step, value) for step, value in points if math.isfinite(value)]
    if not sign or not finite:
        return "", ""
    _, step, value = min(finite)
    return number(value), f"{step:,}"


def metrics_table(stage: StageRecord) -> Markup:
    """Return the last and the best held-out metrics, next to those of training."""
    rows = []
    for kind in ("eval", "samples"):
        for name in stage.metric_names(kind):
            points = stage.points(kind, name)
            if points and not _OF_ONE_MAP.fullmatch(name) and not _NOT_CHARTED.fullmatch(name):
                train = stage.points("train", name) if kind == "eval" else []
                last = number(train[-1][1]) if train else ""
                rows.append((name, last, number(points[-1][1]), *best(name, points)))
    if not rows:
        return tag("p", "Not evaluated yet.", class_="soft")
    return table(("metric", "training, last", "held out, last", "held out, best", "at step"), rows)


def summary(stage: StageRecord) -> Markup:
    """Return the facts and the metrics of a stage."""
    config = stage.record.get("stage", {})
    data, train = config.get("data", {}), config.get("train", {})
    first, last = (stage.starts[0], stage.starts[-1]) if stage.starts else ({}, {})
    class_names = stage.record.get("class_names") or []
    rates = [rate for _, rate in stage.points("train", "images_per_s")]
    splits = f"{data.get('train_split', '?')}, held out: {data.get('eval_split', '?')}"
    source = data.get("tokens") or f"{data.get('name', '?')} ({splits})"
    shown = ", ".join(map(str, class_names[:12])) + (", ..." if len(class_names) > 12 else "")
    versions = (f"{name} {last[name]}" for name in ("var_jax", "jax", "python") if name in last)
    facts = {
        "progress": status(stage),
        "parameters": number(last["parameters"]) if "parameters" in last else None,
        "data set": config and source + (f", {last['images']:,} images" if "images" in last else ""),
        "classes": class_names and f"{len(class_names)}: {shown}",
        "batch": train.get("batch"),
        "peak learning rate": number(stage.record.get("peak_learning_rate", math.nan)),
        "images/s, median": rates and number(statistics.median(rates)),
        "training time": rates and f"{duration(training_seconds(stage))} (steps alone)",
        "devices": last.get("devices"),
        "matrix products": stage.record.get("dtype"),
        "started": first
        and utc(str(first.get("time"))) + f", {len(stage.starts)} times" * (len(stage.starts) > 1),
        "commit": last.get("commit", "")[:12] + "-dirty" * last.get("commit", "").endswith("-dirty"),
        "versions": ", ".join(versions),
        "checkpoints": ", ".join(f"{step:,}" for step in stage.checkpoints),
    }
    known = [(term, value) for term, value in facts.items() if value not in (None, "", [], {}, "nan")]
    terms = tag("dl", *(cell for term, value in known for cell in (tag("dt", term), tag("dd", value))))
    title = tag("h2", tag("a", stage.name, href=f"#{stage.name}"))
    return tag("section", title, terms, metrics_table(stage))


def curves(stage: StageRecord) -> Markup:
    """Return a chart for each metric: the main ones, then, folded, the rest and those of single maps."""
    charts, maps = {}, {}
    for name in stage.metric_names(*KINDS):
        lines = {kind: stage.points(kind, name) for kind in KINDS}
        is_constant = len({value for points in lines.values() for _, value in points}) < 2
        if _NOT_CHARTED.fullmatch(name) or (is_constant and name not in MAIN_CURVES):
            continue
        match = _OF_ONE_MAP.fullmatch(name)
        if match:
            kind = "eval" if lines["eval"] else "train"
            maps.setdefault(match[1], []).append((f"map {int(match[2]) + 1}", kind, lines[kind]))
        else:
            charts[name] = line_chart(
                name,
                [
                    Series(label=kind, points=points, hue=KINDS[kind], has_markers=kind != "train")
                    for kind, points in lines.items()
                ],
            )
    main = [charts.pop(name) for name in MAIN_CURVES if name in charts]
    for name, lines in maps.items():
        hues = [round(360 * i / len(lines)) for i in range(len(lines))]
        charts[f"{name} of each map"] = line_chart(
            f"{name} of each map, {lines[0][1]}",
            [Series(label=label, points=p, hue=hue) for (label, _, p), hue in zip(lines, hues, strict=True)],
        )
    rest = folded(f"{len(charts)} more curves", tag("div", *charts.values(), class_="grid"))
    return join([tag("div", *main, class_="grid"), rest if charts else ""])


def events(stage: StageRecord) -> Markup:
    """Return the skipped steps and spikes; nothing if there are none."""
    lines = [line for line in stage.lines if line["kind"] in EVENTS]
    if not lines:
        return Markup("")
    counts = ", ".join(f"{sum(line['kind'] == kind for line in lines)} {kind}" for kind in EVENTS)
    rows = []
    for line in lines[-MAX_EVENTS:]:
        records = line.get("records") or []
        values = ", ".join(f"{k} {number(v)}" for k, v in line.items() if isinstance(v, float))
        shown = ", ".join(map(str, records[:8])) + (f", ... ({len(records)})" if len(records) > 8 else "")
        rows.append((line["step"], line["kind"], values, shown))
    title = f"Skipped steps and spikes: {counts}"
    title += f"; the last {MAX_EVENTS}" * (len(lines) > MAX_EVENTS)
    return folded(title, table(("step", "event", "values", "records of the batch"), rows))


def configuration(stage: StageRecord) -> Markup:
    """Return the fields of the config, those that differ from the schema first."""
    fields = flatten(stage.record.get("stage", {}))
    if not fields:
        return tag("p", "No config is recorded.", class_="soft")
    defaults = schema_defaults(stage.record["stage"].get("task"))
    if not defaults:
        return folded("Config", table(("field", "value"), fields.items()))
    different = [name for name in fields if name not in defaults or fields[name] != defaults[name]]
    rows = [(name, fields[name], defaults.get(name, "not in the schema")) for name in different]
    same = [(name, value) for name, value in fields.items() if name not in different]
    return folded(
        f"Config: {len(different)} of {len(fields)} fields differ from the defaults",
        table(("field", "value", "default"), rows),
        tag("h3", "As by default"),
        table(("field", "value"), same),
    )


def flatten(config: dict) -> dict[str, str]:
    """Return the fields of a config by dotted name, with values as they are written in it."""
    flat = flatten_dict(config, sep=".")
    return {name: repr(tuple(v) if isinstance(v, list) else v) for name, v in flat.items()}


def schema_defaults(task: str | None) -> dict[str, str]:
    """Return the defaults of configs/schema.py of this checkout; {} in an installation, which has none."""
    path = Path(var_jax.__file__).parent.parent / "configs" / "schema.py"
    if task not in SCHEMA or not path.exists():
        return {}
    spec = importlib.util.spec_from_file_location("schema", path)
    schema = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(schema)
    stage: ConfigDict = getattr(schema, SCHEMA[task])()
    return flatten(stage.to_dict())


def starts(stage: StageRecord) -> Markup:
    """Return when, how and with which versions the stage was started."""
    if not stage.starts:
        return folded("Command", tag("p", tag("code", stage.record.get("command", "not recorded"))))
    names = dict.fromkeys(name for start in stage.starts for name in start)
    rows = [[start.get(name, "") for name in names] for start in stage.starts]
    return folded(f"Starts: {len(rows)}", table(list(names), rows))


# --- Pictures


def picture(path: epath.Path, caption: str) -> Markup:
    """Return a picture with its content in it, reduced if it is large; a note if it is no image."""
    data = path.read_bytes()
    try:
        image = decode_image(data)
    except DecodeError as error:
        return tag("p", f"{path.name} is not an image, or is damaged: {error}", class_="soft")
    media_type = "png"
    if len(data) > MAX_PICTURE_BYTES or max(image.size) > MAX_PICTURE_SIDE or not data.startswith(b"\x89PNG"):
        image.thumbnail((MAX_PICTURE_SIDE, MAX_PICTURE_SIDE))
        content = io.BytesIO()
        image.save(content, "JPEG", quality=88)
        data, media_type = content.getvalue(), "jpeg"
    source = f"data:image/{media_type};base64,{base64.b64encode(data).decode()}"
    return tag("figure", tag("figcaption", caption), tag("img", alt=path.stem, src=source), class_="picture")


def pictures(workdir: epath.Path) -> Markup:
    """Return the latest pictures of the run."""
    paths = {name: workdir / f"{name}.png" for name in PICTURES}
    figures = [
        picture(path, f"{path.name}: {PICTURES[name]}") for name, path in paths.items() if path.exists()
    ]
    if not figures:
        return Markup("")
    return join([tag("h2", "Pictures"), tag("div", *figures, class_="grid wide")])


def previews(stage: StageRecord) -> Markup:
    """Return previews of some steps, evenly spaced; nothing without a second step."""
    figures = []
    for name, by_step in sorted(stage.previews.items()):
        steps = sorted(by_step)
        count = min(NUM_PREVIEWS, len(steps))
        shown = {steps[round(i * (len(steps) - 1) / max(count - 1, 1))] for i in range(count)}
        figures += [picture(by_step[step], f"{name}, step {step:,}") for step in sorted(shown)]
    if not figures:
        return Markup("")
    return folded("Previews over the steps", tag("div", *figures, class_="grid wide"))


# --- The page


def evaluation(workdir: epath.Path) -> Markup:
    """Return the scores of `evaluate.py`; nothing without any."""
    parts = []
    if scores := read_json(workdir / "scores.json"):
        real = scores.get("real_halves") or {}
        rows = [(k, number(v), number(real[k]) if k in real else "") for k, v in numbers(scores)]
        parts += [
            tag("h3", "Samples (scores.json)"),
            tag("p", f"In features of {scores.get('inception', '?')}.", class_="soft"),
            table(("score", "samples", "half of the real images against the rest"), rows),
        ]
    if metrics := read_json(workdir / "reconstruction.json"):
        rows = [(k, number(v)) for k, v in numbers(metrics) if not _OF_ONE_MAP.fullmatch(k)]
        parts += [tag("h3", "Reconstruction (reconstruction.json)"), table(("metric", "value"), rows)]
    return join([tag("h2", "Evaluation"), tag("section", *parts)]) if parts else Markup("")


def numbers(values: dict) -> Iterable[tuple[str, float]]:
    """Return the items that are numbers."""
    return [(name, value) for name, value in values.items() if isinstance(value, int | float)]


def stage_section(stage: StageRecord) -> Markup:
    """Return the part of the page on one stage."""
    return join(
        [
            tag("h2", f"{stage.name}: details", id=stage.name),
            curves(stage),
            previews(stage),
            events(stage),
            configuration(stage),
            starts(stage),
        ]
    )


def page(workdir: epath.Path) -> str:
    """Return the report of a run as HTML.

    Raises:
      ConfigError: if there is no run, or a file of it is damaged; names it.
    """
    stages = read_run(workdir)
    now = utc(datetime.datetime.now(datetime.UTC).isoformat())
    head = join(
        [
            tag("meta", charset="utf-8"),
            tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
            tag("meta", content=CONTENT_POLICY, **{"http-equiv": "Content-Security-Policy"}),
            tag("title", f"{workdir.name}: run report"),
            tag("style", Markup(Path(__file__).with_suffix(".css").read_text())),
        ]
    )
    body = [
        tag("h1", workdir.name),
        tag("p", f"{workdir}; report of {now}, var_jax {var_jax.__version__}", class_="soft"),
        tag("div", *map(summary, stages), class_="grid wide"),
        pictures(workdir),
        evaluation(workdir),
        *map(stage_section, stages),
    ]
    return f"<!doctype html>\n{tag('html', tag('head', head), tag('body', *body), lang='en')}\n"


def main(argv: list[str]) -> None:
    with config_errors():
        workdir = as_path(argv[1])
        out = as_path(FLAGS.out) if FLAGS.out else workdir / "report.html"
    content = page(workdir).encode()
    write_atomic(out, content)
    print(f"{out}: {len(content) / 1e6:.1f} MB")


if __name__ == "__main__":
    flags.DEFINE_string("out", None, "File to write; by default WORKDIR/report.html")
    cli.run(main, arguments=("WORKDIR",))
