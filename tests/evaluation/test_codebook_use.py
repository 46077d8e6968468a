import numpy as np
import pytest

from var_jax.evaluation.codebook_use import codebook_use


def test_perplexity_distinct_and_the_most_possible():
    counts = np.array([[4, 4, 0, 0], [8, 8, 8, 8]], float)
    use = codebook_use(counts, (1, 2), num_images=8)
    assert use["perplexity_0"] == pytest.approx(2) and use["distinct_0"] == 2 and use["most_0"] == 4
    assert use["perplexity_1"] == pytest.approx(4) and use["distinct_1"] == 4
    shares = np.array([12, 12, 8, 8]) / 40
    assert use["perplexity"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))


def test_few_images_cannot_use_many_codes():
    use = codebook_use(np.zeros((2, 100)), (1, 2), num_images=3)
    assert (use["most_0"], use["most_1"], use["most"]) == (3, 12, 15)
