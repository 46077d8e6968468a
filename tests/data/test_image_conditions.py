import json
import os
from pathlib import Path

import numpy as np
import pytest

from var_jax.data.image_conditions import Captions, find_embeddings, read_captions, read_embedding
from var_jax.data.image_folder import ImageFile, UnusableFolder

ROOT = Path("/pictures")
IMAGES = [ImageFile(ROOT / name, "star", "") for name in ("star/1.jpg", "star/2.png", "star/3.jpg")]
FIRST = b'{"image": "star/1.jpg", "caption": "a star"}\n'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"image": "star/2.png", ', 'line 3: not JSON, .*; expected {"image": PATH'),
        (b"\xff\xfe", "line 3: not JSON, .*xff.*xfe"),
        (b"[" * 100_000, "line 3: not JSON"),
        (b"[1, 2]", "line 3: expected .* both strings; got .1, 2."),
        (b'{"image": "star/2.png", "caption": null}', "line 3: expected .* both strings; got .*None"),
        (b'{"file": "star/2.png", "caption": "x"}', "line 3: expected"),
        (b'{"image": "2.png", "caption": "x"}', "line 3: no image '2.png' under /pictures; .*'star/1.jpg"),
        (b'{"image": "\\ud800", "caption": "x"}', "line 3: no image .*ud800"),
        (b'{"image": "./star//1.jpg", "caption": "x"}', "line 3: a second caption of .* after line 1"),
        (b'{"image": "star/2.png", "caption": "' + b"x " * 513 + b'"}', "line 3: a caption of 513 words"),
    ],
)
def test_a_line_that_is_no_caption_of_an_image_is_named(tmp_path, line, message):
    path = tmp_path / "captions.jsonl"
    path.write_bytes(FIRST + b"\n" + line)
    with pytest.raises(UnusableFolder, match=message) as error:
        read_captions(path, IMAGES, ROOT)
    assert str(error.value).startswith(str(path)) and len(str(error.value)) < 500
    str(error.value).encode()  # it can be printed


def test_vocabulary_and_length_are_those_of_training_captions(tmp_path):
    path = tmp_path / "captions.jsonl"
    lines = [
        {"image": "star/2.png", "caption": "a green star on blue"},
        {"image": "star/3.jpg", "caption": ""},
    ]
    text = FIRST.decode() + "\n".join(map(json.dumps, lines))
    path.write_text(text, encoding="utf-8-sig")
    texts = read_captions(path, IMAGES, ROOT)
    assert texts == {ROOT / "star/1.jpg": "a star", ROOT / "star/2.png": "a green star on blue"}
    splits = ("train", "test", "train")
    files = [ImageFile(image.path, "star", split) for image, split in zip(IMAGES, splits, strict=True)]
    captions = Captions.create(texts, files)
    assert (captions.vocabulary, captions.shape) == (("a", "star"), (2,))
    assert [captions.array(file.path).tolist() for file in files] == [[2, 3], [2, 1], [0, 0]]
    assert captions.summary(files) == (
        "captions: of 2 of 3 images, at most 2 words long, with 2 distinct words, "
        "and 3 more in held-out captions only"
    )
    with pytest.raises(UnusableFolder, match="no training image has a caption"):
        Captions.create(texts, files[1:])


class Trap:
    """Object that makes a folder when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def npy(shape: str, data: bytes = b"\0" * 64, dtype: str = "<f4") -> bytes:
    """Return an .npy file whose header claims any shape and type."""
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}}}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


EXPECTED = r"expected a float16 or float32 array \[T, D\]"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", EXPECTED),
        (b"not an array", f"magic string is not correct.*{EXPECTED}"),
        (npy("(4, 4)")[:-1], EXPECTED),  # cut short
        (npy("(1000000000, 1000000000)"), EXPECTED),
        (npy(f"({10**30}, 1)"), EXPECTED),
        (npy("(-4, -4)"), EXPECTED),
        (npy("(0, 4)"), EXPECTED),
        (npy("(" * 2000), EXPECTED),
        (npy("(2, 2)", dtype="<f8"), rf"has float64 \[2, 2\]; {EXPECTED}"),
        (npy("(2, 2)", dtype="<c8"), rf"has complex64 \[2, 2\]; {EXPECTED}"),
        (npy("(4,)"), rf"has float32 \[4\]; {EXPECTED}.*; for one vector, save array\[None\]"),
        (npy("(1, 2, 2)"), rf"has float32 \[1, 2, 2\]; {EXPECTED}"),
        ([[1, np.nan], [0, 0]], r"has nan at \[0, 1\]; all numbers must be finite"),
        ([[1, 2], [np.inf, 0]], r"has inf at \[1, 0\]"),
        ([[1, 2], [0, 0], [3, 0]], r"has a row of zeros, \[1\], before others; zeros are padding"),
    ],
)
def test_a_file_that_is_no_embedding_is_named(tmp_path, content, message):
    path = tmp_path / "1.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, np.array(content, np.float32))
    with pytest.raises(UnusableFolder, match=f"(?s){message}") as error:
        read_embedding(path)
    assert str(error.value).startswith(str(path))


def test_nothing_in_an_embedding_is_executed(tmp_path):
    path, folder = tmp_path / "1.npy", tmp_path / "made"
    np.save(path, np.array([[Trap(folder)]], object), allow_pickle=True)
    with pytest.raises(UnusableFolder, match="Python objects"):
        read_embedding(path)
    assert not folder.exists()


def test_embeddings_of_any_length_are_padded_and_zeros_at_the_end_are_padding(tmp_path):
    (tmp_path / "star").mkdir()
    np.save(tmp_path / "star" / "1.npy", np.array([[1, 2], [3, 4], [0, 0], [0, 0]], ">f2"))
    np.save(tmp_path / "star" / "3.npy", np.array([[5, 1e-3]], np.float32))
    embeddings = find_embeddings(tmp_path, IMAGES, ROOT)
    assert embeddings.shape == (2, 2) and embeddings.dtype == np.float32
    arrays = [embeddings.array(image.path) for image in IMAGES]
    np.testing.assert_array_equal(arrays, np.float32([[[1, 2], [3, 4]], [[0, 0]] * 2, [[5, 1e-3], [0, 0]]]))
    assert embeddings.summary(IMAGES) == "embeddings: of 2 of 3 images, float32 [2, 2]"
    twins = [*IMAGES, ImageFile(ROOT / "star/1.png", "star", "")]
    with pytest.raises(UnusableFolder, match="1.npy is the embedding of 2 images, star/1.jpg, star/1.png"):
        find_embeddings(tmp_path, twins, ROOT)
    np.save(tmp_path / "star" / "2.npy", np.ones((1, 3), np.float16))
    with pytest.raises(UnusableFolder, match="2.npy has D = 3, but .*1.npy has 2; all must have the same"):
        find_embeddings(tmp_path, IMAGES, ROOT)
    with pytest.raises(UnusableFolder, match="no image has an embedding .* expected e.g. .*none/star/1.npy"):
        find_embeddings(tmp_path / "none", IMAGES, ROOT)
