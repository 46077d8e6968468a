import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.helpers.arrays import all_tokens, close, randomized
from var_jax.interop.published import next_scale_table, to_published
from var_jax.sharding import make_mesh, on_mesh
from var_jax.transformer import block
from var_jax.transformer import model as model_module
from var_jax.transformer.block import Block
from var_jax.transformer.config import NextScaleConfig
from var_jax.transformer.next_scale import NextScale


def test_golden_logits(golden_var, golden):
    model, arrays = golden_var
    inputs = golden("vae")["var_input"]
    apply = jax.jit(lambda labels: model.module.apply({"params": model.params}, labels, inputs))
    close(apply(arrays["label"]), arrays["logits"])
    close(apply(np.full_like(arrays["label"], model.num_classes)), arrays["logits_uncond"])
    tokens = all_tokens(golden("vae"))
    close(model.logits(tokens, arrays["label"]), arrays["logits"])  # the tokenizer makes the input


def test_golden_loss_and_gradients(golden_var, golden):
    model, arrays = golden_var
    vae = golden("vae")
    # Rematerialization changes no number.  Label dropout is off, and so are the other rates.
    module = NextScale(dataclasses.replace(model.module.config, class_dropout_prob=0.0), remat="flat_qkv")

    @jax.jit
    def loss_and_gradients(params):
        def loss(params):
            rngs = {"dropout": jax.random.key(0)}
            logits = module.apply(
                {"params": params}, arrays["label"], vae["var_input"], train=True, rngs=rngs
            )
            return optax.softmax_cross_entropy_with_integer_labels(logits, all_tokens(vae)).mean()

        return jax.value_and_grad(loss)(params)

    loss, grads = loss_and_gradients(model.checkpoint_params)
    close(loss, arrays["loss"])
    published = to_published(grads, next_scale_table(model.module.config))
    names = [name for name in arrays if name.startswith("grad:")]
    assert len(names) >= 12
    for name in names:
        close(published[name.removeprefix("grad:")], arrays[name], 1e-3)


@pytest.mark.parametrize("chunk", [1024, 8])
def test_losses_in_one_go_and_in_chunks_are_those_of_the_logits(tiny_var, monkeypatch, chunk):
    module, params = tiny_var
    labels, inputs = jnp.array([0, 5, 3]), jax.random.normal(jax.random.key(0), (3, 20, 4))
    tokens = jax.random.randint(jax.random.key(1), (3, 21), 0, 16)

    def of_logits(params):
        logits = module.apply({"params": params}, labels, inputs)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens)
        return losses.mean(), (losses, 1.0 * (logits.argmax(-1) == tokens))

    def ours(params):
        losses, correct = module.apply({"params": params}, labels, inputs, tokens, method="losses")
        return losses.mean(), (losses, 1.0 * correct)

    want = jax.jit(jax.grad(of_logits, has_aux=True))(params)
    monkeypatch.setattr(model_module, "LOGITS_CHUNK", chunk)
    result = jax.jit(jax.grad(ours, has_aux=True))(params)
    jax.tree.map(lambda got, expected: close(got, expected, 1e-5), result, want)
    assert result[1][1].any()
    # The gradient of a chunk recomputes its logits, so none are saved.
    saved = jax.eval_shape(lambda params: jax.tree.leaves(jax.vjp(ours, params, has_aux=True)[1]), params)
    assert not [leaf.shape for leaf in saved if leaf.shape[-1:] == (16,) and leaf.ndim == 3]


@pytest.mark.parametrize("which", ["tiny_var", "tiny_shared_var"])
def test_cached_equals_uncached(which, request):
    module, params = request.getfixturevalue(which)
    scales, apply = module.config.schedule, lambda *args, **kw: module.apply({"params": params}, *args, **kw)
    labels, inputs = jnp.array([0, 5, 3]), jax.random.normal(jax.random.key(0), (3, 20, 4))
    condition = apply(labels, method="condition")
    cache, parts = apply(3, method="empty_cache"), []
    for k in range(len(scales)):
        own = None if k == 0 else inputs[:, scales.starts[k] - 1 : scales.ends[k] - 1]
        logits, cache = apply(k, own, condition, cache, method="step")
        parts.append(logits)
    close(jnp.concatenate(parts, axis=1), apply(labels, inputs), 1e-5)


def test_a_position_sees_its_own_scale_and_coarser_ones_only(tiny_var):
    module, params = tiny_var
    labels, inputs = jnp.array([0]), jax.random.normal(jax.random.key(0), (1, 20, 4))
    apply = jax.jit(lambda inputs: module.apply({"params": params}, labels, inputs))
    before, after = apply(inputs), apply(inputs.at[:, 2].add(1.0))  # a position of scale 1
    np.testing.assert_array_equal(before[:, :1], after[:, :1])
    assert (np.abs(before - after)[:, 1:].max(-1) > 1e-4).all()


