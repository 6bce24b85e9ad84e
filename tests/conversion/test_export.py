"""Weights back to published files: bit for bit, in shards, with the configs that other tools read,
also from a training run.
"""

import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from hiar_jax.checkpoints import weights
from hiar_jax.checkpoints.training_state import Checkpoints
from hiar_jax.config.building import build
from hiar_jax.config.workdir import save_resolved
from hiar_jax.conversion.export import export
from hiar_jax.convert import convert, parse_bytes
from hiar_jax.errors import Damaged, UserError
from hiar_jax.files import DiskFull
from hiar_jax.training.experiment import Experiment
from tests.helpers import tiny, tiny_run
from tests.helpers.published_files import CONFIGS, diffusers_folder, original_folder, tensors

PARTS = ("dit", "vae", "umt5")
NAMES = {
  "original": {
    "dit": "diffusion_pytorch_model.safetensors",
    "vae": "Wan2.1_VAE.safetensors",
    "umt5": "models_t5_umt5-xxl-enc.safetensors",
  },
  "diffusers": {
    "dit": "transformer/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "umt5": "text_encoder/model.safetensors",
  },
}


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
  directory = tmp_path_factory.mktemp("weights")
  list(convert(str(original_folder(directory / "source")), str(directory / "out")))
  return directory / "out"


def run(source, layout, out, **kwargs) -> list[str]:
  return list(export(source, layout, out, **kwargs))


def assert_same(found, expected):
  assert found.keys() == expected.keys()
  for name, array in expected.items():
    assert (
      found[name].dtype == array.dtype
      and found[name].shape == array.shape
      and found[name].tobytes() == array.tobytes()
    ), name


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_files_as_published(converted, tmp_path, layout):
  lines = run(converted, layout, tmp_path)
  for kind in PARTS:
    assert_same(
      load_file(tmp_path / NAMES[layout][kind]),
      tensors(kind, layout, "bfloat16" if kind == "umt5" else np.float32),
    )
    with safe_open(tmp_path / NAMES[layout][kind], "np") as file:
      assert file.metadata() == {"format": "pt"}
  assert "69 tensors" in lines[0] and not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("layout", ["original", "diffusers"])
@pytest.mark.parametrize("max_shard", [5 * 10**9, 10**5])
def test_there_and_back(converted, tmp_path, layout, max_shard):
  """What was exported converts to the same weights: same numbers, same configs."""
  run(converted, layout, tmp_path / "published", max_shard=max_shard)
  assert (len(list((tmp_path / "published").rglob("*.index.json"))) > 0) == (max_shard < 10**6)
  list(convert(str(tmp_path / "published"), str(tmp_path / "again")))
  for kind in PARTS:
    assert (
      weights.describe(tmp_path / "again", kind).fingerprint
      == weights.describe(converted, kind).fingerprint
    )
    assert weights.read_config(tmp_path / "again", kind) == CONFIGS[kind]
  assert (tmp_path / "again/tokenizer/tokenizer.json").read_bytes() == (
    converted / "tokenizer/tokenizer.json"
  ).read_bytes()


def test_shards(converted, tmp_path):
  run(converted, "diffusers", tmp_path, max_shard=10**6)
  index = json.loads(
    (tmp_path / "transformer/diffusion_pytorch_model.safetensors.index.json").read_text()
  )
  files = sorted(set(index["weight_map"].values()))
  assert [name.split("-")[1:] for name in files] == [
    [f"{i:05d}", "of", f"{len(files):05d}.safetensors"] for i in range(1, len(files) + 1)
  ]
  assert len(files) > 3 and index["metadata"]["total_size"] == sum(
    array.nbytes for array in tensors("dit").values()
  )
  found = {}
  for name in files:
    shard = load_file(tmp_path / "transformer" / name)
    assert sum(array.nbytes for array in shard.values()) <= 10**6 or len(shard) == 1
    assert all(index["weight_map"][tensor] == name for tensor in shard)
    found |= shard
  assert_same(found, tensors("dit", "diffusers"))


def test_casting(converted, tmp_path):
  run(converted, "original", tmp_path, dtype="bfloat16")
  assert_same(load_file(tmp_path / NAMES["original"]["dit"]), tensors("dit", dtype="bfloat16"))


def test_a_pipeline_only_where_all_parts_are_there(converted, tmp_path):
  run(converted, "diffusers", tmp_path / "all")
  assert json.loads((tmp_path / "all/model_index.json").read_text())["_class_name"] == "WanPipeline"
  weights.save(tmp_path / "some", "dit", CONFIGS["dit"], weights.load(converted, "dit")[1])
  lines = run(tmp_path / "some", "diffusers", tmp_path / "part")
  assert "no model_index.json" in lines[-1] and "vae, umt5, tokenizer" in lines[-1]
  assert sorted(path.name for path in (tmp_path / "part").iterdir()) == ["transformer"]


