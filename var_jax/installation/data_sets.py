"""Check the prepared data sets in a folder: their metadata, and that the records can be read."""

import json
from collections.abc import Mapping
from pathlib import Path

from var_jax.installation.check import Check, fail, ok, run_probe, warn

READ_ALL_BYTES = 2**30  # of larger data sets, the first and the last record of each file are read


def check_data_sets(data_dir: str, environ: Mapping[str, str], timeout: float) -> list[Check]:
    """Check every data set under a folder.

    Args:
      data_dir: directory of data sets; a URL is not checked.
      environ: environment of the process that reads.
      timeout: seconds that it may take for a data set.
    """
    if "://" in data_dir:
        return [ok("data", f"{data_dir}: not on this machine, not checked")]
    root = Path(data_dir).expanduser()
    infos = sorted({path for depth in ("*/*", "*/*/*") for path in root.glob(f"{depth}/dataset_info.json")})
    checks = [
        fail("data", f"{folder}: preparing it was not finished", "remove the folder, and prepare it again")
        for folder in sorted(root.glob("*/incomplete.*"))
    ]
    checks += [check_data_set(info, environ, timeout) for info in infos]
    return checks or [ok("data", f"none under {data_dir}; the digits are prepared on first use")]


def check_data_set(info_path: Path, environ: Mapping[str, str], timeout: float) -> Check:
    """Check a data set: its files exist, and have the records that its metadata counts."""
    folder = info_path.parent
    again = f"remove {folder}, and prepare it again or copy it again"
    try:
        info = json.loads(info_path.read_text())
        num_bytes = sum(int(split["numBytes"]) for split in info["splits"])
        files = data_files(folder, info)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return fail("data", f"{info_path} is damaged: {type(error).__name__} {error}", again)
    if info["fileFormat"] != "array_record":
        advice = "prepare it again with --file_format=array_record"
        return warn(
            "data", f"{folder}: its format is {info['fileFormat']}, training needs array_record", advice
        )
    absent = [path for path in (folder / "features.json", *files) if not path.is_file()]
    if absent:
        return fail("data", f"{folder}: {len(absent)} files are missing, e.g. {absent[0].name}", again)
    reads_all = num_bytes <= READ_ALL_BYTES
    arguments = json.dumps([[str(path), count, reads_all] for path, count in files.items()])
    result = run_probe("data_probe.py", arguments, environ=environ, timeout=timeout)
    problems = [event for event in result.events if event.get("problem")]
    if problems:
        first = f"{Path(problems[0]['path']).name} {problems[0]['problem']}"
        return fail("data", f"{folder}: {len(problems)} of {len(files)} files are damaged: {first}", again)
    if result.problem:
        return fail("data", f"{folder}: {result.problem}", "pip install --force-reinstall array_record")
    extent = "all read" if reads_all else "first and last of each file read"
    return ok("data", f"{folder}: {sum(files.values())} records, {extent}")


def data_files(folder: Path, info: Mapping) -> dict[Path, int]:
    """Return the files of a data set, and the number of records of each.

    Raises:
      KeyError: if the metadata has no such field, or the name of a file an unknown one.
    """
    files = {}
    for split in info["splits"]:
        lengths = [int(length) for length in split["shardLengths"]]
        for i, length in enumerate(lengths):
            name = split["filepathTemplate"].format(
                DATASET=info["name"],
                SPLIT=split["name"],
                FILEFORMAT=info["fileFormat"],
                SHARD_X_OF_Y=f"{i:05d}-of-{len(lengths):05d}",
                SHARD_INDEX=f"{i:05d}",
                NUM_SHARDS=f"{len(lengths):05d}",
            )
            files[folder / name] = length
    return files
