"""The programs that training, generating and streaming compile, lowered from what they jit."""

from collections.abc import Callable, Iterator
import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.programs.full_size import (
  FullSize,
  WanShapes,
  is_wan,
  only,
  without_places,
)
from hiar_jax.components import patch_pca
from hiar_jax.config.workdir import to_json
from hiar_jax.generation.video_model import VideoModel
from hiar_jax.models import umt5, vae_tiling
from hiar_jax.models.frames import abstract_weights
from hiar_jax.parallel.mesh import MeshConfig, make_mesh
from hiar_jax.planning.abstract_run import integers, shape
from hiar_jax.planning.stage_steps import step_of
from hiar_jax.streaming.compiled_tick import Engine, StreamParts, TickOptions
from hiar_jax.training.experiment import Experiment

PREVIEWED = 8  # clips of the log
GIVEN = 6  # latent frames that a continuation starts from: two blocks
SINK = 3  # latent frames, of streams that are given one
TILE = 32  # latents a side, as in docs/wan.md
PROMPTS, LENGTHS = 4, (64, 512)  # encoded at once; their tokens, at least and at most

Lowered = jax.stages.Lowered
Condition = Callable[[Experiment], bool]


@dataclasses.dataclass(frozen=True)
class Program:
  """reads: groups of the experiment. exists: whether an experiment has it."""

  lower: Callable[[FullSize], Lowered]
  reads: tuple[str, ...]
  exists: Condition


PROGRAMS: dict[str, Program] = {}


def program(name: str, *reads: str, exists: Condition = lambda e: True):
  """Enters a function run -> Lowered under a name."""

  def enter(lower):
    PROGRAMS[name] = Program(lower, reads, exists)
    return lower

  return enter


def programs(e: Experiment) -> Iterator[tuple[str, str, Callable[[], Lowered]]]:
  """(name, key, lower) of those that the experiment has. Those of one key are the same program."""
  mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
  e = without_places(e)

  def lower(entry: Program) -> Lowered:
    with jax.set_mesh(mesh):
      return entry.lower(FullSize(only(e, entry.reads), pathlib.Path(), mesh))

  for name, entry in PROGRAMS.items():
    if entry.exists(e):
      read = {group: to_json(getattr(e, group)) for group in entry.reads}
      yield name, json.dumps([name, read]), functools.partial(lower, entry)


# The groups that programs read.
SIZES = ("data", "codec", "text", "model")
STUDENT = (*SIZES, "seed", "student", "history", "framepack")
DISTILL = (*STUDENT, "teacher_model", "trajectories", "distill")
TEACHER = (*SIZES, "seed", "teacher")
INIT = (*STUDENT, "trajectories", "causal_init")
PACK = (*SIZES, "seed", "framepack")
# the groups that the teacher's sampler reads
WALK = (*TEACHER, "student", "trajectories")

# The conditions under which they exist.
trains_teacher = lambda e: not e.weights.base
distills = lambda e: e.framepack is None
trains_init = lambda e: distills(e) and not e.weights.student
packs = lambda e: not distills(e)
is_small = lambda e: not is_wan(e)
streams = lambda e: distills(e) and e.history.order == "step_first"
has_clean_sink = lambda e: streams(e) and e.history.clean_sink > 0
takes_sink = lambda e: streams(e) and not e.history.packing
has_no_sink = lambda e: takes_sink(e) and e.history.sink == 0


# ----------------------------------------------------------------------------------------- training


def start(name: str) -> Callable[[FullSize], Lowered]:
  """Lowers the function that training/loop.py jits for the first state."""

  def lower(run: FullSize) -> Lowered:
    step = step_of(run, name)
    return jax.jit(step.stage.create).lower(*step.starts)

  return lower


def step(name: str) -> Callable[[FullSize], Lowered]:
  """Lowers a training step on one device."""

  def lower(run: FullSize) -> Lowered:
    step = step_of(run, name)
    return jax.jit(step.update.make_step()).lower(step.state, step.batch, step.frozen)

  return lower


