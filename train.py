"""Train the stages of a config.

    python train.py --config=configs/digits.py --workdir=runs/digits

On several hosts run the same command on each: in a TPU pod or a SLURM job they find each other; elsewhere add
--coordinator=HOST:PORT --num_processes=N --process_id=I.

The same command, on any number of hosts, resumes a run that was stopped.
"""

import tensorflow_datasets as tfds
from absl import flags, logging
from ml_collections import config_flags

from var_jax import cli, stages
from var_jax.errors import config_errors
from var_jax.training.profiling import parse_steps

CONFIG = config_flags.DEFINE_config_file("config", help_string="Config file, e.g. configs/digits.py")
WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run, for checkpoints, logs and pictures")
PROFILE = flags.DEFINE_string("profile", None, "START:STOP, steps to trace to WORKDIR/<stage>/profile")
cli.define_host_flags()


def main(_):
    with config_errors():
        profile = PROFILE.value and parse_steps(PROFILE.value)
    cli.initialize_distributed()
    tfds.disable_progress_bar()
    with cli.abort_on_error():
        stages.run(CONFIG.value, WORKDIR.value, profile)
    if stages.stages_of(CONFIG.value)[-1].task == "tokenizer":
        print(f"next: train a transformer with --config.tokenizer={WORKDIR.value}")
    else:
        print(f"next: python sample.py --workdir={WORKDIR.value}")


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    cli.run(main, verbosity=logging.WARNING)  # Orbax reports every file at INFO
