"""Trains and samples.

    python -m hiar_jax.train --config=experiments/shapes.py --workdir=runs/shapes

Every stage in order; each resumes where it was stopped and is skipped when it is done, so the same
command always continues.
"""

import os
import resource
import sys
import time

import jax

from hiar_jax.config import command_line as configs
from hiar_jax.training import stages
from hiar_jax.training.run import open_run


def main(config, workdir: str) -> None:
  if os.environ.get("HIAR_DISTRIBUTED"):  # several hosts: each runs this command
    jax.distributed.initialize()
  run = open_run(config, workdir)
  with run.writer, jax.set_mesh(run.mesh):
    for name, stage in (
      ("data", stages.prepare_data),  # clips with captions, and the codec fitted on them
      ("teacher", stages.train_teacher),  # bidirectional, learns the clips
      ("trajectories", stages.sample_trajectories),  # its ODE walks, at the student's levels
      ("causal_init", stages.train_causal_init),  # the causal student learns where they end
      ("distill", stages.distill_student),  # and then from its own rollouts
      ("sample", stages.make_samples),  # long videos, measured
    ):
      started = time.monotonic()
      stage(run)
      report(name, time.monotonic() - started)


def report(stage: str, seconds: float) -> None:
  """What the stage took in this process, compilation included, and the most memory that the process
  has held so far.
  """
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
  print(f"{stage}: {seconds:.0f} s, peak memory so far {peak:.2f} GiB", file=sys.stderr, flush=True)


if __name__ == "__main__":
  configs.run(main)
