"""What the page computes: a visitor's settings to images after each map, and the inside of an image."""

import dataclasses
import threading
import time
from collections.abc import Iterator

import jax
import numpy as np
from jaxtyping import Bool, Float32, Int32, UInt8

from var_jax.api import LoadedVAR
from var_jax.app.device import Device
from var_jax.errors import UserError, config_errors
from var_jax.images import to_uint8
from var_jax.sampling.options import MAX_SEED, PUBLISHED_TOP_K, SamplingOptions, check_integer
from var_jax.sampling.sampler import KnownTokens
from var_jax.scales import Scales

FIRST_COUNT = 4  # images drawn at once, until the visitor changes it
FIRST_DRAWING_SECONDS = 5
PER_MAP = ("guidance", "temperature", "top_k", "top_p")  # options of the page, each also one value per map
TOP_K = (1, 2, 5, 10, 20, 50, 100, 200, 500, PUBLISHED_TOP_K, 2000)  # few, since each is compiled


class BadSetting(UserError, ValueError):
    """Error for settings that the model cannot take, or that need an image first."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What to draw.

    Attributes:
      condition: class of all images, or prompt; see `no_condition` for none.
      seed: image i depends on (seed, i) alone.
      count: number of images.
      options: sampling options.
    """

    condition: int | str
    seed: int
    count: int
    options: SamplingOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Picture:
    """One image to edit, vary or look into.

    Attributes:
      pixels: the image.
      tokens: its tokens.
      condition: its class or prompt; none if unknown.
      title: where it comes from.
    """

    pixels: UInt8[np.ndarray, "H W 3"]
    tokens: Int32[np.ndarray, " L"]
    condition: int | str
    title: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawing:
    """Images after each of the n maps drawn so far.

    Attributes:
      steps: images after 1, 2, ... n maps.
      tokens: tokens of these maps.
      num_maps: K, number of maps of finished images.
      settings: what was asked for.
      original: image that was edited or varied, if any.
    """

    steps: UInt8[np.ndarray, "B n H W 3"]
    tokens: Int32[np.ndarray, "B tokens"]
    num_maps: int
    settings: Settings
    original: Picture | None = None

    def picture(self, i: int, title: str) -> Picture:
        """Return image i as a picture; i = -1 is the original."""
        if i < 0 and self.original is not None:
            return self.original
        if not 0 <= i < len(self.tokens):
            raise BadSetting(f"There is no image {i + 1}: {len(self.tokens)} are drawn.")
        pixels, condition = self.steps[i, -1], self.settings.condition
        return Picture(pixels=pixels, tokens=self.tokens[i], condition=condition, title=title)


def no_condition(model: LoadedVAR) -> int | str:
    """Return the class that means "no class", or the empty prompt of a model trained on captions."""
    return "" if model.module.config.condition == "caption" else model.num_classes


def condition_images(condition: int | str, count: int) -> dict:
    """Return the arguments of a model's methods that give `count` images a class or a prompt."""
    if isinstance(condition, str):
        return {"prompt": [condition or None] * count}
    return {"labels": [condition] * count}


def read_per_map(name: str, text: str) -> tuple | None:
    """Parse one value per map, separated by commas; None if the text is empty.

    Raises:
      BadSetting: naming the option.
    """
    try:
        values = tuple((int if name == "top_k" else float)(word) for word in text.split(",") if text.strip())
    except ValueError as error:
        raise BadSetting(f"{name} for each map: {error}; give numbers separated by commas") from error
    return values or None


def read_settings(
    model: LoadedVAR,
    condition: int | str,
    seed: float,
    count: int,
    values: tuple[float, ...],
    per_map: tuple[str, ...],
    max_images: int,
) -> Settings:
    """Check the settings of the page.

    Args:
      model: model to draw from.
      condition: class or prompt; see `no_condition` for none.
      seed: seed, as the page's field of numbers gives it.
      count: number of images.
      values: options in the order of `PER_MAP`.
      per_map: the same options for each map as texts, which replace the values unless empty.
      max_images: largest number of images.

    Raises:
      ConfigError: naming the setting that is wrong.
    """
    options = dict(zip(PER_MAP, values, strict=True))
    for name, text in zip(PER_MAP, per_map, strict=True):
        options[name] = read_per_map(name, text) or options[name]
    if isinstance(options["guidance"], tuple):
        options["guidance_schedule"] = "ramp"  # the only one with a strength for each map
    is_whole = isinstance(seed, float) and seed.is_integer()
    with config_errors():
        if isinstance(condition, str):
            condition = condition.strip()
            model.conditions(**condition_images(condition, 1))
        else:
            condition = check_integer("class", condition, 0, model.num_classes)
        seed = check_integer("seed", int(seed) if is_whole else seed, 0, MAX_SEED)
        count = check_integer("number of images", count, 1, max_images)
        settings = Settings(
            condition=condition,
            seed=seed,
            count=count,
            options=dataclasses.replace(model.options, upto=None, **options),
        )
        settings.options.per_scale(Scales(model.scales), model.tokenizer.num_codes)
    return settings


def option_values(options: SamplingOptions) -> tuple[tuple, tuple[str, ...]]:
    """Return the options of a model as `values` and `per_map` of `read_settings`."""
    values, texts = [], []
    for name in PER_MAP:
        value = getattr(options, name)
        is_per_map = isinstance(value, tuple)
        values.append(value[-1] if is_per_map else value)
        texts.append(",".join(f"{x:g}" for x in value) if is_per_map else "")
    return tuple(values), tuple(texts)


