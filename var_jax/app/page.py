"""Layout of the page, and which event calls which handler."""

import gradio as gr

from var_jax.api import LoadedVAR
from var_jax.app.drawing import FIRST_COUNT, PER_MAP, no_condition, option_values, top_k_choices
from var_jax.app.handlers import Handlers, condition_name
from var_jax.app.uploads import FORMATS
from var_jax.sampling.options import MAX_SEED

MAX_PIXELATED = 64  # side of the largest images that are shown with sharp pixels
MAX_WAITING = 40  # requests in the queue
MAX_VISITORS = 200  # whose images are kept in memory
MAX_VISITOR_BYTES = 4e9  # of all their images, after each map; at least 10 visitors are kept
DRAWINGS = 5  # a visitor has: generated, edited, varied, two compared
FILE_SECONDS = 600  # that an uploaded file is kept, if the upload was not finished
# Of events that compute, one at a time; and of those that a program cannot call.
ON_DEVICE = dict(concurrency_id="device", concurrency_limit=1, show_progress="minimal")
HIDDEN = dict(show_progress="hidden", api_visibility="private")

CSS = """
.tiles, .maps { display: grid; gap: 10px; grid-template-columns: repeat(auto-fill, minmax(104px, 1fr)); }
.tiles .tile, .tiles button { padding: 4px; border-radius: 8px; border: 2px solid transparent;
  background: none; font: inherit; text-align: center; height: auto; }
.tiles button, .tiles .tile { margin: 0; }
.tiles button { cursor: pointer; }
.tiles button:hover, .tiles button:focus-visible { border-color: var(--border-color-accent); }
.tiles button[aria-pressed] { border-color: var(--color-accent); }
.tiles img { width: 100%; display: block; border-radius: 4px; }
.tiles span, .maps span, .histogram span { display: block; font-size: 0.8rem; text-align: center;
  color: var(--body-text-color); opacity: 0.75; margin-top: 4px; }
.maps svg { width: 100%; display: block; border-radius: 4px; }
.maps rect { stroke: var(--background-fill-primary); stroke-width: 0.03; cursor: pointer; }
.maps rect.chosen { stroke: #f43f5e; stroke-width: 0.14; }
.maps text { font-size: 0.3px; text-anchor: middle; dominant-baseline: central; pointer-events: none;
  fill: white; paint-order: stroke; stroke: #0008; stroke-width: 0.05px; }
.histogram svg { width: 100%; height: 120px; display: block;
  border-bottom: 1px solid var(--border-color-primary); }
.painter .canvas { position: relative; max-width: 420px; }
.painter img { width: 100%; display: block; border-radius: 4px; background: var(--background-fill-secondary);
  aspect-ratio: 1; }
.painter canvas { position: absolute; inset: 0; width: 100%; height: 100%; opacity: 0.65; touch-action: none;
  image-rendering: pixelated; cursor: crosshair; }
.painter .tools { display: flex; gap: 12px; align-items: center; margin-top: 8px; }
#current .tiles { grid-template-columns: minmax(0, 200px); justify-content: center; }
"""
PIXELATED = ".tiles img, .painter img { image-rendering: pixelated; }"

