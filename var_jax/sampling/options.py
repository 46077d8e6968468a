"""Sampling options as a user gives them, and per scale, as the compiled sampler takes them."""

import dataclasses
import math
import numbers

import flax.struct
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Float32

from var_jax.scales import Scales


def guidance_per_scale(guidance: float, schedule: str, scales: Scales) -> Float32[np.ndarray, " K"]:
    """Compute the guidance strength at each scale.

    Args:
      guidance: strength at the last scale.
      schedule: `ramp` for the published guidance * k / (K - 1), or all of it if there is one scale only;
        `constant` for the same strength at every scale.
      scales: schedule of the token maps.
    """
    if schedule == "constant" or len(scales) == 1:
        return np.full(len(scales), guidance, np.float32)
    return np.array([guidance * scales.progress(k) for k in range(len(scales))], np.float32)


def guide(
    logits: Float[Array | np.ndarray, "M n V"], guidance_scale: Float[ArrayLike, ""]
) -> Float[Array | np.ndarray, "B n V"]:
    """Apply classifier-free guidance with strength t: (1 + t) conditional - t unconditional logits.

    Args:
      logits: of M = 2 B rows, each image with its class and then without class.
      guidance_scale: strength t.
    """
    return (1 + guidance_scale) * logits[::2] - guidance_scale * logits[1::2]


PUBLISHED_TOP_K = 900  # the default everywhere; keeps all codes of a smaller codebook
MAX_SEED = 2**32 - 1  # JAX seeds keys with 32 bits: larger seeds would repeat the keys of smaller ones