def stage_key(e: Experiment, stage: int) -> jax.Array:
  return jax.random.fold_in(jax.random.key(e.seed), stage)


for name, make, reads, exists in (
  ("teacher/start", start("teacher"), TEACHER, trains_teacher),
  ("teacher/step", step("teacher"), TEACHER, trains_teacher),
  ("causal_init/start", start("causal_init"), INIT, trains_init),
  ("causal_init/step", step("causal_init"), INIT, trains_init),
  ("distill/start", start("critic"), DISTILL, distills),
  ("distill/critic_step", step("critic"), DISTILL, distills),
  ("distill/generator_step", step("generator"), DISTILL, distills),
  ("framepack/start", start("framepack"), PACK, packs),
  ("framepack/step", step("framepack"), PACK, packs),
):
  program(name, *reads, exists=exists)(make)


@program("teacher/preview", *WALK, exists=trains_teacher)
def teacher_preview(run):
  walk = run.teacher_sampler(jax.random.key(run.experiment.seed))
  weights = abstract_weights(run.experiment.dit)
  return walk.lower(weights, run.prompts(PREVIEWED), integers(PREVIEWED))


@program("trajectories/walk", *WALK, exists=lambda e: distills(e) and e.needs_trajectories)
def trajectories_walk(run):
  e, size = run.experiment, run.experiment.trajectories.batch
  walk = run.teacher_sampler(stage_key(e, 2))
  return walk.lower(abstract_weights(e.dit), run.prompts(size), integers(size), integers(size))


# --------------------------------------------------------------------------------------- generation


def sampled(e: Experiment):
  """The network that makes videos."""
  return e.packed_dit if e.framepack else e.stored_student


def from_start(run: FullSize, frames: int, size: int) -> Lowered:
  """`size` videos of `frames` latent frames, those that the model is given included."""
  e = run.experiment
  start = [run.latents(size, e.given)] if e.given else []
  generate = run.sampler(frames - e.given)
  return generate.lower(abstract_weights(sampled(e)), run.prompts(size), integers(size), *start)


@program("student/preview", *STUDENT, "sample")
def preview(run):
  return from_start(run, run.experiment.latent.frames, PREVIEWED)


@program("sample/generate", *STUDENT, "sample")
def sample_generate(run):
  return from_start(run, run.long_frames, run.experiment.sample.batch)


def weights_in_use(e: Experiment):
  """Of the small worlds those of a run; of Wan converted ones, in the dtype of the products."""
  return abstract_weights(sampled(e), e.model.dtype if is_wan(e) else "float32")


def generate(run: FullSize, given: int) -> Lowered:
  """One video, as long as it is without --frames."""
  frames = run.experiment.latent.frames if is_wan(run.experiment) else run.long_frames
  made = VideoModel(run, "", "").sampler(frames - run.experiment.given)
  start = [run.latents(1, given)] if given else []
  return made.lower(weights_in_use(run.experiment), run.prompts(1), integers(1), *start)


# what is trained towards a first frame starts from a picture
from_anything = lambda e: not e.given
for name, given in {"text": 0, "picture": 1, "video": GIVEN}.items():
  entered = functools.partial(generate, given=given)
  exists = {} if given == 1 else {"exists": from_anything}
  program(f"generate/from_{name}", *STUDENT, "sample", **exists)(entered)


# ---------------------------------------------------------------------------------------- streaming


def engine(run: FullSize, options: TickOptions) -> Engine:
  """Without weights, which its programs are given."""
  e = run.experiment
  sigmas, key = tuple(float(sigma) for sigma in run.sigmas), stage_key(e, 3)
  size = e.latent.height, e.latent.width
  parts = StreamParts(e.student_dit, e.history, sigmas, {}, key, size, lambda prompts: None, "")
  return Engine(parts, options, jax.devices()[:1])


