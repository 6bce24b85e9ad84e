"""What a job would take: its programs as they run, against operations and bytes summed here, and
what is said of them before anything is loaded.
"""

import dataclasses
import itertools
import pathlib
import runpy

import jax
import pytest

from benchmarks import needed_flops
from hiar_jax.config.building import build
from hiar_jax.errors import UserError
from hiar_jax.generation import dry_run, video_model
from hiar_jax.generation.clips import Clip
from hiar_jax.generation.prompts_file import Job
from hiar_jax.generation.timeline import Timeline
from hiar_jax.generation.video_model import ModelChanges, VideoModel
from hiar_jax.models import vae
from hiar_jax.parallel.mesh import MeshConfig, make_mesh
from hiar_jax.planning import programs
from hiar_jax.planning.abstract_run import AbstractRun
from hiar_jax.training.experiment import Experiment
from hiar_jax.training.run import Run
from tests.helpers import tiny_packed, tiny_run

ROOT = tiny_run.ROOT
BLOCK, WINDOW, BLOCKS = 2, 6, 5


def run_of(config, devices: int = 1) -> AbstractRun:
  mesh = make_mesh(MeshConfig(data=1, fsdp=-1), jax.devices()[:devices])
  return AbstractRun(build(Experiment, config), pathlib.Path(), mesh)


def clip(frames: int, given: int = 0, **told) -> Clip:
  behind = told.pop("behind", 0)
  return Clip(Job("", 0, **told), None, None, given, frames, behind=behind)


def sampler(run: AbstractRun, frames: int, batch: int = 1, given: int = 0, **told):
  return dry_run.sampler(run, clip(frames, given, **told), batch, "float32")


def operations(run: AbstractRun, *arguments, **told) -> float:
  return programs.operations(run, lambda run: sampler(run, *arguments, **told))


def result(program: programs.Program) -> tuple[int, ...]:
  with jax.set_mesh(program.mesh):
    return jax.eval_shape(program.function, *program.arguments.values()).shape


# --------------------------------------------------------------------------------- its operations


ROWS = {
  "HiAR": {},
  "Self-Forcing": {"history__order": "block_first", "history__level": "clean"},
  "SAF": {"history__level": "input"},
}


@pytest.mark.parametrize("name", ROWS)
def test_operations_are_those_of_its_forwards(name):
  """Of all steps, on the whole ring, empty slots too: a pair's first block does not see the
  second. Each block that is shown to later ones in a forward of its own has no output there.
  """
  run = run_of(
    tiny_run.make_config(history__window=WINDOW, model__place_embedding=False, **ROWS[name])
  )
  e, ring = run.experiment, WINDOW - BLOCK
  tokens, levels = e.dit.tokens(e.latent.height, e.latent.width), len(e.student.timesteps)
  forward = lambda frames, seen: needed_flops.forward(e.dit, frames, seen, tokens, e.text.length)
  one, pair = forward(BLOCK, ring + BLOCK), forward(2 * BLOCK, ring + 1.5 * BLOCK)
  output = 2 * BLOCK * tokens * e.dit.channels * e.dit.patch[1] * e.dit.patch[2] * e.dit.dim
  expected = {
    "HiAR": levels * (one + (BLOCKS - 1) * pair),
    "Self-Forcing": BLOCKS * (levels * one + one - output),
    "SAF": levels * BLOCKS * one,
  }[name]
  assert operations(run, BLOCK * BLOCKS, 3) == pytest.approx(3 * expected, rel=1e-9)


@pytest.mark.parametrize("guidance", [0.0, 1.0])
def test_operations_of_sections(guidance):
  """With guidance twice the forwards; the history has its places from the first section on."""
  run = run_of(tiny_packed.make_config(sample__guidance=guidance, model__place_embedding=False))
  e = run.experiment
  _, ph, pw = e.dit.patch
  grid = e.latent.height // ph, e.latent.width // pw
  packed = [(group.tokens(*grid), group.pool) for group in e.framepack.parsed.groups]
  section = needed_flops.packed_forward(e.packed_dit, 2 * grid[0] * grid[1], packed, e.text.length)
  forwards = 5 * e.sample.steps * (2 if guidance else 1)
  assert operations(run, 10) == pytest.approx(forwards * section, rel=1e-9)
  _, said = itertools.islice(dry_run._blocks(e, clip(10)), 2)
  assert f"sections: 5, {2 * grid[0] * grid[1]} tokens each" in _ and f"{forwards} forwards" in _
  assert f"history: td_f2k2f1k1_g2, {sum(n for n, _ in packed)} packed tokens a forward" in said


# ------------------------------------------------------------------------------- what it is given


def test_a_picture_and_a_continuation():
  run, frame = run_of(tiny_run.make_config()), (2, 2, 8)
  for given in (0, 1, 4):
    program = sampler(run, 6, 3, given)
    assert result(program)[:2] == (3, given + 6)
    assert len(program.arguments["batch"]) == (3 if given else 2)
  assert result(program)[4] == frame[2]


