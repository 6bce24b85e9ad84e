"""A run on a folder of films: what its videos are measured against, and what it holds out."""

import dataclasses
import itertools
import types

import av
import jax
import numpy as np
import pytest

from hiar_jax.data import pipeline
from hiar_jax.errors import UserError
from hiar_jax.training import log, own_footage, stages
from tests.helpers.tiny_run import make_run


def write(path, tint, frames: int = 24, size: int = 16):
  """A film of moving waves, 8 frames a second."""
  at = np.arange(size)
  with av.open(str(path), "w") as container:
    stream = container.add_stream("ffv1", rate=8)
    stream.width, stream.height, stream.pix_fmt = size, size, "bgr0"
    for i in range(frames):
      wave = np.sin(2 * np.pi * (at[None] + 2 * at[:, None] + 1.13 * i) / 12)[..., None]
      picture = np.rint(128 + wave * np.asarray(tint)).astype(np.uint8)
      container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
    container.mux(stream.encode())
  path.with_suffix(".txt").write_text(f"waves of {path.stem}")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  place = tmp_path_factory.mktemp("own")
  (place / "films").mkdir()
  write(place / "films" / "red.mkv", (90, 10, 10))
  write(place / "films" / "blue.mkv", (10, 10, 90))
  made = make_run(
    place / "w",
    data__source="videos",
    data__folder=str(place / "films"),
    data__held_out=0.2,
    codec__lapped=True,
    log__preview_every=1,
    teacher__steps=2,
    teacher__batch=8,
  )
  stages.prepare_data(made)
  yield made
  made.writer.close()


def films(run) -> dict[str, np.ndarray]:
  """caption -> the frames that are trained on."""
  clips = own_footage.clips_of(run, ["waves of red", "waves of blue"])
  return {caption: np.concatenate(list(found)) for caption, found in clips.items()}


def test_videos_are_measured_against_the_clips_of_their_captions(run):
  shown = films(run)
  assert set(shown) == {"waves of red", "waves of blue"}
  prompts = list(shown)
  videos = np.stack([shown[prompt][:8] for prompt in prompts])
  found = own_footage.measure(run, videos, prompts)
  assert found["distance"]["total"] == 0 and found["still"] == 0
  crossed = own_footage.measure(run, videos, prompts[::-1])
  assert crossed["distance"]["total"] > 30
  alone = own_footage.clips_of(run, ["waves of red"])
  assert set(alone) == {"waves of red"}
  assert set(own_footage.clips_of(run, ["another", "waves of red"])) == set(shown)


def test_the_codec_is_measured_on_what_is_held_out(run):
  found = own_footage.codec_error(run)
  assert found["clips"] == "held out" and found["error"] > 0
  assert found["psnr"] == pytest.approx(-10 * np.log10(found["error"]))


def test_short_videos_are_not_measured(run):
  assert own_footage.measure(run, np.zeros((1, 4, 16, 16, 3), np.uint8), ["waves of red"]) == {}


def test_the_teacher_logs_the_loss_of_held_out_clips(run, monkeypatch):
  """At each preview, of the same clips, levels and noise: it changes with the weights alone."""
  params = jax.device_get(jax.jit(run.experiment.dit.init)(jax.random.key(0)))
  opened = jax.tree.map(lambda x: x + np.float32(0.1), params)

  def previews(run, stage, frozen, preview):
    for step, weights in enumerate((params, opened, params)):
      preview(types.SimpleNamespace(step=step, ema=weights))

  monkeypatch.setattr(stages, "_train", previews)
  clip = np.zeros((2, 1, 4, 2, 2, 8), np.float32)
  monkeypatch.setattr(type(run), "teacher_sampler", lambda *_: lambda *_: clip)
  stages.train_teacher(run)
  records = log.read_log(run.writer.path, "teacher")
  losses = [
    r["scalars"]["held_out_loss"] for r in records if "held_out_loss" in r.get("scalars", {})
  ]
  assert len(losses) == 3 and losses[0] == losses[2] != losses[1] and np.isfinite(losses).all()
  # a closed head predicts nothing: the mean square of the target
  assert 0.5 < losses[0] < 4


def test_held_out_clips_are_in_no_batch(run):
  held = {video.tobytes() for video in stages.prepared_data.held_out(run, 99)["video"]}
  assert len(held) == 2
  batches = itertools.islice(run.clips("data", 8, ("video",), salt=1), 12)
  seen = {video.tobytes() for batch in batches for video in batch["video"]}
  assert len(seen) > 20 and not seen & held
  assert pipeline.count_clips(run.directory("data")) == 2 * 16


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"data__stride": 3}, "data.stride = 3: clips of this codec are any windows of a film"),
    ({"data__held_out": 1.0}, r"data.held_out = 1.0: expected a share"),
    ({"codec__patch": 2, "codec__channels": 8, "codec__lapped": True}, "codec.lapped with"),
  ],
)
def test_what_cannot_be(tmp_path, changes, message):
  folder = {"data__source": "videos", "data__folder": str(tmp_path)}
  with pytest.raises(UserError, match=message):
    make_run(tmp_path / "w", **folder, **changes).check()


def test_no_footage_no_measures(run, monkeypatch):
  """Of clips that are stored as latents there are no pixels to compare with."""
  stored = dataclasses.replace(run.experiment)
  monkeypatch.setattr(type(stored), "stores_latents", True)
  assert own_footage.measure(run, np.zeros((1, 8, 16, 16, 3), np.uint8), ["a"]) == {}
