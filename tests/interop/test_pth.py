"""Read weight files: every format that PyTorch wrote, and malicious files."""

import collections
import io
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.helpers import pickles
from tests.helpers.pickles import PROTOCOL, STOP, dict_of, global_, number, storage, tensor, text, write_zip
from var_jax.interop.pth import read_pth
from var_jax.interop.tensor_files import read_networks, read_tensors, release

DATA = Path(__file__).parent / "data"


def flat(value, path: str = "") -> dict[str, np.ndarray]:
    """Return the arrays in nested containers by path."""
    if isinstance(value, np.ndarray):
        return {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return {k: v for key, child in items for k, v in flat(child, f"{path}/{key}".lstrip("/")).items()}


# --- files that PyTorch wrote


@pytest.mark.parametrize("name", ["legacy", "legacy_python2", "zip"])
def test_every_format_reads_exactly_equal(name, golden_arrays_folder):
    content = read_pth(golden_arrays_folder / f"{name}.pth")
    with np.load(golden_arrays_folder / "legacy_expected.npz") as file:
        expected = dict(file)
    objects = json.loads(str(expected.pop("objects")))
    arrays = flat(content)
    assert arrays.keys() == expected.keys()
    for path, array in arrays.items():
        golden = expected[path]
        is_bfloat16 = array.dtype == ml_dtypes.bfloat16
        assert array.shape == golden.shape and (array.dtype == golden.dtype or is_bfloat16), path
        np.testing.assert_array_equal(array.astype(golden.dtype), golden, err_msg=path)
        assert not array.flags.writeable or array.size == 0
    assert json.loads(json.dumps({key: content[key] for key in objects})) == objects
    assert type(content["state_dict"]) is collections.OrderedDict


@pytest.mark.parametrize("name", ["trainer", "trainer_legacy"])
def test_a_checkpoint_of_the_published_trainer_reads_as_pytorch_wrote_it(name):
    """The files are made by data/make_trainer.py: both networks, AdamW and its gradient scaler."""
    content = read_pth(DATA / f"{name}.pth")
    trainer, optimizer = content["trainer"], content["trainer"]["var_opt"]["optimizer"]
    assert (
        content["epoch"] == 3
        and content["args"]["patch_nums"] == (1, 2, 4)
        and content["args"]["twde"] is None
    )
    assert trainer["var_opt"]["scaler"]["scale"] == 2048.0
    assert [len(group["params"]) for group in optimizer["param_groups"]] == [13, 9]
    assert optimizer["param_groups"][0]["betas"] == (0.9, 0.95)
    # The n-th number of a network is n / 64, and the gradient of its square is positive.
    weight = trainer["var_wo_ddp"]["blocks.0.attn.mat_qkv.weight"]
    first = trainer["var_wo_ddp"]["blocks.0.attn.scale_mul_1H11"].item() + 1 / 64
    np.testing.assert_array_equal(weight, first + np.arange(48, dtype=np.float32).reshape(12, 4) / 64)
    state = optimizer["state"][8]
    assert state["step"] == 1 and state["exp_avg"].shape == (12, 4)
    np.testing.assert_allclose(state["exp_avg"], 0.1 * 2 * weight.astype(np.float16), rtol=1e-3)
    networks = read_networks(DATA / f"{name}.pth")
    assert {kind: len(tensors) for kind, tensors in networks.items()} == {"tokenizer": 3, "next_scale": 25}


def test_a_file_written_by_pytorch_reads_as_views_of_the_file(goldens):
    tensors = read_pth(goldens / "var.pth")
    assert isinstance(tensors, collections.OrderedDict)
    assert tensors["lvl_1L"].dtype == np.int64 and tensors["lvl_1L"].shape == (1, 30)
    weight = tensors["blocks.0.attn.mat_qkv.weight"]
    assert weight.shape == (576, 192) and not weight.flags.writeable and not weight.flags.owndata
    with zipfile.ZipFile(goldens / "var.pth") as archive:
        assert any(archive.read(member) == weight.tobytes() for member in archive.infolist())


def resident(array: np.ndarray) -> int:
    """Return the resident bytes of the memory mapping of an array."""
    address = array.ctypes.data
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(match[1], 16) <= address < int(match[2], 16)
        elif inside and line.startswith("Rss:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("not mapped")


def test_released_memory_of_a_tensor_is_freed_and_read_again(tmp_path):
    big, small = np.arange(1 << 20, dtype=np.float32), np.arange(5, dtype=np.float32)
    tensors = read_pth(pickles.save(tmp_path / "x.pth", {"small": small, "big": big, "last": small}))
    np.testing.assert_array_equal(tensors["big"], big)
    assert resident(tensors["big"]) >= big.nbytes
    release(tensors["big"])
    assert resident(tensors["big"]) < 1 << 19
    np.testing.assert_array_equal(tensors["big"], big)
    release(tensors["big"][5:100:3]), release(np.zeros(0)), release(np.zeros(3))
    np.testing.assert_array_equal(tensors["last"], small)


def test_thousands_of_storages_take_one_open_file(tmp_path):
    """A trainer checkpoint has 1150 storages at d16; processes may open 1024 files by default."""
    tensors = {f"t{i}": np.full(3, i, np.float32) for i in range(2000)}
    pickles.save(tmp_path / "many.pth", tensors)
    save_file(tensors, tmp_path / "many.safetensors")
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))\n"
        "from var_jax.interop.tensor_files import read_networks\n"
        "for path in sys.argv[1:]:\n"
        "    tensors = read_networks(path)[None]\n"
        "    assert len(tensors) == 2000 and all(tensors[f't{i}'][0] == i for i in range(2000)), path\n"
    )
    files = [str(tmp_path / f"many.{suffix}") for suffix in ("pth", "safetensors")]
    done = subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


