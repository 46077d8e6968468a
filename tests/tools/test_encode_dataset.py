import dataclasses
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from tests.helpers.commands import command
from tests.helpers.token_cache import BATCH, CACHE_FLAGS, COMMAND, altered, content, describe, small, sources
from var_jax.data import token_writer
from var_jax.data.token_cache import CacheManifest, open_token_cache
from var_jax.data.token_writer import BatchEncoder, CacheMismatch, write_cache
from var_jax.data.transforms import ToPixels
from var_jax.images import normalize
from var_jax.interop.load import load_tokenizer
from var_jax.paths import as_path
from var_jax.tokenizer.model import encode, fingerprint
from var_jax.tools import encode_dataset


def test_tokens_are_those_of_the_crops_that_seed_image_and_crop_decide(token_cache, tiny_run, digits_dir):
    train, held_out = open_token_cache(token_cache)
    images, images_held_out = sources(digits_dir)
    transform = ToPixels("digits", 8, CACHE_FLAGS["resize"], CACHE_FLAGS["flip"], CACHE_FLAGS["shift"])
    tokenizer, params = load_tokenizer(tiny_run)
    crops = [(i, crop) for i in (0, 7, 1441) for crop in (0, 1)]
    pixels = [
        transform(images[i], np.random.default_rng((CACHE_FLAGS["seed"], i, crop))) for i, crop in crops
    ]
    centered = [transform(images_held_out[i]) for i in (0, 354)]
    assert (pixels[0]["image"] != pixels[1]["image"]).any()
    records = [train[crop * 1442 + i] for i, crop in crops] + [held_out[i] for i in (0, 354)]
    batch = np.stack([item["image"] for item in pixels + centered])
    want = encode(tokenizer, params, normalize(batch))
    np.testing.assert_array_equal(np.stack([item["tokens"] for item in records]), want)
    assert [item["label"] for item in records] == [item["label"] for item in pixels + centered]
    assert len(np.unique(want)) > 4


def test_the_command_on_one_device_writes_what_eight_do_and_goes_on(
    token_cache, tiny_run, digits_dir, tmp_path
):
    flags = [f"--{name}={value}" for name, value in CACHE_FLAGS.items()]
    flags += [
        f"--workdir={tiny_run}",
        "--data=digits",
        f"--data_dir={digits_dir}",
        f"--out={tmp_path}/tokens",
    ]
    arguments = ("-m", "var_jax.tools.encode_dataset", *flags)
    done = command(*arguments, f"--batch={BATCH}")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "1442 images in 2 crops, 355 held out, of digits" in done.stdout
    assert re.search(r"encoding: 100%.* 3239/3239 .*image/s", done.stderr)
    assert content(tmp_path / "tokens") == content(token_cache)
    note = CacheManifest.read(tmp_path / "tokens")
    assert note.complete and note.command.endswith(f"--out={tmp_path}/tokens --batch=64")
    (tmp_path / "tokens" / "train-00002-of-00005.array_record").unlink()
    done = command(*arguments, "--crops=3")
    assert done.returncode != 0 and "holds something else already" in done.stderr
    assert "crops: 2 there, 3 now" in done.stderr and "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def encoder(tiny_run):
    return BatchEncoder(*load_tokenizer(tiny_run), BATCH)


class Killed(BaseException):
    """Raised in place of the signal."""


def test_killed_and_resumed_equals_unbroken(token_cache, encoder, tiny_run, digits_dir, tmp_path):
    out, calls = tmp_path / "tokens", []

    def encode_until_killed(images):
        calls.append(len(images))
        if len(calls) == 25:
            raise Killed
        return encoder(images)

    encode_until_killed.image_size, encode_until_killed.batch = encoder.image_size, encoder.batch
    arguments = (out, describe(tiny_run), sources(digits_dir))
    with pytest.raises(Killed):
        write_cache(*arguments, encode_until_killed, 2, COMMAND)
    assert sorted(path.name for path in out.iterdir()) == [
        "description.json",
        "train-00000-of-00005.array_record",
        "train-00001-of-00005.array_record",
    ]
    assert not CacheManifest.read(out).complete
    (out / "train-00002-of-00005.partial").write_bytes(b"cut short")
    num_calls = len(calls)
    write_cache(*arguments, encode_until_killed, 2, COMMAND)
    assert sum(calls[num_calls:]) == 3239 - 1200  # finished files are not encoded again
    assert content(out) == content(token_cache)
    num_calls = len(calls)
    write_cache(*arguments, encode_until_killed, 2, COMMAND)
    assert len(calls) == num_calls


