"""A model with every part plugged in: all stages of training, stopped once and resumed, on one and
on eight devices; its videos and streams, against a loop that keeps nothing.
"""

import dataclasses
import functools
import json
import shutil

import jax
import numpy as np
import pytest

import hiar_jax
from hiar_jax.checkpoints.training_state import Checkpoints
from hiar_jax.data import tfds_builder
from hiar_jax.errors import UserError
from hiar_jax.parallel.mesh import MeshConfig, make_mesh
from hiar_jax.rollout.noise import block_noise
from hiar_jax.streaming.layout import Layout, widest
from hiar_jax.streaming.live_video import LiveVideo
from hiar_jax.training import pretrained, stages, updates
from hiar_jax.training.run import open_run
from tests.helpers import tiny_run
from tests.helpers.tiny_stream import take
from tests.helpers.untrained import assert_same_pixels, frames
from tests.plugs.conftest import make_config
from tests.plugs.network import Groupwise
from tests.plugs.oracle import Oracle

pytestmark = pytest.mark.slow  # six stages, twice, and every layout of a stream

MATRICES = {f"depth{i}/{n}" for i in (0, 1) for n in "wq wkv wo xq xkv xo up down".split()}


def params(workdir, step: int) -> dict[str, np.ndarray]:
  """The teacher's parameters by their path."""
  found = tiny_run.state(workdir, "teacher", step)
  return {
    name.removeprefix("params/"): x for name, x in found.items() if name.startswith("params/")
  }


@pytest.fixture(scope="module")
def run(trained):
  return open_run(make_config(), trained, save=False)


@pytest.fixture(scope="module")
def initial(run):
  key, _ = jax.random.split(updates.stage_key(run.experiment, "teacher"))
  leaves = jax.tree_util.tree_leaves_with_path(run.experiment.dit.init(key))
  return {jax.tree_util.keystr(p, simple=True, separator="/"): np.asarray(x) for p, x in leaves}


def test_every_stage_leaves_its_result(trained):
  records = tiny_run.log(trained)
  found = [record["stage"] for record in records]
  assert found == ["teacher"] * 3 + ["causal_init"] * 3 + ["distill"] * 3
  assert all(np.isfinite(list(record["scalars"].values())).all() for record in records)
  points, captions = tiny_run.trajectories(trained)
  assert points.shape == (8, 5, 4, 4, 4, 6) and len(captions) == 8
  shown = tiny_run.videos(trained)
  assert len(shown) == 2 and {video.shape[0] for video in shown.values()} == {15}
  measured = json.loads((trained / "sample" / "metrics.json").read_text())
  assert measured["settings"]["frames"] == 15
  assert {path.name for path in (trained / "data").glob("*.json")} >= {
    "letters.json",
    "squash.json",
  }


def test_texts_and_pixels_are_the_parts(run):
  """The squashed clip's latents are no linear function of its pixels; both ways there and back."""
  text, codec = run.text_encoder, run.autoencoder
  assert type(text).__name__ == "Letters" and type(codec).__name__ == "Squash"
  assert np.abs(run.negative).max() > 0 and run.negative.shape == (1, 28, 8)
  assert text.warnings("a réd circle") == ["unknown letters: é"]
  clip = np.random.default_rng(0).integers(0, 256, (1, 7, 4, 4, 3), np.uint8)
  clip = clip.repeat(4, axis=2).repeat(4, axis=3)
  latents = codec.latents(clip)
  assert latents.shape == (1, 4, 4, 4, 6)
  np.testing.assert_array_equal(np.concatenate(list(codec.pieces(latents)), axis=1), clip)
  encoded = run.encode({"video": clip, "tokens": text.tokens(["a red circle"])})
  np.testing.assert_allclose(encoded["latents"], latents, atol=1e-6)
  assert encoded["text"].shape == (1, 28, 8)


