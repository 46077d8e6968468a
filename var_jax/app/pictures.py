"""Pictures of the page as HTML and SVG: tiles of images, token maps, codebook use, attention."""

import base64
import html
import io
from collections.abc import Iterable, Sequence

import matplotlib
import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from var_jax.scales import Scales

MAX_NUMBERED_SIDE = 6  # side of the largest map whose cells show their code
UNSEEN = "#e5e7eb"  # of cells that a position cannot attend to


def png_url(pixels: UInt8[np.ndarray, "H W 3"]) -> str:
    """Encode an image as a data URL, so that the page needs no file."""
    content = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(content, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()


def tiles(
    images: UInt8[np.ndarray, "B H W 3"],
    captions: Sequence[str],
    indices: Iterable[int] | None = None,
    chosen: int | None = None,
) -> str:
    """Arrange images with captions in a grid that wraps.

    Args:
      images: images.
      captions: a text under each.
      indices: numbers of the images, which can be clicked then; None if they cannot.
      chosen: number of the image with a frame.
    """
    numbers = [None] * len(images) if indices is None else list(indices)
    cells = []
    for pixels, caption, i in zip(images, captions, numbers, strict=True):
        text = html.escape(caption, quote=True)
        figure = f'<img src="{png_url(pixels)}" alt="{text}"><span>{text}</span>'
        mark = ' aria-pressed="true"' if i is not None and i == chosen else ""
        button = f'<button type="button" data-index="{i}"{mark}>{figure}</button>'
        cells.append(f'<div class="tile">{figure}</div>' if i is None else button)
    return f'<div class="tiles">{"".join(cells)}</div>'


def code_colors(codebook: Float[np.ndarray, "V C"]) -> list[str]:
    """Return a color for each code, similar for similar codes: ranks on the first principal components."""
    centered = codebook - codebook.mean(axis=0)
    _, _, components = np.linalg.svd(centered, full_matrices=False)
    coordinates = centered @ components[:3].T
    ranks = coordinates.argsort(axis=0).argsort(axis=0) / max(len(codebook) - 1, 1)
    channels = (40 + 200 * ranks).astype(int)
    if channels.shape[1] < 3:
        channels = np.pad(channels, ((0, 0), (0, 3 - channels.shape[1])), constant_values=128)
    return [f"#{r:02x}{g:02x}{b:02x}" for r, g, b in channels]


def token_maps(
    tokens: Int[np.ndarray, " L"], scales: Scales, colors: Sequence[str], chosen: int | None = None
) -> str:
    """Draw the token maps, a color for each code; cells can be clicked.

    Args:
      tokens: tokens of an image.
      scales: schedule of the token maps.
      colors: color of each code (`code_colors`).
      chosen: position with a frame.
    """
    return _maps(scales, [colors[t] for t in tokens], [f"code {t}" for t in tokens], tokens, chosen)


def attention_maps(weights: Float[np.ndarray, " L"], scales: Scales, chosen: int) -> str:
    """Draw how much a position attends to the cells of all maps it sees; brightest is the largest weight.

    Args:
      weights: attention weights.
      scales: schedule of the token maps.
      chosen: the position, which gets a frame.
    """
    colors = matplotlib.colormaps["viridis"](weights / max(float(weights.max()), 1e-12), bytes=True)
    is_seen = scales.levels <= scales.levels[chosen]
    fills = [
        f"#{r:02x}{g:02x}{b:02x}" if seen else UNSEEN
        for (r, g, b, _), seen in zip(colors, is_seen, strict=True)
    ]
    titles = [f"weight {w:.3f}" if seen else "not seen" for w, seen in zip(weights, is_seen, strict=True)]
    return _maps(scales, fills, titles, None, chosen)


def _maps(scales, fills, titles, numbers, chosen) -> str:
    """Draw each map as an SVG of the same size; arguments have an entry for each position."""
    figures = []
    for k, (side, start) in enumerate(zip(scales.sides, scales.starts, strict=True)):
        cells = []
        for position in range(start, start + side * side):
            row, column = divmod(position - start, side)
            title = f"map {k + 1}, row {row + 1}, column {column + 1}: {titles[position]}"
            frame = ' class="chosen"' if position == chosen else ""
            cells.append(
                f'<rect x="{column}" y="{row}" width="1" height="1" fill="{fills[position]}"{frame} '
                f'data-index="{position}"><title>{title}</title></rect>'
            )
            if numbers is not None and side <= MAX_NUMBERED_SIDE:
                cells.append(f'<text x="{column + 0.5}" y="{row + 0.5}">{numbers[position]}</text>')
        svg = f'<svg viewBox="0 0 {side} {side}" role="img">{"".join(cells)}</svg>'
        figures.append(f'<div class="map">{svg}<span>map {k + 1}: {side} x {side}</span></div>')
    return f'<div class="maps">{"".join(figures)}</div>'


def codebook_use(tokens: Int[np.ndarray, " L"], num_codes: int, colors: Sequence[str]) -> str:
    """Draw a histogram of the codes of an image, a bar for each code in the order of the codebook."""
    counts = np.bincount(tokens, minlength=num_codes)
    used = np.flatnonzero(counts)
    width, height = 1000, 160
    bar = max(width / num_codes, 2.0)
    bars = "".join(
        f'<rect x="{code * width / num_codes:.2f}" y="{height * (1 - counts[code] / counts.max()):.2f}" '
        f'width="{bar:.2f}" height="{height * counts[code] / counts.max():.2f}" fill="{colors[code]}">'
        f"<title>code {code}: {counts[code]}</title></rect>"
        for code in used
    )
    svg = f'<svg viewBox="0 0 {width} {height}" preserveAspectRatio="none" role="img">{bars}</svg>'
    top = used[np.argsort(-counts[used], kind="stable")][:3]
    often = ", ".join(f"code {code} {counts[code]} times" for code in top)
    caption = f"{len(tokens)} tokens, {len(used)} of {num_codes} codes. Most often: {often}."
    return f'<div class="histogram">{svg}<span>{caption}</span></div>'


def additions(steps: UInt8[np.ndarray, "K H W 3"]) -> UInt8[np.ndarray, "K H W 3"]:
    """Compute what each map adds to the image: differences on gray, enlarged to the full range together.

    The first one is the image after the first map.
    """
    differences = np.diff(steps.astype(np.float32), axis=0)
    largest = max(float(np.abs(differences).max(initial=0)), 1.0)
    return np.concatenate([steps[:1], (127.5 + 127.5 * differences / largest).astype(np.uint8)])
