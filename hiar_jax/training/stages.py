"""The stages of a run, in order: data, teacher, trajectories, causal init, distillation, samples;
or data, teacher, framepack (after a codebook where history is discretised), samples.

Each is a function of the run. It resumes from its newest checkpoint and returns at once when it is
finished. The trained stages, which training.updates defines, share one loop (training.loop). On
several hosts every process calls every stage; process 0 alone makes the data, while the others
wait, and writes what all have computed.
"""

from collections.abc import Callable, Sequence
import contextlib
import json
import sys

import jax
from jax.experimental import multihost_utils
import numpy as np

from hiar_jax.data import ode_pairs, pipeline, tfds_builder
from hiar_jax.data.trajectories import TrajectoryWriter, check_sigmas
from hiar_jax.evaluation import footage, shapes_truth
from hiar_jax.files import write_atomic
from hiar_jax.parallel.mapping import NO_MESH
from hiar_jax.parallel.rules import leaf_sharding
from hiar_jax.progress import Progress, is_writer
from hiar_jax.rollout.noise import seed_key
from hiar_jax.training import (
  checks,
  loop,
  own_footage,
  prepared_data,
  pretrained,
  samples,
  teacher,
  updates,
)
from hiar_jax.training.run import Run
from hiar_jax.training.state import TrainState
from hiar_jax.training.updates import KEY_OFFSETS, Stage, stage_key
from hiar_jax.types import Params, PyTree

HELD_OUT_CLIPS = 32  # that the teacher's loss is measured on at every preview

# --------------------------------------------------------------------------------------------- data


def prepare_data(run: Run) -> None:
  """Writes <workdir>/data: clips with captions and the codec fitted on them; clips as latents, of a
  published codec (data.latents); or encoded prompts alone (data.sources).
  """
  pretrained.check(run)  # before hours of work
  run.check_origins()
  if jax.process_index() == 0:
    run.origins.forget()
    prepared_data.prepare(run)
  _wait_for_all("data")
  run.origins.check()  # where data/ was deleted, it has been made anew
  if jax.process_index() == 0:
    run.origins.keep()
  # of a folder the number of clips is known now
  checks.check_counts(run.experiment, run.source.count(run.directory("data")))


# ------------------------------------------------------------------------------------------ teacher


def train_teacher(run: Run) -> None:
  """Writes <workdir>/teacher, the bidirectional model; skipped where weights.base replaces it."""
  e = run.experiment
  if e.weights.base or loop.is_done(run, "teacher", e.teacher.steps):
    return
  stage = updates.of_teacher(run)
  sample = run.teacher_sampler(seed_key(e.seed))
  texts = run.texts(run.preview_prompts())
  held_out = _held_out_loss(run)

  def preview(state: TrainState) -> np.ndarray:
    if held_out:
      run.writer.scalars("teacher", int(state.step), {"held_out_loss": held_out(state.ema)})
    # The sampler returns trajectories [b points f h w c]; the last point is the clip.
    return run.pixels(sample(state.ema, texts, np.arange(len(texts)))[:, -1])

  _train(run, stage, _frozen(run, stage), preview=preview)


def _held_out_loss(run: Run) -> Callable[[Params], jax.Array] | None:
  """Returns weights -> the loss on held-out clips; None where there are none."""
  found = prepared_data.held_out(run, HELD_OUT_CLIPS)
  if not found:
    return None
  e, key = run.experiment, stage_key(run.experiment, "teacher")
  rows = np.arange(HELD_OUT_CLIPS) % len(found["caption"])  # few clips come at several levels
  given = {"video": found["video"][rows]}
  given["tokens"] = run.text_encoder.tokens([found["caption"][row] for row in rows])
  if e.dit.reads_start:
    given["start"] = found["start"][rows]
  batch = jax.device_get(run.encode(given))  # the same on every host, for the devices of all
  loss = jax.jit(lambda params, batch: teacher.held_out_loss(e.teacher, e.dit, params, batch, key))
  return lambda params: loss(params, batch)


# ------------------------------------------------------------------------------------- trajectories


def sample_trajectories(run: Run) -> None:
  """Writes <workdir>/trajectories: the teacher's ODE trajectories at the student's noise levels, or
  imported ones (trajectories.pairs).

  They are written in parts of one batch. Finished parts are kept, so a killed run continues with
  the missing ones.
  """
  e = run.experiment
  config = e.trajectories
  if not e.needs_trajectories:
    return
  directory = run.directory("trajectories")
  if run.borrows("trajectories"):
    # a borrowed causal init has read them already
    read = not run.borrows("causal_init") or e.distill.forward_kl.weight
    if read and not tfds_builder.is_complete(directory):
      raise loop.not_there(run, "trajectories", directory)
    return
  if config.pairs:
    if jax.process_index() == 0:
      ode_pairs.prepare(directory, config.pairs, dtype=config.dtype, channels=e.codec.channels)
      encoder, captions = run.text_encoder, pipeline.read_captions(directory)
      prepared_data.print_unread(run, captions)
      encoder.prepare([*captions, encoder.negative_prompt])
    _wait_for_all("trajectories")
    return
  if is_writer():
    _trajectory_writer(run)  # writes the recipe, which the others then find
  _wait_for_all("the trajectories' recipe")
  writer = _trajectory_writer(run)
  if writer.complete:
    return
  _write_parts(run, writer)
  # All parts must lie on the disk before one process joins them into a data set, and the data set
  # before anybody reads it.
  _wait_for_all("trajectories")
  if jax.process_index() == 0:
    writer.finish()
  _wait_for_all("trajectories data set")


