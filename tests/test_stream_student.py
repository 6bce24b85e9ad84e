"""The shapes world's student, streamed: the frames that `hiar_jax.generate` makes of the same
prompt and seed.
"""

import functools
import runpy

import jax
import numpy as np
import pytest
import tiny
import tiny_run
from tiny_stream import assert_same, take

from hiar_jax.jobs.student_model import StudentModel
from hiar_jax.models import dit
from hiar_jax.models.patch_codec import PatchCodec
from hiar_jax.stages import medium
from hiar_jax.stages.run import CODEC, open_run
from hiar_jax.streaming.engine import Engine, Options
from hiar_jax.streaming.generation import Generation
from hiar_jax.streaming.layout import Layout

PROMPT, SEED = "a red circle moving left", 3
SAF = {
  "history__level": "input",
  "history__sink": 2,
  "history__window": 6,
  "history__sink_level": "clean",
  "history__gradient": "attached",
}


@pytest.fixture(scope="module", autouse=True)
def compiles_quickly():
  """These programs run once."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


class Untrained(StudentModel):
  """A run of which nothing has been trained: random weights."""

  identity = "untrained"

  @functools.cached_property
  def _params(self):
    shapes = jax.eval_shape(lambda: dit.init(self.experiment.dit, jax.random.key(0)))
    leaves, tree = jax.tree.flatten(shapes)
    scale = lambda leaf: 1.5 / np.sqrt(leaf.shape[-2] if leaf.ndim > 1 else 4)
    return tree.unflatten(
      scale(leaf) * tiny.random(i, *leaf.shape) for i, leaf in enumerate(leaves)
    )

  def params(self):
    return self._params


def untrained(directory, config) -> StudentModel:
  run = open_run(config, directory, save=False)
  pixels, channels = 3 * run.experiment.codec.patch**2, run.experiment.codec.channels
  codec = PatchCodec(
    np.zeros(pixels, np.float32),
    np.eye(pixels, channels, dtype=np.float32),
    np.ones(channels, np.float32),
  )
  medium.save_codec(run.directory("data") / CODEC, codec)
  return Untrained(run, "", "distill")


def generated(model: StudentModel, blocks: int, given: np.ndarray | None = None) -> np.ndarray:
  """The new blocks' latents, as `hiar_jax.generate` has them."""
  start = [] if given is None else [given]
  frames = 0 if given is None else given.shape[1]
  with jax.set_mesh(model.run.mesh):
    generate = model.generator(blocks * model.experiment.history.block, frames)
    latents = generate(model.params(), model.texts([PROMPT]), np.asarray([SEED]), *start)
  return np.asarray(latents)[:, frames:]


@pytest.mark.slow
def test_a_clean_sink_as_it_is_generated(tmp_path):
  model = untrained(tmp_path, tiny_run.make_config(**SAF))
  generation = Generation(model, PROMPT, SEED, Options(layout=Layout(stage=2)))
  assert_same(take(generation, 5), generated(model, 5))


def test_from_a_picture(tmp_path):
  model = untrained(tmp_path, tiny_run.make_config())
  size = model.experiment.latent_sizes
  given = tiny.random(4, 1, 1, size["height"], size["width"], size["channels"])
  generation = Generation(Engine(model, Options(layout=Layout())), PROMPT, SEED, start=given)
  assert_same(take(generation, 3), generated(model, 3, given))


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
  """The shipped experiment at its size, and what is generated of it."""
  model = untrained(
    tmp_path_factory.mktemp("shapes"),
    runpy.run_path(str(tiny_run.ROOT / "experiments" / "shapes.py"))["get_config"](),
  )
  return model, generated(model, 5)


@pytest.mark.slow
@pytest.mark.parametrize(
  "layout",
  [
    Layout(),
    Layout(2),
    Layout(1, 2),
    Layout(4),
    Layout(2, 2),
    Layout(1, 2, 2),
    Layout(2, 2, 2),
    None,
  ],
  ids=str,
)
def test_the_shapes_student_on_one_to_eight_devices(shapes, layout):
  """None: all of them, a pipe of four stages of two devices."""
  model, expected = shapes
  generation = Generation(model, PROMPT, SEED, Options(layout=layout))
  assert generation.engine.layout == (layout or Layout(stage=4, tensor=2))
  assert_same(take(generation, 5), expected, rounding=5e-5)