def test_a_clips_start_is_in_latent_frames(trained, run):
  """The network reads it, so training's batches have it, and so had the trajectories."""
  clips = tfds_builder.open_source(trained / "data")
  starts = np.asarray([clips[i]["start"] for i in range(8)])
  before = np.asarray([0 if start == 0 else 1 + -(-(start - 1) // 2) for start in starts])
  assert len(set(before)) > 1 and (before < starts).any()
  batch = next(run.clips("data", 16, ("video",), salt=1))
  encoded = run.encode(batch)
  assert sorted(encoded["start"])[-1] == (max(batch["start"]) + 1) // 2 > 0
  points, captions = tiny_run.trajectories(trained)
  sample = run.teacher_sampler(updates.stage_key(run.experiment, "trajectories"))
  texts, params = run.texts([text.decode() for text in captions]), pretrained.load_teacher(run)
  again = sample(params, texts, np.arange(8), before)
  np.testing.assert_allclose(again, points, rtol=0, atol=2e-5 * np.abs(points).max())
  assert np.abs(sample(params, texts, np.arange(8), starts) - points).max() > 1e-3


def test_muon_moves_the_matrices_and_adamw_the_others(trained, initial, run):
  """Muon's first update is its rate along singular vectors, AdamW's in every entry."""
  config, after = run.experiment.teacher, params(trained, 1)
  assert after.keys() == initial.keys() and MATRICES < after.keys()
  for name, x in after.items():
    moved = x - initial[name]
    if name in MATRICES:
      values = np.linalg.svd(moved, compute_uv=False)
      assert values[1] > 0.5 * values[0], name  # the gradient's last ones are rounding
      rate = config.muon_lr * max(1, x.shape[1] / x.shape[0]) ** 0.5
      assert 0.5 * rate < values[0] < 1.5 * rate, name
      assert np.ptp(np.abs(moved)) > config.lr, name  # AdamW's would all be as large
    else:  # optax's has Nesterov's momentum here, hence 1 + 0.9 / 1.9 of the rate
      np.testing.assert_allclose(np.abs(moved), 28 / 19 * config.lr, rtol=0.05, err_msg=name)


def test_eight_devices_train_as_one_and_hold_their_shards(trained, initial, tmp_path, monkeypatch):
  """Straight through on 2 x 4 devices: also what stopping and resuming did not change."""
  shutil.copytree(trained / "data", tmp_path / "data")
  held = {}
  save = Checkpoints.save

  def recording_save(self, step, state, *args, **options):
    for path, x in jax.tree_util.tree_leaves_with_path(state):
      shard = x.addressable_shards[0].data.shape
      held[jax.tree_util.keystr(path, simple=True, separator="/")] = (x.shape, shard)
    return save(self, step, state, *args, **options)

  monkeypatch.setattr(Checkpoints, "save", recording_save)
  run = open_run(make_config(), trained, save=False)
  e = dataclasses.replace(run.experiment, mesh=MeshConfig(data=2, fsdp=4))
  run = dataclasses.replace(run, experiment=e, workdir=tmp_path, mesh=make_mesh(e.mesh))
  with run.writer, jax.set_mesh(run.mesh):
    stages.train_teacher(run)
  for name, (shape, shard) in held.items():
    split = {"up": (4, 1), "down": (1, 4)}.get(name.rpartition("/")[2])
    expected = tuple(np.floor_divide(shape, split)) if split and len(shape) == 2 else shape
    assert shard == expected, name
  assert sum("depth0/up" in name for name in held) >= 3  # parameters, average and momentum
  one, eight = params(trained, 3), params(tmp_path, 3)
  for name, x in one.items():
    error, moved = np.abs(eight[name] - x).max(), np.abs(x - initial[name]).max()
    assert error < 0.02 * moved, (name, error, moved)


# ------------------------------------------------------------------------------- videos and streams

PROMPT, SEED, BLOCKS = "a red circle moving left", 3, 4
FRAMES = 1 + 2 * (2 * BLOCKS - 1)
ROWS = {
  "step_first": dict(window=0, sink=0),
  "window_and_sink": dict(window=5, sink=1),
  "block_first": dict(order="block_first", window=5, sink=1),
}


@pytest.fixture(scope="module")
def model(trained):
  return hiar_jax.load(trained)


@pytest.fixture(scope="module")
def plain(model):
  """Row of the table -> latents of the oracle [1 f h w c]."""

  @functools.cache
  def latents(positions="absolute", **row):
    changed = model.with_method(**row)
    e = changed.experiment
    key = jax.random.fold_in(jax.random.key(e.seed), 3)
    noise = jax.jit(block_noise(key, np.asarray([SEED]), e.latent.block(e.history.block)))
    method = e.history.at(changed.run.sigmas, positions)
    network, text = e.student_dit, model.texts([PROMPT])
    assert isinstance(network, Groupwise) and method.level == "half"
    return Oracle(network, jax.device_get(model.params()), text, method, noise).video(BLOCKS)

  return latents


@pytest.mark.parametrize("name", ROWS)
def test_a_video(model, plain, name):
  changed, expected = model.with_method(**ROWS[name]), plain(**ROWS[name])
  latents = changed.sample_latents([PROMPT], FRAMES, SEED)
  np.testing.assert_allclose(latents, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
  video = changed.generate(PROMPT, frames=FRAMES, seed=SEED)
  assert video.shape == (FRAMES, 16, 16, 3)
  assert_same_pixels(video, changed.decode(expected[0]))


@pytest.mark.parametrize(
  ("layout", "positions"),
  [
    ((1, 1, 1), "absolute"),
    ((1, 1, 1), "relative"),
    ((4, 2, 1), "relative"),
    ((2, 1, 2), "absolute"),
  ],
)
def test_a_stream(model, plain, layout, positions):
  expected = plain(positions, **ROWS["window_and_sink"])
  devices = zip(("level_devices", "tensor_devices", "sequence_devices"), layout, strict=True)
  options = {"frames": FRAMES, "seed": SEED, "sink_positions": positions, **dict(devices)}
  with model.stream(PROMPT, **options) as stream:
    streamed = list(stream)
  # the first latent frame of a video is one frame of pixels
  assert [len(chunk.frames) for chunk in streamed] == [3, 4, 4, 4]
  assert_same_pixels(frames(streamed), model.decode(expected[0]))
  engine = list(model._streaming.values())[-1].engine
  latents = take(LiveVideo(engine, PROMPT, SEED), BLOCKS)
  np.testing.assert_allclose(latents, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
  assert engine.layout == Layout(*layout)
  kv = engine.main.shardings.past.kv.both.spec
  # [s frames depth 2 heads b t d]
  assert (kv[0], kv[4]) == ("level", ("tensor", "sequence"))


def test_the_sink_moves(plain):
  row = ROWS["window_and_sink"]
  assert np.abs(plain(**row) - plain("relative", **row)).max() > 1e-3


def test_a_layout_asks_the_network():
  network = Groupwise(16, 2, 4, 6, 8)
  assert widest(8, 4, network, 4) == Layout(4, 2)
  assert widest(64, 4, network, 4) == Layout(4, 4)
  with pytest.raises(
    UserError, match="tensor = 3 does not divide 4 heads; tensor can be 1, 2 or 4"
  ):
    Layout(tensor=3).check(4, network, 4)


def test_an_axis_that_a_network_does_not_split_is_one_device():
  class Whole(Groupwise):
    def splits(self, height):
      return {}

  assert widest(64, 4, Whole(16, 2, 4, 6, 8), 4) == Layout(4)
  with pytest.raises(UserError, match="sequence = 2 does not divide .*; sequence can be 1$"):
    Layout(sequence=2).check(4, Whole(16, 2, 4, 6, 8), 4)
