import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.helpers.arrays import close
from var_jax.interop.dino_weights import load_dino
from var_jax.tokenizer.dino import dino_features

WIDTH, DEPTH, PATCH, GRID = 128, 3, 16, 3  # two heads
features = jax.jit(dino_features, static_argnames=("layers", "dtype"))


def published(grid: int = GRID) -> dict[str, np.ndarray]:
    """Create a random DINO in the published layout, including its last layer norm."""
    rng, d, result = np.random.default_rng(0), WIDTH, {}
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)

    def layer(name: str, *shape: int) -> None:
        result[f"{name}.weight"] = draw(*shape) / np.float32(np.sqrt(np.prod(shape[1:])))
        result[f"{name}.bias"] = draw(shape[0])

    result["cls_token"], result["pos_embed"] = draw(1, 1, d), draw(1, 1 + grid**2, d)
    layer("patch_embed.proj", d, 3, PATCH, PATCH)
    for i in range(DEPTH):
        layer(f"blocks.{i}.norm1", d)
        layer(f"blocks.{i}.attn.qkv", 3 * d, d)
        layer(f"blocks.{i}.attn.proj", d, d)
        layer(f"blocks.{i}.norm2", d)
        layer(f"blocks.{i}.mlp.fc1", 4 * d, d)
        layer(f"blocks.{i}.mlp.fc2", d, 4 * d)
    layer("norm", d)
    return result


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Loader that writes tensors to a file and reads it with `load_dino`."""
    path = tmp_path_factory.mktemp("dino") / "dino.safetensors"

    def loaded(tensors: dict[str, np.ndarray]) -> dict:
        save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, path)
        return load_dino(path)

    return loaded


@pytest.fixture(scope="module")
def params(load) -> dict:
    return load(published())


def interpolated(x: np.ndarray, side: int, weigh) -> np.ndarray:
    """Resize [h, h, C] to [side, side, C] pixel by pixel, weighting neighbors by distance."""
    source, y = len(x), np.zeros((side, side, x.shape[2]))
    for i, j in np.ndindex(side, side):
        centers = [(k + 0.5) * source / side - 0.5 for k in (i, j)]
        for a, b in np.ndindex(4, 4):
            near = [math.floor(c) - 1 + k for c, k in zip(centers, (a, b), strict=True)]
            weight = math.prod(weigh(abs(c - n)) for c, n in zip(centers, near, strict=True))
            row, column = (min(max(n, 0), source - 1) for n in near)
            y[i, j] += weight * x[row, column]
    return y


def cubic(d: float, a: float = -0.75) -> float:
    if d <= 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    return a * (d**3 - 5 * d**2 + 8 * d - 4) if d < 2 else 0.0


def reference(t: dict[str, np.ndarray], image: np.ndarray, grid: int) -> list[np.ndarray]:
    """Compute the feature maps of one image, patch by patch and head by head, in float64."""

    def norm(name, x):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return x * t[f"{name}.weight"] + t[f"{name}.bias"]

    linear = lambda name, x: x @ t[f"{name}.weight"].T + t[f"{name}.bias"]
    as_map = lambda x: (x[1:] + x[0]).reshape(grid, grid, -1)
    if len(image) != grid * PATCH:
        image = interpolated(image, grid * PATCH, lambda d: max(1 - d, 0))
    image = ((image + 1) / 2 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    kernel = t["patch_embed.proj.weight"].transpose(2, 3, 1, 0).reshape(-1, WIDTH)
    positions = t["pos_embed"][0, 1:].reshape(GRID, GRID, -1)
    positions = interpolated(positions, grid, cubic) if grid != GRID else positions
    x = [t["cls_token"][0, 0] + t["pos_embed"][0, 0]]
    for i, j in np.ndindex(grid, grid):
        patch = image[i * PATCH : (i + 1) * PATCH, j * PATCH : (j + 1) * PATCH].reshape(-1)
        x.append(patch @ kernel + t["patch_embed.proj.bias"] + positions[i, j])
    x = np.array(x)
    result = [as_map(x)]
    for i in range(DEPTH):
        q, k, v = np.split(linear(f"blocks.{i}.attn.qkv", norm(f"blocks.{i}.norm1", x)), 3, axis=-1)
        heads = []
        for h in (slice(0, 64), slice(64, 128)):
            weights = np.exp(q[:, h] @ k[:, h].T / 8)
            heads.append(weights / weights.sum(-1, keepdims=True) @ v[:, h])
        x = x + linear(f"blocks.{i}.attn.proj", np.concatenate(heads, axis=-1))
        hidden = linear(f"blocks.{i}.mlp.fc1", norm(f"blocks.{i}.norm2", x))
        hidden = hidden * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2))) / 2
        x = x + linear(f"blocks.{i}.mlp.fc2", hidden)
        result.append(as_map(x))
    return result


@pytest.mark.parametrize(("side", "grid"), [(80, 5), (72, 5), (16, 4)], ids=["own", "rounded up", "tiny"])
def test_features_are_those_of_a_plain_loop(params, side, grid):
    images = np.random.default_rng(1).uniform(-1, 1, (2, side, side, 3)).astype(np.float32)
    got = features(params, images, (2, 0))
    for b in range(2):
        want = reference(published(), images[b].astype(np.float64), grid)
        for result, expected in zip(got, (want[0], want[3], want[1]), strict=True):
            close(result[b], expected, 1e-5)


def test_positions_of_a_trained_grid_are_taken_as_they_are(load):
    tensors = published(grid=4)
    images = np.zeros((1, 64, 64, 3), np.float32)
    original = features(load(tensors), images, (0,))[0]
    tensors["pos_embed"][0, 7] += 1  # the second row's third patch
    moved = features(load(tensors), images, (0,))[0] - original
    np.testing.assert_allclose(moved[0, 1, 2], 1, atol=1e-5)
    assert np.abs(moved).sum() == pytest.approx(WIDTH, rel=1e-5)


def test_gradients_reach_the_images_and_bfloat16_is_close(params):
    images = np.random.default_rng(2).uniform(-1, 1, (2, 80, 80, 3)).astype(np.float32)

    @jax.jit
    @jax.grad
    def gradient_of_sum(x):
        return sum(jnp.sum(f.astype(jnp.float32)) for f in dino_features(params, x, (2, 0), jnp.bfloat16))

    gradient = gradient_of_sum(images)
    assert np.isfinite(gradient).all() and (np.abs(gradient) > 0).mean() > 0.99
    maps = features(params, images, (2, 0))
    rough = features(params, images, (2, 0), dtype=jnp.bfloat16)
    for result, expected in zip(rough, maps, strict=True):
        assert result.dtype == jnp.bfloat16
        close(result.astype(jnp.float32), expected, 0.03)


def test_prefix_and_head_make_no_difference(params, load):
    prefixed = {f"backbone.{name}": tensor for name, tensor in published().items()}
    prefixed["backbone.head.weight"] = prefixed["optimizer_step"] = np.zeros((3, 3), np.float32)
    jax.tree.map(np.testing.assert_array_equal, load(prefixed), params)
    assert params["blocks"]["qkv"]["kernel"].shape == (DEPTH, WIDTH, 3 * WIDTH)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks.1.norm2.bias": None}, "missing: blocks.1.norm2.bias"),
        ({"blocks.0.ls1.gamma": (128,)}, "unknown: blocks.0.ls1.gamma (128,)"),
        (
            {"blocks.2.mlp.fc1.weight": (256, 128)},
            "blocks.2.mlp.fc1.weight has shape (256, 128), expected (512, 128)",
        ),
        ({"pos_embed": None}, "no published DINO: it has no tensor pos_embed"),
        ({"pos_embed": (1, 9, 128)}, "pos_embed has shape (1, 9, 128), expected (1, 1 + G * G, 128)"),
        (
            {"patch_embed.proj.weight": (96, 3, 16, 16)},
            "(96, 3, 16, 16), expected (D, 3, P, P), D a multiple",
        ),
        ({"patch_embed.proj.weight": (128, 768)}, "(128, 768), expected (D, 3, P, P)"),
    ],
)
def test_what_does_not_fit_is_named(load, change, message):
    tensors = published()
    for name, shape in change.items():
        tensors.pop(name, None)
        if shape:
            tensors[name] = np.zeros(shape, np.float32)
    with pytest.raises(ValueError) as error:
        load(tensors)
    assert message in str(error.value) and "dino.safetensors" in str(error.value)


def test_no_file():
    with pytest.raises(FileNotFoundError, match="no such file: .*nowhere.pth"):
        load_dino("nowhere.pth")


def test_images_and_layers_that_cannot_be_are_refused(params):
    with pytest.raises(ValueError, match=r"square images \[B, H, H, 3\], got \(1, 64, 32, 3\)"):
        dino_features(params, np.zeros((1, 64, 32, 3), np.float32), (0,))
    for layers in ((2, 5, 8, 11), (-1,), ()):
        with pytest.raises(ValueError, match="DINO of 3 blocks has layers 0 to 2, got layers="):
            dino_features(params, np.zeros((1, 64, 64, 3), np.float32), layers)
