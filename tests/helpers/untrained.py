"""A run of the shapes world of which nothing has been trained, to generate and to stream with."""

import functools
import pathlib

import jax
import numpy as np
import pytest

from hiar_jax.checkpoints.training_state import Checkpoints
from hiar_jax.components import patch_pca
from hiar_jax.components.patch_pca import PatchPCA
from hiar_jax.config.workdir import save_resolved
from hiar_jax.generation.video_model import VideoModel
from hiar_jax.training.run import open_run
from tests.helpers import tiny

PROMPT, SEED = "a red circle moving left", 3


@pytest.fixture(scope="module", autouse=True)
def compiles_quickly():
  """These programs run once."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


class Untrained(VideoModel):
  """A run of which nothing has been trained: random weights."""

  identity = "untrained"

  @functools.cached_property
  def _params(self):
    e = self.experiment
    network = e.packed_dit if e.framepack else e.dit
    shapes = jax.eval_shape(lambda: network.init(jax.random.key(0)))
    leaves, tree = jax.tree.flatten(shapes)
    scale = lambda leaf: 1.5 / np.sqrt(leaf.shape[-2] if leaf.ndim > 1 else 4)
    return tree.unflatten(
      scale(leaf) * tiny.random(i, *leaf.shape) for i, leaf in enumerate(leaves)
    )

  def params(self):
    return self._params


def untrained(directory, config) -> VideoModel:
  run = open_run(config, directory, save=False)
  pixels, channels = 3 * run.experiment.codec.patch**2, run.experiment.codec.channels
  codec = PatchPCA(
    np.zeros(pixels, np.float32),
    np.eye(pixels, channels, dtype=np.float32),
    np.ones(channels, np.float32),
    run.experiment.codec.patch,
  )
  patch_pca.save(run.directory("data") / patch_pca.FILE, codec)
  return Untrained(run, "", run.experiment.last_stage)


def generated(model: VideoModel, blocks: int, given: np.ndarray | None = None) -> np.ndarray:
  """The new blocks' latents, as `hiar_jax.generate` has them."""
  start = [] if given is None else [given]
  frames = 0 if given is None else given.shape[1]
  with jax.set_mesh(model.run.mesh):
    generate = model.sampler(blocks * model.experiment.history.block)
    latents = generate(model.params(), model.run.texts([PROMPT]), np.asarray([SEED]), *start)
  return np.asarray(latents)[:, frames:]


def frames(chunks):
  return np.concatenate([chunk.frames for chunk in chunks])


def assert_same_pixels(a, b):
  # rounding may fall on the other side
  assert a.shape == b.shape and np.abs(a.astype(int) - b).max() <= 1


def saved_run(directory: pathlib.Path, config, stages=("teacher", "distill")) -> pathlib.Path:
  """A workdir as training leaves it after these stages, with random weights."""
  model = untrained(directory, config)
  save_resolved(config, directory)
  for stage in stages:
    with Checkpoints(model.run.directory(stage) / "checkpoints") as checkpoints:
      state = {"step": np.ones(()), "params": model.params()}
      state |= {"critic": model.params()} if stage == "distill" else {}
      checkpoints.save(config[stage].steps, state, model.params())
  return directory
