"""Makes a part of an image anew: in-painting, out-painting, editing towards a class, without training.

    python -m var_jax.tools.edit --workdir=runs/digits --image=digit.png --box=0,4,8,8 --label=3 --out=edit

Writes one PNG an edit, and `edit.png`: before, mask, after.  This is a script; no module imports it.
"""

import numpy as np
from absl import app, flags
from etils import epath
from PIL import Image

from var_jax import cli
from var_jax.api import EDITING
from var_jax.images import image_grid, save_png, to_uint8
from var_jax.paths import as_path
from var_jax.tokenizer.resize import area_matrix
from var_jax.tools.image_files import UnusableImage, crop_box, fitted, open_image

FLAGS = flags.FLAGS


def fitted_mask(mask: np.ndarray, side: int) -> np.ndarray:
    """Cut and resize a mask like its image; no masked pixel is lost, however thin the mask is.

    Args:
      mask: bool [h, w], True where to make anew.
      side: of the model's images.

    Returns:
      bool [side, side], True wherever a masked pixel falls.
    """
    left, top, right, bottom = crop_box(mask.shape[::-1])
    matrix = area_matrix(right - left, side)
    return matrix @ mask[top:bottom, left:right].astype(np.float32) @ matrix.T > 0


def mask_from_file(path: str, like: Image.Image, side: int) -> np.ndarray:
    """bool [side, side], True where a mask image is white.

    Raises:
      UnusableImage: if it is not of the size of the image that it belongs to, or is all of one colour.
    """
    mask = open_image(path, "L")
    if mask.size != like.size:
        raise UnusableImage(
            f"{path} is {mask.width} x {mask.height}, but the image is {like.width} x {like.height}: a mask "
            "must be as large as its image, white where to make anew"
        )
    mask = fitted_mask(np.asarray(mask) > 127, side)
    if not mask.any():
        raise UnusableImage(f"{path} is black all over the square that is cut out: nothing to make anew")
    return mask


def mask_from_box(box: list[int], like: Image.Image, side: int) -> np.ndarray:
    """bool [side, side], True inside left, top, right, bottom (pixels of the given image).

    Raises:
      UnusableImage: if that is no box inside the image.
    """
    left, top, right, bottom = box if len(box) == 4 else (0, 0, 0, 0)
    if not (0 <= left < right <= like.width and 0 <= top < bottom <= like.height):
        raise UnusableImage(
            f"--box={','.join(map(str, box))}: must be left,top,right,bottom inside the image, "
            f"{like.width} x {like.height}"
        )
    mask = np.zeros((like.height, like.width), bool)
    mask[top:bottom, left:right] = True
    mask = fitted_mask(mask, side)
    if not mask.any():
        raise UnusableImage(f"--box={','.join(map(str, box))} is outside the square that is cut out")
    return mask


def edit(model, out: epath.Path) -> None:
    side = model.tokenizer.module.config.image_size
    picture = open_image(FLAGS.image, "RGB")
    if FLAGS.mask:
        mask = mask_from_file(FLAGS.mask, picture, side)
    else:
        mask = mask_from_box(cli.numbers("box", int), picture, side)
    image = np.asarray(fitted(picture, side, FLAGS.image), np.float32) / 255
    images = np.repeat(image[None], FLAGS.num, axis=0)
    labels = None
    if FLAGS.label is not None:
        labels = np.repeat(cli.labels(model, "label", most=1), FLAGS.num)
    # A published file has no options of its own: then those of the published demonstration.
    defaults = {} if FLAGS.workdir else EDITING
    options = cli.as_keywords(cli.options(model, **defaults))
    made = model.inpaint(images, mask, labels, FLAGS.seed, paste_back=FLAGS.paste_back, **options)
    for i, after in enumerate(to_uint8(made)):
        save_png(Image.fromarray(after), out / f"edit_{i:03d}.png")
    shown = np.broadcast_to(mask[..., None], image.shape).astype(np.float32)
    grid = np.concatenate([image[None], shown[None], made])
    save_png(image_grid(grid, columns=min(len(grid), 10)), out / "edit.png")
    print(f"{len(made)} images, {mask.mean():.0%} of them made anew: {out}/edit_000.png, ..., edit.png")


def main(_):
    if bool(FLAGS.mask) == bool(FLAGS.box):
        raise app.UsageError("give either --mask=FILE or --box=left,top,right,bottom")
    model = cli.load()
    edit(model, as_path(FLAGS.out or "edit"))


if __name__ == "__main__":
    cli.define_model_flags()
    cli.define_sampling_flags()
    flags.DEFINE_string("image", None, "The image", required=True)
    flags.DEFINE_string("mask", None, "A black and white image of the same size, white where to make anew")
    flags.DEFINE_list("box", None, "left,top,right,bottom in pixels of the image, instead of a mask")
    flags.DEFINE_list("label", None, "Class to edit towards; `none`, the default, for no class")
    flags.DEFINE_integer("num", 4, "Edits to make", lower_bound=1)
    flags.DEFINE_bool("paste_back", False, "Put the pixels of the input back outside the mask")
    cli.run(main)
