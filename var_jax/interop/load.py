"""Load networks and their parameters from a run, an exported model or a published weight file."""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from var_jax.interop import exported, published
from var_jax.interop.exported import CONFIGS, is_exported
from var_jax.interop.model_names import find_model
from var_jax.interop.published import Tensors
from var_jax.interop.tensor_files import SUFFIXES, read_tensors
from var_jax.sampling.options import SamplingOptions
from var_jax.tokenizer.config import TokenizerConfig
from var_jax.tokenizer.model import Tokenizer
from var_jax.training.checkpoint import CHECKPOINT_DIR, SavedArrays, load_config, load_params
from var_jax.training.task import compute_dtype
from var_jax.transformer.config import NextScaleConfig, TransformerConfig
from var_jax.transformer.model import ARTransformer, choose_scan
from var_jax.transformer.next_scale import NextScale
from var_jax.transformer.next_token import NextToken

TRANSFORMER_CLASSES = {"next_scale": NextScale, "next_token": NextToken}  # task -> module class


def load_tokenizer(
    path: str | Path, scales=None, step: int | str = "latest", dtype: str = "auto"
) -> tuple[Tokenizer, dict]:
    """Load a tokenizer and its parameters, float32 arrays on the host.

    Args:
      path: of a run (its --workdir), an exported model, or a published .pth or .safetensors file; or a name
        (`model_names.py`).  For a run that has only a transformer, the tokenizer that it was trained with is
        loaded.
      scales: sides of the token maps, if a file's are not those of 256px.
      step: checkpoint of a run: a step, `latest` or `best`.
      dtype: of the convolutions: float32, bfloat16 or auto: float32 in the encoder, so that tokens are the
        same on every platform, and in the decoder bfloat16 on accelerators and float32 on CPU.

    Raises:
      FileNotFoundError: if there is no tokenizer.
      ValueError: if the scales or the tensors do not fit; the message names them.
    """
    path = find_model(path)
    dtypes = _tokenizer_dtypes(dtype)
    if not _is_weights(path):
        if not (path / "tokenizer").exists() and (path / _transformer_of(path) / CHECKPOINT_DIR).exists():
            stage = load_config(path / _transformer_of(path) / CHECKPOINT_DIR)[1]["stage"]
            if stage["tokenizer"]:
                return load_tokenizer(stage["tokenizer"], scales or stage["scales"] or None, "latest", dtype)
            if "converted_from" in stage:
                raise FileNotFoundError(f"{path} has no tokenizer: {published.TOKENIZER_ADVICE}")
        if is_exported(path):
            config, params = _from_exported(path, "tokenizer")
        else:
            params, record = load_params(path / "tokenizer" / CHECKPOINT_DIR, step)
            config = TokenizerConfig(**record["model"])
        if scales is not None and tuple(scales) != config.scales:
            raise ValueError(
                f"the tokenizer under {path} has scales {config.scales}, asked for {tuple(scales)}"
            )
        return Tokenizer(config, **dtypes), params
    config, params = _from_file(path, "tokenizer", read_tensors(path, "tokenizer"), scales)
    return Tokenizer(config, **dtypes), params


def _tokenizer_dtypes(name: str) -> dict:
    """Return the dtype fields of `Tokenizer` for the argument `dtype` of `load_tokenizer`."""
    decoder = compute_dtype(name)
    return {"dtype": decoder, "encoder_dtype": jnp.dtype(jnp.float32) if name == "auto" else decoder}


def load_transformer(
    path: str | Path, tokenizer: TokenizerConfig, step: int | str = "latest", dtype: str = "auto"
) -> tuple[ARTransformer, dict, SamplingOptions, tuple[str, ...]]:
    """Load a transformer, its parameters (float32 arrays on the host), sampling options and class names.

    Args:
      path: of a run (its --workdir), of which the next-scale stage is loaded, or else the next-token stage;
        of an exported model; or of a published .pth or .safetensors file; or a name (`model_names.py`).
      tokenizer: config of the tokenizer whose tokens it predicts.
      step: checkpoint of a run: a step, `latest` or `best`.
      dtype: of the matrix products: float32 or bfloat16; auto is bfloat16 on accelerators, float32 on CPU.

    Returns:
      The network, its parameters in its own layout, the options of its run or the published ones, and the
      names of the classes of its data set; () for a published file and for older runs.

    Raises:
      FileNotFoundError: if there is no transformer.
      ValueError: if the tensors do not fit each other or the tokenizer; the message names them.
    """
    path = find_model(path)
    compute = compute_dtype(dtype)
    scan_layers = choose_scan("auto", jax.default_backend(), sampling=True)
    if not _is_weights(path):
        if is_exported(path):
            record = exported.read_record(path)
            kind = next((kind for kind in TRANSFORMER_CLASSES if kind in record), "next_scale")
            config, params = _from_exported(path, kind)
            options = exported.read_sampling(path, record)
        else:
            kind = _transformer_of(path)
            params, record = load_params(path / kind / CHECKPOINT_DIR, step)
            config = CONFIGS[kind](**record["model"])
            options = SamplingOptions(**record["stage"]["sampling"])
        _check_fit(path, config, tokenizer)
        model = TRANSFORMER_CLASSES[kind](config, compute, scan_layers=scan_layers)
        return model, model.own_layout(params), options, tuple(record.get("class_names", ()))
    config, params = _from_file(path, "next_scale", read_tensors(path, "next_scale"), tokenizer.scales)
    _check_fit(path, config, tokenizer)
    model = NextScale(config, compute, scan_layers=scan_layers)
    return model, model.own_layout(params), SamplingOptions(), ()


