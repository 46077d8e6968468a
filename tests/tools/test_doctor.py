"""The doctor finds what is wrong with stand-ins for broken installations, machines and data sets."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from packaging.requirements import Requirement

from tests.helpers.commands import REPOSITORY
from var_jax.installation import check, data_sets, devices, machine, packages
from var_jax.installation.check import ProbeResult, guarded, run_probe
from var_jax.installation.devices import Hardware, check_hardware, describe_probe, find_hardware
from var_jax.installation.packages import Package

PROBED = (
    {"begin": "importing JAX"},
    {"jax": "0.11.2", "jaxlib": "0.11.2"},
    {"begin": "listing devices"},
    {"devices": [{"id": 0, "platform": "cpu", "kind": "cpu"}]},
)
GPU = Hardware(num_nvidia_cards=1, num_nvidia_devices=1, driver=(580, 95))


def package(version: str, *requires: str) -> Package:
    return Package(version=version, requires=tuple(map(Requirement, requires)))


def installation(**versions: str | None) -> dict[str, Package]:
    """Packages that fit, or with other versions; None removes one."""
    found = {
        "var-jax": package("0.1.0", "jax>=0.10,<0.12", "flax>=0.12,<0.13", "gcsfs; extra == 'gcs'"),
        "flax": package("0.12.12", "jax>=0.8", "rich>=11", "pytest; extra == 'testing'"),
        "rich": package("15.0.0"),
        "jax": package(
            "0.11.2",
            "jaxlib<=0.11.2,>=0.11.2",
            "jax-cuda13-plugin[with-cuda]<=0.11.2,>=0.11.2; extra == 'cuda13'",
            "libtpu==0.0.48.*; extra == 'tpu'",
        ),
        "jaxlib": package("0.11.2"),
        "jax-cuda13-plugin": package(
            "0.11.2", "jax-cuda13-pjrt==0.11.2", "nvidia-cudnn-cu13>=9.8; extra == 'with-cuda'"
        ),
        "jax-cuda13-pjrt": package("0.11.2"),
    }
    for name, version in versions.items():
        name = name.replace("_", "-")
        old = found.pop(name, package(""))
        if version is not None:
            found[name] = Package(version=version, requires=old.requires)
    return found


def statuses(checks: list[check.Check]) -> list[tuple[str, str]]:
    return [(item.status, item.name) for item in checks]


def test_packages_that_fit_pass_and_those_of_this_environment_do():
    assert statuses(packages.check_dependencies(installation())) == [("ok", "packages")]
    assert statuses(packages.check_plugins(installation())) == [("ok", "jax-cuda13-plugin")]
    assert not [item for item in packages.check_packages() if item.status == "FAIL"]


@pytest.mark.parametrize(
    ("versions", "expected"),
    [
        (
            dict(jaxlib="0.11.1"),
            ("FAIL", "jaxlib", "0.11.1 is installed; jax needs", "pip install 'jaxlib<=0.11.2"),
        ),
        (
            dict(flax="0.11.2"),
            ("FAIL", "flax", "0.11.2 is installed; var_jax needs", "pip install 'flax<0.13,"),
        ),
        (dict(jax=None), ("FAIL", "jax", "is missing; var_jax needs", "pip install 'jax<0.12,>=0.10'")),
        (dict(rich=None), ("warn", "rich", "is missing; flax needs >=11", "pip install 'rich>=11'")),
    ],
)
def test_a_package_that_does_not_fit_is_named_with_its_range(versions, expected):
    (item,) = packages.check_dependencies(installation(**versions))
    assert (item.status, item.name) == expected[:2]
    assert item.message.startswith(expected[2]) and item.advice.startswith(expected[3])


@pytest.mark.parametrize(
    ("versions", "failed"),
    [
        (dict(jax_cuda13_plugin="0.11.1"), ["jax-cuda13-plugin"]),
        (dict(jax_cuda13_pjrt=None), ["jax-cuda13-plugin"]),
        (dict(nvidia_cudnn_cu13="9.1"), ["jax-cuda13-plugin"]),
        (dict(libtpu="0.0.46"), ["libtpu"]),
        (dict(jax_cuda12_plugin="0.11.2"), ["CUDA"]),
    ],
)
def test_plugins_of_another_version_and_two_of_cuda_fail(versions, failed):
    checks = packages.check_plugins(installation(**versions))
    assert [item.name for item in checks if item.status == "FAIL"] == failed


@pytest.mark.parametrize(
    ("version", "status"), [("3.10.9", "FAIL"), ("3.11.0", "ok"), ("3.13.2", "ok"), ("3.14.0", "warn")]
)
def test_python_is_in_the_range_that_was_tested(version, status):
    assert packages.check_python(">=3.11", version).status == status


def test_extras_are_listed_as_present_or_absent():
    message = packages.list_extras(installation(gcsfs="2026.1.0")).message
    assert message == "present: gcs, cuda13; absent: app, hub, torch, wandb, cuda12, tpu"


def fake_card(root: Path, vendor: str, kind: str, device: str) -> None:
    folder = root / "sys/bus/pci/devices" / device
    folder.mkdir(parents=True)
    for name, value in (("vendor", vendor), ("class", kind), ("device", device)):
        (folder / name).write_text(f"{value}\n")


def test_accelerators_are_found_in_the_files_of_the_kernel_and_by_nvidia_smi(tmp_path):
    fake_card(tmp_path, "0x10de", "0x030200", "0x2335")
    fake_card(tmp_path, "0x1ae0", "0x020000", "0x0042")  # a network card of Google
    nowhere = {"PATH": str(tmp_path)}
    assert find_hardware(nowhere, tmp_path) == Hardware(num_nvidia_cards=1)
    (tmp_path / "dev").mkdir()
    for name in ("nvidia0", "nvidia1", "nvidiactl"):
        (tmp_path / "dev" / name).touch()
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 535.129.03\n")
    smi.chmod(0o755)
    found = find_hardware(nowhere, tmp_path)
    assert found == Hardware(num_nvidia_cards=1, num_nvidia_devices=2, driver=(535, 129))
    version = tmp_path / "proc/driver/nvidia/version"
    version.parent.mkdir(parents=True)
    version.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release\nGCC 12.2.0\n"
    )
    fake_card(tmp_path, "0x1ae0", "0x120000", "0x0063")
    found = find_hardware({**nowhere, "TPU_WORKER_ID": "0"}, tmp_path)
    assert found.driver == (580, 95) and found.num_tpus == 1 and found.is_tpu_vm


@pytest.mark.parametrize(
    ("hardware", "plugins", "status"),
    [
        (GPU, [13], "ok"),
        (Hardware(num_nvidia_devices=1, driver=(535, 129)), [13], "FAIL"),
        (Hardware(num_nvidia_devices=1, driver=(535, 129)), [12], "ok"),
        (Hardware(num_nvidia_cards=1), [13], "warn"),
        (Hardware(), [], "ok"),
    ],
)
def test_a_driver_is_compared_with_what_the_plugin_needs(hardware, plugins, status):
    assert [item.status for item in check_hardware(hardware, plugins)] == [status]


@pytest.mark.parametrize(
    ("hardware", "plugins", "environ", "expected", "advice"),
    [
        (GPU, [], {}, ("FAIL", "GPU"), "var_jax[cuda13]"),
        (GPU, [13], {}, ("FAIL", "GPU"), "nvidia-smi"),
        (GPU, [13], {"JAX_PLATFORMS": "cpu"}, ("warn", "GPU"), "unset JAX_PLATFORMS"),
        (Hardware(is_tpu_vm=True), [], {}, ("FAIL", "TPU"), "var_jax[tpu]"),
        (Hardware(), [13], {}, ("warn", "GPU"), "a machine with one"),
    ],
)
def test_a_device_that_jax_does_not_use_is_reported(hardware, plugins, environ, expected, advice):
    result = ProbeResult(events=PROBED, returncode=0, stderr="RuntimeError: CUDA is out of order")
    checks = describe_probe(result, hardware, plugins, environ)
    assert statuses(checks) == [("ok", "JAX"), expected] and advice in checks[1].advice
    if (hardware, plugins, environ) == (GPU, [13], {}):
        assert checks[1].message.endswith("RuntimeError: CUDA is out of order")


def test_a_platform_that_jax_does_not_find_is_reported_with_what_installs_it():
    environ = {"JAX_PLATFORMS": "cuda"}
    failure = ProbeResult(events=(*PROBED[:3], {"error": "AssertionError: "}), returncode=0, stderr="")
    item = devices.check_variables(failure, environ)
    assert (item.status, item.name) == ("FAIL", "JAX_PLATFORMS")
    assert item.advice == "unset JAX_PLATFORMS, or pip install 'var_jax[cuda13]'"
    assert devices.check_variables(ProbeResult(events=PROBED, returncode=0, stderr=""), environ) is None
    assert devices.check_variables(failure, {}) is None


def test_old_cudnn_a_wrong_gradient_and_a_slow_device_are_reported():
    assert devices.check_cudnn({"major": 13, "cudnn_build": 91002, "cudnn": 92800})[0].status == "ok"
    assert devices.check_cudnn({"major": 13, "cudnn_build": 91002, "cudnn": 90100})[0].status == "FAIL"
    missing = {"major": 13, "cudnn_build": 91002, "cudnn_error": "no such file"}
    assert "no such file" in devices.check_cudnn(missing)[0].message
    event = {"device": "cuda:0", "gflops": 600_000.0, "gradient_error": 1e-6, "memory_bytes": 2**37}
    (item,) = devices.check_product(event)
    assert item.status == "ok" and item.message == "600,000 GFLOP/s, gradient within 1e-06, 128.0 GiB"
    assert devices.check_product({**event, "gflops": 1.0})[0].status == "warn"
    assert devices.check_product({**event, "gradient_error": float("nan")})[0].status == "FAIL"


@pytest.mark.parametrize(
    ("module", "timeout", "problem"),
    [
        (
            "import os, sys; print('bad driver', file=sys.stderr); os.abort()",
            60,
            "killed by SIGABRT: bad driver",
        ),
        ("import time; time.sleep(60)", 2, "no answer in time"),
        ("raise ImportError('libcudart.so: no such file')", 60, "ImportError: libcudart.so: no such file"),
        ("import sys; sys.exit(3)", 60, "exit code 3"),
        ("import sys; sys.exit(0)", 60, None),
    ],
)
def test_jax_that_crashes_hangs_or_cannot_be_imported_is_a_failed_check(tmp_path, module, timeout, problem):
    (tmp_path / "jax.py").write_text(module)
    environ = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = run_probe("jax_probe.py", environ=environ, timeout=timeout)
    (item,) = describe_probe(result, Hardware(), [], environ)
    expected = f"importing JAX: {problem}" if problem else "ended without a list of devices"
    assert item.status == "FAIL" and item.message.startswith(expected)


def test_a_check_that_breaks_is_a_failed_check():
    assert "ZeroDivisionError" in guarded("machine", lambda: 1 / 0)[0].message
    (item,) = guarded("images", lambda: __import__("no_such_package"))
    assert item.status == "FAIL" and item.advice == "pip install no_such_package"


@pytest.mark.parametrize(("maximum", "cores"), [("50000 100000\n", 0.5), ("max 100000\n", None)])
def test_cores_are_those_of_the_cgroup(tmp_path, maximum, cores):
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "cpu.max").write_text(maximum)
    assert machine.available_cores(tmp_path) == (cores or len(os.sched_getaffinity(0)))
    assert machine.check_cores(tmp_path)[0].status == ("warn" if cores else "ok")


def test_memory_is_what_the_cgroup_leaves(tmp_path):
    for name, content in (
        ("proc/meminfo", "MemTotal: 99999999 kB\nMemAvailable: 88888888 kB\n"),
        ("sys/fs/cgroup/memory.max", str(3 * 2**30)),
        ("sys/fs/cgroup/memory.current", str(2**30)),
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    (item,) = machine.check_memory(tmp_path)
    assert item.status == "warn" and item.message == "2.0 of 3.0 GiB available"


def test_few_open_files_little_space_and_a_folder_that_takes_no_files_are_reported(tmp_path, monkeypatch):
    assert [machine.check_open_files(limit)[0].status for limit in (256, 1024)] == ["warn", "ok"]
    for free, status in ((2**40, "ok"), (2**30, "warn"), (2**20, "FAIL")):
        monkeypatch.setattr(machine.shutil, "disk_usage", lambda _, free=free: type("", (), {"free": free}))
        assert machine.check_folder("workdir", tmp_path / "new" / "run", "--workdir")[0].status == status
    (tmp_path / "file").touch()
    environ = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "file" / "cache")}
    assert machine.check_cache(environ)[0].status == "FAIL"
    assert [*tmp_path.iterdir()] == [tmp_path / "file"]


def test_images_are_written_and_read():
    assert machine.check_images()[0].status == "ok"


@pytest.fixture
def data_set(tmp_path) -> Path:
    """A data set of two files of 40 and 30 records."""
    folder = tmp_path / "flowers" / "1.0.0"
    folder.mkdir(parents=True)
    for i, count in enumerate((40, 30)):
        writer = ArrayRecordWriter(
            str(folder / f"flowers-train.array_record-{i:05d}-of-00002"), "group_size:1,uncompressed"
        )
        for j in range(count):
            writer.write(f"record {i} {j} ".encode() * 100)
        writer.close()
    split = {
        "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        "name": "train",
        "numBytes": "90000",
        "shardLengths": ["40", "30"],
    }
    info = {"name": "flowers", "fileFormat": "array_record", "splits": [split]}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    (folder / "features.json").write_text("{}")
    return folder


def check_data(folder: Path) -> check.Check:
    (item,) = data_sets.check_data_sets(str(folder.parents[1]), os.environ, 60)
    return item


def test_a_data_set_that_is_whole_passes(data_set):
    item = check_data(data_set)
    assert item.status == "ok" and item.message == f"{data_set}: 70 records, all read"


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "metadata", "format", "incomplete"])
def test_a_damaged_data_set_is_reported(data_set, damage):
    second, info = data_set / "flowers-train.array_record-00001-of-00002", data_set / "dataset_info.json"
    if damage == "truncated":
        os.truncate(second, second.stat().st_size // 2)
    elif damage == "flipped":
        content = bytearray(second.read_bytes())
        position = content.index(b"record 1 20")
        content[position] ^= 1
        second.write_bytes(content)
    elif damage == "missing":
        second.unlink()
    elif damage == "metadata":
        info.write_text(info.read_text()[:50])
    elif damage == "format":
        info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    else:
        data_set.rename(data_set.with_name("incomplete.XYZ_1.0.0"))
        checks = data_sets.check_data_sets(str(data_set.parents[1]), os.environ, 60)
        assert statuses(checks)[0] == ("FAIL", "data") and "not finished" in checks[0].message
        return
    item = check_data(data_set)
    assert item.status == ("warn" if damage == "format" else "FAIL")
    expected = {
        "truncated": "1 of 2 files are damaged: flowers-train.array_record-00001-of-00002",
        "flipped": "1 of 2 files are damaged: flowers-train.array_record-00001-of-00002",
        "missing": "1 files are missing, e.g. flowers-train.array_record-00001-of-00002",
        "metadata": "dataset_info.json is damaged",
        "format": "its format is tfrecord",
    }
    assert expected[damage] in item.message


def run_doctor(folder: Path, *options: str, **environ: str) -> tuple[int, dict[str, dict]]:
    """Exit code, and the checks by name, of the command."""
    done = subprocess.run(
        [
            sys.executable,
            *options,
            "-m",
            "var_jax.tools.doctor",
            "--json",
            f"--data_dir={folder}",
            "--workdir=build",
        ],
        cwd=REPOSITORY,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.returncode, {item["name"]: item for item in json.loads(done.stdout)}


def test_the_command_reports_wrong_flags_and_goes_on_without_them(data_set):
    (data_set / "file").touch()
    returncode, checks = run_doctor(
        data_set.parents[1],
        XLA_FLAGS="--xla_no_such_flag=1",
        JAX_PLATFORMS="cpu",
        JAX_COMPILATION_CACHE_DIR=str(data_set / "file" / "cache"),
    )
    assert returncode == 1
    failed = {name for name, item in checks.items() if item["status"] == "FAIL"}
    assert failed >= {"XLA_FLAGS", "compile cache"}
    assert "--xla_no_such_flag=1" in checks["XLA_FLAGS"]["message"]
    assert checks["JAX"]["status"] == checks["data"]["status"] == "ok"
    assert (
        "gradient within"
        in next(item for name, item in checks.items() if name.startswith("compute"))["message"]
    )


def test_the_command_runs_where_no_package_can_be_imported(tmp_path):
    """-S hides site-packages from the doctor, and a stand-in breaks JAX in its other process."""
    (tmp_path / "jax.py").write_text("raise ImportError('damaged')")
    returncode, checks = run_doctor(tmp_path, "-S", PYTHONPATH=str(tmp_path))
    assert returncode == 1
    assert checks["packages"]["advice"] == "pip install packaging"
    assert checks["images"]["advice"] == "pip install Pillow" and "damaged" in checks["JAX"]["message"]
    assert checks["memory"]["status"] in ("ok", "warn")


def test_importing_var_jax_imports_no_jax_and_its_names_are_listed():
    program = (
        "import sys, var_jax; assert {*var_jax.__all__} < {*dir(var_jax)}; sys.exit('jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
