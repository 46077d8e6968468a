"""Trains the stages of a config.

    python train.py --config=configs/digits.py --workdir=runs/digits

On several hosts the same command runs on each: in a TPU pod or a SLURM job they find each other; elsewhere
add --coordinator=HOST:PORT --num_processes=N --process_id=I.

Run the same command again, on as many hosts as there are then, to go on where it was stopped.
"""

import sys

import tensorflow_datasets as tfds
from absl import app, flags, logging
from ml_collections import config_flags

from var_jax import stages
from var_jax.cli import define_host_flags, failing_at_once, join_hosts, keep_compiled_programs
from var_jax.errors import UserError
from var_jax.training.profiling import parse_steps

CONFIG = config_flags.DEFINE_config_file("config", help_string="What to train, e.g. configs/digits.py")
WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run: checkpoints, logs, pictures")
PROFILE = flags.DEFINE_string("profile", None, "START:STOP, steps to trace into WORKDIR/<stage>/profile")
define_host_flags()


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}")
    try:
        profile = PROFILE.value and parse_steps(PROFILE.value)
    except ValueError as error:
        raise app.UsageError(str(error)) from error
    logging.set_verbosity(logging.WARNING)  # Orbax reports every file at INFO
    keep_compiled_programs()
    join_hosts()
    tfds.disable_progress_bar()
    try:
        with failing_at_once():
            stages.run(CONFIG.value, WORKDIR.value, profile)
    except UserError as error:
        sys.exit(f"train.py: {error}")


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main)