# --- files that name other globals than those of tensors


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("builtins", "eval"),
        ("torch", "load"),
        ("numpy", "fromfile"),
        ("torch._utils", "_rebuild"),
        ("collections", "OrderedDict.__class__"),
    ],
)
def test_any_other_global_is_rejected_before_anything_runs(tmp_path, module, name):
    by_line = global_(module, name)
    by_stack = b"".join(b"\x8c" + bytes([len(part)]) + part.encode() for part in (module, name)) + b"\x93"
    for function in (by_line, by_stack):
        path = write_zip(tmp_path / "evil.pth", PROTOCOL + pickles.call(function, text("x")) + STOP)
        with pytest.raises(
            ValueError, match=f"evil.pth .*asks for {re.escape(f'{module}.{name}')}, which is not"
        ):
            read_pth(path)


@pytest.mark.parametrize(
    ("opcodes", "instruction"),
    [
        (b"(ios\nsystem\n", "INST"),
        (b"(cos\nsystem\nX\x01\x00\x00\x00xo", "asks for os.system"),
        (global_("collections", "OrderedDict") + b")\x81", "NEWOBJ"),
        (b"\x82\x01", "EXT1"),
        (b"Pstorage\n", "PERSID"),
        (b"I1\n", "INT"),
        (b"\x80\x01N", "protocol 1; torch.save writes 2 to 5"),
    ],
)
def test_instructions_that_torch_save_does_not_write_are_rejected_by_name(tmp_path, opcodes, instruction):
    with pytest.raises(ValueError, match=f"evil.pth .*{instruction}"):
        read_pth(write_zip(tmp_path / "evil.pth", PROTOCOL + opcodes + STOP))


def test_a_file_cannot_change_a_dtype(tmp_path):
    """BUILD on the dtype of a storage used to set the size of bfloat16 for the whole process."""
    state = pickles.tuple_of(number(3), text("<"), b"N", b"N", b"N", number(64), number(8), number(0))
    for target in ("BFloat16Storage", "bfloat16", "FloatStorage"):
        evil = PROTOCOL + global_("torch", target) + state + b"b" + STOP
        with pytest.raises(ValueError, match="a pickle that fills a ElementType"):
            read_pth(write_zip(tmp_path / "evil.pth", evil))
    for target in (global_("collections", "OrderedDict"), storage("0", 1), b"]", text("x"), b"}"):
        evil = write_zip(tmp_path / "evil.pth", PROTOCOL + target + state + b"b" + STOP, {"0": b"1234"})
        with pytest.raises(ValueError, match="evil.pth cannot be read: a pickle that fills a"):
            read_pth(evil)
    assert np.dtype(ml_dtypes.bfloat16).itemsize == 2 and jnp.ones(3, jnp.bfloat16).sum() == 3