def test_one_part(converted, tmp_path):
  assert len(run(converted, "diffusers", tmp_path, kind="vae")) == 1
  assert [path.name for path in tmp_path.iterdir()] == ["vae"]
  with pytest.raises(UserError, match="holds nothing of kind 'tiny_vae'"):
    run(converted, "diffusers", tmp_path, kind="tiny_vae")


def test_what_is_there_is_not_overwritten_unasked(converted, tmp_path):
  run(converted, "diffusers", tmp_path, max_shard=10**6)
  before = tiny_run.files(tmp_path)
  with pytest.raises(
    UserError, match=r"diffusion_pytorch_model-00001-of.*is there already.*--overwrite"
  ):
    run(converted, "diffusers", tmp_path)
  assert tiny_run.files(tmp_path) == before
  run(converted, "diffusers", tmp_path, overwrite=True)  # in one file: the shards must go
  assert [path.name for path in sorted((tmp_path / "transformer").iterdir())] == [
    "config.json",
    "diffusion_pytorch_model.safetensors",
  ]


def test_damaged_weights_are_one_line(converted, tmp_path):
  shutil.copytree(converted, tmp_path / "weights")
  chunk = tmp_path / "weights/vae/params/quant.kernel/c/0/0"
  content = bytearray(chunk.read_bytes())
  content[len(content) // 2] ^= 4
  chunk.write_bytes(content)
  with pytest.raises(Damaged, match=r"params/quant\.kernel is damaged .*convert again") as error:
    run(tmp_path / "weights", "diffusers", tmp_path / "out", kind="vae")
  assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("last", range(1, 9))
def test_a_failed_export_leaves_the_one_before(converted, tmp_path, monkeypatch, last):
  """At each move of a file the disk is full: the old files are back, nothing else is left."""
  run(converted, "diffusers", tmp_path, kind="dit")
  folder = tmp_path / "transformer"
  before = {path.name: path.read_bytes() for path in folder.iterdir()}
  replace, left = os.replace, [last]

  def failing(source, target):
    left[0] -= "json.tmp" not in str(source)
    if not left[0]:
      raise OSError(28, "No space left on device")
    replace(source, target)

  monkeypatch.setattr(os, "replace", failing)
  with pytest.raises(DiskFull, match="no space left on the disk of .*transformer"):
    run(converted, "diffusers", tmp_path, kind="dit", max_shard=10**6, overwrite=True)
  assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


# A fork for each move of files: killed there, the old ones must be in place or set aside.
KILLS = """
import os, pathlib, shutil, sys
from hiar_jax.conversion.export import Target, _swap

OLD = {"x-00001-of-00002.safetensors": "old", "x-00002-of-00002.safetensors": "old",
       "x.safetensors.index.json": "old", "config.json": "old"}
NEW = {"x-00001-of-00002.safetensors": "new", "x.safetensors.index.json": "new",
       "x-00002-of-00002.safetensors": "new", "config.json": "new"}
folder = pathlib.Path(sys.argv[1])
replace = os.replace

def write(directory, files):
  shutil.rmtree(directory, ignore_errors=True)
  directory.mkdir()
  for name, text in files.items():
    (directory / name).write_text(text)

def read(directory):
  return {path.name: path.read_text() for path in directory.glob("[!.]*")}

def swap(last):
  moves = 0
  def killed(source, target):
    nonlocal moves
    moves += 1
    if moves == last:
      os._exit(9)
    replace(source, target)
  process = os.fork()
  if not process:
    os.replace = killed
    _swap(folder / ".staging", Target(folder, "x"), folder / ".old")
    os._exit(0)
  return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])

for last in range(1, 9):
  for again in (None, *range(1, 9)):  # killed once more, then left alone
    write(folder, OLD)
    write(folder / ".staging", NEW)
    assert swap(last) == 9
    write(folder / ".staging", NEW)
    assert again is None or swap(again) in (9, 0)
    found = {**read(folder), **read(folder / ".old")}
    assert found == OLD or read(folder) == NEW, (last, again, found)
    write(folder / ".staging", NEW)
    assert swap(None) == 0
    assert read(folder) == NEW and not (folder / ".old").exists(), (last, again)
"""


@pytest.mark.slow
def test_a_killed_export_leaves_the_one_before_or_its_own(tmp_path):
  done = subprocess.run(
    [sys.executable, "-c", KILLS, str(tmp_path / "out")],
    cwd=tiny_run.ROOT,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr


def test_the_tiny_autoencoder_has_no_place_in_diffusers(tmp_path):
  from tests.helpers.published_files import params

  weights.save(tmp_path / "weights", "tiny_vae", CONFIGS["tiny_vae"], params("tiny_vae"))
  assert (
    "tiny_vae: diffusers has no place for it"
    in run(tmp_path / "weights", "diffusers", tmp_path / "out")[0]
  )
  run(tmp_path / "weights", "original", tmp_path / "out")
  assert_same(load_file(tmp_path / "out/taew2_1.safetensors"), tensors("tiny_vae"))


def test_diffusers_to_diffusers_through_here(tmp_path):
  source = diffusers_folder(tmp_path / "source")
  list(convert(str(source), str(tmp_path / "weights")))
  run(tmp_path / "weights", "diffusers", tmp_path / "back")
  for name in NAMES["diffusers"].values():
    assert_same(load_file(tmp_path / "back" / name), load_file(source / name))
    config = name.replace(name.split("/")[1], "config.json")
    assert json.loads((tmp_path / "back" / config).read_text()) == json.loads(
      (source / config).read_text()
    )


# ----------------------------------------------------------------------------------- a training run


def trained(directory, **changes):
  """What a run leaves of its last stage, without training."""
  config = tiny_run.make_config(**{"model__place_embedding": False, **changes})
  save_resolved(config, directory)
  experiment = build(Experiment, config)
  shapes = jax.eval_shape(lambda: experiment.dit.init(jax.random.key(0)))
  leaves, tree = jax.tree.flatten(shapes)
  params = tree.unflatten(tiny.random(i, *leaf.shape) for i, leaf in enumerate(leaves))
  with Checkpoints(directory / "distill" / "checkpoints") as checkpoints:
    checkpoints.save(3, {"step": np.asarray(3)}, params)
  return experiment.dit, params


def test_a_training_run(tmp_path):
  config, params = trained(tmp_path / "run")
  run(tmp_path / "run", "diffusers", tmp_path / "out")
  assert (
    json.loads((tmp_path / "out/transformer/config.json").read_text())["num_layers"]
    == config.num_layers
  )
  list(convert(str(tmp_path / "out"), str(tmp_path / "weights")))
  found_config, found = weights.load(tmp_path / "weights", "dit")
  for field in (*config.sizes, "eps"):
    assert getattr(found_config, field) == getattr(config, field), field
  jax.tree.map(np.testing.assert_array_equal, found, params)


def test_a_stage_that_has_not_run(tmp_path):
  trained(tmp_path / "run")
  with pytest.raises(UserError, match="no checkpoints in .*causal_init"):
    run(tmp_path / "run", "original", tmp_path / "out", stage="causal_init")


def test_a_stage_that_was_made_by_another_run(tmp_path, monkeypatch):
  """Behind two borrowers, from any folder; and one that would be another is not taken."""
  _, params = trained(tmp_path / "first")
  (tmp_path / "first" / "distill").rename(tmp_path / "first" / "teacher")
  for name, lender in (("second", "../first"), ("third", "../second")):
    save_resolved(
      tiny_run.make_config(model__place_embedding=False, stages_from=lender), tmp_path / name
    )
  monkeypatch.chdir("/")
  run(tmp_path / "third", "original", tmp_path / "out", stage="teacher", kind="dit")
  found = load_file(tmp_path / "out" / NAMES["original"]["dit"])
  np.testing.assert_array_equal(found["head.modulation"], params["head_modulation"])
  trained(tmp_path / "first", teacher__lr=0.5)
  with pytest.raises(UserError, match="there are no checkpoints in .*second/teacher"):
    run(tmp_path / "second", "original", tmp_path / "other", stage="teacher")


def test_a_model_with_parts_that_wan_lacks(tmp_path):
  params = {**tiny.params(), "extra": {"kernel": tiny.random(0, 2, 2)}}
  weights.save(tmp_path / "weights", "dit", tiny.CONFIG, params)
  with pytest.raises(UserError, match=r"differ at extra\.kernel"):
    run(tmp_path / "weights", "original", tmp_path / "out")
  assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_a_run_with_place_embeddings_has_no_published_names(tmp_path):
  trained(tmp_path / "run", model__place_embedding=True)
  with pytest.raises(UserError, match="place_embedding = True: published models have none"):
    run(tmp_path / "run", "original", tmp_path / "out")


@pytest.mark.parametrize(
  ("text", "size"), [("5GB", 5 * 10**9), ("500mb", 5 * 10**8), ("1.5 GB", 1.5e9), ("1000", 1000)]
)
def test_sizes(text, size):
  assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "0", "five", "5TB", "-1GB"])
def test_sizes_that_are_none(text):
  with pytest.raises(UserError, match="expected a size such as 5GB"):
    parse_bytes(text)
