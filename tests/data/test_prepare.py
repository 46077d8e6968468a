import io

import numpy as np
import pytest
from PIL import Image

from tests import coloured_shapes
from var_jax.data.image_folder import list_images
from var_jax.data.prepare import BadImages, check, prepare
from var_jax.data.sources import open_source
from var_jax.data.transforms import ToPixels

COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}


def encoded(colour, form: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((12, 16, 3), colour, np.uint8)).save(buffer, form)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Thirty images of three classes in three formats."""
    root = tmp_path / "pictures"
    for name, colour in COLOURS.items():
        (root / name).mkdir(parents=True)
        for i in range(10):
            form = ("JPEG", "PNG", "WEBP")[i % 3]
            suffix = {"JPEG": "jpg", "PNG": "PNG", "WEBP": "webp"}[form]
            (root / name / f"{i}.{suffix}").write_bytes(encoded(colour, form))
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
    with pytest.raises(FileExistsError, match="colours is there already"):
        prepare(folder, "colours", tmp_path / "data", 0.2, False, workers=1)


def test_the_same_files_are_held_out_again_and_folders_of_splits_are_kept(folder, tmp_path):
    held = lambda root: {str(f.path.relative_to(root)) for f in list_images(root, 0.3) if f.split == "test"}  # noqa: E731
    again = tmp_path / "elsewhere"
    again.parent.mkdir(exist_ok=True)
    folder.rename(again)
    assert held(again) == held(again) and 0 < len(held(again)) < 20
    (again / "train").mkdir()
    for name in COLOURS:
        (again / name).rename(again / "train" / name)
    (again / "val" / "red").mkdir(parents=True)
    (again / "val" / "red" / "x.png").write_bytes(encoded((1, 2, 3), "PNG"))
    files = list_images(again, 0.3)
    assert [f.path.name for f in files if f.split == "test"] == ["x.png"] and len(files) == 31
    assert {f.label for f in files} == set(COLOURS)


def test_a_flat_folder_has_one_class_and_a_mixed_one_is_refused(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(encoded((9, 9, 9), "PNG"))
    assert {f.label for f in list_images(tmp_path, 0.5)} == {"image"}
    (tmp_path / "cats").mkdir()
    (tmp_path / "cats" / "a.png").write_bytes(encoded((9, 9, 9), "PNG"))
    with pytest.raises(ValueError, match="holds 3 images beside its folders of classes, e.g. 0.png"):
        list_images(tmp_path, 0.5)


def test_broken_files_are_listed_and_left_out_only_on_request(folder, tmp_path, capsys):
    whole = (folder / "red" / "0.jpg").read_bytes()
    (folder / "red" / "0.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "blue" / "1.PNG").write_bytes(b"hello")
    with pytest.raises(BadImages, match="2 of 30 files cannot be decoded") as error:
        prepare(folder, "colours", tmp_path / "data", 0.2, False, workers=1)
    assert "red/0.jpg: " in str(error.value) and "blue/1.PNG: not an image of a known kind" in str(
        error.value
    )
    assert not (tmp_path / "data" / "colours").exists()
    assert sum(prepare(folder, "colours", tmp_path / "data", 0.2, True, workers=1)) == 28
    assert "left out 2 of 30" in capsys.readouterr().out


def test_what_was_checked_is_not_checked_again(folder, tmp_path, monkeypatch):
    files, notes = list_images(folder, 0.2), tmp_path / "notes.jsonl"
    assert set(check(files[:20], notes, 1).values()) == {None}
    notes.write_text(notes.read_text() + '["cut short')
    notes.write_text(notes.read_text() + "\n")
    (folder / "blue" / "0.jpg").write_bytes(b"changed since")
    seen = []
    monkeypatch.setattr(
        "var_jax.data.prepare.concurrent.futures.ProcessPoolExecutor", lambda *_: Serial(seen)
    )
    found = check(files, notes, 1)
    assert len(seen) == 11 and found[str(folder / "blue" / "0.jpg")]


class Serial:
    """A pool of this process alone that notes what it is given."""

    def __init__(self, seen: list):
        self.seen = seen

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def map(self, function, items, chunksize):
        for item in items:
            self.seen.append(item)
            yield function(item)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "My Set"}, "--name must be small letters"),
        ({"name": "digits"}, "not `digits`"),
        ({"held_out": 1.5}, "--held_out must be a share between 0 and 1, found 1.5"),
        ({"images": "nowhere"}, "no such folder: .*nowhere"),
        ({"held_out": 1e-9}, "30 images for training and 0 held out"),
    ],
)
def test_what_makes_no_data_set_is_said(folder, tmp_path, change, message):
    images = tmp_path / change.pop("images", folder.name)
    arguments = dict(name="colours", held_out=0.2) | change
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        prepare(images, arguments["name"], tmp_path / "data", arguments["held_out"], False, 1)


def test_pictures_of_many_kinds_go_through(tmp_path, capsys):
    pictures = tmp_path / "pictures"
    broken = coloured_shapes.write_folder(pictures, images=200, seed=1)
    with pytest.raises(BadImages, match="4 of 204 files cannot be decoded") as error:
        prepare(pictures, "shapes", tmp_path / "data", 0.2, False, workers=1)
    lines = str(error.value).splitlines()[1:-1]
    assert {line.split(": ")[0].strip() for line in lines} == {str(path) for path in broken}
    assert sum(prepare(pictures, "shapes", tmp_path / "data", 0.2, True, workers=1)) == 200
    said = capsys.readouterr().out
    assert all(f"{path}: " in said for path in broken)

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
            got, want = pixels(record)["image"], enlarged_centre(image)
            assert got.shape == (64, 64, 3) and got.dtype == np.uint8
            assert np.abs(got - want).max() <= 8, (image.size, image.mode)  # rounding twice; moved: > 50
    assert (counts == 20).all() and sizes == {(64, 64), (96, 64), (64, 96), (80, 80)}
    assert modes == {("JPEG", "RGB"), ("JPEG", "L"), ("PNG", "RGB"), ("PNG", "L"), ("PNG", "RGBA")}


def enlarged_centre(image: Image.Image) -> np.ndarray:
    """The middle of an image at 72 pixels on the shorter side, 64 by 64, in one step of resampling."""
    half, (w, h) = 32 * min(image.size) / 72, image.size
    box = (w / 2 - half, h / 2 - half, w / 2 + half, h / 2 + half)
    rgb = image.convert("RGB").resize((64, 64), Image.Resampling.LANCZOS, box=box)
    return np.asarray(rgb).astype(int)


def test_shapes_are_drawn_alike_again_and_the_folder_must_be_new(tmp_path):
    draw = lambda seed: coloured_shapes.draw("star", np.random.default_rng(seed))  # noqa: E731
    np.testing.assert_array_equal(draw(3), draw(3))
    assert np.abs(draw(3).astype(int) - draw(4)).mean() > 10
    (tmp_path / "there.txt").touch()
    with pytest.raises(FileExistsError, match="is not empty"):
        coloured_shapes.write_folder(tmp_path, images=10)