def test_globals_named_in_a_file_are_read_as_inert_tokens(tmp_path):
    content = read_pth(
        write_zip(
            tmp_path / "x.pth",
            PROTOCOL
            + dict_of(
                {
                    "dtype": global_("torch", "float32"),
                    "function": global_("torch._utils", "_rebuild_tensor_v2"),
                    "device": pickles.call(global_("torch", "device"), text("cuda"), number(1)),
                    "size": pickles.call(global_("torch", "Size"), pickles.tuple_of(number(2), number(3))),
                }
            )
            + STOP,
        )
    )
    assert content["device"] == "cuda:1" and content["size"] == (2, 3)
    for token in (content["dtype"], content["function"]):
        assert not callable(token) and type(token).__module__ == "var_jax.interop.torch_globals"
        with pytest.raises(AttributeError):
            token.name = "float64"


# --- tensors outside of their storage


@pytest.mark.parametrize(
    ("offset", "sizes", "strides", "message"),
    [
        (0, (5,), (1,), "outside its storage"),
        (3, (2,), (1,), "outside its storage"),
        (0, (2, 2), (3, 1), "outside its storage"),
        (0, (2000,), (0,), "outside its storage '0' of 4 elements, or repeats them"),
        (0, (3, 3), (0, 1), "or repeats them"),
        (-1, (2,), (1,), "no count"),
        (3, (2,), (-1,), "no count"),
        (0, (-1,), (1,), "no count"),
        (0, (1 << 62,), (1,), "no count"),
        (0, (2, 2), (1,), "without shape and strides"),
        (0, (1,) * 40, (1,) * 40, "40 dimensions; at most 16"),
        (0, (0, 1 << 40), (1, 1), "an empty tensor"),
        (0, (2, True), (1, 1), None),
    ],
)
def test_tensors_that_reach_outside_their_storage_are_rejected(tmp_path, offset, sizes, strides, message):
    if message is None:  # True instead of a number
        shape = pickles.tuple_of(number(2), b"\x88"), pickles.tuple_of(number(1), number(1))
        parts = (storage("0", 4), number(0), *shape, b"\x89", pickles.ORDERED_DICT)
        evil, message = pickles.call(global_("torch._utils", "_rebuild_tensor_v2"), *parts), "no count"
    else:
        evil = tensor(storage("0", 4), offset, sizes, strides)
    path = write_zip(tmp_path / "evil.pth", PROTOCOL + dict_of({"x": evil}) + STOP, {"0": bytes(16)})
    with pytest.raises(ValueError, match=f"evil.pth .*{message}"):
        read_pth(path)


def test_a_tensor_is_no_storage(tmp_path):
    """A view with stride 0 claimed any number of elements, and a view of that view read them."""
    evil = tensor(tensor(storage("0", 1), 0, (10**8,), (0,)), 0, (2000,), (1,))
    path = write_zip(tmp_path / "evil.pth", PROTOCOL + dict_of({"x": evil}) + STOP, {"0": bytes(4)})
    with pytest.raises(ValueError, match="evil.pth .*other arguments than torch.save writes"):
        read_pth(path)


