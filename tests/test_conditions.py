import numpy as np
import pytest

from var_jax.conditions import PADDING, UNKNOWN, encode_caption, encode_prompt, make_vocabulary, split_words

VOCABULARY = ("a", "blue", "don't", "on", "red", "star")


def test_words_are_lower_case_runs_of_letters_digits_and_apostrophes():
    assert split_words("A RED star, on_blue (No. 7)!\tDon\u2019t\n") == (
        "a", "red", "star", "on", "blue", "no", "7", "don't",
    )  # fmt: skip
    assert split_words("Straße e\u0301te\u0301 звезда") == ("straße", "été", "звезда")  # composed
    assert split_words(" _-—…\ud800 ") == ()


def test_a_vocabulary_has_each_word_once_in_order():
    assert make_vocabulary(["a red star on blue", "Don't: a RED, red star"]) == VOCABULARY
    assert make_vocabulary([]) == ()


def test_word_ids_begin_after_padding_and_unknown_and_are_cut_to_the_length():
    ids = encode_caption("A green star, on blue", VOCABULARY, 7)
    assert ids.dtype == np.int32 and ids.tolist() == [2, UNKNOWN, 7, 5, 3, PADDING, PADDING]
    assert encode_caption("a zebra red star", VOCABULARY, 3).tolist() == [2, UNKNOWN, 6]
    assert encode_caption("", VOCABULARY, 2).tolist() == [PADDING, PADDING]


def test_a_prompt_is_checked_before_it_is_encoded():
    ids = encode_prompt("Red star on blue", VOCABULARY, 5)
    np.testing.assert_array_equal(ids, encode_caption("red star on blue", VOCABULARY, 5))
    with pytest.raises(ValueError, match=r"'a rad star' has the word 'rad'.*known are a, blue, don't, "):
        encode_prompt("a rad star", VOCABULARY, 5)
    many = tuple(sorted((*VOCABULARY, *(f"word{i}" for i in range(40)))))
    with pytest.raises(ValueError, match=r"has the word 'rad'.*known are the nearest red, "):
        encode_prompt("a rad star", many, 5)
    with pytest.raises(ValueError, match=r"'\?!' has no words; known words are a, blue, don't"):
        encode_prompt("?!", VOCABULARY, 5)
    with pytest.raises(ValueError, match="has 4 words, but the longest .* has 3: shorten it"):
        encode_prompt("a red star on", VOCABULARY, 3)
