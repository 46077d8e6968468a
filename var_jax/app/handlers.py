"""What happens on the page: values of its fields to the values to show, for one visitor at a time."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path

import gradio as gr
import numpy as np

from var_jax.api import LoadedVAR
from var_jax.app import drawing, pictures, uploads
from var_jax.app.device import Device
from var_jax.app.drawing import PER_MAP, BadSetting, Drawing, Picture, Settings
from var_jax.errors import UserError
from var_jax.scales import Scales

NO_IMAGE = "There is no image yet: press Generate, or upload one."
BUG = "This did not work, because of an error in the program. The log of the server has the details."


def shows_errors(handler):
    """Show the message of a UserError to the visitor; log any other error with its traceback."""

    @functools.wraps(handler)
    def wrapper(*args, **kwargs):
        try:
            yield from handler(*args, **kwargs)
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from error
        except Exception as error:
            raise gr.Error(BUG) from error  # gradio logs the traceback

    return wrapper


@dataclasses.dataclass(frozen=True, kw_only=True)
class Handlers:
    """Event handlers; generators, each of which yields the values of its outputs.

    Attributes:
      models: models to choose from by name; the first one draws on all tabs.
      device: the device that they share.
      max_images: largest number of images of a request.
      max_upload_bytes: largest size of an uploaded file.
    """

    models: Mapping[str, LoadedVAR]
    device: Device
    max_images: int
    max_upload_bytes: int

    @property
    def model(self) -> LoadedVAR:
        """Model of all tabs but Compare."""
        return next(iter(self.models.values()))

    @property
    def scales(self) -> Scales:
        """Schedule of the token maps of `model`."""
        return Scales(self.model.scales)

    @functools.cached_property
    def colors(self) -> list[str]:
        """Color of each code of `model`."""
        return pictures.code_colors(np.asarray(self.model.networks.quantizer.codes, np.float32))

    def _settings(
        self, model: LoadedVAR, condition: int | str, seed: float, count: int, *options
    ) -> Settings:
        """Check the fields of the page; "no class" is that of `model`."""
        if condition == drawing.no_condition(self.model):
            condition = drawing.no_condition(model)
        values, per_map = options[: len(PER_MAP)], options[len(PER_MAP) :]
        return drawing.read_settings(model, condition, seed, count, values, per_map, self.max_images)

    @shows_errors
    def generate(self, *fields) -> Iterator[tuple]:
        """Yield tiles, number of maps and drawing after each map."""
        settings = self._settings(self.model, *fields)
        for result in drawing.draw(self.device, self.model, settings):
            yield drawing_tiles(result), result.steps.shape[1], result

    @shows_errors
    def edit(self, picture: Picture | None, painting: str, paste_back: bool, *fields) -> Iterator[tuple]:
        """Yield tiles, number of maps and drawing after each map, with the painted part drawn again."""
        settings, picture = self._settings(self.model, *fields), existing(picture)
        mask = uploads.mask_from_painting(painting, self.model.image_size)
        for result in drawing.edit(self.device, self.model, picture, mask, settings, paste_back):
            yield drawing_tiles(result), result.steps.shape[1], result

    @shows_errors
    def vary(self, picture: Picture | None, kept: int, *fields) -> Iterator[tuple]:
        """Yield tiles, number of maps and drawing after each map, with the first maps kept."""
        settings, picture = self._settings(self.model, *fields), existing(picture)
        for result in drawing.vary(self.device, self.model, picture, kept, settings):
            yield drawing_tiles(result), result.steps.shape[1], result

    @shows_errors
    def compare(
        self, left: str, right: str, condition: int | str, seed: float, count: int, *options
    ) -> Iterator[tuple]:
        """Yield the tiles of both sides, number of maps and both drawings, with one seed, after each map."""
        half = len(options) // 2
        sides = []
        for name, fields in ((left, options[:half]), (right, options[half:])):
            model = self.models[name]
            settings = self._settings(model, condition, seed, count, *fields)
            sides.append(drawing.draw(self.device, model, settings))
        latest: tuple[Drawing | None, ...] = (None, None)
        for results in itertools.zip_longest(*sides):
            latest = tuple(new or old for new, old in zip(results, latest, strict=True))
            num_maps = max(result.steps.shape[1] for result in latest)
            yield *map(drawing_tiles, latest), num_maps, latest

    @shows_errors
    def show_map(self, num_maps: int, result: Drawing | None) -> Iterator[str]:
        """Yield the tiles of a drawing after some maps; nothing before there is one."""
        yield gr.skip() if result is None else drawing_tiles(result, num_maps)

    @shows_errors
    def show_map_of_both(self, num_maps: int, results: tuple[Drawing, Drawing] | None) -> Iterator[tuple]:
        """Yield the tiles of both sides after some maps; nothing before there are any."""
        yield (gr.skip(),) * 2 if results is None else tuple(drawing_tiles(r, num_maps) for r in results)

    @shows_errors
    def pick_first(self, result: Drawing | None) -> Iterator[tuple]:
        """Make the first image of a drawing the current image."""
        yield self._current(existing(result), 0)

    @shows_errors
    def pick(self, result: Drawing | None, event: gr.EventData) -> Iterator[tuple]:
        """Make the image that was clicked the current image."""
        yield self._current(existing(result), int(event.index))

    @shows_errors
    def upload(self, path: str) -> Iterator[tuple]:
        """Make an uploaded image the current image, and delete the file."""
        data = Path(path).read_bytes()
        Path(path).unlink(missing_ok=True)
        pixels = uploads.image_from_upload(data, self.model.image_size, self.max_upload_bytes)
        yield show_picture(drawing.encode(self.device, self.model, pixels, "uploaded image"))

    def _current(self, result: Drawing, i: int) -> tuple:
        """Return the outputs that show image i of a drawing as the current image."""
        settings = result.settings
        name = condition_name(self.model, settings.condition)
        return show_picture(result.picture(i, f"{name}, seed {settings.seed}, image {i + 1}"))

    @shows_errors
    def look_inside(self, picture: Picture | None) -> Iterator[tuple]:
        """Yield the picture, its token maps, images after each map, additions, codebook use; no attention."""
        picture = existing(picture)
        steps = drawing.decode_steps(self.device, self.model, picture)
        names = [f"map {k + 1}" for k in range(len(steps))]
        yield (
            picture,
            pictures.token_maps(picture.tokens, self.scales, self.colors),
            pictures.tiles(steps, [f"after {name}" for name in names]),
            pictures.tiles(pictures.additions(steps), [f"{name} adds" for name in names]),
            pictures.codebook_use(picture.tokens, self.model.tokenizer.num_codes, self.colors),
            None,
            "<p>Click a cell of the token maps.</p>",
        )

    @shows_errors
    def attend(self, picture: Picture | None, layer: int, head: int, event: gr.EventData) -> Iterator[tuple]:
        """Yield token maps with the clicked cell, its attention weights and their picture."""
        picture, position = existing(picture), int(event.index)
        weights = drawing.attention(self.device, self.model, picture, position)
        yield (
            pictures.token_maps(picture.tokens, self.scales, self.colors, position),
            (weights, position),
            self._attention_picture(weights, position, layer, head),
        )

    @shows_errors
    def show_attention(self, attention: tuple | None, layer: int, head: int) -> Iterator[str]:
        """Yield the attention of another layer or head; nothing before a cell was clicked."""
        if attention is not None:
            weights, position = attention
            yield self._attention_picture(weights, position, layer, head)
        else:
            yield gr.skip()

    def _attention_picture(self, weights: np.ndarray, position: int, layer: int, head: int) -> str:
        selected = drawing.select_attention(weights, layer, head)
        return pictures.attention_maps(selected, self.scales, position)


def existing(value):
    """Return a value of the visitor's state.

    Raises:
      BadSetting: if there is none yet.
    """
    if value is None:
        raise BadSetting(NO_IMAGE)
    return value


def condition_name(model: LoadedVAR, condition: int | str) -> str:
    """Return what the page calls a class; a prompt is its own name."""
    if isinstance(condition, str):
        return condition or "no prompt"
    if condition == model.num_classes:
        return "no class"
    name = model.class_names[condition] if model.class_names else str(condition)
    return name if name == str(condition) else f"{condition}: {name}"


def drawing_tiles(result: Drawing, num_maps: int | None = None) -> str:
    """Return the images of a drawing after some maps as tiles, after the original if there is one."""
    drawn = result.steps.shape[1]
    shown = min(num_maps or drawn, drawn)
    images = result.steps[:, shown - 1]
    captions = [str(i + 1) for i in range(len(images))]
    indices = list(range(len(images)))
    if result.original is not None:
        images = np.concatenate([result.original.pixels[None], images])
        captions, indices = ["original", *captions], [-1, *indices]
    return pictures.tiles(images, captions, indices) + f"<p>After map {shown} of {result.num_maps}</p>"


def show_picture(picture: Picture) -> tuple:
    """Return the current image, its view, and the painter with an empty mask."""
    url = pictures.png_url(picture.pixels)
    view = pictures.tiles(picture.pixels[None], [picture.title])
    return picture, view, gr.HTML(value="", image=url)
