import io
import sys

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from tests.digits_judge import split_off
from var_jax.data.sources import DataSetMissing, open_source


def test_digits_are_those_of_scikit_learn_split_once_and_for_all(digits_dir):
    digits = load_digits()
    is_test = split_off(digits.target)
    for split, chosen in (("train", ~is_test), ("test", is_test)):
        source = open_source("digits", split, digits_dir)
        assert len(source) == source.num_records == chosen.sum()
        assert [source[i]["label"] for i in range(len(source))] == digits.target[chosen].tolist()
        pixels = np.asarray(Image.open(io.BytesIO(source[7]["image"])))
        np.testing.assert_array_equal(np.round(pixels * (16 / 255)), digits.images[chosen][7])
        assert source.num_classes == 10 and source.class_names[3] == "3"


def test_no_tensorflow_is_loaded(digits_dir):
    open_source("digits", "train", digits_dir)[0]
    assert "tensorflow" not in sys.modules


def test_filling_up_to_whole_batches(digits_dir):
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