def test_members_that_are_too_short_or_missing_are_rejected(goldens, tmp_path):
    path = tmp_path / "short.pth"
    with zipfile.ZipFile(goldens / "var.pth") as good, zipfile.ZipFile(path, "w") as bad:
        for info in good.infolist():
            data = good.read(info)
            bad.writestr(info.filename, data[:16] if info.filename.endswith("data/4") else data)
    with pytest.raises(ValueError, match="short.pth .*does not hold"):
        read_pth(path)
    evil = PROTOCOL + dict_of({"x": tensor(storage("7", 1), 0, (1,), (1,))}) + STOP
    with pytest.raises(ValueError, match="evil.pth .*'archive/data/7' is missing"):
        read_pth(write_zip(tmp_path / "evil.pth", evil))


# --- small files that would take much memory or time


def rejection(path: Path, max_bytes: int = 1 << 24) -> str:
    """Return the error message for a file; reading it must take little memory."""
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=path.name) as error:
            read_pth(path)
        assert tracemalloc.get_traced_memory()[1] < max_bytes
    finally:
        tracemalloc.stop()
    return str(error.value)


def test_the_memo_is_not_larger_than_the_number_of_stored_values(tmp_path):
    evil = PROTOCOL + b"Nr" + struct.pack("<I", 1 << 30) + b"j" + struct.pack("<I", (1 << 30) - 1) + STOP
    assert "recalls value" in rejection(write_zip(tmp_path / "evil.pth", evil))


@pytest.mark.parametrize(
    ("evil", "message"),
    [
        (b"X\xff\xff\xff\x7f", "a text of 2147483647 bytes"),
        (b"T\xff\xff\xff\xff", "cut short"),
        (b"(" * 100, "open marks"),
        (b"N" * 300_000, "values on its stack"),
        (b"]" + b"N0" * 10, "POP"),
        (b"]" + b"Na" * 265_000, "more than .* instructions"),
        (b"]q\x00h\x00a", "a container that holds itself"),
        (b"]q\x00]h\x00aq\x01h\x00h\x01a", "a container that holds itself"),
        (b"]" * 100 + b"a" * 99, "nested more than 32 deep"),
        (b")" + b"\x85" * 20_000, "nested more than 32 deep"),
        (b"})Ns", "a dict key that is a tuple"),
        (b"}" + number(1 << 61) + b"Ns", "a dict key that is a int"),
        (b"]((NNNe", "fills a|lacks a mark|empty stack"),
        (b"R", "empty stack"),
    ],
)
def test_programs_that_grow_or_are_cyclic_are_rejected(tmp_path, evil, message):
    error = rejection(write_zip(tmp_path / "evil.pth", PROTOCOL + evil + STOP), 1 << 26)
    assert re.search(message, error), error


def test_a_call_cannot_copy_one_list_many_times(tmp_path):
    """The file has a list of 5,000 pairs, and makes a dict of it for every eight bytes."""
    pairs = b"](" + b"".join(b"](X\x01\x00\x00\x00aNe" for _ in range(5_000)) + b"eq\x00"
    evil = pairs + global_("collections", "OrderedDict") + b"q\x01" + b"h\x01h\x00\x85R" * 1000
    assert "instructions" in rejection(write_zip(tmp_path / "evil.pth", PROTOCOL + evil + STOP), 1 << 26)


def test_a_call_cannot_copy_one_text_many_times(tmp_path):
    """The file has a name of 16,000 wide characters, and a device of it (64 kB) for every eight bytes."""
    name = b"X\x00\xfa\x00\x00" + "\U0001f600".encode() * 16_000 + b"q\x00"
    evil = b"(" + name + global_("torch", "device") + b"q\x01" + b"h\x01h\x00K\x01\x86R" * 3000 + b"t"
    assert "device with other arguments" in rejection(
        write_zip(tmp_path / "evil.pth", PROTOCOL + evil + STOP)
    )


@pytest.mark.parametrize("name", ["quantize.ema_vocab_hit_SV", "class_emb.weight"])
def test_a_tensor_without_elements_and_with_a_huge_size_is_rejected(tmp_path, name):
    empty = dict_of({name: tensor(storage("0", 0), 0, (1 << 32, 0), (0, 1))})
    path = write_zip(tmp_path / "evil.pth", PROTOCOL + empty + STOP, {"0": b""})
    assert "an empty tensor of shape" in rejection(path)


