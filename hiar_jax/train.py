"""Trains an experiment, from its data to sampled videos.

    python -m hiar_jax.train --config=experiments/shapes.py --workdir=runs/shapes

The stages run in order. Each resumes from its newest checkpoint and is skipped when it is finished,
so the same command always continues. `--extend` trains the last stage longer, or with another
learning rate:

    python -m hiar_jax.train --config=experiments/shapes.py --workdir=runs/shapes \
      --config.distill.steps=400 --extend
"""

import contextlib
import os
import sys
import time

from absl import flags
import jax

from hiar_jax import peak_memory
from hiar_jax.checkpoints import lock
from hiar_jax.config import command_line as configs
from hiar_jax.parallel.mesh import all_devices
from hiar_jax.progress import is_writer
from hiar_jax.training import stages
from hiar_jax.training.experiment import Experiment
from hiar_jax.training.run import open_run

DISTILLATION = (
  # the teacher's ODE trajectories, kept at the student's noise levels
  ("trajectories", stages.sample_trajectories),
  # the causal student regresses the trajectories' ends
  ("causal_init", stages.train_causal_init),
  # and then learns from its own rollouts: distribution matching and forward KL
  ("distill", stages.distill_student),
)
CODEBOOK = (
  # where history is discretised (+D): what it is replaced by
  ("codebook", stages.fit_codebook),
)
FRAMEPACK = (
  # the teacher learns to make a section from packed context
  ("framepack", stages.train_framepack),
)


def main(config, workdir: str, extend: bool = False) -> None:
  """Runs all stages of the experiment that `config` (a ConfigDict) describes.

  extend: as open_run's.
  """
  # Several hosts, each running this command, find one another before any device is used.
  if os.environ.get("HIAR_DISTRIBUTED"):
    jax.distributed.initialize()
  all_devices()  # raises where there is none of the platform that is asked for
  with contextlib.ExitStack() as stack:
    if is_writer():  # the others of the same job write beside it
      stack.enter_context(lock.held(workdir, f"--workdir={workdir}"))
    run = open_run(config, workdir, extend=extend)
    stack.enter_context(run.writer)
    stack.enter_context(jax.set_mesh(run.mesh))
    for name, stage in (
      # clips with captions, and the codec fitted on them
      ("data", stages.prepare_data),
      # the bidirectional teacher learns the clips by flow matching
      ("teacher", stages.train_teacher),
      *after_teacher(run.experiment),
      # long videos, measured where the truth is known
      ("sample", stages.make_samples),
    ):
      started = time.monotonic()
      stage(run)
      report(name, time.monotonic() - started)


def after_teacher(experiment: Experiment) -> tuple:
  """Returns the stages between teacher and samples: (name, function of the run) each."""
  if experiment.framepack is None:
    return DISTILLATION
  return (CODEBOOK if experiment.framepack.parsed.discretised else ()) + FRAMEPACK


def report(stage: str, seconds: float) -> None:
  """Prints a stage's time in this process, compilation included, and the peak memory so far."""
  peak = peak_memory.peak()[1] / 2**30
  print(f"{stage}: {seconds:.0f} s, peak memory so far {peak:.2f} GiB", file=sys.stderr, flush=True)


if __name__ == "__main__":
  flags.DEFINE_boolean(
    "extend",
    False,
    "train the stage that was trained last on from its newest checkpoint, to more steps or with "
    "another learning rate",
  )
  configs.run(lambda *given: main(*given, extend=flags.FLAGS.extend), Experiment)