def test_published_initialisation():
    config = NextScaleConfig(
        depth=4, width=256, num_heads=4, num_classes=100, num_codes=64, scales=(1, 2, 4), gamma_init=1e-3
    )
    blank = (jnp.zeros(1, jnp.int32), jnp.zeros((1, 20, 32)))
    params = nn.meta.unbox(NextScale(config).init(jax.random.key(0), *blank))["params"]
    std = math.sqrt(1 / (3 * 256))
    layers = params["blocks"]["layers"]
    want = {
        "qkv": (layers["attention"]["qkv"]["kernel"], std),
        "proj": (layers["attention"]["proj"]["kernel"], std / math.sqrt(8)),
        "fc2": (layers["mlp"]["fc2"]["kernel"], std / math.sqrt(8)),
        "class": (params["class_embedding"], std),
        "head": (params["head"]["kernel"], 0.02 * std),
        "gates": (params["adaln"]["adaln"]["kernel"][..., :512], 1e-3 * std),
        "rest": (params["adaln"]["adaln"]["kernel"][..., 512:], 0.5 * std),
        "head adaln": (params["head_adaln"]["kernel"], 0.5 * std),
    }
    for name, (array, expected) in want.items():
        assert float(jnp.std(array)) == pytest.approx(expected, rel=0.03), name
    np.testing.assert_allclose(layers["attention"]["log_temperature"], math.log(4), rtol=1e-6)
    assert not any(jnp.any(layers["attention"][name]) for name in ("q_bias", "v_bias"))
    kernel = layers["attention"]["qkv"]["kernel"]
    assert not np.allclose(kernel[0], kernel[1])  # every layer has its own


def test_number_of_parameters_of_d16():
    blank = (jnp.zeros(1, jnp.int32), jnp.zeros((1, 679, 32)))
    shapes = jax.eval_shape(NextScale(NextScaleConfig()).init, jax.random.key(0), *blank)
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nn.meta.unbox(shapes)))
    assert count == pytest.approx(310e6, rel=0.01)  # published: 310 M


def test_dropped_labels_are_no_class(tiny_var):
    config = dataclasses.replace(tiny_var[0].config, class_dropout_prob=0.999999)
    inputs, rngs = jax.random.normal(jax.random.key(0), (3, 20, 4)), {"dropout": jax.random.key(0)}
    apply = lambda labels, **kw: NextScale(config).apply({"params": tiny_var[1]}, labels, inputs, **kw)
    close(apply(jnp.array([0, 1, 2]), train=True, rngs=rngs), apply(jnp.full(3, 5)), 1e-6)


def test_stochastic_depth_drops_whole_branches_and_keeps_the_mean():
    config = NextScaleConfig(
        depth=1, width=8, num_heads=1, num_classes=2, num_codes=4, code_dim=4, scales=(1,), drop_path=0.5
    )
    block = Block(config, jnp.float32)
    modulation = jnp.zeros((2000, 6, 8)).at[:, :2].set(1.0)
    x = jnp.ones((2000, 1, 8)) * jnp.arange(8.0)
    scanned = lambda key: (jnp.array(0), modulation, None, jnp.array(0.5), key)
    variables = block.init(jax.random.key(0), (x, None), scanned(None))
    variables = {"params": randomized(variables["params"])}
    kept = block.apply(variables, (x, None), scanned(None))[0][0] - x
    dropped = block.apply(variables, (x, None), scanned(jax.random.key(1)))[0][0] - x
    untouched = np.isclose(np.abs(dropped).max((1, 2)), 0)
    assert 0.2 < untouched.mean() < 0.3  # both branches dropped: a quarter
    assert np.abs(kept).max() > 0.1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 100, "num_heads": 3}, "num_heads=3 must be positive and divide width=100"),
        ({"depth": 0}, "depth must be at least 1"),
        ({"drop_path": 1.0}, r"drop_path must be in \[0, 1\)"),
    ],
)
def test_impossible_architectures_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        NextScaleConfig(**fields)


@pytest.mark.parametrize("tensor", [1, 2])
def test_three_products_for_queries_keys_and_values_equal_one(tiny_var, monkeypatch, tensor):
    """GPUs compute three."""
    module, params = tiny_var
    labels, inputs = jnp.array([0, 3]), jax.random.normal(jax.random.key(0), (2, 20, 4))
    mesh = make_mesh(data=1, fsdp=1, tensor=tensor, devices=jax.devices()[:tensor])

    def step():
        loss = on_mesh(lambda params: module.apply({"params": params}, labels, inputs).std(), mesh)
        lowered = jax.jit(jax.value_and_grad(loss)).lower(params)
        return lowered.compile()(params), lowered.as_text().count("stablehlo.dot_general")

    one, products = step()
    monkeypatch.setattr(block, "GPU_KERNELS", ("auto",))
    three, more_products = step()
    assert more_products > products
    jax.tree.map(lambda got, want: close(got, want, 1e-6), three, one)
