import io
import sys

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from tests.helpers.commands import Command
from var_jax.data.image_folder import ImageFile, make_builder
from var_jax.data.sources import DataSetMissing, open_source
from var_jax.data.transforms import ToPixels
from var_jax.tools.judge_digits import split_off


def test_digits_are_those_of_scikit_learn_with_a_fixed_split(digits_dir):
    digits = load_digits()
    is_test = split_off(digits.target)
    for split, chosen in (("train", ~is_test), ("test", is_test)):
        source = open_source("digits", split, digits_dir)
        assert len(source) == source.num_records == chosen.sum()
        assert [source[i]["label"] for i in range(len(source))] == digits.target[chosen].tolist()
        pixels = np.asarray(Image.open(io.BytesIO(source[7]["image"])))
        np.testing.assert_array_equal(np.round(pixels * (16 / 255)), digits.images[chosen][7])
        assert source.num_classes == 10 and source.class_names[3] == "3"


PREPARE_TOGETHER = """
import os, pathlib, sys, time
from var_jax.data import digits, sources
generate = digits.Digits._generate_examples
meeting = pathlib.Path(sys.argv[2])

def wait_for_the_other(self, test=False):
    (meeting / str(os.getpid())).touch()
    while len(list(meeting.iterdir())) < 2:
        time.sleep(0.02)
    yield from generate(self, test)

digits.Digits._generate_examples = wait_for_the_other
print(len(sources.open_source("digits", "train", sys.argv[1])))
"""


def test_two_processes_prepare_the_digits_at_once(tmp_path):
    (tmp_path / "meeting").mkdir()
    folders = (tmp_path / "data", tmp_path / "meeting")
    both = [Command("-c", PREPARE_TOGETHER, *folders) for _ in range(2)]
    done = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], "\n".join(error[-2000:] for _, error in done)
    assert [out.split()[-1] for out, _ in done] == ["1442", "1442"]
    assert [path.name for path in (tmp_path / "data").iterdir()] == [
        "digits"
    ]  # no temporary directory is left


def test_exif_orientation_is_applied_except_to_imagenet_as_published(tmp_path, digits_dir):
    assert open_source("digits", "test", digits_dir)[0]["exif"]
    exif = Image.Exif()
    exif[0x0112] = 3
    buffer = io.BytesIO()
    stored = np.arange(64, dtype=np.uint8).reshape(8, 8)
    Image.fromarray(stored).save(buffer, "PNG", exif=exif)
    for name, expected in (("photographs", stored[::-1, ::-1]), ("imagenet2012", stored)):
        file = tmp_path / "image.png"
        file.write_bytes(buffer.getvalue())
        files = [ImageFile(file, "cat", split) for split in ("train", "test")]
        make_builder(name, files, tmp_path / "data").download_and_prepare(file_format="array_record")
        source = open_source(name, "train", tmp_path / "data")
        np.testing.assert_array_equal(ToPixels(name, 8, 1.0, False)(source[0])["image"][..., 0], expected)


def test_no_tensorflow_is_loaded(digits_dir):
    open_source("digits", "train", digits_dir)[0]
    assert "tensorflow" not in sys.modules


def test_padding_to_full_batches(digits_dir):
    source = open_source("digits", "test", digits_dir)
    padded = source.pad_to_multiple(64)
    assert len(padded) == 384 and padded[len(source) - 1]["valid"] == 1 and padded[len(source)]["valid"] == 0
    assert len(source.pad_to_multiple(len(source))) == len(source)


def test_a_missing_data_set_says_how_to_prepare_it(tmp_path):
    with pytest.raises(DataSetMissing) as error:
        open_source("imagenet2012", "train", tmp_path)
    for words in (str(tmp_path), "tfds build imagenet2012 --file_format=array_record", "configs/digits.py"):
        assert words in str(error.value)


def test_a_missing_split_is_named(digits_dir):
    with pytest.raises(ValueError, match=r"no split 'validation'; it has \['test', 'train'\]"):
        open_source("digits", "validation", digits_dir)
