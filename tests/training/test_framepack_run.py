"""A FramePack experiment as a run: what its config refuses, and the commands on what it trained."""

import dataclasses
import json
import re
import types

import jax
import numpy as np
from PIL import Image
import pytest

from experiments import (
  shapes,
  shapes_framepack,
  shapes_framepack_discrete,
  shapes_hiar_packed,
)
from hiar_jax import evaluate, train
from hiar_jax.checkpoints import weights
from hiar_jax.config.building import build
from hiar_jax.config.workdir import save_resolved, to_json
from hiar_jax.errors import UserError
from hiar_jax.generation import dry_run
from hiar_jax.generation.clips import Clip
from hiar_jax.generation.prompts_file import Job
from hiar_jax.generation.video_model import VideoModel
from hiar_jax.parallel.mesh import MeshConfig, make_mesh
from hiar_jax.rollout import packed
from hiar_jax.training import prepared_data, stages
from hiar_jax.training.experiment import Experiment, WeightsConfig
from hiar_jax.training.pretrained import load_teacher
from hiar_jax.training.run import Run
from tests.helpers import tiny_run
from tests.helpers.video_reader import read_mp4


def config(experiment=shapes_framepack, **changes):
  c = experiment.get_config("smoke")
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
  weights.save(tmp_path, "dit", other, jax.device_get(jax.jit(other.init)(jax.random.key(0))))
  run = Run(e, tmp_path, make_mesh(MeshConfig()))
  refused = "was trained with k1, k2, k8 kernels of packed history, and "
  with pytest.raises(UserError, match=f"{refused}framepack.packing = 'td_f16k4.* has k1, k2, k4: "):
    VideoModel(run, str(tmp_path), "").params()
  plain = build(Experiment, config(**SMALL, framepack=None, teacher__frames=0))
  with pytest.raises(UserError, match=rf"{refused}the config \(no packing\) has no: "):
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
  """Of the main experiment; but for the compiler's temporaries, which are its version's, and for
  seconds.
  """
  e = build(Experiment, shapes_framepack.get_config("main"))
  model = VideoModel(Run(e, tmp_path, make_mesh(MeshConfig(), jax.devices()[:1])), "", "framepack")
  clip = Clip(Job("", 0), None, None, given=0, frames=180)
  *network, row = dry_run.lines(model, [clip])
  program, memory, flops, seconds = row.splitlines()
  assert len(network) == 3 and "compiled in" in seconds
  for line in (*network, program, memory.partition("), ")[0], flops):
    assert f"\n{line}" in PAGE


def test_the_settings_of_the_page_are_a_configs():
  """Each block of Python changes a config that can be built, and is not the default."""
  blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
  of_student = [block for block in blocks if "history." in block]
  assert len(blocks) == 4 and len(of_student) == 1
  student = shapes.get_config("smoke")
  exec(of_student[0], {"c": student})
  assert student.history == shapes_hiar_packed.get_config("smoke").history
  for block in set(blocks) - set(of_student):
    c = config()
    exec(block, {"c": c})
    assert build(Experiment, c) != build(Experiment, config())


def discrete(**changes):
  return config(shapes_framepack_discrete, **changes)


def test_only_discretised_history_has_a_codebook():
  plain, with_codebook = (build(Experiment, c) for c in (config(), discrete()))
  names = lambda e: [name for name, _ in train.after_teacher(e)]
  assert names(plain) == ["framepack"] and names(with_codebook) == ["codebook", "framepack"]
  # what a run of an earlier version has resolved says nothing of codebooks
  assert "codebook" not in to_json(plain.framepack) and Run(plain, None, None).codebook is None
  with pytest.raises(UserError, match="codebook.unit = 3: latents of 8 x 8 are not whole squares"):
    build(Experiment, discrete(framepack__codebook__unit=3))
  with pytest.raises(UserError, match="codebook: centroids = 0: expected at least 1"):
    build(Experiment, discrete(framepack__codebook__centroids=0))


def test_the_stage_fits_the_codebook_that_sampling_finds(tmp_path, monkeypatch):
  """On latents of the clips; once; part of the model's identity, and one line where it is gone."""
  e = build(Experiment, discrete(framepack__codebook__centroids=3))
  save_resolved(discrete(), tmp_path)
  clips = np.random.default_rng(0).integers(0, 256, (3, 2, 8, 8, 1)).astype(np.uint8)
  monkeypatch.setattr(prepared_data, "videos_to_fit", lambda run: clips)
  encoder = types.SimpleNamespace(identity="", latents=lambda x: np.repeat(x / 64.0, 16, axis=-1))
  same = lambda x: x
  words = types.SimpleNamespace(identity="", negative_prompt="", tokens=same, embed=same)

  def opened(e=e):
    run = Run(e, tmp_path, None)
    run.__dict__.update(autoencoder=encoder, text_encoder=words)
    return run

  for read in (lambda: opened().sampler(9), lambda: VideoModel(opened(), "", "framepack").identity):
    with pytest.raises(UserError, match="codebook.npz is missing: discretised history"):
      read()
  stages.fit_codebook(opened())
  path = tmp_path / "codebook" / "codebook.npz"
  first = path.read_bytes()
  stages.fit_codebook(opened())
  assert path.read_bytes() == first
  centroids = opened().codebook.centroids
  assert centroids.shape == (3, 16) and 0 <= centroids.min() < centroids.max() <= 255 / 64

  as_trained = VideoModel(opened(), "", "framepack").identity
  sample = dataclasses.replace(e.sample, discretised=False)
  as_it_is = VideoModel(opened(dataclasses.replace(e, sample=sample)), "", "framepack").identity
  path.unlink()
  clips = 255 - clips // 2
  stages.fit_codebook(opened())
  another = VideoModel(opened(), "", "framepack").identity
  assert len({as_trained, as_it_is, another}) == 3


