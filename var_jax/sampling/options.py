"""How to draw, as a person says it, and as the compiled program takes it."""

import dataclasses
import math
import numbers

import flax.struct
import jax
import numpy as np

from var_jax.scales import Scales


def guidance_per_scale(guidance: float, schedule: str, scales: Scales) -> np.ndarray:
    """float32 [K]: guidance at each scale.

    Args:
      guidance: strength at the last scale.
      schedule: `ramp`, the published guidance * k / (K - 1), where a single scale gets all of it; or
        `constant`.
    """
    if schedule == "constant" or len(scales) == 1:
        return np.full(len(scales), guidance, np.float32)
    return np.array([guidance * scales.progress(k) for k in range(len(scales))], np.float32)


def guide(logits: jax.Array, guidance_scale: jax.Array) -> jax.Array:
    """Logits [2 B, n, V], of each image with and then without class, -> [B, n, V].

    (1 + t) conditional - t unconditional.
    """
    return (1 + guidance_scale) * logits[::2] - guidance_scale * logits[1::2]


PUBLISHED_TOP_K = 900  # the default everywhere; where there are fewer codes it keeps them all
MAX_SEED = 2**32 - 1  # keys of JAX are seeded with 32 bits; larger seeds would repeat smaller ones


@flax.struct.dataclass
class ScaleControls:
    """Options worked out for every one of K scales; arrays change without compiling, the rest is static.

    Attributes:
      guidance_scale: float32 [K], of guidance.
      top_p: float32 [K].
      temperature: float32 [K].
      num_guided_scales: number of first scales that are guided; later ones skip the unconditional half.
      top_k: of each scale; 0 for all codes.
      use_top_p: whether top-p is used at each scale.
      smooth: whether codes are mixed at each scale.
      scales: the first so many are drawn.
    """

    guidance_scale: jax.Array
    top_p: jax.Array
    temperature: jax.Array
    num_guided_scales: int = flax.struct.field(pytree_node=False)
    top_k: tuple[int, ...] = flax.struct.field(pytree_node=False)
    use_top_p: tuple[bool, ...] = flax.struct.field(pytree_node=False)
    smooth: tuple[bool, ...] = flax.struct.field(pytree_node=False)
    scales: int = flax.struct.field(pytree_node=False)


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """How to draw; the defaults are those of the published FID protocol.

    Guidance, top-k, top-p, temperature and smooth are one value, or a list of one a scale.

    Attributes:
      guidance: strength of classifier-free guidance at the last scale; 0 for none.  A list is taken as it is.
      guidance_schedule: how one strength is spread: `ramp`, from 0 at the first scale (published), or
        `constant`.
      guidance_until: scales from this one on (0 is the first) are drawn without guidance, at half the work;
        None guides all.
      top_k: draw among this many of the likeliest codes; 0 for all.
      top_p: draw among the likeliest codes that hold this probability; 0 for all.
      temperature: logits are divided by it, after guidance and before top-k and top-p.
      smooth: mix codes instead of drawing one (for looking at, not for FID).
      upto: draw the first so many maps only, a coarse preview; None for all.

    Raises:
      ValueError: naming the option that is out of range or of another type.
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
            if isinstance(value, (np.ndarray, np.generic, jax.Array)):
                value = np.asarray(value).tolist()
            object.__setattr__(self, name, tuple(value) if isinstance(value, list) else value)
        _check("guidance must be a finite number", self.guidance, _is_number)
        whole = lambda k: _is_integer(k) and k >= 0  # noqa: E731
        _check("top_k must be a whole number, 0 (all codes) or more", self.top_k, whole)
        share = lambda p: _is_number(p) and 0 <= p <= 1  # noqa: E731
        _check("top_p must be in [0, 1], 0 for all codes", self.top_p, share)
        _check("temperature must be above 0", self.temperature, lambda t: _is_number(t) and t > 0)
        _check("smooth must be True or False", self.smooth, lambda s: isinstance(s, (bool, np.bool_)))
        if self.guidance_schedule not in ("ramp", "constant"):
            raise ValueError(f"guidance_schedule must be ramp or constant, got {self.guidance_schedule!r}")
        for name in ("guidance_until", "upto"):  # their upper bounds are known with the scales
            if (value := getattr(self, name)) is not None:
                check_integer(name, value, 0 if name == "guidance_until" else 1)

    def controls(self, scales: Scales, num_codes: int) -> ScaleControls:
        """These options at every scale of a schedule.

        Raises:
          ValueError: on a list that is not of one value a scale, a scale that there is not, or a top_k over
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
        used = np.flatnonzero(guidance_scale)
        return ScaleControls(
            guidance_scale=guidance_scale,
            top_p=top_p,
            temperature=np.array(self._per_scale("temperature", scales), np.float32),
            num_guided_scales=int(used[-1]) + 1 if len(used) else 0,
            top_k=tuple(0 if k >= num_codes else k for k in top_k),
            use_top_p=tuple(bool(p) for p in top_p > 0),
            smooth=tuple(bool(s) for s in self._per_scale("smooth", scales)),
            scales=self._scale("upto", 1, len(scales)),
        )

    def _per_scale(self, name: str, scales: Scales) -> tuple:
        """The value of an option at each scale."""
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
        """The number of scales that an option names; all where it is None."""
        value = getattr(self, name)
        return highest if value is None else check_integer(name, value, lowest, highest)


def check_integer(name: str, value, lowest: int, highest: int | None = None) -> int:
    """Return an argument as an int.

    Raises:
      ValueError: naming the argument, if it is no integer (a bool is none) or out of its range.
    """
    if not (_is_integer(value) and lowest <= value and (highest is None or value <= highest)):
        bounds = f"of at least {lowest}" if highest is None else f"in {lowest} .. {highest}"
        raise ValueError(f"{name} must be a whole number {bounds}, got {value!r}")
    return int(value)


def _is_integer(value) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_number(value) -> bool:
    """Whether a value is a finite real number; a bool is none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def _check(message: str, value, holds) -> None:
    """Raises ValueError unless a value, or each of a tuple, holds what it must."""
    for one in value if isinstance(value, tuple) else (value,):
        if not holds(one):
            raise ValueError(f"{message}, got {one!r}")
