"""Emulation on a CPU of the reduced precision of an accelerator's matrix products and convolutions.

On a GPU, float32 operands are rounded to TF32 (10 bits of mantissa) with precision `default` and `high`.  On
a TPU they are rounded to bfloat16 (7 bits) with `default`; `high` is three products of bfloat16 parts.
`highest` is float32 on every platform.
"""

from collections.abc import Callable, Iterator

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

PLATFORMS = ("gpu", "tpu")
PRODUCTS = ("dot_general", "conv_general_dilated")
BITS = {"tf32": 10, "bf16": 7}
ROUNDING = {"gpu": {"default": "tf32", "high": "tf32"}, "tpu": {"default": "bf16", "high": "bf16x3"}}


def emulated(function: Callable, platform: str) -> Callable:
    """Compile a function of arrays with the products of a platform."""

    def run(*args):
        closed, shape = jax.make_jaxpr(function, return_shape=True)(*args)
        outputs = _evaluate(closed.jaxpr, closed.consts, ROUNDING[platform], *jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shape), outputs)

    return jax.jit(run)


def products(function: Callable, *args) -> list:
    """List the equations of products in the jaxpr of a function, including loops and nested jaxprs."""
    return [
        eqn for eqn in _equations(jax.make_jaxpr(function)(*args).jaxpr) if eqn.primitive.name in PRODUCTS
    ]


def precision_of(eqn) -> str:
    """Return the precision of a product: `default`, `high` or `highest`."""
    precision = eqn.params["precision"]
    if precision is None:
        return "default"
    assert isinstance(precision, tuple) and len(set(precision)) == 1, precision
    return precision[0].name.lower()


def _equations(jaxpr: Jaxpr) -> Iterator:
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in _inner(eqn):
            yield from _equations(inner)


def _inner(eqn) -> list[Jaxpr]:
    leaves = jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: isinstance(x, (Jaxpr, ClosedJaxpr)))
    return [getattr(leaf, "jaxpr", leaf) for leaf in leaves if isinstance(leaf, (Jaxpr, ClosedJaxpr))]


def _evaluate(jaxpr: Jaxpr, consts, rounding: dict, *args) -> list:
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
    read = lambda v: v.val if isinstance(v, Literal) else values[v]
    for eqn in jaxpr.eqns:
        outputs = _apply(eqn, [read(v) for v in eqn.invars], rounding)
        values.update(zip(eqn.outvars, outputs, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _apply(eqn, inputs: list, rounding: dict) -> list:
    name, inner = eqn.primitive.name, _inner(eqn)
    if name in PRODUCTS:
        return [_product(eqn, inputs, rounding)]
    if name == "scan":
        return _scan(eqn, inputs, rounding)
    nested = any(e.primitive.name in PRODUCTS for jaxpr in inner for e in _equations(jaxpr))
    if not nested and not name.startswith("custom_"):
        outputs = eqn.primitive.bind(*inputs, **eqn.params)
        return outputs if eqn.primitive.multiple_results else [outputs]
    # Primitives that wrap a jaxpr: jit, checkpoint, custom derivatives.
    closed = next(p for p in eqn.params.values() if isinstance(p, Jaxpr | ClosedJaxpr))
    assert len(inner) == 1 and len(inputs) == len(inner[0].invars), f"{name} is not emulated"
    return _evaluate(inner[0], getattr(closed, "consts", ()), rounding, *inputs)


def _scan(eqn, inputs: list, rounding: dict) -> list:
    (jaxpr,) = _inner(eqn)
    count_unsliced = lambda outer, inner: sum(  # constants and carries have equal shapes inside
        a.aval.shape == b.aval.shape for a, b in zip(outer, inner, strict=True)
    )
    carries = count_unsliced(eqn.outvars, jaxpr.outvars)
    stop = count_unsliced(eqn.invars, jaxpr.invars)
    consts = stop - carries
    jaxpr_consts = getattr(eqn.params["jaxpr"], "consts", ())

    def body(carry, xs):
        outputs = _evaluate(jaxpr, jaxpr_consts, rounding, *inputs[:consts], *carry, *xs)
        return outputs[:carries], outputs[carries:]

    length, reverse = eqn.params["length"], eqn.params["reverse"]
    carry, stacked = jax.lax.scan(body, inputs[consts:stop], inputs[stop:], length, reverse)
    return [*carry, *stacked]


def _product(eqn, operands: list, rounding: dict) -> jax.Array:
    product = lambda a, b: eqn.primitive.bind(a, b, **eqn.params)
    a, b = operands
    dtype = rounding.get(precision_of(eqn)) if a.dtype == b.dtype == "float32" else None
    if dtype is None:
        return product(a, b)
    if dtype == "bf16x3":
        (a, a_rest), (b, b_rest) = ((_rounded(x, "bf16"), x - _rounded(x, "bf16")) for x in (a, b))
        a_rest, b_rest = _rounded(a_rest, "bf16"), _rounded(b_rest, "bf16")
        return product(a, b) + (product(a, b_rest) + product(a_rest, b))
    return product(_rounded(a, dtype), _rounded(b, dtype))


def _rounded(x: jax.Array, dtype: str) -> jax.Array:
    return jax.lax.reduce_precision(x, 8, BITS[dtype])