# Clicks on tiles and cells.
SELECT_JS = """
element.addEventListener("click", (event) => {
  const cell = event.target.closest("[data-index]");
  if (!cell) return;
  element.querySelectorAll("[aria-pressed]").forEach((other) => other.removeAttribute("aria-pressed"));
  cell.setAttribute("aria-pressed", "true");
  trigger("select", {index: Number(cell.dataset.index)});
});
"""
# The value is the mask as a PNG: pixels of the image that the brush covers, on a transparent ground.
PAINTER_HTML = """
<div class="painter">
  <div class="canvas">
    <img src="${image}" alt="Image to edit"><canvas width="SIDE" height="SIDE"></canvas>
  </div>
  <div class="tools">
    <label>Brush <input type="range" min="1" max="SIDE" value="BRUSH"></label>
    <button type="button" class="clear sm secondary">Clear</button>
  </div>
</div>
"""
PAINTER_JS = """
const find = (selector) => element.querySelector(selector);
let last = null;
const place = (event) => {
  const canvas = find("canvas"), box = canvas.getBoundingClientRect();
  return [(event.clientX - box.left) / box.width * canvas.width,
    (event.clientY - box.top) / box.height * canvas.height];
};
const paint = ([x0, y0], [x1, y1]) => {
  const canvas = find("canvas"), context = canvas.getContext("2d", {willReadFrequently: true});
  const radius = find("input").value / 2, length = (x1 - x0) ** 2 + (y1 - y0) ** 2;
  const pixels = context.getImageData(0, 0, canvas.width, canvas.height);
  for (let y = 0; y < canvas.height; y++) {
    for (let x = 0; x < canvas.width; x++) {
      const along = length ? ((x + 0.5 - x0) * (x1 - x0) + (y + 0.5 - y0) * (y1 - y0)) / length : 0;
      const nearest = Math.min(1, Math.max(0, along));
      const distance = Math.hypot(x + 0.5 - x0 - nearest * (x1 - x0), y + 0.5 - y0 - nearest * (y1 - y0));
      if (distance > radius && (x !== Math.floor(x1) || y !== Math.floor(y1))) continue;
      pixels.data.set([255, 200, 0, 255], 4 * (y * canvas.width + x));
    }
  }
  context.putImageData(pixels, 0, 0);
};
const clear = () => {
  const canvas = find("canvas");
  canvas.getContext("2d").clearRect(0, 0, canvas.width, canvas.height);
};
element.addEventListener("pointerdown", (event) => {
  if (event.target.tagName !== "CANVAS") return;
  event.target.setPointerCapture(event.pointerId);
  last = place(event);
  paint(last, last);
});
element.addEventListener("pointermove", (event) => {
  if (!last) return;
  const next = place(event);
  paint(last, next);
  last = next;
});
const end = () => {
  if (!last) return;
  last = null;
  props.value = find("canvas").toDataURL("image/png");
};
element.addEventListener("pointerup", end);
element.addEventListener("pointercancel", end);
element.addEventListener("click", (event) => {
  if (!event.target.closest(".clear")) return;
  clear();
  props.value = "";
});
watch("image", clear);
"""


def build_page(handlers: Handlers) -> gr.Blocks:
    """Lay out the page and connect its events."""
    model = handlers.model
    with gr.Blocks(
        title="var_jax", analytics_enabled=False, delete_cache=(FILE_SECONDS, FILE_SECONDS)
    ) as page:
        gr.Markdown(f"## var_jax\n{_summary(handlers)}")
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                basics, options = _settings_panel(handlers)
                current, view, upload = gr.State(None), *_current_image(handlers)
            with gr.Column(scale=3, min_width=320), gr.Tabs():
                with gr.Tab("Generate"):
                    generate_button = gr.Button("Generate", variant="primary")
                    generated = _results(handlers, "generated")
                with gr.Tab("Edit"):
                    gr.Markdown("Paint over the part of the current image to draw again.")
                    with gr.Row():
                        with gr.Column(min_width=280):
                            painter = _painter(model)
                            paste_back = gr.Checkbox(False, label="Keep the pixels outside the mask exactly")
                            edit_button = gr.Button("Draw the painted part again", variant="primary")
                        with gr.Column(min_width=280):
                            edited = _results(handlers, "edited")
                with gr.Tab("Vary"):
                    last = len(model.scales) - 1
                    kept = gr.Slider(
                        0, last, value=min(2, last), step=1, label="Maps of the current image to keep"
                    )
                    vary_button = gr.Button("Draw variations", variant="primary")
                    varied = _results(handlers, "varied")
                with gr.Tab("Look inside"):
                    _inside(handlers, current)
                with gr.Tab("Compare"):
                    _compare(handlers, basics, options)
        shown = [current, view, painter]
        fields = [*basics, *options]
        runs = (
            (generate_button, handlers.generate, fields, generated, "generate"),
            (edit_button, handlers.edit, [current, painter, paste_back, *fields], edited, "edit"),
            (vary_button, handlers.vary, [current, kept, *fields], varied, "vary"),
        )
        for button, handler, inputs, results, name in runs:
            event = button.click(handler, inputs, results, api_name=name, **ON_DEVICE)
            tiles, _, result = results
            tiles.select(handlers.pick, result, shown, **HIDDEN)
            if name == "generate":
                event.success(
                    handlers.pick_first, result, shown, show_progress="hidden", api_name="choose_first"
                )
        upload.upload(handlers.upload, upload, shown, api_name="upload", **ON_DEVICE)
    page.queue(max_size=MAX_WAITING, default_concurrency_limit=4)
    return page


