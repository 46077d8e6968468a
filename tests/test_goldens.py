"""The golden tensors in the repository, and where golden tensors are looked for."""

from benchmarks.goldens import REPOSITORY, SUBSET, golden_folder


def test_the_subset_in_the_repository_is_that_of_all_golden_tensors(goldens):
    names = {path.name for path in SUBSET.iterdir()} - {"README.md", "vae_quantizer.npz"}
    assert len(names) == 9
    for name in names:
        assert (SUBSET / name).read_bytes() == (goldens / name).read_bytes(), name


def test_the_subset_is_small():
    assert sum(path.stat().st_size for path in SUBSET.iterdir()) < 6e6


def test_the_variable_comes_first_then_the_shared_folder_then_the_subset(monkeypatch, tmp_path):
    monkeypatch.setattr("benchmarks.goldens.REPOSITORY", tmp_path / "clone")
    monkeypatch.setenv("VAR_JAX_GOLDENS", "/nowhere")
    assert str(golden_folder()) == "/nowhere"
    monkeypatch.delenv("VAR_JAX_GOLDENS")
    assert golden_folder() == SUBSET == REPOSITORY / "tests" / "goldens"
    (tmp_path / "shared" / "goldens").mkdir(parents=True)
    assert golden_folder() == tmp_path / "shared" / "goldens"
