import collections
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from examples import coloured_shapes
from var_jax.conditions import KINDS, encode_caption
from var_jax.data.image_folder import ImageFile, UnusableFolder, format_counts, hold_out, list_images
from var_jax.data.loader import eval_batches, train_batches
from var_jax.data.sources import open_source
from var_jax.data.transforms import ToPixels
from var_jax.errors import ConfigError
from var_jax.tools import prepare as prepare_module
from var_jax.tools.prepare import BadImages, check_files, inspect_all, open_check_log, prepare

COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}


def encoded(colour, form: str, number: int = 0) -> bytes:
    """Encode an image of one color, slightly different for each number, since duplicates stay together."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((12, 16, 3), np.add(colour, number // 2), np.uint8)).save(buffer, form)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Write thirty images of three classes in three formats."""
    root = tmp_path / "pictures"
    for name, colour in COLOURS.items():
        (root / name).mkdir(parents=True)
        for i in range(10):
            form = ("JPEG", "PNG", "WEBP")[i % 3]
            suffix = {"JPEG": "jpg", "PNG": "PNG", "WEBP": "webp"}[form]
            (root / name / f"{i}.{suffix}").write_bytes(encoded(colour, form, i))
    (root / "notes.txt").write_text("not an image")
    return root


def test_a_folder_becomes_a_data_set_of_its_own_bytes(folder, tmp_path):
    train, test = prepare(folder, "colours", tmp_path / "data", 0.2, False, workers=2)
    assert train + test == 30 and test > 0
    sources = [open_source("colours", split, tmp_path / "data") for split in ("train", "test")]
    assert [len(source) for source in sources] == [train, test]
    assert sources[0].class_names == ("blue", "green", "red")
    originals, pixels = (
        {path.read_bytes() for path in folder.rglob("*.*")},
        ToPixels("colours", 8, 1.0, False),
    )
    for source in sources:
        for i in range(len(source)):
            assert source[i]["image"] in originals
            got = pixels(source[i])["image"].reshape(-1, 3).mean(0)
            want = COLOURS[source.class_names[source[i]["label"]]]
            assert np.abs(got - want).max() < 12
    with pytest.raises(FileExistsError, match="colours exists already"):
        prepare(folder, "colours", tmp_path / "data", 0.2, False, workers=1)


def test_captions_and_embeddings_are_stored_with_their_images(folder, tmp_path, capsys):
    """Image i of each class is captioned with its class if i < 8, and has i % 3 + 1 vectors if i < 9."""
    rng, arrays, lines = np.random.default_rng(0), {}, []
    for path in (image.path for image in list_images(folder)[0]):
        name, number = path.relative_to(folder), int(path.stem)
        if number < 8:
            caption = f"All {name.parent}!" + " so" * (number % 2)
            lines.append(json.dumps({"image": f"./{name}", "caption": caption}))
        if number < 9:
            arrays[path.read_bytes()] = rng.normal(size=(number % 3 + 1, 4)).astype(np.float16)
            (tmp_path / "vectors" / name.parent).mkdir(parents=True, exist_ok=True)
            np.save(tmp_path / "vectors" / name.with_suffix(".npy"), arrays[path.read_bytes()])
    captions = folder / "captions.jsonl"  # passed over as an image
    captions.write_text("\n".join(lines))
    data = tmp_path / "data"
    prepare(folder, "colours", data, 0.2, False, 1, captions, tmp_path / "vectors")
    output = capsys.readouterr().out
    assert "captions: of 24 of 30 images, at most 3 words long, with 5 distinct words\n" in output
    assert "embeddings: of 27 of 30 images, float16 [3, 4]" in output
    words = ("all", "blue", "green", "red", "so")
    for split in ("train", "test"):
        labelled, captioned, embedded = (open_source("colours", split, data, kind) for kind in KINDS)
        assert labelled.condition_fields() == {} and "condition" not in labelled[0]
        fields = dict(condition_length=3, condition_width=0, vocabulary=words)
        assert captioned.condition_fields() == fields and captioned.condition == "caption"
        fields |= dict(condition_width=4, vocabulary=())
        assert embedded.condition_fields() == fields and embedded.condition == "embedding"
        for i in range(len(labelled)):
            name = captioned.class_names[captioned[i]["label"]]
            ids = encode_caption(f"all {name} so", words, 3).tolist()
            assert captioned[i]["condition"].tolist() in (ids, [*ids[:2], 0], [0, 0, 0])
            padded = np.zeros((3, 4), np.float32)
            if (rows := arrays.get(embedded[i]["image"])) is not None:
                padded[: len(rows)] = rows
            np.testing.assert_array_equal(embedded[i]["condition"], padded)
    batch = next(train_batches(embedded, ToPixels("colours", 8, 1.0, False), 4, seed=0, threads=1))
    assert batch["condition"].shape == (4, 3, 4) and batch["condition"].dtype == np.float32
    batch = next(eval_batches(captioned, ToPixels("colours", 8, 1.0, False), 8, threads=1))
    assert batch["condition"].dtype == np.int32
    np.testing.assert_array_equal(batch["condition"][:6], [captioned[i]["condition"] for i in range(6)])


