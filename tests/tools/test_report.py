"""Reports of runs: whole, in progress, old, hostile, in a bucket."""

import json
import re
from html.parser import HTMLParser

import pytest

from tests.helpers.commands import command
from var_jax.errors import ConfigError
from var_jax.paths import as_path
from var_jax.tools.charts import Series, line_chart
from var_jax.tools.report import page

HOSTILE = "<script>alert(1)</script><img src=x onerror='alert(2)'>\"&"


class Elements(HTMLParser):
    """Names of the elements of a page, its attributes, and its text."""

    def __init__(self, content: str):
        super().__init__()
        self.names: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(content)

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += f"{data}\n"


def write_stage(folder, lines: list[dict], config: dict | None = None) -> None:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if config:
        (folder / "config.json").write_text(json.dumps(config))


def test_the_report_of_a_run_is_one_file_that_needs_nothing_else(tiny_run, tmp_path):
    done = command("-m", "var_jax.tools.report", str(tiny_run), f"--out={tmp_path}/run.html")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith(f"{tmp_path}/run.html: 0.")
    content = (tmp_path / "run.html").read_text()
    elements = Elements(content)
    sources = [value for name, value in elements.attributes if name == "src"]
    assert len(sources) >= 8 and all(source.startswith("data:image/") for source in sources)
    assert "script" not in elements.names and "link" not in elements.names
    assert not re.search(r"https?://|url\(|@import", content)
    (start,) = map(json.loads, (tiny_run / "tokenizer" / "starts.jsonl").read_text().splitlines())
    facts = ("tokenizer", "next_scale", "2 of 2 steps", f"{start['parameters']:,}", f"jax {start['jax']}")
    for text in (*facts, "digits (train, held out: test), 1,442 images", "accuracy_last"):
        assert text in elements.text, text
    assert start["step"] == 0 and start["time"] > "2026" and start["devices"] == "8 x cpu"


def test_the_config_has_the_fields_that_differ_from_the_schema_first(tiny_run):
    text = Elements(page(as_path(tiny_run))).text
    assert re.search(r"Config: \d+ of \d+ fields differ from the defaults", text)
    different, same, *_ = text.split("tokenizer: details")[1].split("As by default")
    assert "train.batch\n16\n768\n" in different and "train.batch" not in same.split("Starts")[0]
    assert "train.grad_accum_steps\n1\n" in same and "train.grad_accum_steps" not in different


def test_what_comes_from_files_is_text(tmp_path):
    lines = [{"step": s, "kind": "eval", "loss": 1.0 / s, HOSTILE: s} for s in (1, 2)]
    lines.append({"step": 2, "kind": "spike", "loss": 9.0, "records": [HOSTILE]})
    config = {"steps": 4, "dtype": HOSTILE, "class_names": [HOSTILE], "stage": {HOSTILE: {"a": HOSTILE}}}
    stage = tmp_path / HOSTILE.replace("/", "") / "toy"
    write_stage(stage, lines, config)
    (stage / "previews").mkdir()
    (stage / "previews" / f"{HOSTILE.replace('/', '')}_0000001.png").write_bytes(b"no image")
    (stage / "starts.jsonl").write_text(json.dumps({"time": HOSTILE, "commit": HOSTILE}) + "\n")
    (stage.parent / "scores.json").write_text(json.dumps({"fid": 3.5, "inception": HOSTILE}))
    elements = Elements(page(as_path(stage.parent)))
    assert not {"script", "img", "iframe", "object"} & {*elements.names}
    assert not [name for name, _ in elements.attributes if name.startswith("on")]
    assert elements.text.count("<script>alert(1)</script>") >= 6
    assert "is not an image, or is damaged" in elements.text


def test_a_run_in_progress_of_an_older_version_with_one_stage(tmp_path):
    """Without starts.jsonl; the last line is being written."""
    lines = [{"step": s, "kind": "train", "loss": 8.0 / s, "images_per_s": 4.0} for s in (2, 4, 6)]
    lines.append({"step": 6, "kind": "eval", "loss": None, "accuracy": 0.25})
    lines.append({"step": 5, "kind": "skipped", "loss": None, "records": list(range(12))})
    config = {"steps": 10, "stage": {"train": {"keep": 3, "batch": 16}}}
    write_stage(tmp_path / "next_scale", lines, config)
    with open(tmp_path / "next_scale" / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "kin')
    text = Elements(page(as_path(tmp_path))).text
    assert "6 of 10 steps: in progress, or stopped" in text
    assert "0:24 (steps alone)" in text  # 6 steps of 16 images at 4 images/s
    assert "accuracy\n0.25\n0.25\n6\n" in text  # the last and the best
    assert "Skipped steps and spikes: 1 skipped, 0 spike" in text and "6, 7, ... (12)" in text
    assert "max_to_keep" in text  # the present name of the field


def test_a_directory_without_a_run_and_a_damaged_file_are_errors_of_a_line(tmp_path):
    with pytest.raises(ConfigError, match=f"{tmp_path} has no run: no STAGE/metrics.jsonl"):
        page(as_path(tmp_path))
    with pytest.raises(ConfigError, match="nowhere has no run"):
        page(as_path(tmp_path / "nowhere"))
    write_stage(tmp_path / "toy", [{"step": 1, "kind": "train"}])
    (tmp_path / "scores.json").write_text("{")
    with pytest.raises(ConfigError, match=r"scores.json: Expecting property name"):
        page(as_path(tmp_path))


def test_a_run_in_a_bucket(tiny_run, bucket):
    run = as_path(bucket) / "reported"
    for name in ("samples.png", "next_scale/metrics.jsonl", "next_scale/config.json"):
        (run / name).write_bytes((tiny_run / name).read_bytes())
    text = Elements(page(run)).text
    assert "2 of 2 steps" in text and "samples.png: samples" in text


def test_a_chart_has_its_points_in_the_frame_and_keeps_spikes():
    points = [(float(x), 1.0) for x in range(10_000)]
    points[4321] = (4321.0, 1000.0)
    points[7] = (7.0, float("nan"))
    chart = line_chart("loss", [Series(label="train", points=points, hue=0)])
    (path,) = re.findall(r'polyline points="([^"]*)"', chart)
    ys = [float(point.split(",")[1]) for point in path.split()]
    assert len(ys) < 400 and min(ys) == 8.0 and max(ys) == 168.0  # the spike at the top, the rest below
    assert "(log)" in chart and ">1000<" in chart
    constant = line_chart("rate", [Series(label="train", points=[(1.0, 5.0)], hue=0)])
    assert constant.count("<circle") == 1 and 'cy="88.0"' in constant  # a single point, in the middle
    assert line_chart("none", [Series(label="train", points=[(1.0, float("nan"))], hue=0)]) == ""