def _trajectory_writer(run: Run) -> TrajectoryWriter:
  e, config = run.experiment, run.experiment.trajectories
  return TrajectoryWriter(
    run.directory("trajectories"),
    list(map(float, config.sigmas(e.student))),
    config.count,
    config.batch,
    dtype=config.dtype,
    # The settings that shaped the points: parts made with others are not mixed with these.
    recipe={
      "guidance": config.guidance,
      "steps": config.steps,
      "seed": e.seed,
      "teacher_steps": e.teacher.steps,
      # stored points that name none are Euler's
      **({"solver": config.solver} if config.solver != "euler" else {}),
      # and those that name no order are of the first clips
      **({"clips": "shuffled"} if _shuffles(run) else {}),
    },
  )


def _shuffles(run: Run) -> bool:
  """True where trajectories are of clips from all over the data: a folder or a file has an order,
  a generated world has none. Those that an earlier version began go on in their order.
  """
  stored = tfds_builder.read_recipe(run.directory("trajectories"))
  return run.source.world is None and (stored is None or "clips" in stored)


def _clip_order(run: Run, count: int) -> np.ndarray:
  """Returns the numbers of `count` clips in the order in which trajectories take them."""
  if not _shuffles(run):
    return np.arange(count)
  seed = [run.experiment.seed, KEY_OFFSETS["trajectories"]]
  return np.random.default_rng(seed).permutation(count)