def test_a_caption_that_fits_no_image_stops_before_anything_is_written(folder, tmp_path):
    captions = tmp_path / "captions.jsonl"
    captions.write_text('{"image": "red/0.png", "caption": "red"}')
    with pytest.raises(UnusableFolder, match="captions.jsonl, line 1: no image 'red/0.png' under"):
        prepare(folder, "colours", tmp_path / "data", 0.2, False, 1, captions)
    assert not (tmp_path / "data").exists()


def test_a_data_set_without_conditions_says_how_to_get_them(digits_dir):
    with pytest.raises(ValueError, match="'digits' has no captions; prepare it .* with --captions"):
        open_source("digits", "test", digits_dir, "caption")
    with pytest.raises(ValueError, match="one of label, caption, embedding; got 'image'"):
        open_source("digits", "test", digits_dir, "image")


def split_of(root: Path, share: float) -> dict[str, str]:
    """Return the split of each file under the root; all files are different."""
    images, _ = list_images(root)
    digests = {image.path: str(image.path) for image in images}
    return {
        str(image.path.relative_to(root)): image.split for image in hold_out(images, share, digests, root)
    }


def test_the_same_share_of_every_class_is_held_out_again_and_folders_of_splits_are_kept(folder, tmp_path):
    before = split_of(folder, 0.3)
    held_out = [name for name, split in before.items() if split == "test"]
    assert collections.Counter(name.split("/")[0] for name in held_out) == dict.fromkeys(COLOURS, 3)
    for i in range(10, 25):
        (folder / "red" / f"{i}.png").write_bytes(encoded((9, 9, 9), "PNG"))
    (folder / "pink").mkdir()
    (folder / "pink" / "0.png").write_bytes(encoded((9, 9, 9), "PNG"))
    moved_folder = tmp_path / "elsewhere"
    folder.rename(moved_folder)
    after = split_of(moved_folder, 0.3)
    assert all(after[name] == split for name, split in before.items() if not name.startswith("red"))
    assert after["pink/0.png"] == "train"  # a class of one image is for training
    moved = sum(after[name] != split for name, split in before.items())
    assert moved <= 3 and sum(name.startswith("red") and after[name] == "test" for name in after) == 8

    shutil.rmtree(moved_folder / "pink")
    (moved_folder / "train").mkdir()
    for name in COLOURS:
        (moved_folder / name).rename(moved_folder / "train" / name)
    archive = split_of(moved_folder, 0.3)  # of training images alone: its folders are the classes
    assert len(archive) == 45 and {image.label for image in list_images(moved_folder)[0]} == set(COLOURS)
    (moved_folder / "val" / "red").mkdir(parents=True)
    (moved_folder / "val" / "red" / "x.png").write_bytes(encoded((1, 2, 3), "PNG"))
    (moved_folder / "extra").mkdir()
    assert [name for name, split in split_of(moved_folder, 0.3).items() if split == "test"] == [
        "val/red/x.png"
    ]
    images, passed_over = list_images(moved_folder)
    assert len(images) == 46 and {image.label for image in images} == set(COLOURS)
    assert passed_over["folders that are not splits"] == 1


