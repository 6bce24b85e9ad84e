"""The stages of a run, in order: data, teacher, trajectories, causal init, distillation, samples.

Each is a function of the run; it resumes where it was stopped, and does nothing when it is done.
The trained ones go through one loop (training.loop), with a step from training.teacher, causal_init
or distill. On several hosts all call every stage: process 0 alone writes data and samples, and the
others wait.
"""

import json
import sys

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np

from hiar_jax.components import patch_pca
from hiar_jax.components.patch_pca import save
from hiar_jax.data import (
  ode_pairs,
  pipeline,
  prompt_texts,
  shapes_clips,
  tfds_builder,
  video_folder,
)
from hiar_jax.data.trajectories import TrajectoryWriter, check_sigmas
from hiar_jax.evaluation import shapes_truth
from hiar_jax.files import write_atomic
from hiar_jax.models import dit
from hiar_jax.parallel.mapping import map_step
from hiar_jax.progress import progress
from hiar_jax.training import causal_init, distill, loop, pretrained, samples, teacher
from hiar_jax.training.run import CODEC, Run
from hiar_jax.training.state import create

FIT_CLIPS = 1024  # a few million patches: the components no longer change

# What each stage adds to the seed, so that no two draw alike.
KEYS = {"teacher": 1, "trajectories": 2, "causal_init": 4, "distill": 5}


# --------------------------------------------------------------------------------------------- data


def prepare_data(run: Run) -> None:
  """Writes <workdir>/data: clips with captions (the shapes world or a folder of videos) and the
  codec fitted on them, or encoded prompts alone.
  """
  directory, data = run.directory("data"), run.experiment.data
  if jax.process_index() == 0 and not run.experiment.stages_from:
    if data.source == "shapes":
      shapes_clips.prepare(directory, run.world, data.clips, data.seed)
    elif data.source == "videos":
      video_folder.prepare(directory, data.folder, data.frames, data.height, data.width, data.fps)
    else:
      run.components.prepare(pipeline.read_prompts(data.prompts))
      prompt_texts.prepare(directory, data.prompts, run.components.texts)
    if data.source != "prompts" and not (directory / CODEC).exists():
      save(directory / CODEC, _fit_codec(run))
  _wait("data")


def _fit_codec(run: Run) -> patch_pca.PatchPCA:
  source = tfds_builder.open_source(run.directory("data"))
  clips = np.stack([source[i]["video"] for i in range(min(len(source), FIT_CLIPS))])
  return patch_pca.fit(clips.astype(np.float32) / 127.5 - 1.0, run.experiment.codec)


# ------------------------------------------------------------------------------------------ teacher


def train_teacher(run: Run) -> None:
  """Writes <workdir>/teacher, bidirectional; nothing where weights.base stands for it."""
  e = run.experiment
  if e.weights.base or loop.is_done(run, "teacher", e.teacher.steps):
    return
  key_init, key_train = jax.random.split(_key(run, "teacher"))
  step = teacher.make_step(e.teacher, e.dit, run.task)
  sample, tokens = run.teacher_sampler(jax.random.key(e.seed)), run.preview_tokens()

  def update(shardings):
    mapped = map_step(step, shardings, run.mesh, e.mesh.mapping)
    return lambda state, iterators, _: mapped(state, iterators.next("clips"))

  loop.run_stage(
    run,
    "teacher",
    e.teacher,
    create=lambda: create(key_train, dit.init(e.dit, key_init), e.teacher.optimizer()),
    update=update,
    iterators=loop.DataIterators(run, clips=run.clips("data", e.teacher.batch, ("video",), salt=1)),
    preview=lambda state: run.pixels(sample(state.ema, tokens, np.arange(len(tokens)))[:, -1]),
  )


# ------------------------------------------------------------------------------------- trajectories


def sample_trajectories(run: Run) -> None:
  """Writes <workdir>/trajectories: the teacher's ODE trajectories at the student's noise levels, or
  those that others made.

  Part by part; parts that are there are kept, so a killed run goes on where it was.
  """
  e, config = run.experiment, run.experiment.trajectories
  if e.stages_from or not e.needs_trajectories:
    return
  directory = run.directory("trajectories")
  if config.pairs:
    if jax.process_index() == 0:
      ode_pairs.prepare(directory, config.pairs, dtype=config.dtype, channels=e.codec.channels)
      run.components.prepare(pipeline.read_captions(directory))
    _wait("trajectories")
    return
  writer = TrajectoryWriter(
    directory,
    list(map(float, config.sigmas(e.student))),
    config.count,
    config.batch,
    dtype=config.dtype,
    recipe={
      "guidance": config.guidance,
      "steps": config.steps,
      "seed": e.seed,
      "teacher_steps": e.teacher.steps,
    },
  )
  if writer.complete:
    return
  _write_parts(run, writer)
  _wait("trajectories")
  if jax.process_index() == 0:
    writer.finish()
  _wait("trajectories data set")