def test_tensors_of_many_times_the_bytes_of_the_file_are_rejected(tmp_path):
    """A hundred tensors share one storage of a megabyte: copied, they would take a hundred megabytes."""
    view = tensor(storage("0", 1 << 18), 0, (1 << 18,), (1,))
    tensors = dict_of({f"x{i}": view for i in range(100)})
    path = write_zip(tmp_path / "evil.pth", PROTOCOL + tensors + STOP, {"0": bytes(1 << 20)})
    assert "more than 8 times as many bytes as the file" in rejection(path)


def test_compressed_archives_are_rejected_and_not_inflated(tmp_path):
    pickled = PROTOCOL + b"]" + b"N0" * 5_000_000 + STOP
    path = write_zip(tmp_path / "bomb.pth", pickled, compression=zipfile.ZIP_DEFLATED)
    error = rejection(path)
    assert "compressed" in error and "torch.save(torch.load(old, weights_only=True), new)" in error


# --- ambiguous archives


def replace_bytes(path: Path, old: bytes, new: bytes, count: int = 1) -> None:
    data = path.read_bytes()
    assert old in data and len(old) == len(new)
    path.write_bytes(data.replace(old, new, count))


def test_archives_that_other_tools_would_read_differently_are_rejected(tmp_path):
    good = PROTOCOL + dict_of({"x": tensor(storage("0", 4), 0, (4,), (1,))}) + STOP
    path = tmp_path / "evil.pth"
    write_zip(path, good, {"0": bytes(16), "1": bytes(16)})
    assert read_pth(path)["x"].shape == (4,)
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/data.pkl", good)
    assert "is there twice" in rejection(path)
    write_zip(path, good, {"0": bytes(16), "1": bytes(16)})
    replace_bytes(path, b"archive/data/1", b"archive/data/9")  # the local header, not the directory
    assert "is not where the central directory says" in rejection(path)
    write_zip(path, good, {"0": bytes(16), "1": bytes(16)})
    data = path.read_bytes()
    entry = data.rindex(b"archive/data/1") - 46  # its sizes are enlarged, to overlap the central directory
    path.write_bytes(data[: entry + 20] + struct.pack("<2I", 500, 500) + data[entry + 28 :])
    assert "overlap" in rejection(path)
    path.write_bytes(data + b"x")
    assert "bytes follow the end" in rejection(path)


def test_zip64_archives_are_read(tmp_path, monkeypatch):
    value = {"x": np.arange(4, dtype=np.float32)}
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 10)  # larger sizes and offsets are in the extra fields
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 1)
    path = pickles.save(tmp_path / "x.pth", value)
    assert b"PK\x06\x06" in path.read_bytes()
    np.testing.assert_array_equal(read_pth(path)["x"], value["x"])


# --- files of other formats


@pytest.mark.parametrize("cut", [0, 1, 100, -100])
def test_damaged_files_are_named(goldens, tmp_path, cut):
    path = tmp_path / "cut.pth"
    path.write_bytes((goldens / "vae.pth").read_bytes()[:cut])
    with pytest.raises(ValueError, match="cut.pth cannot be read: not a zip archive, or cut short"):
        read_pth(path)
    path.write_bytes((goldens / "legacy.pth").read_bytes()[: cut or -1])
    with pytest.raises(ValueError, match="cut.pth cannot be read: cut short"):
        read_pth(path)


def test_errors_for_formats_that_only_pytorch_reads_say_what_to_do(tmp_path):
    path = tmp_path / "x.pth"
    path.write_bytes(bytes(257) + b"ustar" + bytes(1000))
    with pytest.raises(ValueError, match="tar archive of PyTorch before 0.1.10"):
        read_pth(path)
    with zipfile.ZipFile(path, "w") as archive:  # the layout of the Inception network of 2015-12-05
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py"):
            archive.writestr(f"inception/{name}", b"")
    with pytest.raises(ValueError, match=r"torch.save\(torch.jit.load\(old\).state_dict\(\), new\)"):
        read_pth(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", PROTOCOL + b"}" + STOP)
        archive.writestr("x/byteorder", b"big")
    with pytest.raises(ValueError, match="not little-endian"):
        read_pth(path)
    path.write_bytes(pickle.dumps({"x": 1}))
    with pytest.raises(
        ValueError, match="x.pth cannot be read: it is a pickle, but not one that torch.save writes"
    ):
        read_pth(path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "it is a Git LFS pointer"),
        (b"\n<!DOCTYPE html>\n<html><title>Sign in", "it is a web page"),
    ],
)
def test_what_a_failed_download_leaves_is_named(tmp_path, suffix, content, message):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"x{suffix} .*: {message}"):
        read_tensors(path, "tokenizer")


