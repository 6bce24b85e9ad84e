"""Weights that a stage starts from: an earlier stage's, or published ones in its place."""

from collections.abc import Callable
import dataclasses
import functools
import sys

import jax

from hiar_jax.checkpoints import weights
from hiar_jax.checkpoints.on_disk import CHECKPOINTS
from hiar_jax.checkpoints.training_state import load_params, steps_in
from hiar_jax.errors import UserError
from hiar_jax.models.frames import Network, abstract_weights
from hiar_jax.parallel.rules import sharded_shapes
from hiar_jax.training.experiment import Experiment
from hiar_jax.training.run import Run
from hiar_jax.types import Params


@dataclasses.dataclass(frozen=True)
class Start:
  """Weights that a first state is made of: their shapes, and a function that loads them, which is
  called where no checkpoint is restored.
  """

  shapes: Params
  load: Callable[[], Params]


def start_of(run: Run, stage: str) -> Start:
  """Returns the weights of a stage, or the published ones in its place, as a start."""
  shapes = abstract_weights(run.experiment.network_of(stage))
  return Start(shapes, lambda: load_weights(run, stage))


def load_teacher(run: Run) -> Params:
  """Loads the teacher, bidirectional and of the student's size: its stage's, or weights.base."""
  return load_weights(run, "teacher")


def frozen_of(e: Experiment, name: str) -> tuple[Network, str]:
  """Returns the network and the dtype of weights that a stage reads and does not train: `teacher`,
  or in distribution matching `real_score` and `critic`, which is the teacher too.

  These two are kept in the dtype that they compute in (half the memory in bfloat16).
  """
  if name == "real_score":
    return e.teacher_dit, e.teacher_dit.dtype
  return e.dit, e.dit.dtype if name == "critic" else "float32"


def load_frozen(run: Run, name: str) -> Params:
  """Loads weights of `frozen_of`. The real score is weights.teacher where that is given."""
  network, dtype = frozen_of(run.experiment, name)
  base, free = _in_place_of(run, "teacher")
  published = run.experiment.weights.teacher if name == "real_score" else ""
  if published or base:
    return load_published(run, published or base, network, dtype, free=free)
  return jax.tree.map(lambda leaf: leaf.astype(dtype), load_teacher(run))


def check(run: Run) -> None:
  """Raises UserError where published weights in a stage's place are missing or of other sizes."""
  for stage in ("teacher", "causal_init"):
    directory, free = _in_place_of(run, stage)
    if directory:
      check_sizes(run, directory, run.experiment.network_of(stage), free)


def _in_place_of(run: Run, stage: str) -> tuple[str, tuple[str, ...]]:
  """Returns the directory of published weights in a stage's place, '' for none, and the sizes in
  which they may differ.
  """
  e = run.experiment
  directory = {"teacher": e.weights.base, "causal_init": e.weights.student}.get(stage, "")
  # training starts from any kernels, and with guidance as an input or without: projections that are
  # lacking or too many are made or dropped then
  packed = {"teacher": e.framepack is not None, "causal_init": e.stored_student != e.dit}
  return directory, ("packing", "guided") * packed.get(stage, False)


def step_of(
  run: Run, stage: str, step: int | None = None, *, unfinished: bool = False
) -> int | None:
  """Returns the step of the checkpoint that a stage's weights are of: its last one, or `step`, or
  where `unfinished` the newest; another than the last is said on stderr. None where published
  weights take its place, or nothing is there.

  Raises UserError where the stage has no such checkpoint.
  """
  directory = run.directory(stage) / CHECKPOINTS
  there, last = steps_in(directory), getattr(run.experiment, stage).steps
  if _in_place_of(run, stage)[0] or (not there and step is None):
    return None
  if step is not None and step not in there:
    raise UserError(f"--step={step}: the checkpoints in {directory} are of {there or 'no step'}")
  wanted = last if step is None else step
  if wanted not in there:
    if not unfinished:
      raise UserError(
        f"{directory}: {stage} is at step {there[-1]} of {last}; the training command goes on with "
        f"it, --step={there[-1]} takes it as it is (evaluate: --unfinished)"
      )
    wanted = there[-1]
  if wanted != last:
    print(f"weights of {directory}: step {wanted} of {last}", file=sys.stderr)
  return wanted


def load_weights(run: Run, stage: str, step: int | None = None) -> Params:
  """Loads the averaged weights of a stage, or the published ones in its place, sharded over the
  mesh. step: of its checkpoint; None: the last one.

  Raises UserError as step_of.
  """
  network = run.experiment.network_of(stage)
  directory, free = _in_place_of(run, stage)
  if directory:
    return load_published(run, directory, network, free=free)
  shapes = abstract_weights(network)
  shardings = run.shardings(shapes, network.sharding_rules)
  wanted = step_of(run, stage) if step is None else step
  directory = run.directory(stage) / CHECKPOINTS
  return load_params(directory, sharded_shapes(shapes, shardings), wanted)


def load_published(
  run: Run,
  directory: str,
  expected: Network,
  dtype: str = "float32",
  *,
  free: tuple[str, ...] = (),
) -> Params:
  """Loads converted weights, cast to `dtype` (float32 where they are to be trained).

  free: sizes that may be others. Raises UserError where they have other sizes than `expected`.
  """
  check_sizes(run, directory, expected, free)
  sharding = functools.partial(run.shardings, rules=expected.sharding_rules)
  return weights.load(directory, expected.kind, dtype=dtype, sharding=sharding)[1]


def check_sizes(run: Run, directory: str, expected: Network, free: tuple[str, ...] = ()) -> None:
  """Raises UserError where weights are missing, or of other sizes than `expected` and not free."""
  found = weights.read_config(directory, expected.kind)
  sizes = [name for name in expected.sizes if name not in free]
  different = [name for name in sizes if getattr(found, name) != getattr(expected, name)]
  if different == ["packing"]:
    raise UserError(_other_kernels(run, directory, found.packing, expected.packing))
  if different:
    lines = ", ".join(
      f"{name} {getattr(found, name)}, not {getattr(expected, name)}" for name in different
    )
    raise UserError(
      f"{directory} holds another model than the config describes: {lines}; give the weights of "
      "this size"
    )


def _other_kernels(run: Run, directory: str, found: tuple, expected: tuple) -> str:
  """Returns the line for weights with other kernels of packed history than the config's."""
  there, wanted = (", ".join(f"k{pool}" for pool in pools) or "no" for pools in (found, expected))
  framepack, history = run.experiment.framepack, run.experiment.history
  of = f"history.packing = {history.packing!r}" if history.packing else "the config (no packing)"
  if framepack:
    of = f"framepack.packing = {framepack.packing!r}"
  return (
    f"{directory} was trained with {there} kernels of packed history, and {of} has {wanted}: give "
    "a schedule of the same kernels, or other weights"
  )
