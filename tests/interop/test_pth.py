import collections
import io
import os
import pickle
import zipfile

import numpy as np
import pytest
from safetensors.numpy import save_file

from var_jax.interop.pth import read_pth
from var_jax.interop.tensor_files import read_tensors


def write_pth(path, pickled: bytes, storages: dict[str, bytes], compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        for key, data in storages.items():
            archive.writestr(f"archive/data/{key}", data)


def global_call(module: str, name: str) -> bytes:
    """A pickle that calls module.name("x")."""
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"X\x01\x00\x00\x00x\x85R."


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("builtins", "eval"),
        ("torch", "load"),
        ("numpy", "fromfile"),
        ("torch._utils", "_rebuild"),
    ],
)
def test_any_other_global_is_refused_before_anything_runs(tmp_path, module, name):
    path = tmp_path / "evil.pth"
    write_pth(path, global_call(module, name), {})
    with pytest.raises(ValueError, match=f"asks for {module}.{name}, which is not one of the globals"):
        read_pth(path)


def test_a_dotted_name_does_not_reach_further(tmp_path):
    path = tmp_path / "evil.pth"
    body = b"\x80\x04\x8c\x0bcollections\x8c\x13OrderedDict.__class__\x93."
    write_pth(path, body.replace(b"\x13", bytes([len("OrderedDict.__class__")])), {})
    with pytest.raises(ValueError, match="refused"):
        read_pth(path)


def test_a_file_written_by_pytorch_reads_as_views_of_the_file(goldens):
    tensors = read_pth(goldens / "var.pth")
    assert isinstance(tensors, collections.OrderedDict)
    assert tensors["lvl_1L"].dtype == np.int64 and tensors["lvl_1L"].shape == (1, 30)
    weight = tensors["blocks.0.attn.mat_qkv.weight"]
    assert weight.shape == (576, 192) and not weight.flags.writeable
    with zipfile.ZipFile(goldens / "var.pth") as archive:
        assert any(archive.read(member) == weight.tobytes() for member in archive.infolist())


def test_tensors_that_reach_outside_their_storage_are_refused(goldens, tmp_path):
    """The storage of one tensor is cut short in a copy of a good file."""
    path = tmp_path / "short.pth"
    with zipfile.ZipFile(goldens / "var.pth") as good, zipfile.ZipFile(path, "w") as bad:
        for info in good.infolist():
            data = good.read(info)
            bad.writestr(info.filename, data[:16] if info.filename.endswith("data/4") else data)
    with pytest.raises(ValueError, match="does not hold"):
        read_pth(path)


@pytest.mark.parametrize("cut", [100, -100])
def test_damaged_files_are_named(goldens, tmp_path, cut):
    path = tmp_path / "cut.pth"
    path.write_bytes((goldens / "vae.pth").read_bytes()[:cut])
    with pytest.raises(ValueError, match="cut.pth cannot be read: not a zip archive, or cut short"):
        read_pth(path)


def test_files_that_are_something_else(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file: .*nothing.pth"):
        read_tensors(tmp_path / "nothing.pth", "tokenizer")
    (tmp_path / "x.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"must be a .pth or .pt or .safetensors file, found '.bin'"):
        read_tensors(tmp_path / "x.bin", "tokenizer")
    (tmp_path / "x.safetensors").write_bytes(os.urandom(64))
    with pytest.raises(ValueError, match="is not a safetensors file"):
        read_tensors(tmp_path / "x.safetensors", "tokenizer")
    buffer = io.BytesIO()
    pickle.dump([1, 2], buffer, protocol=2)
    write_pth(tmp_path / "list.pth", buffer.getvalue(), {})
    with pytest.raises(ValueError, match="holds no plain state dict"):
        read_tensors(tmp_path / "list.pth", "tokenizer")


def test_safetensors_read_alike(tmp_path):
    tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3)}
    save_file(tensors, tmp_path / "x.safetensors")
    np.testing.assert_array_equal(read_tensors(tmp_path / "x.safetensors", "tokenizer")["a"], tensors["a"])
