"""Conditions: what an image is drawn from.  Kinds, and captions as word ids.

A condition is an array with a leading batch axis:

  label      int32 [B]            class of the image; the number of classes means "no condition"
  caption    int32 [B, T]         word ids of the caption
  embedding  float32 [B, T, D]    vectors computed elsewhere, e.g. by CLIP or T5

A row of zeros (id 0, or a zero vector) is padding, and all padding means "no condition".
"""

import bisect
import difflib
import re
import unicodedata
from collections.abc import Iterable, Sequence

import numpy as np

KINDS = ("label", "caption", "embedding")
PADDING = 0  # word id
SHOWN = 40  # words in an error message, at most
UNKNOWN = 1  # word id; 2 + i is word i of the vocabulary
_WORD = re.compile(r"(?:[^\W_]|')+")


def split_words(caption: str) -> tuple[str, ...]:
    """Split a caption into lower-case words: maximal runs of letters, digits and apostrophes."""
    text = unicodedata.normalize("NFC", caption.lower()).replace("\u2019", "'")  # the curly apostrophe
    return tuple(_WORD.findall(text))


def make_vocabulary(captions: Iterable[str]) -> tuple[str, ...]:
    """Return the distinct words of captions, sorted."""
    return tuple(sorted({word for caption in captions for word in split_words(caption)}))


def encode_caption(caption: str, vocabulary: Sequence[str], length: int) -> np.ndarray:
    """Return the word ids of a caption, padded or cut: int32 [length].

    Args:
      caption: any text; words that are not in the vocabulary become `UNKNOWN`.
      vocabulary: sorted words, as `make_vocabulary` returns them.
      length: T.
    """
    ids = np.full(length, PADDING, np.int32)
    for i, word in enumerate(split_words(caption)[:length]):
        place = bisect.bisect_left(vocabulary, word)
        ids[i] = 2 + place if place < len(vocabulary) and vocabulary[place] == word else UNKNOWN
    return ids


def decode_caption(ids: Sequence[int], vocabulary: Sequence[str]) -> str:
    """Return the words of a caption, with "?" for an unknown one."""
    return " ".join("?" if i == UNKNOWN else vocabulary[i - 2] for i in ids if i != PADDING)


def encode_prompt(prompt: str, vocabulary: Sequence[str], length: int) -> np.ndarray:
    """Return the word ids of a prompt of a user, as `encode_caption` does, after checking it.

    Raises:
      ValueError: if it has no words, too many of them, or one that no caption has had.
    """
    words = split_words(prompt)
    if not words:
        raise ValueError(f"the prompt {prompt!r} has no words; known words are {_listing(vocabulary)}")
    for word in words:
        if word not in vocabulary:
            nearest = difflib.get_close_matches(word, vocabulary, cutoff=0)
            are_few = len(vocabulary) <= SHOWN
            known = _listing(vocabulary) if are_few else f"the nearest {_listing(nearest)}"
            raise ValueError(
                f"the prompt {prompt!r} has the word {word!r}, which no caption of the training images has; "
                f"known are {known}"
            )
    if len(words) > length:
        raise ValueError(
            f"the prompt {prompt!r} has {len(words)} words, but the longest caption of the training "
            f"images has {length}: shorten it"
        )
    return encode_caption(prompt, vocabulary, length)


def _listing(words: Sequence[str]) -> str:
    return ", ".join([*words[:SHOWN], *["..."] * (len(words) > SHOWN)])