def _write_parts(run: Run, writer: TrajectoryWriter) -> None:
  """This process's share of the parts that are missing."""
  config, data = run.experiment.trajectories, run.directory("data")
  captions, starts = pipeline.read_captions(data), pipeline.read_starts(data)
  params = pretrained.load(run)
  sample = run.teacher_sampler(_key(run, "trajectories"))
  # the last part is shorter: filled up to the batch, so that nothing is compiled twice
  fill = lambda array: np.pad(
    array, ((0, config.batch - len(array)), *((0, 0),) * (array.ndim - 1))
  )
  missing = writer.missing_parts(jax.process_index(), jax.process_count())
  parts = -(-config.count // config.batch)
  with progress("trajectories", parts, initial=parts - len(missing)) as bar:
    for done, part in enumerate(missing, parts - len(missing) + 1):
      rows = np.asarray(writer.rows(part))
      clips = rows % len(captions)
      chosen, begin = [captions[i] for i in clips], np.asarray(starts, np.int32)[clips]
      points = sample(params, fill(run.tokens(chosen)), fill(rows), fill(begin))
      writer.write_part(part, np.asarray(points)[: len(rows)], chosen, begin)
      bar.update(done)


# -------------------------------------------------------------------------------------- causal init


def train_causal_init(run: Run) -> None:
  """Writes <workdir>/causal_init: the block-causal student, started from the teacher and regressed
  on its trajectories; nothing where weights.student stands for it.
  """
  e = run.experiment
  if e.weights.student or loop.is_done(run, "causal_init", e.causal_init.steps):
    return
  check_sigmas(run.directory("trajectories"), list(map(float, run.point_sigmas)))
  weights, key = pretrained.load(run), _key(run, "causal_init")
  step = causal_init.make_step(e.causal_init, e.student_dit, run.task, run.point_sigmas, e.history)

  def update(shardings):
    mapped = map_step(step, shardings, run.mesh, e.mesh.mapping)
    return lambda state, iterators, _: mapped(state, iterators.next("trajectories"))

  loop.run_stage(
    run,
    "causal_init",
    e.causal_init,
    create=lambda: create(key, weights, e.causal_init.optimizer()),
    update=update,
    iterators=loop.DataIterators(
      run,
      trajectories=run.clips("trajectories", e.causal_init.batch, ("trajectory",), salt=4),
    ),
    preview=_student_preview(run),
  )


# ------------------------------------------------------------------------------------- distillation


class LatestMetrics:
  """The generator's last metrics, logged beside the critic's.

  Saved with the feeds, so that a resumed run logs what a straight one does.
  """

  def __init__(self):
    self.metrics: dict[str, jax.Array | float] = {}

  def get_state(self) -> dict[str, float]:
    return {name: float(value) for name, value in self.metrics.items()}

  def set_state(self, state: dict[str, float]) -> None:
    self.metrics = dict(state)


def distill_student(run: Run) -> None:
  """Writes <workdir>/distill.

  The student comes from causal init, the critic from the teacher, or both from published weights.
  """
  e, config = run.experiment, run.experiment.distill
  if loop.is_done(run, "distill", config.steps):
    return
  real, base = pretrained.load_real(run), pretrained.load(run)
  start, key = pretrained.load_weights(run, "causal_init"), _key(run, "distill")
  student = distill.Student(
    e.student_dit,
    e.dit,
    e.teacher_dit,
    e.history,
    jnp.asarray(run.sigmas),
    run.task,
    jnp.asarray(run.point_sigmas),
  )
  latest = LatestMetrics()
  iterators = {"prompts": run.clips("data", config.batch, (), salt=5), "generator": latest}
  if config.forward_kl.weight:
    iterators["trajectories"] = run.clips("trajectories", config.batch, ("trajectory",), salt=6)

  def update(shardings):
    spread = lambda step: map_step(step, shardings, run.mesh, e.mesh.mapping)
    critic = spread(distill.make_critic_step(config, student))
    generator = spread(distill.make_generator_step(config, student))

    def both(state, iterators, step):
      """Generator first, when it is its turn; the critic always."""
      if config.updates_generator(step):
        batch = iterators.next("prompts")
        if config.forward_kl.weight:
          batch["trajectories"] = iterators.next("trajectories")
        state, now = generator(state, batch, real)
        latest.metrics = {f"generator_{name}": value for name, value in now.items()}
      state, critic_measured = critic(state, iterators.next("prompts"))
      names = {f"critic_{name}": value for name, value in critic_measured.items()}
      return state, {"loss": critic_measured["loss"], **names, **latest.metrics}

    return both

  loop.run_stage(
    run,
    "distill",
    config,
    create=lambda: create(
      key, start, config.generator_optimizer(), base, config.critic_optimizer()
    ),
    update=update,
    iterators=loop.DataIterators(run, **iterators),
    preview=_student_preview(run),
  )


# ------------------------------------------------------------------------------------------ samples


def make_samples(run: Run) -> None:
  """Writes <workdir>/sample: long videos of the distilled student, an mp4 per prompt, a contact
  sheet, and metrics.json where the truth is known.

  Skipped when metrics.json (its last file) is there.
  """
  config, directory = run.experiment.sample, run.directory("sample")
  done = directory / "metrics.json"
  if done.exists() or jax.process_index() != 0:
    return
  prompts = samples.read_prompts(run)
  for prompt in prompts:
    samples.print_remarks(run, prompt)
  frames = samples.long_frames(run)
  params = pretrained.load_weights(run, "distill")
  measured = samples.measured_prompts(run, prompts)
  videos = samples.make_videos(run, params, measured or prompts, frames, seed=config.seed)
  if measured:
    result = shapes_truth.measure(videos, measured, run.world, run.experiment.data.frames)
  else:
    result = {"prompts": prompts, "frames": frames}
  shown = dict(zip(prompts, videos[: len(prompts)], strict=True))
  samples.save_videos(run, directory, shown, config.seed)
  write_atomic(done, (json.dumps(result, indent=2) + "\n").encode())
  if measured:
    print(samples.shapes_line(result), file=sys.stderr)


# ------------------------------------------------------------------------------------- shared parts


def _key(run: Run, stage: str) -> jax.Array:
  return jax.random.fold_in(jax.random.key(run.experiment.seed), KEYS[stage])


def _wait(name: str) -> None:
  """Until every process is here."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def _student_preview(run: Run):
  """state -> clips of the training length, for the log."""
  generate, tokens = run.sampler(run.experiment.latent.frames), run.preview_tokens()
  return lambda state: run.pixels(generate(state.ema, tokens, np.arange(len(tokens))))
