"""Launch scripts: linted, dry runs, and runs with fakes of gcloud and SLURM."""

import functools
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import yaml

from benchmarks.cloud import launch_command
from configs import var
from tests.helpers.commands import REPOSITORY
from var_jax.sharding import check_batch

LAUNCH = REPOSITORY / "launch"
README = (LAUNCH / "README.md").read_text()
SLICE = {"BUCKET": "a-bucket", "EVERY": "0", "NAME": "pod", "ZONE": "z", "ACCELERATOR": "v5litepod-16"}

# Fake gcloud: answers from files, and records its calls.
GCLOUD = """#!/bin/bash
printf '%s\\n' "${*//$'\\n'/ }" >> "$FAKE/asked"
case "$*" in
  *"queued-resources list"*) [[ ! -e $FAKE/no_network ]] && { [[ -e $FAKE/state ]] && echo pod || true; } ;;
  *"queued-resources describe"*) cat "$FAKE/state" ;;
  *"queued-resources delete"*) rm "$FAKE/state" ;;
  *"queued-resources create"*) echo ACTIVE > "$FAKE/state" ;;
  *"echo running; elif"*) cat "$FAKE/hosts" && cat "$FAKE/next" > "$FAKE/hosts" ;;
esac
"""


def tpu_vm(*arguments, path: Path | None = None, **environment) -> subprocess.CompletedProcess:
    environment = {**os.environ, **SLICE, **environment}
    if path:
        environment |= {"PATH": f"{path}:{os.environ['PATH']}", "FAKE": str(path)}
    command = [LAUNCH / "tpu_vm.sh", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


@pytest.fixture
def gcloud(tmp_path):
    """Return the folder of a fake gcloud without any slice."""
    (tmp_path / "gcloud").write_text(GCLOUD)
    (tmp_path / "git").write_text("#!/bin/bash\n")
    for name in ("gcloud", "git"):
        (tmp_path / name).chmod(0o755)
    (tmp_path / "asked").touch()
    return tmp_path


def recorded_actions(folder: Path) -> list[str]:
    """Return the actions that the fake gcloud was asked for; queries are left out."""
    actions = {
        "resources create": "create",
        "resources delete": "delete",
        "vm scp": "copy",
        "uv venv": "install",
        "train.py": "run",
    }
    lines = (folder / "asked").read_text().splitlines()
    return [name for line in lines for part, name in actions.items() if part in line]


@pytest.mark.parametrize("script", ["tpu_vm.sh", "slurm.sh"])
def test_shellcheck_finds_nothing(script):
    linter = Path(sys.executable).parent / "shellcheck"
    done = subprocess.run([linter, LAUNCH / script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("subcommand", "commands"),
    [
        (
            "create",
            [r"queued-resources create pod --node-id=pod --zone=z --accelerator-type=v5litepod-16 .*--spot"],
        ),
        (
            "install",
            [r"^git archive", r"tpu-vm scp \S+ pod: --zone=z --worker=all", r"ssh pod .*gcsfuse.*a-bucket"],
        ),
        ("run", [r"tpu-vm ssh pod --zone=z --worker=all .*train\.py.*var\.py:d16.*workdir="]),
        ("status", [r"describe pod", r"ssh pod --zone=z --worker=all .*train\.rc"]),
        ("logs", [r"ssh pod --zone=z --worker=3 .*tail"]),
        (
            "resume",
            [r"describe pod", r"resources create", r"^git archive", r"vm scp", r"uv.*venv", r"train\.py"],
        ),
        (
            "watch",
            [r"describe pod", r"resources create", r"^git archive", r"vm scp", r"uv.*venv", r"train\.py"],
        ),
        ("delete", [r"queued-resources delete pod --zone=z --force --quiet"]),
    ],
)
def test_dry_run_prints_every_command_and_runs_none(gcloud, subcommand, commands):
    done = tpu_vm(subcommand, path=gcloud, DRY_RUN="1", WORKER="3")
    assert done.returncode == 0, done.stderr
    printed = [line for line in done.stdout.splitlines() if line.startswith(("gcloud", "git"))]
    assert len(printed) == len(commands)
    for line, pattern in zip(printed, commands, strict=True):
        assert re.search(pattern, line)
        assert shlex.split(line.replace("$'", "'"))[0] in ("gcloud", "git")
    assert not (gcloud / "asked").read_text()


def test_the_commands_of_the_readme_are_those_of_plan_and_pass_a_dry_run():
    rows = re.findall(r"^\| (d\d+) \| (\S+) \| `(.*?)` \| `(.*?)` \|$", README, re.MULTILINE)
    planned = re.findall(r"^\| (d\d+) \| `(\S+)` \|", (REPOSITORY / "docs" / "scaling.md").read_text(), re.M)
    assert {row[:2] for row in rows} <= set(planned) and len(rows) > 9
    for model, topology, command, flags in rows:
        chips = math.prod(int(side) for side in topology.split(":")[1].split("x"))
        assert command == launch_command(topology, chips)
        environment = dict(word.split("=", 1) for word in command.split()[:-2])
        printed = tpu_vm("create", DRY_RUN="1", **environment).stdout
        assert f"--accelerator-type={environment['ACCELERATOR']} " in printed
        assert f"--runtime-version={environment['RUNTIME']} " in printed
        config, *overrides = flags.split()
        assert config == f"--config=configs/var.py:{model}"
        fields = var.get_config(model)
        for override in overrides:
            name, value = override.removeprefix("--config.").split("=")
            *sections, field = name.split(".")
            section = functools.reduce(lambda section, name: section[name], sections, fields)
            section[field] = type(section[field])(value)  # fails on an unknown field
        check_batch(fields.train.batch, mesh_of(fields.train.mesh, chips), fields.train.grad_accum_steps)


def mesh_of(sizes: dict, chips: int) -> types.SimpleNamespace:
    sizes = dict(sizes)
    if sizes["fsdp"] == -1:
        sizes["fsdp"] = chips // (sizes["data"] * sizes["tensor"])
    assert math.prod(sizes.values()) == chips
    return types.SimpleNamespace(shape=sizes)


def test_the_code_travels_through_a_folder_of_this_user_alone_and_nothing_is_piped_into_a_shell(gcloud):
    (gcloud / "git").write_text(
        "#!/bin/bash\nfor word; do case $word in --output=*) out=${word#--output=} ;; esac; done\n"
        'touch "$out"; stat -c %a "$(dirname "$out")" > "$FAKE/mode"\n'
    )
    for _ in range(2):
        assert tpu_vm("install", path=gcloud).returncode == 0
    calls = (gcloud / "asked").read_text()
    archives = [Path(path) for path in re.findall(r"vm scp (\S+)", calls)]
    assert len(set(archives)) == 2 and not any(path.parent.exists() for path in archives)
    assert (gcloud / "mode").read_text() == "700\n"
    assert not re.search(r"\|\s*(ba)?sh\b", calls) and "uv==" in calls


def test_on_demand_slices_and_custom_flags(gcloud):
    assert "--spot" not in tpu_vm("create", DRY_RUN="1", SPOT="0").stdout
    assert "digits.py" in tpu_vm("run", DRY_RUN="1", TRAIN_FLAGS="--config=configs/digits.py").stdout


def test_a_missing_bucket_and_an_unknown_subcommand_are_reported():
    assert "BUCKET" in tpu_vm("create", BUCKET="").stderr
    done = tpu_vm("reboot")
    assert done.returncode == 2 and "unknown subcommand 'reboot'" in done.stderr and "resume" in done.stderr


def test_watch_restarts_training_recreates_preempted_slices_and_ends_when_done(gcloud):
    (gcloud / "state").write_text("SUSPENDED\n")
    (gcloud / "hosts").write_text("running\nfinished 1\n")
    (gcloud / "next").write_text("idle\nfinished 1\n")
    watching = subprocess.Popen(
        [LAUNCH / "tpu_vm.sh", "watch"],
        env={
            **os.environ,
            **SLICE,
            "EVERY": "0.1",
            "PATH": f"{gcloud}:{os.environ['PATH']}",
            "FAKE": str(gcloud),
        },
        stderr=subprocess.PIPE,
        text=True,
    )
    recreation = ["delete", "create", "copy", "install", "run"]
    # The second run follows when all hosts have stopped.
    wait_until(lambda: recorded_actions(gcloud)[:6] == [*recreation, "run"])
    (gcloud / "next").write_text("finished 0\nfinished 0\n")
    _, stderr = watching.communicate(timeout=30)
    assert watching.returncode == 0 and "training is done" in stderr
    assert "pod is SUSPENDED: recreating it" in stderr
    assert set(recorded_actions(gcloud)[6:]) <= {"run"}


def wait_until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_watch_gives_up_if_training_fails_soon_after_each_start(gcloud):
    (gcloud / "state").write_text("ACTIVE\n")
    for name in ("hosts", "next"):
        (gcloud / name).write_text("finished 1\n")
    done = tpu_vm("watch", path=gcloud, MAX_FAILURES="3")
    assert done.returncode == 1 and "training ended 3 times soon after its start" in done.stderr
    assert recorded_actions(gcloud) == ["run"] * 3


def test_a_network_error_is_not_taken_for_a_lost_slice(gcloud):
    (gcloud / "no_network").touch()
    assert tpu_vm("resume", path=gcloud).returncode != 0
    assert recorded_actions(gcloud) == []


def test_the_command_of_run_starts_training_once_and_keeps_its_exit_code(tmp_path):
    """Run the command that is sent to the hosts, with a temporary home directory."""
    (tmp_path / "var_jax").mkdir()
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    python = tmp_path / "venv" / "bin" / "python"
    python.write_text('#!/bin/bash\necho "$@" >> ~/arguments; sleep 0.5; exit 3\n')
    python.chmod(0o755)
    (tmp_path / "gcloud").write_text('#!/bin/bash\nfor word; do :; done\nexec bash -c "${word#--command=}"\n')
    (tmp_path / "gcloud").chmod(0o755)
    home = {"HOME": str(tmp_path), "TRAIN_FLAGS": "--workdir=$HOME/gcs/run"}
    for _ in range(2):
        subprocess.run(
            [LAUNCH / "tpu_vm.sh", "run"],
            env={**os.environ, **SLICE, **home, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
            check=True,
        )
    assert (tmp_path / "arguments").read_text() == f"train.py --workdir={tmp_path}/gcs/run\n" * 2
    assert (tmp_path / "train.rc").read_text() == "3\n"


@pytest.mark.parametrize(("code", "requeued"), [(1, True), (0, False)])
def test_slurm_forwards_sigterm_to_python_waits_for_it_and_requeues(tmp_path, code, requeued):
    fakes = {
        "srun": 'touch "$FAKE/started"; until test -e "$FAKE/term"; do sleep 0.05; done; '
        f'sleep 0.3; touch "$FAKE/saved"; exit {code}',
        "scancel": 'echo "$@" > "$FAKE/cancelled"; touch "$FAKE/term"',
        "scontrol": 'test -e "$FAKE/saved" && echo "$@" > "$FAKE/requeued"',
    }
    for name, body in fakes.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "FAKE": str(tmp_path)}
    job = subprocess.Popen([LAUNCH / "slurm.sh", "--config=c"], env={**environment, "SLURM_JOB_ID": "17"})
    wait_until((tmp_path / "started").exists)
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=20) == code
    assert (tmp_path / "cancelled").read_text() == "--signal=TERM 17\n"
    assert (tmp_path / "saved").exists()
    assert (tmp_path / "requeued").exists() == requeued
    if requeued:
        assert (tmp_path / "requeued").read_text() == "requeue 17\n"


def test_slurm_requests_one_process_per_gpu_and_a_signal_to_the_shell():
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", (LAUNCH / "slurm.sh").read_text(), re.MULTILINE))
    assert options["ntasks-per-node"] == options["gpus-per-node"]  # required by JAX's detection
    assert options["signal"] == "B:TERM@120" and "requeue" in options and "gpus-per-task" not in options


def test_the_jobset_has_a_pod_for_each_host_of_the_topology():
    jobset = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    chips_of_a_host = container["resources"]["limits"]["google.com/tpu"]
    assert container["resources"]["requests"] == container["resources"]["limits"]
    sides = [int(n) for n in pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")]
    dimensions = {"tpu-v5-lite-podslice": 2, "tpu-v6e-slice": 2, "tpu-v5p-slice": 3, "tpu-v4-podslice": 3}
    assert len(sides) == dimensions[pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"]]
    assert job["parallelism"] == job["completions"] == math.prod(sides) // chips_of_a_host == 4
    assert job["completionMode"] == "Indexed"


def test_the_jobset_restarts_together_and_preemptions_are_free():
    spec = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    assert job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule == {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    (rule,) = spec["failurePolicy"]["rules"]
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"] and spec["failurePolicy"]["maxRestarts"] > 0
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    (container,) = pod["containers"]
    assert container["command"] == ["python", "train.py"]  # SIGTERM reaches python
    config = next(a for a in container["args"] if a.startswith("--config=")).split("=")[1]
    assert (REPOSITORY / config.split(":")[0]).exists()
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"]: "/gcs" for volume in pod["volumes"]}
    assert all("=/gcs/" in a for a in container["args"] if not a.startswith("--config="))
