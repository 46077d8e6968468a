"""Web page to generate, edit, vary, look inside and compare images of a model.

    python -m var_jax.app --workdir=runs/digits
    python -m var_jax.app --workdir=runs/digits --compare=runs/other
    python -m var_jax.app --tokenizer=vae_ch160v4096z32.pth --checkpoint=var_d16.pth

One process serves several visitors in turn.  Nothing is sent to or loaded from the internet.
"""

import gc
import importlib.util
import os
import signal
import tempfile
import threading
from pathlib import Path

from absl import flags

import var_jax
from var_jax import cli
from var_jax.app.device import Device
from var_jax.app.drawing import FIRST_COUNT, option_values, read_settings, warm_up
from var_jax.errors import ConfigError, config_errors

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Define the flags of the command."""
    cli.define_model_flags(has_output=False)
    flags.DEFINE_multi_string("compare", [], "Another model for the tab Compare: a run, a folder, a name")
    flags.DEFINE_string("host", "127.0.0.1", "Address to listen on; 0.0.0.0 for all networks")
    flags.DEFINE_integer("port", None, "Port; by default the first free one from 7860", 1, 65535)
    flags.DEFINE_integer("max_images", 16, "Largest number of images of a request", 1, 64)
    flags.DEFINE_float("max_upload_mb", 10.0, "Largest size of an uploaded file", 0.001, 1000.0)


def load_models() -> dict[str, var_jax.LoadedVAR]:
    """Load the models that the flags name, under the last part of their path.

    Raises:
      UsageError: if the flags do not name a tokenizer and a transformer.
      ConfigError: naming the file that cannot be read.
    """
    if not (FLAGS.workdir or FLAGS.tokenizer or FLAGS.checkpoint):
        FLAGS.workdir = "digits"
    is_file = FLAGS.checkpoint is not None and Path(FLAGS.checkpoint).suffix
    models = {Path(FLAGS.checkpoint if is_file else FLAGS.workdir or FLAGS.checkpoint).name: cli.load()}
    for path in FLAGS.compare:
        name = Path(path).name
        while name in models:
            name += "'"
        with config_errors():
            models[name] = var_jax.load_var(path, dtype=FLAGS.dtype)
    kinds = {model.module.config.condition for model in models.values()}
    if len(kinds) > 1 or "embedding" in kinds:
        raise ConfigError(
            "the page draws from classes or from captions, and the same for all models; these are models of "
            f"{', '.join(sorted(f'{kind}s' for kind in kinds))}"
        )
    return models


def prepare_gradio(folder: str) -> None:
    """Set gradio's environment: no telemetry, files in a folder; before it is imported.

    Raises:
      ConfigError: if gradio is not installed.
    """
    if importlib.util.find_spec("gradio") is None:
        raise ConfigError("the page needs gradio: pip install 'var_jax[app]'")
    os.environ.update(
        GRADIO_ANALYTICS_ENABLED="False",
        HF_HUB_DISABLE_TELEMETRY="1",
        GRADIO_TEMP_DIR=folder,
    )


def serve(folder: str) -> None:
    """Serve the page until the process is interrupted.

    Args:
      folder: folder for uploaded files.
    """
    prepare_gradio(folder)
    gc.disable()  # until the page is served: imports and tracing make objects that stay
    models, device = load_models(), Device()
    model = next(iter(models.values()))
    count = min(FIRST_COUNT, FLAGS.max_images)
    words = model.module.config.vocabulary  # a word and not "no caption": its program guides
    condition = words[0] if words else 0
    settings = read_settings(model, condition, 0, count, *option_values(model.options), FLAGS.max_images)
    is_served = threading.Event()
    threading.Thread(target=warm_up, args=(device, model, settings, is_served), daemon=True).start()

    from var_jax.app.handlers import Handlers  # imports gradio, whose environment is set now
    from var_jax.app.page import build_page, launch

    handlers = Handlers(
        models=models,
        device=device,
        max_images=FLAGS.max_images,
        max_upload_bytes=int(FLAGS.max_upload_mb * 1e6),
    )
    page = build_page(handlers)
    with config_errors(OSError, prefix=f"--host={FLAGS.host} --port={FLAGS.port}: "):
        url = launch(page, handlers, FLAGS.host, FLAGS.port)
    print(f"The page is at {url}", flush=True)
    is_served.set()
    gc.freeze()
    gc.enable()
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        page.close(verbose=False)


def main(_):
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="var_jax_app_") as folder:
        serve(folder)
    os._exit(0)  # the usual exit would crash while another thread compiles


if __name__ == "__main__":
    define_flags()
    cli.run(main)
