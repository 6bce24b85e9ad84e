"""Distillation from published pieces: prompts and converted weights of Wan's layout, small and
random, through every stage.
"""

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from hiar_jax.checkpoints import training_state, weights
from hiar_jax.components import umt5_tokenizer
from hiar_jax.data import tfds_builder
from hiar_jax.data.prompt_texts import pad
from hiar_jax.data.trajectories import TrajectoryWriter, read_sigmas
from hiar_jax.models import dit, umt5
from hiar_jax.parallel.mesh import MeshConfig, make_mesh
from hiar_jax.training import pretrained, stages
from hiar_jax.training.run import Run, open_run, read_config
from tests.helpers import tiny_run
from tests.helpers.tiny_wan import DIT, random_like, save_weights
from tests.helpers.video_reader import read_mp4

# The 14B model's part is played by a network of another size than the student's.
TEACHER = dit.DiTConfig(dim=48, ffn_dim=32, num_heads=2, num_layers=3, freq_dim=16, text_dim=16)
CONFIG = """
from hiar_jax.experiments import hiar_wan_1_3b

def get_config():
  c = hiar_wan_1_3b.get_config()
  c.data.size, c.data.frames, c.data.prompts = (16, 32), 21, "{place}/prompts.txt"
  c.weights.base = c.codec.weights = c.text.weights = "{place}/weights"
  c.weights.teacher = "{place}/teacher"
  c.model.update(dim=32, ffn_dim=48, num_heads=2, num_layers=2)
  c.teacher_model.update(dim=48, ffn_dim=32, num_heads=2, num_layers=3)
  for model in (c.model, c.teacher_model):
    model.update(freq_dim=16, dtype="float32", remat="none")
  c.text.dim, c.text.length, c.text.dtype = 16, 64, "float32"
  c.trajectories.update(count=4, batch=2, steps=4)
  c.causal_init.update(steps=2, batch=2, ema_start=0)
  c.distill.update(steps=2, batch=2, critic_updates=1, ema_start=0)
  c.sample.update(count=2, length=2.0)
  c.log.update(every=1, checkpoint_every=1)
  c.mesh.update(data=1, fsdp=-1)
  return c
"""
PROMPTS = ["A cat walks on the grass", "一只狗在海滩上奔跑", "waves", "snow falls"]
pytestmark = pytest.mark.slow  # they read a run that takes half a minute to train


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  root = tmp_path_factory.mktemp("wan_training")
  (root / "config.py").write_text(CONFIG.format(place=root))
  (root / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
  save_weights(root / "weights")
  weights.save(root / "teacher", "dit", TEACHER, random_like(TEACHER, dit.DiTConfig.init, 5, 0.2))
  return root


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
  return tiny_run.chain(tmp_path_factory.getbasetemp())


def train(chain, place, workdir: pathlib.Path, *overrides: str):
  return chain.python(
    "-m", "hiar_jax.train", f"--config={place}/config.py", f"--workdir={workdir}", *overrides
  )


@pytest.fixture(scope="module")
def trained(chain, place):
  done = train(chain, place, place / "run")
  assert done.returncode == 0, done.stderr
  return place / "run"


def test_prompts_become_a_data_set_of_texts(trained, place):
  """What UMT5 makes of each prompt, without padding, and a second way to the same numbers."""
  source = tfds_builder.open_source(trained / "data")
  assert [source[i]["caption"].decode() for i in range(len(source))] == PROMPTS
  config, params = weights.load(place / "weights", "umt5")
  tokens = umt5_tokenizer.Tokenizer(place / "weights", 64)([PROMPTS[1]])
  expected = np.asarray(umt5.encode_text(params, tokens.ids, tokens.mask, config))[0]
  np.testing.assert_allclose(pad([source[1]["text"]], 64)[0], expected, atol=1e-5)


def test_trajectories_start_in_noise_and_carry_their_prompts(trained):
  source = tfds_builder.open_source(trained / "trajectories")
  # all of them, in an order of the run's seed
  assert sorted(source[i]["caption"].decode() for i in range(4)) == sorted(PROMPTS)
  points = np.stack([source[i]["trajectory"] for i in range(4)]).astype(np.float32)
  assert points.shape == (4, 5, 6, 2, 4, 16)
  assert abs(points[:, 0].std() - 1) < 0.05 and np.isfinite(points).all()


def test_the_walk_has_a_shift_of_its_own(trained):
  """The first Euler step goes as far as its levels say: from 1 to .96 with the published shift 8,
  to .9375 with the student's 5.
  """
  assert read_sigmas(trained / "trajectories") == pytest.approx(
    [1, 0.96, 0.8889, 0.7273, 0], abs=5e-5
  )
  moves = []
  for shift in (8.0, 0.0):
    config = read_config(trained)
    config.trajectories.shift = shift
    one = make_mesh(MeshConfig(), jax.devices()[:1])
    run = dataclasses.replace(open_run(config, trained.parent / "walk", save=False), mesh=one)
    sample = run.teacher_sampler(jax.random.key(0))
    points = sample(pretrained.load_teacher(run), run.texts(PROMPTS[:1]), np.zeros(1, np.int32))
    moves.append(np.asarray(points[:, 1] - points[:, 0]))
  np.testing.assert_allclose(
    moves[0] / 0.04, moves[1] / 0.0625, rtol=0, atol=1e-3 * np.abs(moves[0] / 0.04).max()
  )


def test_hosts_share_the_trajectories(trained, tmp_path, monkeypatch):
  """Two hosts on one disk, of which one is stopped and goes on: each makes its own parts once,
  together those of one host.
  """
  config, made = read_config(trained), []
  config.trajectories.count = 6  # three parts, of which the first host makes two
  one = make_mesh(MeshConfig(), jax.devices()[:1])

  def a_run(workdir):
    if not workdir.exists():
      shutil.copytree(trained / "data", workdir / "data")
    return dataclasses.replace(open_run(config, workdir, save=False), mesh=one)

  def run_as(host, hosts, workdir):
    monkeypatch.setattr(jax, "process_index", lambda: host)
    monkeypatch.setattr(jax, "process_count", lambda: hosts)
    made.clear()
    stages.sample_trajectories(a_run(workdir))
    return list(made)

  def write(self, part, *args):
    if stopping and part == 2:
      raise KeyboardInterrupt
    made.append(part)
    return write_part(self, part, *args)

  walk, write_part, stopping = (
    a_run(tmp_path / "alone").teacher_sampler(jax.random.key(0)),
    TrajectoryWriter.write_part,
    False,
  )
  monkeypatch.setattr(Run, "teacher_sampler", lambda run, key: walk)  # compiled once
  monkeypatch.setattr(TrajectoryWriter, "write_part", write)
  monkeypatch.setattr(stages.multihost_utils, "sync_global_devices", lambda name: None)
  assert run_as(0, 1, tmp_path / "alone") == [0, 1, 2]
  stopping = True
  assert run_as(1, 2, tmp_path / "hosts") == [1] and not tfds_builder.is_complete(
    tmp_path / "hosts" / "trajectories"
  )
  with pytest.raises(KeyboardInterrupt):
    run_as(0, 2, tmp_path / "hosts")
  assert made == [0]
  stopping = False
  assert run_as(0, 2, tmp_path / "hosts") == [2]
  (alone, captions), (shared, same) = (
    tiny_run.trajectories(tmp_path / name) for name in ("alone", "hosts")
  )
  np.testing.assert_array_equal(alone, shared)
  assert captions == same and captions[4:] == captions[:2]
  assert sorted(caption.decode() for caption in captions[:4]) == sorted(PROMPTS)


def test_the_student_starts_from_the_base_and_moves(trained, place):
  base = weights.load(place / "weights", "dit")[1]
  for stage in ("causal_init", "distill"):
    after = training_state.load_params(trained / stage / "checkpoints")
    assert jax.tree.map(np.shape, after) == jax.tree.map(np.shape, base)
    moved = [
      float(np.abs(np.asarray(a) - np.asarray(b)).max())
      for a, b in zip(*map(jax.tree.leaves, (after, base)), strict=True)
    ]
    assert 0 < max(moved) < 1e-3
  assert not (trained / "teacher").exists()


def test_it_ends_in_videos_twice_the_training_length(trained):
  videos = sorted((trained / "sample").glob("*.mp4"))
  assert (
    len(videos) == 2
    and json.loads((trained / "sample" / "metrics.json").read_text())["prompts"] == PROMPTS[::2]
  )
  frames, fps, made = read_mp4(videos[0])
  assert frames.shape == (45, 16, 32, 3) and fps == 16  # 12 latent frames
  assert made["prompt"] in PROMPTS


def test_two_devices_train_alike(chain, trained, place):
  """The networks over both, in halves; the text encoder on one."""
  config = (place / "config.py").read_text()
  (place / "two.py").write_text(config.replace("  return c", "  c.mesh.min_shard = 64\n  return c"))
  done = chain.python(
    "-m", "hiar_jax.train", f"--config={place}/two.py", f"--workdir={place}/two", devices=2
  )
  assert done.returncode == 0, done.stderr
  for stage in ("causal_init", "distill"):
    for one, two in zip(
      tiny_run.log(trained, stage), tiny_run.log(place / "two", stage), strict=True
    ):
      assert two["scalars"]["loss"] == pytest.approx(one["scalars"]["loss"], rel=1e-3)


def test_a_finished_run_does_nothing_again(chain, trained, place):
  kept = lambda: {
    name: value
    for name, value in tiny_run.files(trained).items()
    if name != "config.json" and not name.startswith("logs")
  }
  before = kept()
  again = train(chain, place, trained)
  assert again.returncode == 0 and kept() == before


def test_a_student_that_exists_skips_causal_init(chain, trained, place):
  """As the published run starts from Self-Forcing's."""
  weights.save(place / "student", "dit", DIT, random_like(DIT, dit.DiTConfig.init, 9, 0.2))
  done = train(
    chain,
    place,
    place / "from_student",
    f"--config.weights.student={place}/student",
    "--config.distill.forward_kl.weight=0.0",
  )
  assert done.returncode == 0, done.stderr
  assert not (place / "from_student" / "causal_init").exists()


def test_the_negative_prompt_is_the_published_one(trained):
  run = open_run(read_config(trained), trained, save=False)
  negative = np.asarray(run.negative)
  assert negative.shape == (1, 64, 16) and np.abs(negative).max() > 0
  np.testing.assert_array_equal(negative, run.texts([umt5_tokenizer.NEGATIVE_PROMPT]))


BAD = {
  "weights of another size": (["--config.model.num_layers=3"], "num_layers 2, not 3"),
  "weights that are not there": (["--config.weights.base=nowhere"], "nowhere"),
  "no prompts": (["--config.data.prompts=nowhere.txt"], "nowhere.txt"),
  "a folder without an encoder": (["--config.text.weights=tests"], "no weights of kind 'umt5'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(chain, place, case):
  overrides, expected = BAD[case]
  done = train(chain, place, place / f"bad {case}", *overrides)
  lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
  assert (
    done.returncode == 2
    and len(lines) == 1
    and expected in lines[0]
    and "Traceback" not in done.stderr
  ), done.stderr
