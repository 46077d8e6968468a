"""Names of models that are not paths: of those in the package, and `hf://` for the Hugging Face hub."""

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
    """Download a file, or an exported model, from the hub; return its path on this machine."""
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
    where = {"repo_id": parts["repo"], "revision": parts["revision"]}
    try:
        if parts["file"]:
            return huggingface_hub.hf_hub_download(filename=parts["file"], **where)
        folder = huggingface_hub.snapshot_download(allow_patterns=[CONFIG_FILE, WEIGHTS_FILE], **where)
    except (
        errors.HfHubHTTPError,
        errors.LocalEntryNotFoundError,
        errors.HFValidationError,
        OSError,
    ) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FileNotFoundError(f"{name} could not be downloaded: {reason}") from error
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if not (Path(folder) / file).exists():
            raise FileNotFoundError(f"{name} holds no {file}; name a file of it: {name}/FILE")
    return folder
