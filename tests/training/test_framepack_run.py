"""A FramePack experiment as a run: what its config refuses, and the commands on what it trained."""

import dataclasses
import re
import types

import jax
import numpy as np
import pytest

from experiments import shapes_framepack
from hiar_jax.checkpoints import weights
from hiar_jax.config.building import build
from hiar_jax.config.workdir import save_resolved
from hiar_jax.errors import UserError
from hiar_jax.generation.video_model import VideoModel
from hiar_jax.parallel.mesh import MeshConfig, make_mesh
from hiar_jax.training.experiment import Experiment, WeightsConfig
from hiar_jax.training.pretrained import load_teacher
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

  changed = [
    {},
    {"sample__steps": 3},
    {"sample__guidance": 0.5},
    {"sample__solver": "unipc"},
    {"framepack__sort": "similarity"},
    {"sample__seed": 4},
  ]
  plain, *others, seed = (identity(**changes) for changes in changed)
  assert len({plain, *others}) == 5 and seed == plain
  defaults = {"sample__solver": "euler", "framepack__sort": "time", "framepack__time_weight": 1.0}
  assert identity(**defaults) == plain  # as that of a run from before there were any


SMALL = dict(model__dim=16, model__ffn_dim=24, model__num_heads=2, model__num_layers=1)


def test_weights_of_other_kernels_are_one_line(tmp_path):
  """To generate with; training starts from any, and makes the kernels that are missing."""
  e = build(Experiment, config(**SMALL))
  other = e.dit.packed((1, 2, 8))
  weights.save(tmp_path, "dit", other, jax.device_get(other.init(jax.random.key(0))))
  run = Run(e, tmp_path, make_mesh(MeshConfig()))
  refused = "was trained with k1, k2, k8 kernels of packed history, and "
  with pytest.raises(UserError, match=f"{refused}framepack.packing = 'td_f16k4.* has k1, k2, k4: "):
    VideoModel(run, str(tmp_path), "").params()
  plain = build(Experiment, config(**SMALL, framepack=None, teacher__frames=0))
  with pytest.raises(UserError, match=rf"{refused}the config \(no framepack\) has no: "):
    VideoModel(Run(plain, tmp_path, run.mesh), str(tmp_path), "").params()
  base = dataclasses.replace(e, weights=WeightsConfig(base=str(tmp_path)))
  found = load_teacher(Run(base, tmp_path, run.mesh))
  made = e.packed_dit.with_projections(found)
  assert {name for name in made if name.startswith("packed")} == {f"packed_k{k}" for k in (1, 2, 4)}
  np.testing.assert_array_equal(made["packed_k2"]["kernel"], found["packed_k2"]["kernel"])
  weights.save(tmp_path, "dit", e.packed_dit, jax.device_get(made))
  assert set(VideoModel(run, str(tmp_path), "").params()) == set(made)


PAGE = (tiny_run.ROOT / "docs" / "packing.md").read_text()


@pytest.mark.slow
def test_costs_are_those_of_the_page(tmp_path):
  """Of the main experiment; but for the compiler's count, which is its version's."""
  e = build(Experiment, shapes_framepack.get_config("main"))
  model = VideoModel(Run(e, tmp_path, make_mesh(MeshConfig(), jax.devices()[:1])), "", "framepack")
  found = model.plan(frames=180, given=0, batch=1)
  *lines, compiled = found.text().splitlines()
  assert len(lines) == 6 and all(line in PAGE for line in lines)
  assert compiled.startswith("compiled for cpu, generate: ")
  assert found.flops_video == pytest.approx(20 * found.flops_block)


def test_the_settings_of_the_page_are_a_configs():
  """Each block of Python changes a config that can be built, and is not the default."""
  blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
  assert len(blocks) == 3
  for block in blocks:
    c = config()
    exec(block, {"c": c})
    assert build(Experiment, c) != build(Experiment, config())


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