def _write_parts(run: Run, writer: TrajectoryWriter) -> None:
  """Samples and writes this process's share of the missing parts."""
  config = run.experiment.trajectories
  captions = pipeline.read_captions(run.directory("data"))
  seed = [run.experiment.seed, KEY_OFFSETS["trajectories"]]
  starts = np.asarray(pipeline.read_starts(run.directory("data"), seed), np.int32)
  order = _clip_order(run, len(captions))
  params = pretrained.load_teacher(run)
  sample = run.teacher_sampler(stage_key(run.experiment, "trajectories"))

  def fill(rows: np.ndarray) -> jax.Array:
    """Pads axis 0 to the batch: the last part is shorter, and must not be compiled separately. In
    one process its devices share the rows where they divide them.
    """
    rows = np.pad(rows, ((0, config.batch - len(rows)), *((0, 0),) * (rows.ndim - 1)))
    if jax.process_count() > 1:  # each has parts of its own
      return rows
    return jax.device_put(rows, leaf_sharding("batch/rows", run.mesh, shape=rows.shape))

  # Several processes work on different rows, on the same weights: nothing may be pinned to a mesh
  # of the devices of all.
  several = jax.process_count() > 1
  apart = jax.sharding.use_abstract_mesh(NO_MESH) if several else contextlib.nullcontext()
  missing = writer.missing_parts(jax.process_index(), jax.process_count())
  parts = -(-config.count // config.batch)
  with apart, Progress("trajectories", parts, initial=parts - len(missing)) as bar:
    for done, part in enumerate(missing, parts - len(missing) + 1):
      # Row i takes the i-th caption of that order, over again where there are more rows than clips.
      # Its noise depends on i alone, so parts may be made in any order by any process.
      rows = np.asarray(writer.rows(part))
      clips = order[rows % len(captions)]
      prompts = [captions[i] for i in clips]
      before = run.latent_starts(starts[clips])
      points = sample(params, fill(run.texts(prompts)), fill(rows), fill(before))
      writer.write_part(part, np.asarray(points)[: len(rows)], prompts, starts[clips])
      bar.update(done)


# ---------------------------------------------------------------------------------------- framepack


def fit_codebook(run: Run) -> None:
  """Writes <workdir>/codebook: centroids of the clips' latents, which replace what a section reads
  of the past.
  """
  e, data = run.experiment, run.directory("data")
  clips, encode = lambda: prepared_data.videos_to_fit(run), run.autoencoder.latents
  if e.stores_latents:
    clips, encode = lambda: prepared_data.spread_latents(data), lambda x: x
  if jax.process_index() == 0:
    seed = [e.seed, KEY_OFFSETS["codebook"]]
    e.framepack.codebook.fit(run.directory("codebook"), clips, encode, seed=seed)
  _wait_for_all("codebook")


def train_framepack(run: Run) -> None:
  """Writes <workdir>/framepack: the teacher, fine-tuned to make a section from packed context."""
  e = run.experiment
  if loop.is_done(run, "framepack", e.framepack.steps):
    return
  stage = updates.of_framepack(run)
  frozen, adapters = _frozen(run, stage), e.packed_adapters
  merge = jax.jit(adapters.merged) if adapters else lambda trained, base: trained

  def inference(state: TrainState) -> Params:
    return merge(state.ema, frozen[0].base)

  _train(run, stage, frozen, preview=_student_preview(run, inference), inference=inference)


# -------------------------------------------------------------------------------------- causal init


def train_causal_init(run: Run) -> None:
  """Writes <workdir>/causal_init: the block-causal student, started from the teacher and regressed
  on its trajectories; skipped where weights.student replaces it.
  """
  e = run.experiment
  if e.weights.student or loop.is_done(run, "causal_init", e.causal_init.steps):
    return
  # Trajectories kept from another config would lie at other levels than the step assumes.
  check_sigmas(run.directory("trajectories"), list(map(float, run.point_sigmas)))
  _train(run, updates.of_causal_init(run), preview=_student_preview(run))


# ------------------------------------------------------------------------------------- distillation


def distill_student(run: Run) -> None:
  """Writes <workdir>/distill: the student after distribution matching on its own rollouts."""
  if loop.is_done(run, "distill", run.experiment.distill.steps):
    return
  stage = updates.of_distillation(run)
  _train(run, stage, _frozen(run, stage), preview=_student_preview(run))


# ------------------------------------------------------------------------------------------ samples


def make_samples(run: Run) -> None:
  """Writes <workdir>/sample: long videos of the trained model, an mp4 per prompt, a contact
  sheet, and metrics.json, which holds measurements: against the truth where it is known, else
  against the footage that was trained on.

  Skipped where metrics.json, the last file to be written, exists.
  """
  config = run.experiment.sample
  directory = run.directory("sample")
  metrics_file = directory / "metrics.json"
  if metrics_file.exists():
    return
  prompts = samples.read_prompts(run)
  for prompt in prompts if is_writer() else ():
    samples.print_warnings(run, prompt)
  frames = samples.long_frames(run)
  params = pretrained.load_weights(run, run.experiment.last_stage)
  # The prompts that are saved come first among those that are measured, so no video is made twice.
  measured = samples.measured_prompts(run, prompts)
  # by all processes: the network lies on the devices of all of them
  videos = samples.make_videos(run, params, measured or prompts, frames, seed=config.seed)
  if not is_writer():
    return
  if measured:
    made = videos[:, samples.given_pixels(run) :]
    metrics = shapes_truth.measure(made, measured, run.world, run.experiment.data.frames)
  else:
    measures = own_footage.measure(run, videos[:, samples.given_pixels(run) :], prompts)
    metrics = {"prompts": prompts, "frames": frames, **measures}
  saved = dict(zip(prompts, videos[: len(prompts)], strict=True))
  samples.save_videos(run, directory, saved, config.seed)
  write_atomic(metrics_file, (json.dumps(metrics, indent=2) + "\n").encode())
  if measured:
    print(samples.shapes_line(metrics), file=sys.stderr)
  elif measures:
    print(footage.line(metrics), file=sys.stderr)


# ------------------------------------------------------------------------------------- shared parts


def _frozen(run: Run, stage: Stage) -> list[PyTree]:
  """Loads what each update of a stage reads and nobody trains, each tree of weights once."""
  names = dict.fromkeys(name for update in stage.updates for name in update.reads)
  loaded = {name: pretrained.load_frozen(run, name) for name in names}
  return [
    update.frozen and update.frozen(run.negative, *(loaded[name] for name in update.reads))
    for update in stage.updates
  ]


def _train(run: Run, stage: Stage, frozen: Sequence[PyTree] = (), **options) -> None:
  """Runs a stage; options: of loop.run_stage."""
  iterators = {
    name: run.clips(feed.stage, stage.config.batch, feed.keys, feed.salt, stage.config.seed)
    for name, feed in stage.feeds.items()
  }
  loop.run_stage(
    run,
    stage,
    starts=[pretrained.start_of(run, name) for name in stage.starts],
    frozen=frozen,
    iterators=loop.DataIterators(run, **iterators),
    **options,
  )


def _wait_for_all(name: str) -> None:
  """Returns when every process has called it with this name."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def _student_preview(run: Run, inference=lambda state: state.ema):
  """Returns state -> uint8 clips [b F H W 3] of the training length, for the log; inference: as
  loop.run_stage's.
  """
  e, prompts = run.experiment, run.preview_prompts()
  generate = run.sampler(e.latent.frames - e.given)
  texts, seeds = run.texts(prompts), np.arange(len(prompts))
  start = samples.true_starts(run, prompts, seeds)
  return lambda state: run.pixels(generate(inference(state), texts, seeds, *start))