def launch(page: gr.Blocks, handlers: Handlers, host: str, port: int | None) -> str:
    """Start the server in a thread of its own, and return its address.

    Raises:
      OSError: if the port is not free.
    """
    # It gives up after 3 seconds, too early on a busy machine; `launch` has reached the server before.
    gr.networking.url_ok = lambda url: True
    fonts = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]  # of the visitor, not of the internet
    _, url, _ = page.launch(
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        ssr_mode=False,
        show_error=False,
        enable_monitoring=False,
        run_history=False,
        footer_links=[],
        server_name=host,
        server_port=port,
        state_session_capacity=max_visitors(handlers.model, handlers.max_images),
        max_file_size=handlers.max_upload_bytes,
        theme=gr.themes.Default(font=fonts[0], font_mono=fonts[1]),
        css=CSS + (PIXELATED if handlers.model.image_size <= MAX_PIXELATED else ""),
    )
    return url


def max_visitors(model: LoadedVAR, max_images: int) -> int:
    """Return the number of visitors whose images are kept in memory."""
    drawing_bytes = max_images * len(model.scales) * 3 * model.image_size**2
    return min(MAX_VISITORS, max(10, int(MAX_VISITOR_BYTES / (DRAWINGS * drawing_bytes))))


def _summary(handlers: Handlers) -> str:
    model, name = handlers.model, next(iter(handlers.models))
    sides = ", ".join(map(str, model.scales))
    config = model.module.config
    conditions = f"{len(config.vocabulary)} words" if config.vocabulary else f"{model.num_classes} classes"
    return (
        f"**{name}**: images of {model.image_size} x {model.image_size} pixels, drawn coarse to fine in "
        f"{len(model.scales)} token maps of side {sides}. {conditions}, depth {model.depth}."
    )


def _settings_panel(handlers: Handlers) -> tuple[list, list]:
    """Add the settings of all tabs; return the fields condition, seed, count, and those of the options."""
    model = handlers.model
    none = no_condition(model)
    if isinstance(none, str):
        words = ", ".join(model.module.config.vocabulary)
        condition = gr.Textbox(none, label="Prompt; empty for none", info=f"Words: {words}", max_lines=2)
    else:
        classes = [(condition_name(model, label), label) for label in (*range(model.num_classes), none)]
        condition = gr.Dropdown(classes, value=0, label="Class")
    seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED)
    new_seed = gr.Button("New seed", size="sm")
    new_seed.click(None, None, seed, js=f"() => Math.floor(Math.random() * {MAX_SEED + 1})", **HIDDEN)
    first = min(FIRST_COUNT, handlers.max_images)
    count = gr.Slider(1, max(handlers.max_images, 2), value=first, step=1, label="Number of images")
    with gr.Accordion("Sampling options", open=False):
        options = _option_fields(model)
    return [condition, seed, count], options


def _option_fields(model: LoadedVAR) -> list:
    """Add the sampling options with the defaults of a model; return their fields, in the order of PER_MAP."""
    (guidance, temperature, top_k, top_p), texts = option_values(model.options)
    values = [
        gr.Slider(0, max(10, guidance), value=guidance, step=0.1, label="Guidance"),
        gr.Slider(0.1, max(3, temperature), value=temperature, step=0.05, label="Temperature"),
        gr.Dropdown(top_k_choices(model), value=top_k, label="Top-k: likeliest codes to choose from"),
        gr.Slider(0, 1, value=top_p, step=0.01, label="Top-p: probability to choose from (0: all)"),
    ]
    with gr.Accordion("One value for each map", open=any(texts)):
        hint = f"{len(model.scales)} numbers, as " + ",".join(str(k) for k in range(len(model.scales)))
        names = [name.replace("_", "-").capitalize() for name in PER_MAP]
        per_map = [
            gr.Textbox(text, label=f"{name} for each map", placeholder=hint, max_lines=1)
            for name, text in zip(names, texts, strict=True)
        ]
    return [*values, *per_map]


def _current_image(handlers: Handlers) -> tuple[gr.HTML, gr.UploadButton]:
    """Add the view of the current image, and the button to upload one."""
    gr.Markdown("**Current image**, for Edit, Vary and Look inside. Click a drawn image to choose it.")
    view = gr.HTML("<p>None yet.</p>", elem_id="current")
    types = [".png", ".jpg", ".jpeg", ".webp"]
    limit = f"{handlers.max_upload_bytes / 1e6:g} MB"
    upload = gr.UploadButton("Upload an image", file_types=types, type="filepath", size="sm")
    gr.Markdown(f"<small>{', '.join(FORMATS)}, up to {limit}; cut to a square in the middle.</small>")
    return view, upload