@flax.struct.dataclass
class PerScaleOptions:
    """Sampling options of each of K scales; arrays can change without recompilation, the rest is static.

    Attributes:
      guidance_scale: float32 [K], guidance strength at each scale.
      top_p: float32 [K], probability that the nucleus of each scale holds.
      temperature: float32 [K], divisor of the logits at each scale.
      num_guided_scales: number of scales that are guided, from the first; later ones skip the unconditional
        half of the batch.
      top_k: number of likeliest codes kept at each scale; 0 for all codes.
      use_top_p: True at the scales that filter by top-p.
      smooth: True at the scales that mix codes.
      num_maps: number of maps to sample, from the first.
    """

    guidance_scale: Array | np.ndarray
    top_p: Array | np.ndarray
    temperature: Array | np.ndarray
    num_guided_scales: int = flax.struct.field(pytree_node=False)
    top_k: tuple[int, ...] = flax.struct.field(pytree_node=False)
    use_top_p: tuple[bool, ...] = flax.struct.field(pytree_node=False)
    smooth: tuple[bool, ...] = flax.struct.field(pytree_node=False)
    num_maps: int = flax.struct.field(pytree_node=False)


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """Sampling options; the defaults are those of the published FID protocol.

    Guidance, top-k, top-p, temperature and smooth are one value, or a list with one value per scale.

    Attributes:
      guidance: strength of classifier-free guidance at the last scale; 0 for none.  The values of a list
        apply to their scales as they are.
      guidance_schedule: course of a single strength over the scales: `ramp`, from 0 at the first scale
        (published), or `constant`.
      guidance_until: first scale (0 is the coarsest) without guidance, from which on the work is halved; None
        to guide all.
      top_k: number of likeliest codes to sample from; 0 for all.
      top_p: probability that the likeliest codes to sample from hold together; 0 for all.
      temperature: divisor of the logits, after guidance and before top-k and top-p.
      smooth: mix codes (Gumbel-softmax) instead of sampling one; for viewing, not for FID.
      upto: number of maps to sample, for a coarse preview; None for all.

    Raises:
      ValueError: naming the option that is out of range or of the wrong type.
    """

    guidance: float | tuple[float, ...] = 1.5
    guidance_schedule: str = "ramp"
    guidance_until: int | None = None
    top_k: int | tuple[int, ...] = PUBLISHED_TOP_K
    top_p: float | tuple[float, ...] = 0.96
    temperature: float | tuple[float, ...] = 1.0
    smooth: bool | tuple[bool, ...] = False
    upto: int | None = None

    def __post_init__(self):
        for name in ("guidance", "top_k", "top_p", "temperature", "smooth"):
            value = getattr(self, name)
            if isinstance(value, (np.ndarray, np.generic, Array)):
                value = np.asarray(value).tolist()
            object.__setattr__(self, name, tuple(value) if isinstance(value, list) else value)
        _check("guidance must be a finite number", self.guidance, _is_number)
        is_count = lambda k: _is_integer(k) and k >= 0
        _check("top_k must be a whole number, 0 (all codes) or more", self.top_k, is_count)
        is_probability = lambda p: _is_number(p) and 0 <= p <= 1
        _check("top_p must be in [0, 1], 0 for all codes", self.top_p, is_probability)
        _check("temperature must be above 0", self.temperature, lambda t: _is_number(t) and t > 0)
        _check("smooth must be True or False", self.smooth, lambda s: isinstance(s, (bool, np.bool_)))
        if self.guidance_schedule not in ("ramp", "constant"):
            raise ValueError(f"guidance_schedule must be ramp or constant, got {self.guidance_schedule!r}")
        if self.guidance_schedule != "ramp" and isinstance(self.guidance, tuple):
            raise ValueError(
                f"guidance_schedule={self.guidance_schedule} needs a single guidance strength, "
                f"got one per scale: {self.guidance}"
            )
        for name in ("guidance_until", "upto"):  # `per_scale` checks their upper bounds
            if (value := getattr(self, name)) is not None:
                check_integer(name, value, 0 if name == "guidance_until" else 1)

    def per_scale(self, scales: Scales, num_codes: int) -> PerScaleOptions:
        """Expand these options to every scale of a schedule.

        Args:
          scales: schedule of the token maps.
          num_codes: V, size of the codebook.

        Raises:
          ValueError: on a list without one value per scale, a scale outside the schedule, or a top_k above
            the size of the codebook.
        """
        top_k = tuple(int(k) for k in self._per_scale("top_k", scales))
        if max(top_k) > num_codes and set(top_k) != {PUBLISHED_TOP_K}:
            raise ValueError(
                f"top_k must be at most the {num_codes} codes of the codebook, 0 for all; got {max(top_k)}"
            )
        until = self._scale("guidance_until", 0, len(scales))
        if isinstance(self.guidance, tuple):
            guidance_scale = np.array(self._per_scale("guidance", scales), np.float32)
        else:
            guidance_scale = guidance_per_scale(self.guidance, self.guidance_schedule, scales)
        guidance_scale[until:] = 0
        top_p = np.array(self._per_scale("top_p", scales), np.float32)
        guided = np.flatnonzero(guidance_scale)
        return PerScaleOptions(
            guidance_scale=guidance_scale,
            top_p=top_p,
            temperature=np.array(self._per_scale("temperature", scales), np.float32),
            num_guided_scales=int(guided[-1]) + 1 if len(guided) else 0,
            top_k=tuple(0 if k >= num_codes else k for k in top_k),
            use_top_p=tuple(bool(p) for p in top_p > 0),
            smooth=tuple(bool(s) for s in self._per_scale("smooth", scales)),
            num_maps=self._scale("upto", 1, len(scales)),
        )

    def _per_scale(self, name: str, scales: Scales) -> tuple:
        """Return the value of an option at each scale."""
        value = getattr(self, name)
        if not isinstance(value, tuple):
            return (value,) * len(scales)
        if len(value) != len(scales):
            raise ValueError(
                f"{name} must be one value or one for each of the {len(scales)} scales {scales.sides}, "
                f"got {len(value)}: {value}"
            )
        return value

    def _scale(self, name: str, lowest: int, highest: int) -> int:
        """Return the number of scales that an option names; `highest` if it is None."""
        value = getattr(self, name)
        return highest if value is None else check_integer(name, value, lowest, highest)


def check_integer(name: str, value, lowest: int, highest: int | None = None) -> int:
    """Return an argument as an int.

    Raises:
      ValueError: naming the argument, if it is not an integer (a bool is not) or out of range.
    """
    if not (_is_integer(value) and lowest <= value and (highest is None or value <= highest)):
        bounds = f"of at least {lowest}" if highest is None else f"in {lowest} .. {highest}"
        raise ValueError(f"{name} must be a whole number {bounds}, got {value!r}")
    return int(value)


def _is_integer(value) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_number(value) -> bool:
    """Return True for a finite real number; a bool is not a number."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def _check(message: str, value, is_valid) -> None:
    """Raise ValueError unless `is_valid` holds for a value, or for each item of a tuple."""
    for item in value if isinstance(value, tuple) else (value,):
        if not is_valid(item):
            raise ValueError(f"{message}, got {item!r}")