def _transformer_of(run: Path) -> str:
    """Return the task of a run's transformer; next_scale if it has none, or both."""
    kinds = (kind for kind in TRANSFORMER_CLASSES if (run / kind / CHECKPOINT_DIR).exists())
    return next(kinds, "next_scale")


def read_network(path: str | Path, kind: str) -> tuple[TokenizerConfig | TransformerConfig, dict]:
    """Read the config and parameters of a network, without checks against another network.

    A published tokenizer file does not hold the scales, and no parameter depends on them: only the number of
    scales in the returned config is meaningful.

    Args:
      path: of a run (its --workdir), whose latest checkpoint is read, of an exported model, or of a published
        file.
      kind: `tokenizer`, `next_scale` or `next_token` (runs only).

    Returns:
      Config, and parameters as float32 arrays on the host.

    Raises:
      FileNotFoundError: if there is no such network.
      ValueError: if the tensors do not fit each other; the message names them.
    """
    path = find_model(path)
    if is_exported(path):
        return _from_exported(path, kind)
    if _is_weights(path):
        if kind == "next_token":
            raise ValueError(f"{path}: a published file holds no next-token transformer; give a run")
        tensors = read_tensors(path, kind)
        hits = tensors.get("quantize.ema_vocab_hit_SV")
        has_scales = hits is not None and hits.ndim == 2 and len(hits) <= published.MAX_SCALES
        return _from_file(path, kind, tensors, (1,) * len(hits) if has_scales else None)
    folder = path / kind / CHECKPOINT_DIR
    step, record = load_config(folder)
    saved = SavedArrays(folder, step, "params")
    params = unflatten_dict({name: saved.read(name) for name in saved}, sep="/")
    return CONFIGS[kind](**record["model"]), params


def _from_exported(path: Path, kind: str) -> tuple[TokenizerConfig | TransformerConfig, dict]:
    """Return config and parameters (host arrays) of a network of an exported model."""
    config = exported.read_config(path, kind, exported.read_record(path))
    shapes = tokenizer_shapes(config) if kind == "tokenizer" else transformer_shapes(config)
    shapes.pop("code_hits", None)
    return config, exported.read_params(path, kind, shapes)


def _from_file(
    path: Path, kind: str, tensors: Tensors, scales
) -> tuple[TokenizerConfig | NextScaleConfig, dict]:
    """Return config and parameters (host arrays) of a file in the published layout."""
    check_file = published_tokenizer if kind == "tokenizer" else published_next_scale
    config, table, shapes = check_file(path, tensors, scales)
    params = published.to_ours(tensors, table, shapes)
    params.pop("code_hits", None)
    return config, params


def published_tokenizer(path: Path, tensors: Tensors, scales=None) -> tuple[TokenizerConfig, list, dict]:
    """Check the tensors of a published tokenizer; return its config, table, and shapes of our parameters.

    Raises:
      ValueError: if tensors do not fit; the message names them and the file.
    """
    config = with_path(path, published.tokenizer_config, tensors, scales)
    table, shapes = published.tokenizer_table(config), tokenizer_shapes(config)
    with_path(path, published.check_tensors, tensors, table, shapes)
    return config, table, shapes


def published_next_scale(path: Path, tensors: Tensors, scales=None) -> tuple[NextScaleConfig, list, dict]:
    """Check the tensors of a published transformer; return its config, table, and shapes of our parameters.

    Raises:
      ValueError: if tensors do not fit; the message names them and the file.
    """
    config = with_path(path, published.next_scale_config, tensors, scales)
    table, shapes = published.next_scale_table(config), transformer_shapes(config)
    with_path(path, published.check_tensors, tensors, table, shapes, published.next_scale_constants(config))
    return config, table, shapes


def tokenizer_shapes(config: TokenizerConfig) -> dict:
    """Return the shapes of our tokenizer parameters and of the code counts in published files."""
    shapes = _init_shapes(Tokenizer(config), _abstract((1, config.image_size, config.image_size, 3)))
    hits = jax.ShapeDtypeStruct((len(config.scales), config.num_codes), jnp.float32)
    return {**shapes, "code_hits": hits}


def transformer_shapes(config: TransformerConfig) -> dict:
    """Return the shapes of our transformer parameters, in the layout of checkpoints."""
    inputs = _abstract((1, config.length - config.num_start_tokens, config.code_dim))
    model_class = NextScale if config.predicts_maps else NextToken
    return _init_shapes(model_class(config), config.null_conditions(1), inputs)


def _is_weights(path: Path) -> bool:
    """Return True if a path is a weight file, or has the suffix of one, rather than a run directory."""
    return path.is_file() or path.suffix in SUFFIXES


def _abstract(shape: tuple[int, ...], dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _init_shapes(model: nn.Module, *inputs) -> dict:
    variables = jax.eval_shape(lambda *args: model.init(jax.random.key(0), *args), *inputs)
    return nn.meta.unbox(variables)["params"]


def with_path(path: Path, function, *args):
    """Call `function(*args)`, and prepend the path to the message of a ValueError."""
    try:
        return function(*args)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _check_fit(path: Path, config: TransformerConfig, tokenizer: TokenizerConfig) -> None:
    """Check that a transformer was trained for this tokenizer.

    Raises:
      ValueError: naming the field that differs, with both values.
    """
    for field in ("scales", "num_codes", "code_dim"):
        value, expected = getattr(config, field), getattr(tokenizer, field)
        if value != expected:
            raise ValueError(f"the transformer {path} has {field} {value}, but the tokenizer has {expected}")
