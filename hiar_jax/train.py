"""Trains and samples: `python -m hiar_jax.train --config=experiments/shapes.py --workdir=runs/shapes`.

Every stage in order; each resumes where it was stopped and is skipped when it is done, so the same command always continues.
"""

import os

import jax

from hiar_jax import config as configs
from hiar_jax.stages import causal_init, data, distill, sample, teacher, trajectories
from hiar_jax.stages.run import open_run


def main(config, workdir: str) -> None:
  if os.environ.get("HIAR_DISTRIBUTED"):  # several hosts: each runs this command
    jax.distributed.initialize()
  run = open_run(config, workdir)
  with run.writer, jax.set_mesh(run.mesh):
    data.run(run)  # clips with captions, and the codec fitted on them
    teacher.run(run)  # bidirectional, learns the clips
    trajectories.run(run)  # its ODE walks, kept at the student's levels
    causal_init.run(run)  # the causal student learns where they end
    distill.run(run)  # and then from its own rollouts
    sample.run(run)  # long videos, measured


if __name__ == "__main__":
  configs.run(main)
