import dataclasses
import json
import pickle

import numpy as np
import pytest

from tests.helpers.token_cache import COMMAND, altered, describe, small
from var_jax.data import token_cache as token_cache_module
from var_jax.data.loader import eval_batches, train_batches
from var_jax.data.sources import DataSetMissing
from var_jax.data.token_cache import CacheManifest, open_token_cache
from var_jax.data.token_writer import CacheMismatch, write_cache
from var_jax.paths import as_path


def test_a_cache_reads_as_a_source(token_cache):
    train, held_out = open_token_cache(token_cache)
    counts = [(split.num_records, split.num_images) for split in (train, held_out)]
    assert counts == [(2884, 1442), (355, 355)]
    assert (train.name, held_out.name, train.num_classes) == ("digits/train", "digits/test", 10)
    item = train[2883]
    assert item["tokens"].shape == (21,) and item["tokens"].dtype == np.int32 and item["valid"] == 1
    assert train[1441]["label"] == item["label"] and item["label"].dtype == np.int32
    padded = held_out.pad_to_multiple(64)
    assert len(padded) == 384 and padded[355]["valid"] == 0 and padded.num_images == 355
    np.testing.assert_array_equal(padded[383]["tokens"], held_out[354]["tokens"])
    unpickled = pickle.loads(pickle.dumps(train))  # as in grain's worker processes
    np.testing.assert_array_equal(unpickled[700]["tokens"], train[700]["tokens"])


def test_files_and_layout_follow_the_description(tiny_run, tmp_path):
    holds = describe(tiny_run)
    assert [len(records) for records in holds.shards(tmp_path, "train").values()] == [600] * 4 + [484]
    assert list(holds.shards(tmp_path, "eval").values()) == [range(355)]
    assert holds.layout.itemsize == 4 + 21 * 2
    assert describe(tiny_run, num_codes=2**16).layout["tokens"].subdtype[0] == np.uint16
    assert describe(tiny_run, num_codes=2**16 + 1).layout["tokens"].subdtype[0] == np.int32


def test_batches_hold_every_crop_once_before_they_repeat_and_every_held_out_image(token_cache):
    train, held_out = open_token_cache(token_cache)
    batches = train_batches(train, None, 1442, seed=0)
    first = [next(batches) for _ in range(2)]
    assert set(first[0]) == {"tokens", "label", "valid"} and first[0]["tokens"].shape == (1442, 21)
    rows = lambda items: sorted(item.tobytes() for item in items)
    tokens = np.concatenate([batch["tokens"] for batch in first])
    assert rows(tokens) == rows([train[i]["tokens"] for i in range(len(train))])
    batches = list(eval_batches(held_out, None, 100))
    valid = np.concatenate([batch["valid"] for batch in batches]) > 0
    tokens = np.concatenate([batch["tokens"] for batch in batches])[valid]
    np.testing.assert_array_equal(tokens, np.stack([held_out[i]["tokens"] for i in range(355)]))


def test_an_incomplete_cache_is_rejected_with_the_command_that_finishes_it(token_cache, tmp_path):
    unfinished = altered(token_cache, tmp_path / "begun", complete=False)
    with pytest.raises(DataSetMissing, match=rf"begun .*is not complete.  To finish it:\n  {COMMAND}"):
        open_token_cache(unfinished)
    damaged = altered(token_cache, tmp_path / "torn")
    (damaged / "train-00003-of-00005.array_record").unlink()
    with pytest.raises(DataSetMissing, match=rf"it lacks 1 files, e.g. train-00003-of(.|\n)*{COMMAND}"):
        open_token_cache(damaged)
    with pytest.raises(
        DataSetMissing, match=r"no token cache at .*none(.|\n)*var_jax.tools.encode_dataset --workdir"
    ):
        open_token_cache(tmp_path / "none")


def test_files_that_do_not_match_the_description_are_rejected(token_cache, tmp_path):
    short = altered(token_cache, tmp_path / "short", eval_images=350)
    with pytest.raises(
        ValueError, match="has 355 records in 1 files like eval-.*but description.json says 350"
    ):
        open_token_cache(short)
    (short / "description.json").write_text(json.dumps({"holds": {"crops": 1}, "command": ""}))
    with pytest.raises(ValueError, match="description.json describes no token cache"):
        CacheManifest.read(short)