def test_files_of_other_formats_are_rejected(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file: .*nothing.pth"):
        read_tensors(tmp_path / "nothing.pth", "tokenizer")
    (tmp_path / "x.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"must be a .pth or .pt or .safetensors file, got '.bin'"):
        read_tensors(tmp_path / "x.bin", "tokenizer")
    (tmp_path / "x.safetensors").write_bytes(os.urandom(64))
    with pytest.raises(ValueError, match="is not a safetensors file"):
        read_tensors(tmp_path / "x.safetensors", "tokenizer")
    buffer = io.BytesIO()
    pickle.dump([1, 2], buffer, protocol=2)
    for content in (buffer.getvalue(), PROTOCOL + b"}" + STOP, PROTOCOL + b"}" + number(1) + b"Ns" + STOP):
        with pytest.raises(ValueError, match="list.pth holds no plain state dict"):
            read_tensors(write_zip(tmp_path / "list.pth", content), "tokenizer")
    with pytest.raises(ValueError, match="weights=gs://bucket/vae.pth: must be a local path"):
        read_tensors("gs://bucket/vae.pth", "tokenizer")


# --- safetensors


def test_safetensors_are_read_as_written(tmp_path):
    tensors = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.arange(3).astype(ml_dtypes.bfloat16),
        "c": np.zeros((0, 5), np.uint16),
        "d": np.array(7, np.int64),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    read = read_tensors(tmp_path / "x.safetensors", "tokenizer")
    assert read.keys() == tensors.keys()
    for name, expected in tensors.items():
        assert read[name].dtype == expected.dtype and read[name].shape == expected.shape
        np.testing.assert_array_equal(read[name], expected)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ('{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"a": ' + "1" * 5000 + "}", "not JSON"),
        ("[1]", "not a JSON object"),
        ('{"a": 1}', "a has no dtype, shape and data_offsets"),
        ('{"a": {"dtype": "F32", "shape": [4.0], "data_offsets": [0, 16]}}', "a has no dtype, shape"),
        ('{"a": {"dtype": "F32", "shape": [true, 4], "data_offsets": [0, 16]}}', "a has no dtype, shape"),
        ('{"a": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}}', "a has no dtype, shape"),
        ('{"a": {"dtype": "C64", "shape": [2], "data_offsets": [0, 16]}}', "a has dtype C64"),
        (
            '{"a": {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}}',
            "does not have bytes 0 to 32 of 16",
        ),
        ('{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 16]}}', "does not have bytes"),
        ('{"a": {"dtype": "F32", "shape": [0, 99999999999], "data_offsets": [0, 0]}}', "an empty tensor"),
        ('{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', "8 bytes follow the tensors"),
        ('{"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}', "leave a gap, at byte 8"),
        (
            '{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}, '
            '"b": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}',
            "overlap",
        ),
        (
            '{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}, '
            '"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}',
            "twice",
        ),
    ],
)
def test_safetensors_with_an_inconsistent_header_are_rejected(tmp_path, header, message):
    path = tmp_path / "evil.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(16))
    with pytest.raises(ValueError, match=f"evil.safetensors is not a safetensors file: .*{message}"):
        read_networks(path)
    path.write_bytes(struct.pack("<Q", 1 << 62) + header.encode())
    with pytest.raises(ValueError, match="evil.safetensors .*at most 8388608 are read"):
        read_networks(path)
