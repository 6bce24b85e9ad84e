"""A FramePack experiment as a run: what its config refuses, and the commands on what it trained."""

import json
import types

import numpy as np
from PIL import Image
import pytest

from experiments import shapes_framepack
from hiar_jax.config.building import build
from hiar_jax.config.workdir import save_resolved
from hiar_jax.errors import UserError
from hiar_jax.generation.video_model import VideoModel
from hiar_jax.training.experiment import Experiment
from hiar_jax.training.run import Run
from tests.helpers import tiny_run
from tests.helpers.video_reader import read_mp4


def config(**changes):
  c = shapes_framepack.get_config("smoke")
  with c.unlocked():
    for path, value in changes.items():
      *groups, name = path.split("__")
      group = c
      for one in groups:
        group = group[one]
      group[name] = value
  return c


def test_the_packed_network_has_a_projection_for_each_kernel():
  e = build(Experiment, config())
  assert e.packed_dit.packing == (1, 2, 4) and e.dit.packing == ()
  assert e.last_stage == "framepack" and e.teacher_latent.frames == 9 and e.latent.frames == 45


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"data__frames": 46, "history__block": 2}, "a clip of 46 latent frames is not"),
    ({"history__block": 5}, "makes 9 frames a section: set history.block = 9, not 5"),
    ({"sample__order": "inverted"}, "'inverted': the model is trained for framepack.orders = "),
    ({"sample__order": "sideways"}, "order = 'sideways': expected one of vanilla, both_ends"),
    ({"framepack__packing": "td_f16k3_g9"}, "schedule 'td_f16k3_g9': 'f16k3'"),
    ({"teacher__frames": 46}, "teacher.frames = 46: clips have 45 latent frames"),
    ({"framepack": None}, "teacher.frames: the teacher of a causal student is trained on whole"),
  ],
)
def test_what_does_not_fit_is_refused(changes, message):
  with pytest.raises(UserError, match=message):
    build(Experiment, config(**changes))


def test_how_sections_are_sampled_is_part_of_a_models_identity(tmp_path):
  """So a clip that was made in another way is not kept for the one that was asked for."""

  def identity(**changes) -> str:
    e = build(Experiment, config(**changes))
    save_resolved(config(), tmp_path)
    codec, text = (types.SimpleNamespace(identity="") for _ in range(2))
    run = Run(e, tmp_path, None)
    run.__dict__.update(autoencoder=codec, text_encoder=text)
    return VideoModel(run, "", "framepack").identity

  changed = [{}, {"sample__steps": 3}, {"sample__guidance": 0.5}, {"sample__seed": 4}]
  plain, steps, guidance, seed = (identity(**changes) for changes in changed)
  assert len({plain, steps, guidance}) == 3 and seed == plain


@pytest.fixture
def chain(tmp_path_factory):
  return tiny_run.chain(tmp_path_factory.getbasetemp())


@pytest.mark.slow
def test_smoke_goes_through_every_stage_and_command(chain, tmp_path):
  """Resumed after each stage as it is: a second call trains nothing and makes the same videos."""
  workdir = tmp_path / "framepack"
  train = ("-m", "hiar_jax.train", "--config=experiments/shapes_framepack.py:smoke")
  done = chain.python(*train, f"--workdir={workdir}")
  assert done.returncode == 0, done.stderr
  assert [record["stage"] for record in tiny_run.log(workdir)][-1] == "framepack"
  assert {path.name for path in workdir.iterdir()} >= {"teacher", "framepack", "sample"}
  assert not (workdir / "distill").exists() and not (workdir / "trajectories").exists()
  kept = lambda: {k: v for k, v in tiny_run.files(workdir).items() if k != "config.json"}
  before = kept()
  done = chain.python(*train, f"--workdir={workdir}")
  assert done.returncode == 0 and kept() == before

  def command(name, *options):
    return chain.python("-m", f"hiar_jax.{name}", f"--workdir={workdir}", *options)

  prompt = "--prompt=a red circle moving left"
  for name in "ab":
    done = command("generate", prompt, "--frames=27", "--seed=3", f"--out={tmp_path}/{name}.mp4")
    assert done.returncode == 0, done.stderr
  first, second = (read_mp4(tmp_path / f"{name}.mp4")[0] for name in "ab")
  assert len(first) == 27
  np.testing.assert_array_equal(first, second)
  refused = command("generate", prompt, "--stage=distill", f"--out={tmp_path}/c.mp4")
  assert refused.returncode == 2 and "has no such stage; its last is framepack" in refused.stderr
  refused = command("stream", prompt, "--frames=9", f"--out={tmp_path}/d.mp4")
  assert refused.returncode == 2 and "cannot be streamed level by level" in refused.stderr
  evaluated = chain.python(
    "-m", "hiar_jax.evaluate", f"--workdirs={workdir}", "--videos=3", f"--out={tmp_path}/table"
  )
  assert evaluated.returncode == 0, evaluated.stderr
  assert "framepack, td_f16k4f2k2f1k1_g9, vanilla" in (tmp_path / "table" / "table.md").read_text()


@pytest.mark.slow
def test_smoke_towards_a_true_first_frame(chain, tmp_path):
  """Measured without it; and without one there is no video to make."""
  workdir, first = tmp_path / "inverted", tmp_path / "first.png"
  done = chain.python(
    "-m",
    "hiar_jax.train",
    "--config=experiments/shapes_framepack_inverted.py:smoke",
    f"--workdir={workdir}",
  )
  assert done.returncode == 0, done.stderr
  measured = json.loads((workdir / "sample" / "metrics.json").read_text())
  assert measured["settings"]["frames"] == 180
  assert all(len(video) == 181 for video in tiny_run.videos(workdir).values())
  Image.fromarray(np.full((32, 32, 3), 90, np.uint8)).save(first)
  run, prompt = f"--workdir={workdir}", "--prompt=a red circle moving left"
  evaluate = [f"--workdirs={workdir}", "--videos=3", "--length=1", f"--out={tmp_path}/table"]
  made, refused, evaluated = chain.commands(
    [
      ("hiar_jax.generate", [run, prompt, f"--image={first}", f"--out={tmp_path}/a.mp4"]),
      ("hiar_jax.generate", [run, prompt, f"--out={tmp_path}/b.mp4"]),
      ("hiar_jax.evaluate", evaluate),
    ]
  )
  assert made[0] == evaluated[0] == 0, made[2] + evaluated[2]
  assert len(read_mp4(tmp_path / "a.mp4")[0]) == 181
  assert refused[0] == 2 and "'f1k1_x_g9_f1k1f2k2f16k4_td': the model makes videos" in refused[2]
  rows = json.loads((tmp_path / "table" / "metrics.json").read_text())
  name = "inverted, f1k1_x_g9_f1k1f2k2f16k4_td, inverted"
  assert rows[name]["settings"]["frames"] == rows["true clips"]["settings"]["frames"] == 45