def test_a_cache_of_older_crops_is_read_with_a_warning_but_not_continued(
    digits_dir, tiny_tokenizer, tmp_path, monkeypatch
):
    warnings = []
    monkeypatch.setattr(
        token_cache_module.logging, "warning", lambda text, *args: warnings.append(text % args)
    )
    description, parts, encode = small(digits_dir, tiny_tokenizer)
    write_cache(as_path(tmp_path), description, parts, encode, 2, COMMAND)
    tokens = [source[39]["tokens"] for source in open_token_cache(tmp_path)]
    assert not warnings
    manifest = json.loads((tmp_path / "description.json").read_text())
    del manifest["holds"]["transform"]  # as written before the field existed
    (tmp_path / "description.json").write_text(json.dumps(manifest))
    older = open_token_cache(tmp_path)
    np.testing.assert_array_equal([source[39]["tokens"] for source in older], tokens)
    assert len(warnings) == 1 and "holds crops of transform version 0" in warnings[0]
    assert not older[0].description.transform  # 0 means absent: runs on this cache resume
    with pytest.raises(CacheMismatch, match="transform: 0 there, 1 now"):
        write_cache(as_path(tmp_path), description, parts, encode, 2, COMMAND)


@pytest.mark.parametrize(
    ("kind", "dtype", "stored"), [("caption", "int32", 4 * 3), ("embedding", "float16", 2 * 3 * 5)]
)
def test_captions_and_embeddings_are_read_as_those_of_the_data_set(
    digits_dir, tiny_tokenizer, tmp_path, kind, dtype, stored
):
    spec, parts, encode = small(digits_dir, tiny_tokenizer)
    shape, vocabulary = ((3,), ("a", "star")) if kind == "caption" else ((3, 5), ())
    values = np.random.default_rng(0).integers(0, 4, (40, *shape)).astype(dtype)
    fields = dict(condition_shape=shape, condition_dtype=dtype, vocabulary=vocabulary)
    records = [
        [record | {kind: value} for record, value in zip(p.records, values, strict=True)] for p in parts
    ]
    sources = [dataclasses.replace(p, records=r, **fields) for p, r in zip(parts, records, strict=True)]
    captioned = dataclasses.replace(spec, **fields)
    write_cache(as_path(tmp_path), captioned, sources, encode, 2, COMMAND)
    assert captioned.layout.itemsize == spec.layout.itemsize + stored
    train, held_out = open_token_cache(tmp_path, condition=kind)
    assert train.condition == kind and train.condition_fields() == sources[0].condition_fields()
    for source in (train, held_out):
        batch = source.batch([39, 0])
        assert batch["condition"].dtype == (np.int32 if kind == "caption" else np.float32)
        np.testing.assert_array_equal(batch["condition"], values[[39, 0]])
    np.testing.assert_array_equal(train[40 + 7]["condition"], values[7])  # of the second crop
    labels = open_token_cache(tmp_path)[0]
    assert labels.condition == "label" and set(labels[0]) == {"tokens", "label", "valid"}
    other = {"caption": "embedding", "embedding": "caption"}[kind]
    with pytest.raises(ValueError, match=f"has no {other}s, .* encode again with --condition={other} into"):
        open_token_cache(tmp_path, condition=other)


def test_caches_without_conditions_are_those_of_before(digits_dir, tiny_tokenizer, tmp_path):
    spec = small(digits_dir, tiny_tokenizer)[0]
    CacheManifest(spec, COMMAND, complete=True).write(as_path(tmp_path))
    manifest = json.loads((tmp_path / "description.json").read_text())
    new = [manifest["holds"].pop(name) for name in ("condition_shape", "condition_dtype", "vocabulary")]
    assert not any(new)  # a missing field counts as off: runs on older caches resume
    (tmp_path / "description.json").write_text(json.dumps(manifest))  # as written before the fields existed
    assert CacheManifest.read(as_path(tmp_path)).holds == spec and spec.layout.names == ("label", "tokens")