@pytest.mark.slow
def test_what_packed_models_are_told():
  """A text and a seed for each section, frames behind them, a loop."""
  run = run_of(tiny_packed.make_config("shapes_framepack_both_ends"))
  texts, seeds, given, behind = sampler(
    run, 6, 2, behind=1, timeline=Timeline(()), takes=((1, 5),)
  ).arguments["batch"]
  assert texts.shape[:2] == seeds.shape == (2, 3) and given is None and behind.shape[1] == 1
  assert result(sampler(run, 6, 2, behind=1))[1] == 7
  assert result(sampler(run, 6, 2, loop=True))[1] == 6
  # towards an end that is there sections are made one by one, each with a history of its own
  assert operations(run, 6, loop=True) > operations(run, 6)


def test_devices_share_what_is_sharded():
  config = tiny_run.make_config(model__dim=64, model__ffn_dim=64, mesh__min_shard=64)
  alone, spread = (sampler(run_of(config, devices), 4, 4) for devices in (1, 4))
  whole, part = (program.bytes_of("weights") for program in (alone, spread))
  assert whole / 4 < part < whole / 3  # small leaves are everywhere
  assert spread.bytes_of("batch") == alone.bytes_of("batch") / 4
  # three videos are not split over four devices
  assert sampler(run_of(config, 4), 4, 3).bytes_of("batch") == 3 * alone.bytes_of("batch") / 4


@pytest.fixture
def wan(monkeypatch):
  """Returns runs of Wan's at a small size; changes: of its codec."""
  small = vae.VAEConfig(
    dim=8,
    z_dim=16,
    dim_mult=(1, 1),
    num_res_blocks=1,
    temporal_downsample=(True,),
    latents_mean=(0.0,) * 16,
    latents_std=(1.0,) * 16,
  )
  monkeypatch.setattr(vae, "VAEConfig", lambda: small)
  config = runpy.run_path(str(ROOT / "experiments" / "hiar_wan_1_3b.py"))["get_config"]()
  config.data.size = 256, 384

  def make(devices: int = 1, **changes) -> AbstractRun:
    run = run_of(config, devices)
    e = run.experiment
    codec = dataclasses.replace(e.codec, **changes)
    return dataclasses.replace(run, experiment=dataclasses.replace(e, codec=codec))

  return make


@pytest.mark.slow
def test_a_frame_is_decoded_over_the_devices_that_divide_its_width(wan):
  whole, spread, tiled = (programs.decoder(run) for run in (wan(), wan(4), wan(4, tile=8)))
  assert (whole.mesh.size, spread.mesh.size, tiled.mesh.size) == (1, 4, 1)
  assert spread.bytes_of("cache") == whole.bytes_of("cache") / 4
  assert spread.bytes_of("weights") == whole.bytes_of("weights")
  # the same operations; a tile's border is decoded twice
  counts = [programs.operations(run, programs.decoder) for run in (wan(), wan(4), wan(1, tile=8))]
  assert counts[0] == counts[1] < counts[2]


# ---------------------------------------------------------------------------------- what is said


def opened(config) -> VideoModel:
  return VideoModel(
    Run(build(Experiment, config), pathlib.Path(), run_of(config).mesh), "", "distill"
  )


def test_the_published_sizes_are_said_before_anything_is_compiled():
  config = runpy.run_path(str(ROOT / "experiments" / "hiar_wan_1_3b.py"))["get_config"]()
  model = video_model.from_config(config, None, ModelChanges(), needed=False)
  assert list(itertools.islice(dry_run.lines(model, [clip(21)]), 4)) == [
    "DiT: 1.419 billion parameters, 2.64 GiB",
    "VAE: 0.127 billion parameters, 484 MiB",
    "UMT5: 5.681 billion parameters, 10.6 GiB",
    "blocks: 7, 4680 tokens each (1560 a latent frame), 4 noise levels",
  ]


@pytest.mark.slow
def test_a_shape_has_a_row(capsys):
  """Two clips of one shape are one batch; a run's weights are float32 whatever it computes in."""
  model = opened(tiny_run.make_config(model__dtype="bfloat16"))
  *said, note = dry_run.lines(model, [clip(4), clip(4), clip(2)])
  heads = [line for line in said if line.startswith("generate on here")]
  assert [line.splitlines()[0][-7:] for line in heads] == ["2 clips", " 1 clip"]
  held = sum(leaf.size * 4 for leaf in jax.tree.leaves(dry_run.abstract_weights(model.network)))
  assert f"weights {dry_run.size(held)}" in heads[0] and dry_run.size(held) in said[0]
  assert "FLOPs: " in heads[0] and "compiled in" in heads[0]
  assert "a CPU computes bfloat16 in float32" in note
  assert capsys.readouterr().err == "generate on here: compiling\n" * 2


def test_a_kernel_that_is_not_here_is_one_line():
  config = tiny_run.make_config(model__attention="cudnn")
  with pytest.raises(UserError, match="generate on here cannot be planned: attention = 'cudnn' is"):
    list(dry_run.lines(opened(config), [clip(4)]))
