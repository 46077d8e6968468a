"""Names of models that are not paths: of those in the package, and `hf://` for the Hugging Face hub."""

import os
import re
from pathlib import Path

from etils import epath

from var_jax.interop.exported import CONFIG_FILE, WEIGHTS_FILE
from var_jax.paths import as_path

PRETRAINED = Path(__file__).parent.parent / "pretrained"
HUB = "hf://"
_HUB_NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+?))?(?:/(?P<file>[^@]+))?")


def pretrained_names() -> tuple[str, ...]:
    """Return the names of the models that come with the package."""
    return tuple(sorted(path.parent.name for path in PRETRAINED.glob(f"*/{CONFIG_FILE}")))


def find_model(name: str | Path) -> epath.Path:
    """Return the path of a model: a run, a weight file, or the folder of an exported model.

    Args:
      name: a path; the name of a model that comes with the package, unless there is a path of that name; or
        `hf://owner/name`, `hf://owner/name/file`, `hf://owner/name@revision/file`, which is downloaded to
        the cache of huggingface_hub.

    Raises:
      ModuleNotFoundError: on hf:// without huggingface_hub.
      FileNotFoundError: if the hub has no such model or file, or cannot be reached.
      ValueError: on a malformed hf:// name.
    """
    name = str(name)
    if name.startswith(HUB):
        return epath.Path(_download(name))
    path = as_path(name)
    if name in pretrained_names() and not path.exists():
        return epath.Path(PRETRAINED / name)
    return path


def _download(name: str) -> str:
    """Download a file, or the two files of an exported model, from the hub; return the path."""
    parts = _HUB_NAME.fullmatch(name.removeprefix(HUB))
    if parts is None:
        raise ValueError(
            f"{name}: must be hf://owner/name, hf://owner/name/file or hf://owner/name@revision/file"
        )
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{name} needs huggingface_hub: pip install 'var_jax[hub]'") from error
    repository = {"repo_id": parts["repo"], "revision": parts["revision"]}
    files = [parts["file"]] if parts["file"] else [CONFIG_FILE, WEIGHTS_FILE]
    try:
        paths = [huggingface_hub.hf_hub_download(filename=file, **repository) for file in files]
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FileNotFoundError(f"{name}: {' and '.join(files)} could not be downloaded: {reason}") from error
    return paths[0] if parts["file"] else os.path.dirname(paths[0])
