"""Matrix FLOPs of a function, counted in its jaxpr: the same number on every platform.

XLA's `cost_analysis` of a program that is not compiled is None on a GPU; of any program it counts the body of
a loop once and a kernel as nothing.
"""

import math

from jax.extend.core import Jaxpr, JaxprEqn, jaxprs_in_params

UNKNOWN = ("while", "pallas_call")  # how often their body runs is not in the jaxpr


def count_flops(jaxpr: Jaxpr) -> float:
    """Count the FLOPs of all matrix products and convolutions (a multiplication and an addition are two).

    A scan counts as often as it runs, a `cond` as its most expensive branch.

    Raises:
      ValueError: on a while loop or a Pallas kernel, whose FLOPs are not known from the jaxpr.
    """
    return float(sum(_equation_flops(equation) for equation in jaxpr.eqns))


def _equation_flops(equation: JaxprEqn) -> float:
    name = equation.primitive.name
    if name == "dot_general":
        return _product_flops(equation)
    if name == "conv_general_dilated":
        return _convolution_flops(equation)
    inner = [count_flops(jaxpr) for jaxpr in jaxprs_in_params(equation.params)]
    if name in UNKNOWN:
        raise ValueError(f"cannot count the FLOPs of {name}: how often its body runs is not in the jaxpr")
    if name == "cond":
        return max(inner)
    return sum(inner) * (equation.params["length"] if name == "scan" else 1)


def _product_flops(equation: JaxprEqn) -> float:
    lhs, (contracting, _) = equation.invars[0].aval, equation.params["dimension_numbers"]
    return 2 * equation.outvars[0].aval.size * math.prod(lhs.shape[axis] for axis in contracting[0])


def _convolution_flops(equation: JaxprEqn) -> float:
    """Count only the taps that meet the image, as XLA does: those that meet padding are no work."""
    params, (lhs, rhs), out = equation.params, equation.invars, equation.outvars[0].aval
    lhs_spec, rhs_spec, out_spec = params["dimension_numbers"]  # batch or output channels, channels, sides
    flops = 2 * out.shape[out_spec[0]] * out.shape[out_spec[1]] * rhs.aval.shape[rhs_spec[1]]
    for i, (padding, _) in enumerate(params["padding"]):
        side, taps, outputs = (
            aval.shape[spec[2 + i]]
            for aval, spec in ((lhs.aval, lhs_spec), (rhs.aval, rhs_spec), (out, out_spec))
        )
        stride, spread, dilation = (
            params[name][i] for name in ("window_strides", "lhs_dilation", "rhs_dilation")
        )
        places = (o * stride + t * dilation - padding for o in range(outputs) for t in range(taps))
        flops *= sum(0 <= place <= (side - 1) * spread and place % spread == 0 for place in places)
    return flops
