"""Tells one tokenizer from another."""

import zlib

import numpy as np
from flax.traverse_util import flatten_dict


def fingerprint(params: dict) -> str:
    """CRC-32 of the paths and the values of all parameters, as 8 hexadecimal digits.

    Args:
      params: of a tokenizer, as they were trained or loaded (not cast to the compute dtype).
    """
    crc = 0
    for path, value in sorted(flatten_dict(params, sep="/").items()):
        crc = zlib.crc32(path.encode(), crc)
        crc = zlib.crc32(np.asarray(value).tobytes(), crc)
    return f"{crc:08x}"
