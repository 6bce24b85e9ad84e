"""What a later stage of a run would trip over, found before the first one: Experiment checks what
its parts must be for any use; here is what training alone asks.
"""

import math
import sys

from jax.sharding import Mesh

from hiar_jax.data.prompt_rows import read_prompts
from hiar_jax.errors import UserError
from hiar_jax.evaluation import drift
from hiar_jax.parallel.mesh import check_batch
from hiar_jax.progress import is_writer
from hiar_jax.training.experiment import Experiment


def check_stages(e: Experiment, mesh: Mesh, clips: tuple[float, str]) -> None:
  """Raises UserError for what a stage would notice only hours later, when its turn comes.

  clips: (number of clips or prompts of the data, the field that sets it).
  """
  if e.data.source == "videos":
    _check_videos(e)
  for name in _sources(e, clips):
    training = getattr(e, name)
    check_batch(training.batch, training.accumulate, mesh, name)
    training.check_average(name)
  check_counts(e, clips)
  why = e.dit.unavailable_on(mesh.devices.flat[0].platform)
  if why:
    raise UserError(f"model.{why}; 'auto' takes what can run")
  if not e.framepack:
    _check_distillation(e)
  _check_measured(e)
  if e.sample.prompts != "held_out":
    read_prompts(e.sample.prompts)  # raises where the file is missing or empty
    if e.given and e.data.opened.world is None:
      raise UserError(
        f"sample.prompts = {e.sample.prompts!r}: a video starts from framepack.given = {e.given} "
        "frames, which prompts of a file do not have; expected 'held_out', the captions of clips"
      )


def _check_measured(e: Experiment) -> None:
  """Raises UserError for videos that are too short to be measured against the truth."""
  if e.data.opened.world is None:
    return
  block, given = e.history.block, e.codec.pixel_frames(e.given) if e.given else 0
  frames = [
    e.codec.pixel_frames(e.given + blocks * block) - given for blocks in range(drift.SEGMENTS + 1)
  ]
  made = frames[min(-(-e.sample_frames // block), drift.SEGMENTS)]
  if made < drift.SEGMENTS:
    fewer = sum(count < drift.SEGMENTS for count in frames) - 1  # blocks: one more are enough
    shortest = math.floor(100 * fewer * block / (e.latent.frames - e.given) + 1e-9) / 100 + 0.01
    raise UserError(
      f"sample.length = {e.sample.length}: videos of {made} frames, and measuring takes "
      f"{drift.SEGMENTS}; give at least {shortest:.2f}"
    )


def _check_videos(e: Experiment) -> None:
  if e.data.stride and not e.stores_latents:
    raise UserError(
      f"data.stride = {e.data.stride}: clips of this codec are any windows of a film; it is for "
      "those that are stored as latents: leave it at 0"
    )
  if e.data.held_out and e.stores_latents:
    raise UserError(
      f"data.held_out = {e.data.held_out}: of clips that are stored as latents none are held out; "
      "leave it at 0, and keep films for that in another folder"
    )


def check_counts(e: Experiment, clips: tuple[float, str]) -> None:
  """Raises UserError where a batch is larger than what it is drawn from; clips: as check_stages."""
  for name, (count, field) in _sources(e, clips).items():
    batch = getattr(e, name).batch
    if batch > count:
      raise UserError(
        f"{name}.batch = {batch} is more than {field} = {count}; take a smaller batch or make more"
      )


def _sources(e: Experiment, clips: tuple[float, str]) -> dict[str, tuple[float, str]]:
  """Returns the trained stages -> (examples that each can draw a batch from, the field that sets
  their number).
  """
  count = math.inf if e.trajectories.pairs else e.trajectories.count
  trajectories = (count, "trajectories.count")
  sources = {} if e.weights.base else {"teacher": clips}
  if e.framepack:
    return {**sources, "framepack": clips}
  if not e.weights.student:
    sources["causal_init"] = trajectories
  # without forward KL, distillation reads prompts alone
  return {**sources, "distill": trajectories if e.distill.forward_kl.weight else clips}


def _check_distillation(e: Experiment) -> None:
  if not e.distill.generator_steps:
    raise UserError(
      f"distill.critic_warmup = {e.distill.critic_warmup} of distill.steps = {e.distill.steps}: "
      "the generator would never be updated; set a lower one"
    )
  if e.history.clean_sink and not e.history.context.free:
    raise UserError(
      "history.sink_level = 'clean' is trained at history.level = 'input' alone, not at "
      f"{e.history.level!r}"
    )


def print_notes(e: Experiment) -> None:
  """Says on stderr which learning rates never reach their peak."""
  for name in _sources(e, (0, "")) if is_writer() else ():
    training = getattr(e, name)
    # a critic has as many updates as the stage has steps, no fewer than the network beside it
    if training.warmup >= training.averaged:
      print(
        f"note: {name}.warmup = {training.warmup} of {training.averaged} updates: the learning "
        "rate never reaches its peak",
        file=sys.stderr,
      )