def test_a_directory_of_something_else_is_left_alone(token_cache, encoder, tiny_run, digits_dir, tmp_path):
    other = altered(token_cache, tmp_path / "other", crops=1, seed=9)
    before = content(other)
    with pytest.raises(
        ValueError, match=r"(?s)other holds something else.*crops: 1 there, 2 now.*seed: 9 there"
    ):
        write_cache(other, describe(tiny_run), sources(digits_dir), encoder, 2, COMMAND)
    assert content(other) == before
    (other / "description.json").unlink()
    with pytest.raises(
        ValueError, match="holds something else already.*\n.*eval-00000-of-00001.array_record"
    ):
        write_cache(other, describe(tiny_run), sources(digits_dir), encoder, 2, COMMAND)


def test_no_room_is_said_before_anything_is_encoded(encoder, tiny_run, digits_dir, tmp_path, monkeypatch):
    full = shutil.disk_usage(tmp_path)._replace(free=2**16)
    monkeypatch.setattr(token_writer.shutil, "disk_usage", lambda _: full)
    with pytest.raises(OSError, match="has 0.00 GiB free, the tokens take"):
        write_cache(tmp_path, describe(tiny_run), sources(digits_dir), encoder, 2, COMMAND)
    assert not list(tmp_path.glob("*.array_record"))


def test_a_disk_that_fills_up_says_to_go_on(tmp_path):
    (tmp_path / "x.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"x.array_record could not be written.*(?s:.)*the same command again"):
        token_writer.write_records(tmp_path / "x.array_record", np.zeros(3, [("label", "<i4")]))


def test_a_batch_that_the_devices_cannot_share_is_refused(tiny_run):
    with pytest.raises(ValueError, match="--batch=12 must be a multiple of 8, the number of devices"):
        BatchEncoder(*load_tokenizer(tiny_run), 12)


def test_the_fingerprint_sees_every_parameter_and_its_name(tiny_tokenizer):
    params = tiny_tokenizer[1]
    before = fingerprint(params)
    assert fingerprint({name: params[name] for name in reversed(params)}) == before
    kernel = params["quant_conv"]["kernel"]
    moved = {**params["quant_conv"], "kernel": kernel.at[0, 0, 0, 0].add(1e-3)}
    assert fingerprint({**params, "quant_conv": moved}) != before
    swapped = {**params, "quant_conv": params["post_quant_conv"], "post_quant_conv": params["quant_conv"]}
    assert fingerprint(swapped) != before


def test_the_command_explains_another_cache_but_hides_no_defect_of_the_encoding(
    digits_dir, tiny_tokenizer, tmp_path, monkeypatch
):
    spec, parts, encode = small(digits_dir, tiny_tokenizer)

    def defect(images):
        raise ValueError("operands could not be broadcast together")

    defect.image_size, defect.batch = encode.image_size, encode.batch
    monkeypatch.setattr(encode_dataset, "FLAGS", SimpleNamespace(threads=2))
    for cache_spec, error, message in (
        (spec, ValueError, "operands could not be broadcast"),
        (dataclasses.replace(spec, seed=9), CacheMismatch, "holds something else already"),
    ):
        monkeypatch.setattr(
            encode_dataset, "from_flags", lambda spec=cache_spec: (as_path(tmp_path), spec, parts, defect)
        )
        with pytest.raises(error, match=message):
            encode_dataset.main([])