def stream(run: FullSize, what: str, given: int = 0, head: bool = False, **options) -> Lowered:
  """what: tick, which is one program while the pipe fills and after; recache; start, after `given`.

  head: of the pipe that makes a clean sink.
  """
  of, e = engine(run, TickOptions(**options)), run.experiment
  made, weights = of.head if head else of.main, weights_in_use(e)
  text = shape((1, e.text.length, e.text.dim), np.float32)
  with jax.set_mesh(of.mesh):
    if what == "tick":
      return made.compiled_tick.lower(weights, made.abstract(text), text, shape((), bool))
    if what == "recache":
      due = shape((of.method.levels,), bool)
      return made._recache.lower(weights, made.abstract(text), text, due)
    texts = shape((max(1, -(-given // e.history.block)), *text.shape), text.dtype)
    start = run.latents(1, given) if given else None
    return made._start.lower(weights, texts, integers(1), start)


for name, exists, options in (
  ("stream", streams, {}),
  ("stream_clean_sink", has_clean_sink, {"head": True}),
  ("stream_sink", has_no_sink, {"sink": SINK}),
  ("stream_carried_sink", takes_sink, {"sink": SINK, "sink_positions": "relative"}),
):
  for what in ("start", "tick", "recache"):
    entered = functools.partial(stream, what=what, **options)
    program(f"{name}/{what}", *STUDENT, exists=exists)(entered)
for name, given in {"picture": 1, "video": GIVEN}.items():
  entered = functools.partial(stream, what="start", given=given)
  program(f"stream/start_from_{name}", *STUDENT, exists=streams)(entered)


# ---------------------------------------------------------------------------------- pixels and text


@program("codec/encode", *SIZES, exists=is_small)
def codec_encode(run):
  encode = lambda codec, video: patch_pca.encode(codec, patch_pca.to_unit(video))
  return jax.jit(encode).lower(run.autoencoder, run.pixels(1, GIVEN))


@program("codec/decode", *SIZES, exists=is_small)
def codec_decode(run):
  latents = run.latents(PREVIEWED, run.experiment.latent.frames)
  return jax.jit(patch_pca.decode).lower(run.autoencoder, latents)


def autoencoder(run: FullSize, what: str, **changes) -> Lowered:
  """encode_picture or _video; decode_first or _next, a latent frame each; decode_video."""
  e = run.experiment
  codec = dataclasses.replace(e.codec, **changes)
  wan, latent = WanShapes(codec), run.latents(1, 1)
  module, config, weights = wan.network
  if what.startswith("encode"):
    frames = {"encode_picture": 1, "encode_video": GIVEN}[what]
    return wan._encode.lower(weights, run.pixels(1, e.codec.pixel_frames(frames)))
  if what == "decode_first":
    return wan.stream.step.lower(weights, latent, None)
  if what == "decode_next":
    _, cache = jax.eval_shape(wan.stream.decode, weights, latent, None)
    return wan.stream.step.lower(weights, latent, cache)
  tiling = codec.tiling
  decode = functools.partial(vae_tiling.decode, tiling=tiling) if tiling else module.decode
  decode = functools.partial(decode, config=config)
  return jax.jit(decode).lower(weights, run.latents(1, run.experiment.latent.frames))


for name, changes in {"vae": {}, "vae_tiled": {"tile": TILE}, "tiny_vae": {"tiny": True}}.items():
  for what in ("encode_picture", "encode_video", "decode_first", "decode_next", "decode_video"):
    entered = functools.partial(autoencoder, what=what, **changes)
    program(f"{name}/{what}", "data", "codec", exists=is_wan)(entered)


def encode_text(run: FullSize, length: int) -> Lowered:
  """As components.umt5_encoder has it."""
  dtype = jnp.dtype(run.experiment.text.dtype)
  config = umt5.UMT5Config(dtype=dtype)
  weights = jax.tree.map(lambda leaf: shape(leaf.shape, dtype), umt5.abstract_params(config))
  encode = jax.jit(lambda params, ids, mask: umt5.encode_text(params, ids, mask, config))
  return encode.lower(weights, integers(PROMPTS, length), integers(PROMPTS, length))


for length in LENGTHS:
  entered = functools.partial(encode_text, length=length)
  program(f"umt5/{length}_tokens", "text", exists=is_wan)(entered)