def top_k_choices(model: LoadedVAR) -> list[tuple[str, int]]:
    """Return names and values of top-k to choose from: all codes, the model's own, and a few more."""
    own = model.options.top_k
    counts = {k for k in TOP_K if k < model.tokenizer.num_codes} | {
        *(own if isinstance(own, tuple) else (own,))
    }
    return [("all", 0), *((str(k), k) for k in sorted(counts - {0}))]


def draw(
    device: Device,
    model: LoadedVAR,
    settings: Settings,
    known: KnownTokens | None = None,
    original: Picture | None = None,
) -> Iterator[Drawing]:
    """Draw images, and yield them after each map.

    Args:
      device: the device.
      model: model to draw from.
      settings: checked settings.
      known: tokens [1, L] to keep in all images.
      original: image that they are of.
    """
    rows = 1 << (settings.count - 1).bit_length()  # few sizes, since each is compiled
    if known is not None:
        known = jax.tree.map(lambda x: np.repeat(x, rows, axis=0), known)
    options = settings.options
    statics = jax.tree.structure(options.per_scale(Scales(model.scales), model.tokenizer.num_codes))
    is_guided = settings.condition != no_condition(model)
    conditions = condition_images(settings.condition, rows)
    maps = model.stream(seed=settings.seed, known=known, **conditions, **dataclasses.asdict(options))
    steps: list[np.ndarray] = []
    for images, tokens in device.stream(maps, (id(model), rows, known is None, is_guided, statics)):
        steps.append(to_uint8(images[: settings.count]))
        yield Drawing(
            steps=np.stack(steps, axis=1),
            tokens=tokens[: settings.count],
            num_maps=len(model.scales),
            settings=settings,
            original=original,
        )


def edit(
    device: Device,
    model: LoadedVAR,
    picture: Picture,
    mask: Bool[np.ndarray, "H W"],
    settings: Settings,
    paste_back: bool,
) -> Iterator[Drawing]:
    """Draw the part of a picture under a mask again, and yield the images after each map.

    Args:
      device: the device.
      model: model to draw from.
      picture: image to edit.
      mask: True where to resample.
      settings: checked settings.
      paste_back: copy the pixels of the picture outside the mask.

    Raises:
      ConfigError: if the mask selects no token.
    """
    with config_errors():
        known = model.known_outside_mask(picture.tokens[None], mask)
    for drawing in draw(device, model, settings, known, picture):
        steps = np.where(mask[..., None], drawing.steps, picture.pixels) if paste_back else drawing.steps
        yield dataclasses.replace(drawing, steps=steps)


def vary(
    device: Device, model: LoadedVAR, picture: Picture, kept: int, settings: Settings
) -> Iterator[Drawing]:
    """Keep the first maps of a picture and draw the others, and yield the images after each map.

    Args:
      device: the device.
      model: model to draw from.
      picture: image to vary.
      kept: number of maps to keep.
      settings: checked settings; the seed is raised by one, since that of the picture would draw it again.

    Raises:
      ConfigError: if the model does not have so many maps.
    """
    with config_errors():
        known = model.known_before_scale(picture.tokens[None], kept)
    settings = dataclasses.replace(settings, seed=(settings.seed + 1) % (MAX_SEED + 1))
    return draw(device, model, settings, known, picture)


def encode(device: Device, model: LoadedVAR, pixels: UInt8[np.ndarray, "H W 3"], title: str) -> Picture:
    """Encode an uploaded image, whose class or prompt is unknown."""
    (tokens,) = device.call(model.tokenizer.encode, pixels[None].astype(np.float32) / 255)
    return Picture(pixels=pixels, tokens=tokens, condition=no_condition(model), title=title)


def decode_steps(device: Device, model: LoadedVAR, picture: Picture) -> UInt8[np.ndarray, "K H W 3"]:
    """Decode a picture after 1, 2, ... K maps."""
    return to_uint8(device.call(model.tokenizer.decode_steps, picture.tokens[None])[0])


def attention(
    device: Device, model: LoadedVAR, picture: Picture, position: int
) -> Float32[np.ndarray, "depth heads L"]:
    """Compute how much a position of a picture attends to every position.

    Raises:
      ConfigError: on a position outside the sequence, or a next-token transformer.
    """
    with config_errors():
        check_integer("cell", position, 0, model.tokenizer.num_tokens - 1)
        if not model.module.config.predicts_maps:
            raise BadSetting("Attention is shown for next-scale transformers only.")
    conditions = {"labels": None, **condition_images(picture.condition, 1)}
    return device.call(model.attention, picture.tokens[None], position=position, **conditions)[0]


def select_attention(
    weights: Float32[np.ndarray, "depth heads L"], layer: int, head: int
) -> Float32[np.ndarray, " L"]:
    """Return the weights of a layer and a head; -1 is the mean over all."""
    by_head = weights.mean(axis=0) if layer < 0 else weights[layer]
    return by_head.mean(axis=0) if head < 0 else by_head[head]


def warm_up(device: Device, model: LoadedVAR, settings: Settings, is_served: threading.Event) -> None:
    """Compile what the page runs with its first settings, in the order of its tabs.

    Args:
      device: the device.
      model: the model of the page.
      settings: its first settings.
      is_served: set when the page can be opened; the programs of its other tabs follow when there was time
        for a first drawing, which would wait for them.
    """
    *_, drawing = draw(device, model, settings)
    is_served.wait()
    time.sleep(FIRST_DRAWING_SECONDS)
    picture = drawing.picture(0, "")
    for _ in vary(device, model, picture, 0, settings):  # compiles what an edit takes, too
        pass
    encode(device, model, picture.pixels, "")
    decode_steps(device, model, picture)
    if model.module.config.predicts_maps:
        attention(device, model, picture, 0)