def _results(handlers: Handlers, name: str) -> tuple[gr.HTML, gr.Slider, gr.State]:
    """Add tiles of drawn images, the slider over the maps, and the drawing that they show."""
    num_maps = len(handlers.model.scales)
    tiles = gr.HTML(js_on_load=SELECT_JS, elem_id=name)
    slider = gr.Slider(1, max(num_maps, 2), value=num_maps, step=1, label="Images after map")
    result = gr.State(None)
    slider.input(handlers.show_map, [slider, result], tiles, trigger_mode="always_last", **HIDDEN)
    return tiles, slider, result


def _painter(model: LoadedVAR) -> gr.HTML:
    """Add the image with a canvas to paint the mask on."""
    side = model.image_size
    blank = "data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw=="
    return gr.HTML(
        "",
        html_template=PAINTER_HTML.replace("SIDE", str(side)).replace("BRUSH", str(max(2, side // 5))),
        js_on_load=PAINTER_JS,
        elem_id="painter",
        image=blank,
    )


def _inside(handlers: Handlers, current: gr.State) -> None:
    """Add the tab Look inside."""
    model = handlers.model
    button = gr.Button("Look into the current image", variant="primary")
    picture, attention = gr.State(None), gr.State(None)
    gr.Markdown("### Token maps\nA color for each code; similar codes have similar colors.")
    maps = gr.HTML(js_on_load=SELECT_JS, elem_id="token_maps")
    gr.Markdown("### Attention\nHow much a cell attends to the cells of its own and the coarser maps.")
    with gr.Row():
        mean = ("mean", -1)
        layers = [mean, *((str(i + 1), i) for i in range(model.depth))]
        heads = [mean, *((str(i + 1), i) for i in range(model.module.config.num_heads))]
        layer = gr.Dropdown(layers, value=-1, label="Layer", min_width=120)
        head = gr.Dropdown(heads, value=-1, label="Head", min_width=120)
    attention_maps = gr.HTML(elem_id="attention")
    gr.Markdown("### Images after each map")
    steps = gr.HTML(elem_id="steps")
    gr.Markdown("### What each map adds\nGray is no change.")
    additions = gr.HTML(elem_id="additions")
    gr.Markdown("### Codebook use")
    use = gr.HTML(elem_id="codebook_use")
    outputs = [picture, maps, steps, additions, use, attention, attention_maps]
    button.click(handlers.look_inside, current, outputs, api_name="look_inside", **ON_DEVICE)
    maps.select(
        handlers.attend,
        [picture, layer, head],
        [maps, attention, attention_maps],
        api_visibility="private",
        **ON_DEVICE,
    )
    for field in (layer, head):
        field.change(handlers.show_attention, [attention, layer, head], attention_maps, **HIDDEN)


def _compare(handlers: Handlers, basics: list, options: list) -> None:
    """Add the tab Compare."""
    names = list(handlers.models)
    gr.Markdown("Two models, or two settings of one, with the same class or prompt, and seed.")
    button = gr.Button("Compare", variant="primary")
    with gr.Row():
        with gr.Column(min_width=280):
            left = gr.Dropdown(names, value=names[0], label="Left model")
            gr.Markdown("With the sampling options of the settings.")
        with gr.Column(min_width=280):
            right = gr.Dropdown(names, value=names[-1], label="Right model")
            with gr.Accordion("Sampling options of the right side", open=False):
                right_options = _option_fields(handlers.models[names[-1]])
    with gr.Row():
        left_tiles, right_tiles = (gr.HTML(elem_id=side, min_width=280) for side in ("left", "right"))
    num_maps = max(len(model.scales) for model in handlers.models.values())
    slider = gr.Slider(1, max(num_maps, 2), value=num_maps, step=1, label="Images after map")
    results = gr.State(None)
    tiles = [left_tiles, right_tiles]
    fields = [left, right, *basics, *options, *right_options]
    button.click(handlers.compare, fields, [*tiles, slider, results], api_name="compare", **ON_DEVICE)
    slider.input(handlers.show_map_of_both, [slider, results], tiles, trigger_mode="always_last", **HIDDEN)
