"""What a job of videos would take, before anything is loaded: its networks, its blocks, and the
rows that hiar_jax.plan has, of the programs that would run on the devices that are here.
"""

from collections.abc import Iterator
import functools

import jax
import jax.numpy as jnp

from hiar_jax.generation.clips import Clip, alike
from hiar_jax.generation.video_model import VideoModel
from hiar_jax.models.frames import abstract_weights
from hiar_jax.packing.orders import steps_of
from hiar_jax.packing.schedule import Group
from hiar_jax.peak_memory import size
from hiar_jax.planning import compiled, programs, table, targets
from hiar_jax.planning.abstract_run import AbstractRun, integers, shape
from hiar_jax.planning.programs import Program
from hiar_jax.training.experiment import Experiment


def lines(model: VideoModel, clips: list[Clip]) -> Iterator[str]:
  """Yields the plan of a job, each part as soon as it is there; clips of one shape share a program.

  Raises UserError where the network cannot run on these devices.
  """
  e, target = model.experiment, targets.parse(targets.HERE)
  run = AbstractRun(e, model.run.workdir, model.run.mesh)
  networks = {"DiT": (abstract_weights(model.network), model.dtype)}
  for name, (tree, dtype) in {**networks, **e.codec.networks(), **e.text.networks()}.items():
    count = sum(leaf.size for leaf in jax.tree.leaves(tree))
    held = size(count * jnp.dtype(dtype).itemsize)
    yield f"{name}: {count / 1e9:.3f} billion parameters, {held}"
  for group in alike(clips):
    yield from _blocks(e, group[0])
    batch = min(e.sample.batch, len(group))
    make = functools.partial(sampler, clip=group[0], batch=batch, dtype=model.dtype)
    yield table.lines(compiled.find(run, "generate", make, target))
  if programs.PROGRAMS["vae"].exists(e):
    yield table.lines(compiled.find(run, "vae, one latent frame", programs.decoder, target))
  if target.devices[0].platform == "cpu" and e.model.dtype == "bfloat16":
    yield "a CPU computes bfloat16 in float32 and holds copies for it: other devices need less"


def sampler(run: AbstractRun, clip: Clip, batch: int, dtype: str) -> Program:
  """Returns the sampler of `batch` clips alike. dtype: of the weights."""
  sections = clip.frames // run.experiment.history.block
  # a text and a seed for each section, where a clip has them
  text, each = run.prompts(1).shape[1:], (batch, sections)
  ends = [run.latents(batch, count) if count else None for count in (clip.given, clip.behind)]
  while ends and ends[-1] is None:
    ends.pop()  # the sampler of a causal model takes no end
  rows = [
    shape((*(each if clip.job.timeline else each[:1]), *text), jnp.float32),
    integers(*(each if clip.job.takes else each[:1])),
    *ends,
  ]
  return programs.sampler(run, dtype, clip.frames, rows, **clip.sections)


def _blocks(e: Experiment, clip: Clip) -> Iterator[str]:
  """Yields a line of the blocks, or of the sections of a packed model and of their history."""
  block, after = e.history.block, f" after {clip.given} given latent frames" * bool(clip.given)
  count, tokens = clip.frames // block, e.dit.tokens(e.latent.height, e.latent.width)
  each = f"{count}{after}, {tokens * block} tokens each ({tokens} a latent frame)"
  if not e.framepack:
    yield f"blocks: {each}, {len(e.student.timesteps)} noise levels"
    return
  schedule, (_, ph, pw) = e.framepack.parsed, e.dit.patch
  order, ended = clip.job.order or e.sample.order, bool(clip.behind or clip.job.loop)
  twice = e.sample.guidance and not e.framepack.distilled_guidance
  forwards = len(steps_of(order, count, ended=ended)) * e.sample.steps * (2 if twice else 1)
  grid = e.latent.height // ph, e.latent.width // pw
  groups = *schedule.groups, *(Group(1, pool) for pool in schedule.compressed_pools)
  packed = [(group.tokens(*grid), group.pool) for group in groups]
  history = sum(count for count, _ in packed)
  said = " + ".join(f"{tokens} by k{pool}" for tokens, pool in packed)
  if "ta" in (schedule.before_tail, schedule.after_tail):
    said += ", and 1 for each frame beyond"
  yield f"sections: {each}, {forwards} forwards"
  yield f"history: {schedule.notation}, {history} packed tokens a forward ({said})"