@pytest.mark.parametrize(("images", "test"), [(20, 10), (2, 10), (1, 1)])
def test_every_class_has_its_share_of_held_out_images(images, test):
    files = [ImageFile(Path(f"/r/{c}/{i}.png"), str(c), "") for c in range(10) for i in range(images)]
    splits = hold_out(files, 0.05, {file.path: str(file.path) for file in files}, Path("/r"))
    held_out = collections.Counter(file.label for file in splits if file.split == "test")
    assert held_out.total() == test and max(held_out.values()) == 1  # by file names: 0 0 2 0 0 1 3 0 0 3


def test_copies_of_an_image_are_on_one_side_whatever_they_are_called():
    files = [ImageFile(Path(f"/r/{c}/{i}.png"), str(c), "") for c in range(4) for i in range(100)]
    digests = {file.path: str(int(file.path.stem) // 4) for file in files}  # 16 copies, 4 in each class
    splits = hold_out(files, 0.2, digests, Path("/r"))
    sides = collections.defaultdict(set)
    for file in splits:
        sides[digests[file.path]].add(file.split)
    assert len(sides) == 25 and all(len(of_one) == 1 for of_one in sides.values())
    assert 3 <= sum(of_one == {"test"} for of_one in sides.values()) <= 7


def test_links_are_followed_once_and_what_is_passed_over_is_counted(folder, tmp_path, capsys):
    (tmp_path / "elsewhere").mkdir()
    (folder / "red").rename(tmp_path / "elsewhere" / "crimson")
    (folder / "red").symlink_to(tmp_path / "elsewhere" / "crimson")
    (folder / "rouge").symlink_to(
        tmp_path / "elsewhere" / "crimson"
    )  # two classes of the same images: why not
    (folder / "blue" / "loop").symlink_to(folder)
    (folder / "blue" / "again").symlink_to(folder / "blue")
    (folder / "blue" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(folder / "blue" / "pipe.png")  # opening it would block forever
    for name in ("a.heic", "b.HEIC", "Thumbs.db", ".DS_Store", "._0.png", "README"):
        (folder / "green" / name).write_bytes(b"x")
    for name in (".git", "__MACOSX", "green/.thumbnails"):
        (folder / name).mkdir()
        (folder / name / "0.png").write_bytes(encoded((1, 1, 1), "PNG"))
    (folder / "green" / os.fsdecode(b"caf\xe9.png")).write_bytes(encoded((30, 200, 31), "PNG"))
    images, passed_over = list_images(folder)
    assert collections.Counter(image.label for image in images) == {
        "red": 10,
        "rouge": 10,
        "blue": 10,
        "green": 11,
    }
    assert passed_over == {
        ".heic": 2,
        ".db": 1,
        ".txt": 1,
        "files without a suffix": 1,
        "hidden files": 2,
        "hidden folders": 3,
        "broken links": 1,
        "files that are neither files nor folders": 1,
        "links to folders that are read already": 2,
    }
    assert format_counts({".txt": 3, ".heic": 12, ".db": 3}) == "12 .heic, 3 .db, 3 .txt"
    assert prepare(folder, "colours", tmp_path / "data", 0.2, False, workers=1) == (33, 8)
    output = capsys.readouterr().out
    assert "41 images in 4 classes" in output and "passed over: 3 hidden folders, 2 .heic" in output
    assert "10 files are copies of others" in output


def test_other_formats_are_stored_as_they_are_without_tensorflow(tmp_path):
    forms = {"gif": "GIF", "bmp": "BMP", "tif": "TIFF", "avif": "AVIF"}
    for suffix, form in forms.items():
        (tmp_path / suffix).mkdir()
        for i in range(2):
            (tmp_path / suffix / f"{i}.{suffix}").write_bytes(encoded((200, 30, 30), form, 10 * i))
    assert prepare(tmp_path, "others", tmp_path / "data", 0.2, False, workers=1) == (4, 4)
    source = open_source("others", "test", tmp_path / "data")
    assert source.class_names == tuple(sorted(forms))
    for i in range(4):
        name = source.class_names[source[i]["label"]]
        assert source[i]["image"] in {path.read_bytes() for path in (tmp_path / name).iterdir()}
        pixels = ToPixels("others", 8, 1.0, False)(source[i])["image"].reshape(-1, 3).mean(0)
        assert pixels[0] > 190 and pixels[1] < 60
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize(
    "name", ["cat ", " cat", "two\nlines", "\N{NO-BREAK SPACE}cat", os.fsdecode(b"caf\xe9")]
)
def test_class_names_that_would_be_read_otherwise_are_refused(folder, name):
    (folder / name).mkdir()
    (folder / name / "0.png").write_bytes(encoded((9, 9, 9), "PNG"))
    with pytest.raises(UnusableFolder, match="rename it") as error:
        list_images(folder)
    str(error.value).encode()  # it can be printed


def test_a_flat_folder_has_one_class_and_a_mixed_one_is_refused(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(encoded((9, 9, 9), "PNG"))
    assert {f.label for f in list_images(tmp_path)[0]} == {"image"}
    (tmp_path / "cats").mkdir()
    (tmp_path / "cats" / "a.png").write_bytes(encoded((9, 9, 9), "PNG"))
    with pytest.raises(UnusableFolder, match="holds 3 images outside of its class folders, e.g. 0.png"):
        list_images(tmp_path)


def test_broken_files_are_listed_and_left_out_only_on_request(folder, tmp_path, capsys):
    whole = (folder / "red" / "0.jpg").read_bytes()
    (folder / "red" / "0.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "blue" / "1.PNG").write_bytes(b"hello")
    line = io.BytesIO()
    Image.new("L", (60000, 1)).save(line, "PNG")
    (folder / "blue" / "4.PNG").write_bytes(line.getvalue())
    with pytest.raises(BadImages, match="3 of 30 files cannot be used") as error:
        prepare(folder, "colours", tmp_path / "data", 0.2, False, workers=1)
    assert "red/0.jpg: " in str(error.value) and "blue/1.PNG: not an image of a known kind" in str(
        error.value
    )
    assert "blue/4.PNG: 60000 x 1: more than 20 times as long as wide" in str(error.value)
    assert not (tmp_path / "data" / "colours").exists()
    assert sum(prepare(folder, "colours", tmp_path / "data", 0.2, True, workers=1)) == 27
    assert "left out 3 of 30" in capsys.readouterr().out


def test_what_was_checked_is_not_checked_again(folder, tmp_path):
    files, log_path = list_images(folder)[0], tmp_path / "checked.jsonl"
    with open_check_log(log_path) as log:
        assert {check.problem for check in check_files(files[:20], log, 1).values()} == {None}
    with open(log_path, "a") as log:
        log.write('["cut short')
    (folder / "blue" / "0.jpg").write_bytes(b"changed since")
    with open_check_log(log_path) as log:
        checks = check_files(files, log, 1)
    assert len(log_path.read_text().splitlines()) == 20 + 1 + 11
    assert checks[folder / "blue" / "0.jpg"].problem and len({c.digest for c in checks.values()}) == 30
    with open_check_log(log_path) as log:
        assert check_files(files, log, 1) == checks
    assert len(log_path.read_text().splitlines()) == 32


def inspect_all_or_die(paths):
    """Emulate an image that takes all memory, so that the kernel kills the process that decodes it."""
    if any(path.name == "8.webp" and path.parent.name == "red" for path in paths):
        os.kill(os.getpid(), signal.SIGKILL)
    return inspect_all(paths)


def test_a_file_that_kills_the_process_that_decodes_it_is_a_bad_file(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "inspect_all", inspect_all_or_die)
    monkeypatch.setattr(prepare_module, "FILES_PER_TASK", 5)
    with pytest.raises(BadImages, match="1 of 30 files cannot be used") as error:
        prepare(folder, "colours", tmp_path / "data", 0.2, False, workers=1)
    assert "red/8.webp: kills the process that decodes it (out of memory" in str(error.value)
    assert len((tmp_path / "data" / "colours.checked.jsonl").read_text().splitlines()) == 30


KILLED = """
import sys, time
from pathlib import Path
from var_jax.data import image_folder
from var_jax.tools import prepare

def hold(items, count):
    for number, item in enumerate(items):
        if number == count:
            Path(sys.argv[3]).touch()
            time.sleep(600)
        yield item

if sys.argv[4] == "writing":
    generate = image_folder.ImageFolder._generate_examples
    image_folder.ImageFolder._generate_examples = lambda self, split="": hold(generate(self, split), 5)
else:
    prepare.FILES_PER_TASK, inspect = 4, prepare.inspect_in_processes
    prepare.inspect_in_processes = lambda paths, workers: hold(inspect(paths, workers), 9)
prepare.prepare(sys.argv[1], "colours", sys.argv[2], 0.2, False, 1)
"""


def alive(group: int) -> list[str]:
    """Return the command lines of the processes of a group."""
    lines = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if os.getpgid(int(path.name)) == group and (line := (path / "cmdline").read_text()):
                lines.append(line)
        except (ProcessLookupError, FileNotFoundError):
            pass
    return lines


@pytest.mark.parametrize("where", ["checking", "writing"])
def test_killed_anywhere_it_goes_on_with_the_same_command(folder, tmp_path, where):
    data, held = tmp_path / "data", tmp_path / "held"
    command = [sys.executable, "-c", KILLED, str(folder), str(data), str(held), where]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True)
    deadline = time.monotonic() + 300
    while not held.exists():
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    with pytest.raises(BlockingIOError, match="another `prepare` writes this data set"):
        prepare(folder, "colours", data, 0.2, False, 1)
    process.kill()
    process.communicate()
    while left := alive(process.pid):  # workers would wait for their next task forever
        assert time.monotonic() < deadline, left
        time.sleep(0.05)
    lines = (data / "colours.checked.jsonl").read_text().splitlines()
    assert len(lines) == (9 if where == "checking" else 30)
    assert any(data.glob("colours/incomplete.*")) == (where == "writing")
    counts = prepare(folder, "colours", data, 0.2, False, 1)
    assert counts == (24, 6) and {path.name for path in data.iterdir()} == {"colours", "downloads"}
    assert [path.name for path in (data / "colours").iterdir()] == ["1.0.0"]
    assert len(open_source("colours", "train", data)) == 24
    if where == "writing":  # and killed once more, after the last write: the notes are still there
        (data / "colours.checked.jsonl").write_text("\n".join(lines))
        assert prepare(folder, "colours", data, 0.2, False, 1) == counts
        with pytest.raises(FileExistsError, match="colours exists already"):
            prepare(folder, "colours", data, 0.2, False, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "My Set"}, "--name must be lowercase letters"),
        ({"name": "digits"}, "not `digits`"),
        ({"held_out": 1.5}, "--held_out must be a fraction between 0 and 1, got 1.5"),
        ({"images": "nowhere"}, "no such folder: .*nowhere"),
        ({"images": "notes"}, r"no images \(.jpg .* under .*notes; passed over: 1 .txt"),
        ({"images": "one"}, "1 images for training and 0 held out"),
    ],
)
def test_arguments_that_make_no_data_set_are_named(folder, tmp_path, change, message):
    (tmp_path / "notes").mkdir()
    (folder / "notes.txt").rename(tmp_path / "notes" / "notes.txt")
    (tmp_path / "one").mkdir()
    (folder / "red" / "0.jpg").rename(tmp_path / "one" / "0.jpg")
    images = tmp_path / change.get("images", folder.name)
    arguments = dict(name="colours", held_out=0.2) | change
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        prepare(images, arguments["name"], tmp_path / "data", arguments["held_out"], False, 1)


def test_the_command_explains_what_is_wrong_with_a_folder_but_hides_no_defect(folder, tmp_path, monkeypatch):
    flags = SimpleNamespace(
        images=str(folder), name="colours", data_dir=str(tmp_path), held_out=0.2, skip_bad=False, workers=1,
        captions=None, embeddings=None,
    )  # fmt: skip
    monkeypatch.setattr(prepare_module, "FLAGS", flags)

    def defect(*_):
        raise ValueError("operands could not be broadcast together")

    monkeypatch.setattr(prepare_module, "check_files", defect)
    with pytest.raises(ValueError, match="operands could not be broadcast"):
        prepare_module.main([])
    flags.captions = str(folder / "none.jsonl")
    with pytest.raises(ConfigError, match=r"No such file or directory: '.*none.jsonl'"):
        prepare_module.main([])
    flags.captions = "gs://bucket/captions.jsonl"
    with pytest.raises(ConfigError, match="--captions"):
        prepare_module.main([])
    flags.captions = None
    flags.images = f"{folder}/none"
    with pytest.raises(ConfigError, match="no such folder: .*none"):
        prepare_module.main([])
    flags.name = "My Set"
    with pytest.raises(ConfigError, match="--name must be lowercase letters"):
        prepare_module.main([])


def test_pictures_of_many_kinds_go_through(tmp_path, capsys):
    pictures = tmp_path / "pictures"
    broken = coloured_shapes.write_folder(pictures, images=200, seed=1)
    with pytest.raises(BadImages, match="4 of 204 files cannot be used") as error:
        prepare(pictures, "shapes", tmp_path / "data", 0.2, False, workers=1)
    lines = str(error.value).splitlines()[1:-1]
    assert {line.split(": ")[0].strip() for line in lines} == {str(path) for path in broken}
    assert sum(prepare(pictures, "shapes", tmp_path / "data", 0.2, True, workers=1)) == 200
    output = capsys.readouterr().out
    assert all(f"{path}: " in output for path in broken)

    classes = {path.read_bytes(): path.parent.name for path in pictures.rglob("*.*")}
    pixels, sizes, modes, counts = ToPixels("shapes", 64, 1.125, False), set(), set(), np.zeros(10, int)
    for split in ("train", "test"):
        source = open_source("shapes", split, tmp_path / "data")
        assert source.class_names == tuple(coloured_shapes.SHAPES)
        for record in map(source.__getitem__, range(len(source))):
            assert source.class_names[record["label"]] == classes[record["image"]]
            counts[record["label"]] += 1
            image = Image.open(io.BytesIO(record["image"]))
            sizes.add(image.size)
            modes.add((image.format, image.mode))
            got, want = pixels(record)["image"], enlarged_center(image)
            assert got.shape == (64, 64, 3) and got.dtype == np.uint8
            assert np.abs(got - want).max() <= 8, (image.size, image.mode)  # rounding twice; moved: > 50
    assert (counts == 20).all() and sizes == {(64, 64), (96, 64), (64, 96), (80, 80)}
    assert modes == {("JPEG", "RGB"), ("JPEG", "L"), ("PNG", "RGB"), ("PNG", "L"), ("PNG", "RGBA")}


def enlarged_center(image: Image.Image) -> np.ndarray:
    """Return the center of an image at 72 pixels on the short side, 64 by 64, in one step of resampling."""
    half, (w, h) = 32 * min(image.size) / 72, image.size
    box = (w / 2 - half, h / 2 - half, w / 2 + half, h / 2 + half)
    rgb = image.convert("RGB").resize((64, 64), Image.Resampling.LANCZOS, box=box)
    return np.asarray(rgb).astype(int)


def test_shapes_are_drawn_alike_again_and_the_folder_must_be_new(tmp_path):
    draw = lambda seed: coloured_shapes.draw("star", np.random.default_rng(seed))
    np.testing.assert_array_equal(draw(3), draw(3))
    assert np.abs(draw(3).astype(int) - draw(4)).mean() > 10
    (tmp_path / "there.txt").touch()
    with pytest.raises(FileExistsError, match="is not empty"):
        coloured_shapes.write_folder(tmp_path, images=10)