def test_sampling_without_the_codebook_is_an_option(tmp_path, monkeypatch):
  """The sampler is given the codebook, or none."""
  seen = []
  make = lambda sections, *_, **__: seen.append(sections.codebook) or id
  monkeypatch.setattr(packed, "make_sampler", make)
  monkeypatch.setattr(Run, "texts", lambda self, prompts: None)
  book, words = object(), types.SimpleNamespace(negative_prompt="")
  for changes in ({}, {"sample__discretised": False}):
    run = Run(build(Experiment, discrete(**changes)), tmp_path, None)
    run.__dict__.update(codebook=book, text_encoder=words)
    run.sampler(9)
  assert seen == [book, None]


def test_a_table_says_how_a_run_is_sampled():
  label = lambda c: evaluate.row_label(Run(build(Experiment, c), None, None))
  assert label(config()) == "td_f16k4f2k2f1k1_g9, vanilla"
  assert label(config(sample__discretised=False)) == "td_f16k4f2k2f1k1_g9, vanilla"
  assert label(discrete()) == "td_f16k4f2k2f1k1_g9+D, vanilla"
  as_it_is = label(discrete(sample__discretised=False))
  assert as_it_is == "td_f16k4f2k2f1k1_g9+D, vanilla, history as it is"


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
  kept = lambda: tiny_run.kept(workdir)
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
  done = command("stream", prompt, "--frames=27", "--seed=3", f"--out={tmp_path}/d.mp4")
  assert done.returncode == 0 and len(read_mp4(tmp_path / "d.mp4")[0]) == 27, done.stderr
  refused = command("stream", prompt, "--window=9", f"--out={tmp_path}/e.mp4")
  assert refused.returncode == 2 and "window = 9: a packed model" in refused.stderr
  evaluated = chain.python(
    "-m", "hiar_jax.evaluate", f"--workdirs={workdir}", "--videos=3", f"--out={tmp_path}/table"
  )
  assert evaluated.returncode == 0, evaluated.stderr
  assert "framepack, td_f16k4f2k2f1k1_g9, vanilla" in (tmp_path / "table" / "table.md").read_text()


@pytest.mark.slow
def test_discretised_history_goes_through_every_stage_and_command(chain, tmp_path):
  workdir = tmp_path / "discrete"
  train = ("-m", "hiar_jax.train", "--config=experiments/shapes_framepack_discrete.py:smoke")
  done = chain.python(*train, f"--workdir={workdir}")
  assert done.returncode == 0, done.stderr
  path = workdir / "codebook" / "codebook.npz"
  kept = lambda: tiny_run.kept(workdir)
  before = kept()
  done = chain.python(*train, f"--workdir={workdir}")
  assert done.returncode == 0 and kept() == before and "codebook/codebook.npz" in before

  def generate(name):
    prompt = "--prompt=a red circle moving left"
    options = ("--frames=27", "--seed=3", f"--out={tmp_path / name}.mp4")
    return chain.python("-m", "hiar_jax.generate", f"--workdir={workdir}", prompt, *options)

  first = generate("first")
  assert first.returncode == 0 and len(read_mp4(tmp_path / "first.mp4")[0]) == 27, first.stderr
  command = ("-m", "hiar_jax.evaluate", f"--workdirs={workdir}", "--videos=3")
  done = chain.python(*command, f"--out={tmp_path}/table")
  assert done.returncode == 0, done.stderr
  rows = tmp_path / "table" / "rows"
  assert (rows / "discrete-td-f16k4f2k2f1k1-g9-d-vanilla.json").exists()
  done = chain.python("-m", "hiar_jax.evaluate", f"--from={rows}", f"--out={tmp_path}/again")
  assert done.returncode == 0, done.stderr
  for name in ("table.md", "metrics.json", "fifths.png"):
    assert (tmp_path / "table" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
  whole = path.read_bytes()
  for content, message in ((whole[: len(whole) // 2], "is damaged"), (None, "is missing")):
    path.unlink() if content is None else path.write_bytes(content)
    failed = generate("none")
    assert failed.returncode == 2 and f"{path} {message}" in failed.stderr, failed.stderr
    assert len(failed.stderr.strip().splitlines()) == 1


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
