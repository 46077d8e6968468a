"""Edit an image without training: inpainting, outpainting, editing towards a class.

    python -m var_jax.tools.edit --workdir=runs/digits --image=digit.png --box=0,4,8,8 --label=3 --out=edit

Writes one PNG per edit, and `edit.png`: the image, the mask, the edits.
"""

import dataclasses

import numpy as np
from absl import app, flags
from etils import epath
from PIL import Image

from var_jax import cli
from var_jax.api import EDITING, LoadedVAR
from var_jax.images import image_grid, save_png, to_uint8
from var_jax.paths import as_path
from var_jax.tokenizer.resize import area_matrix
from var_jax.tools.image_files import UnusableImage, center_crop_resize, crop_box, open_image

FLAGS = flags.FLAGS


def center_crop_resize_mask(mask: np.ndarray, side: int) -> np.ndarray:
    """Crop and resize a mask like its image, without losing thin strokes.

    Args:
      mask: bool [h, w], True where to resample.
      side: side of the model's images.

    Returns:
      bool [side, side], True in each pixel that a masked pixel overlaps.
    """
    left, top, right, bottom = crop_box(mask.shape[::-1])
    matrix = area_matrix(right - left, side)
    return matrix @ mask[top:bottom, left:right].astype(np.float32) @ matrix.T > 0


def mask_from_file(path: str, like: Image.Image, side: int) -> np.ndarray:
    """Read a mask bool [side, side] from an image file, True where it is white.

    Args:
      path: file of the mask.
      like: image that the mask belongs to.
      side: side of the model's images.

    Raises:
      UnusableImage: if the sizes of mask and image differ, or the mask selects no pixel.
    """
    mask = open_image(path, "L")
    if mask.size != like.size:
        raise UnusableImage(
            f"{path} is {mask.width} x {mask.height}, but the image is {like.width} x {like.height}: the "
            "mask must have the size of the image, and be white where to resample"
        )
    mask = center_crop_resize_mask(np.asarray(mask) > 127, side)
    if not mask.any():
        raise UnusableImage(f"{path} is black in the whole center crop: make it white where to resample")
    return mask


def mask_from_box(box: list[int], like: Image.Image, side: int) -> np.ndarray:
    """Return a mask bool [side, side] that is True inside a box.

    Args:
      box: left, top, right, bottom in pixels of the image.
      like: image that the box belongs to.
      side: side of the model's images.

    Raises:
      UnusableImage: if the box is empty, or not inside the image or its center crop.
    """
    left, top, right, bottom = box if len(box) == 4 else (0, 0, 0, 0)
    if not (0 <= left < right <= like.width and 0 <= top < bottom <= like.height):
        raise UnusableImage(
            f"--box={','.join(map(str, box))}: must be left,top,right,bottom inside the image, "
            f"{like.width} x {like.height}"
        )
    mask = np.zeros((like.height, like.width), bool)
    mask[top:bottom, left:right] = True
    mask = center_crop_resize_mask(mask, side)
    if not mask.any():
        raise UnusableImage(f"--box={','.join(map(str, box))} is outside the center crop of the image")
    return mask


def edit(model: LoadedVAR, out: epath.Path) -> None:
    """Edit the image of the flags, and write the edits and a grid."""
    original = open_image(FLAGS.image, "RGB")
    if FLAGS.mask:
        mask = mask_from_file(FLAGS.mask, original, model.image_size)
    else:
        mask = mask_from_box(cli.numbers("box", int), original, model.image_size)
    image = np.asarray(center_crop_resize(original, model.image_size, FLAGS.image), np.float32) / 255
    images = np.repeat(image[None], FLAGS.num, axis=0)
    towards = cli.condition(model, "label", FLAGS.num)
    # A published file has no options of its own, so use those of the published demonstration.
    defaults = {} if FLAGS.workdir else EDITING
    options = dataclasses.asdict(cli.options(model, **defaults))
    edits = model.inpaint(images, mask, seed=FLAGS.seed, paste_back=FLAGS.paste_back, **towards, **options)
    for i, pixels in enumerate(to_uint8(edits)):
        save_png(Image.fromarray(pixels), out / f"edit_{i:03d}.png")
    mask_image = np.broadcast_to(mask[..., None], image.shape).astype(np.float32)
    grid = np.concatenate([image[None], mask_image[None], edits])
    save_png(image_grid(grid, columns=min(len(grid), 10)), out / "edit.png")
    print(f"{len(edits)} images, {mask.mean():.0%} of them resampled: {out}/edit_000.png, ..., edit.png")


def main(_):
    if bool(FLAGS.mask) == bool(FLAGS.box):
        raise app.UsageError("give either --mask=FILE or --box=left,top,right,bottom")
    model = cli.load()
    edit(model, as_path(FLAGS.out or "edit"))


if __name__ == "__main__":
    cli.define_model_flags()
    cli.define_sampling_flags()
    flags.DEFINE_string("image", None, "Image file", required=True)
    flags.DEFINE_string(
        "mask", None, "Mask file of the same size, white where to resample and black elsewhere"
    )
    flags.DEFINE_list("box", None, "left,top,right,bottom in pixels of the image, instead of --mask")
    flags.DEFINE_list("label", None, "Class or caption to edit towards; `none`, the default, for no class")
    flags.DEFINE_integer("num", 4, "Number of edits", lower_bound=1)
    flags.DEFINE_bool("paste_back", False, "Copy the pixels of the input outside the mask")
    cli.run(main)
