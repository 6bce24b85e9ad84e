"""A weights directory: what goes in comes out, on any devices, or one line says what is wrong with it."""

import dataclasses
import errno
import json
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import published_files
import pytest
import tiny

from hiar_jax import stored_arrays, weights
from hiar_jax.errors import UserError
from hiar_jax.models.published_names import Stack

PARAMS = {
  "layers": {"kernel": tiny.random(0, 3, 8, 4), "bias": tiny.random(1, 3, 4)},
  "scale": tiny.random(2, 5),
  "gain": np.asarray(1.5, np.float32),
  "zeros": np.zeros((2, 2), np.float32),
}
CONFIG = tiny.CONFIG
ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def saved(tmp_path):
  weights.save(tmp_path, "dit", CONFIG, PARAMS, "a.safetensors")
  return tmp_path


def assert_same(found, expected=PARAMS):
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(np.asarray(a), b)


def chunks(directory):
  params = directory / "dit" / "params"
  return sorted(path for path in params.rglob("*") if path.is_file() and "c" in path.relative_to(params).parts)


def test_there_and_back(saved):
  config, params = weights.load(saved, "dit")
  assert config == CONFIG and all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))
  assert_same(params)
  assert [path.name for path in saved.iterdir()] == ["dit"]


@pytest.mark.parametrize("kind", weights.KINDS)
def test_every_config_comes_back(tmp_path, kind):
  weights.save(tmp_path, kind, published_files.CONFIGS[kind], PARAMS)
  config = weights.read_config(tmp_path, kind)
  assert config == published_files.CONFIGS[kind] and type(config) is weights.config_class(kind)
  changed = dataclasses.replace(config, dtype="bfloat16" if kind == "dit" else jnp.bfloat16)
  assert weights.config_from_json(kind, json.loads(json.dumps(weights.config_to_json(changed)))) == changed


def test_the_description(tmp_path):
  params = {"a": tiny.random(0, 3), "b": tiny.random(0, 2, 2).astype(jnp.bfloat16)}
  found = weights.save(tmp_path, "dit", CONFIG, params, "x.pth", tensors=7)
  assert found == weights.describe(tmp_path, "dit") and weights.exists(tmp_path, "dit") and not weights.exists(tmp_path, "vae")
  assert (found.kind, found.source, found.tensors, found.parameters, found.dtype) == ("dit", "x.pth", 7, 7, "bfloat16+float32")
  assert_same(weights.load(tmp_path, "dit")[1], params)


def test_casting(saved):
  _, params = weights.load(saved, "dit", dtype="bfloat16")
  assert_same(params, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS))


def test_onto_several_devices(saved):
  mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  split, whole = jax.NamedSharding(mesh, jax.P(None, "data")), jax.NamedSharding(mesh, jax.P())
  assert_same(weights.load(saved, "dit", sharding=whole)[1])
  place = lambda tree: jax.tree.map(lambda leaf: split if leaf.shape[1:2] == (8,) else whole, tree)
  _, params = weights.load(saved, "dit", sharding=place)
  assert_same(params)
  assert params["layers"]["kernel"].sharding == split and params["scale"].sharding == whole
  assert params["layers"]["kernel"].addressable_shards[3].data.shape == (3, 1, 4)


def test_reading_row_by_row(saved):
  config, arrays = weights.open_arrays(saved, "dit")
  kernel = arrays["layers"]["kernel"]
  assert config == CONFIG and kernel.shape == (3, 8, 4) and kernel.dtype == np.float32 and kernel.size == 96
  np.testing.assert_array_equal(kernel[2], PARAMS["layers"]["kernel"][2])
  np.testing.assert_array_equal(np.asarray(kernel), PARAMS["layers"]["kernel"])


def test_orbax_reads_it(saved):
  """Without anything of this project."""
  with ocp.StandardCheckpointer() as checkpointer:
    found = checkpointer.restore(saved / "dit" / "params")
  assert_same(jax.tree.map(np.asarray, found))


# ------------------------------------------------------------------------------------------------------------- chunks


@pytest.mark.parametrize(
  ("shape", "itemsize", "limit", "expected"),
  [
    ((), 4, 64, ()), ((5,), 4, 64, (5,)), ((100,), 4, 64, (16,)), ((3, 8, 4), 4, 64, (1, 4, 4)), ((3, 2, 2), 4, 32, (2, 2, 2)),
    ((3, 4, 100), 4, 64, (1, 1, 16)), ((0, 3), 4, 64, (1, 3)), ((40, 5120, 13824), 4, 64 << 20, (1, 1213, 13824)),
  ],
)  # fmt: skip
def test_chunks_are_no_larger_than_the_limit(shape, itemsize, limit, expected):
  assert stored_arrays.chunk_shape(shape, itemsize, limit) == expected


@pytest.mark.parametrize("limit", [4, 20, 48, 10**6])
def test_however_it_is_cut(tmp_path, monkeypatch, limit):
  monkeypatch.setattr(stored_arrays, "CHUNK_BYTES", limit)
  weights.save(tmp_path, "dit", CONFIG, PARAMS)
  assert len(chunks(tmp_path)) >= max(5, sum(leaf.nbytes for leaf in jax.tree.leaves(PARAMS)) // limit)
  assert_same(weights.load(tmp_path, "dit")[1])


class Rows:
  """A stack that remembers which rows were asked for."""

  def __init__(self, array):
    self.array, self.shape, self.dtype, self.size, self.asked = array, array.shape, array.dtype, array.size, []

  def __getitem__(self, row):
    self.asked.append(row)
    return self.array[row]


def test_stacks_are_read_one_row_at_a_time(tmp_path, monkeypatch):
  monkeypatch.setattr(stored_arrays, "CHUNK_BYTES", 8 * 4 * 4)
  rows = Rows(PARAMS["layers"]["kernel"])
  stack = Stack([*PARAMS["layers"]["bias"]])
  weights.save(tmp_path, "dit", CONFIG, {"kernel": stored_arrays.Cast(rows, jnp.bfloat16), "bias": stack})
  assert rows.asked == [0, 1, 2]
  expected = {"kernel": PARAMS["layers"]["kernel"].astype(jnp.bfloat16), "bias": PARAMS["layers"]["bias"]}
  assert_same(weights.load(tmp_path, "dit")[1], expected)


# -------------------------------------------------------------------------------------------------------- fingerprints


def test_fingerprints(saved, tmp_path_factory):
  def of(params):
    directory = tmp_path_factory.mktemp("weights")
    weights.save(directory, "dit", CONFIG, params, "another name")
    return weights.fingerprint(directory, "dit")

  changed = jax.tree.map(np.copy, PARAMS)
  changed["layers"]["kernel"][2, 7, 3] = np.nextafter(changed["layers"]["kernel"][2, 7, 3], np.float32(9))
  renamed = {**PARAMS, "scale_": PARAMS["scale"]}
  del renamed["scale"]
  cast = {**PARAMS, "zeros": PARAMS["zeros"].astype(jnp.bfloat16)}
  reshaped = {**PARAMS, "zeros": PARAMS["zeros"].reshape(1, 4)}
  first = weights.fingerprint(saved, "dit")
  assert of(PARAMS) == first and len(first) == 16
  assert len({first, *map(of, (changed, renamed, cast, reshaped))}) == 5


# ------------------------------------------------------------------------------------------------------------- mistakes


def test_what_is_missing(saved):
  with pytest.raises(UserError, match=r"no directory .*nowhere.*hiar_jax\.convert --source=FILES --out=.*nowhere"):
    weights.load(saved / "nowhere", "dit")
  with pytest.raises(UserError, match=r"no weights of kind 'vae' \(there is dit\)"):
    weights.read_config(saved, "vae")
  with pytest.raises(UserError, match="kind = 'dti': expected one of dit, vae"):
    weights.load(saved, "dti")


def test_another_kind_in_the_folder(saved):
  shutil.copytree(saved / "dit", saved / "vae")
  with pytest.raises(UserError, match="kind 'dit', expected 'vae'"):
    weights.load(saved, "vae")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"kind": "dit"}'])
def test_a_damaged_description(saved, content):
  (saved / "dit" / "model.json").write_text(content)
  with pytest.raises(UserError, match=r"model\.json is damaged .*convert again") as error:
    weights.fingerprint(saved, "dit")
  assert "\n" not in str(error.value)


def test_a_config_from_another_version(saved):
  path = saved / "dit" / "model.json"
  found = json.loads(path.read_text())
  path.write_text(json.dumps({**found, "config": {**found["config"], "num_head": 3}}))
  with pytest.raises(UserError, match="did you mean 'num_heads'"):
    weights.load(saved, "dit")


@pytest.mark.parametrize("damage", ["bit", "cut", "lost", "metadata", "params"])
def test_damaged_weights(saved, damage):
  chunk = chunks(saved)[0]
  if damage == "bit":
    content = bytearray(chunk.read_bytes())
    content[2] ^= 4
    chunk.write_bytes(content)
  elif damage == "cut":
    chunk.write_bytes(chunk.read_bytes()[:-3])
  elif damage == "lost":
    chunk.unlink()
  elif damage == "metadata":
    (saved / "dit" / "params" / "_METADATA").unlink()
  else:
    shutil.rmtree(saved / "dit" / "params")
  with pytest.raises(UserError, match=r"dit is damaged .*convert again") as error:
    weights.load(saved, "dit")
  assert "\n" not in str(error.value)


class Failing(Rows):
  """Comes to grief at its second row."""

  def __init__(self, error):
    super().__init__(PARAMS["layers"]["kernel"])
    self.error = error

  def __getitem__(self, row):
    if row:
      raise self.error
    return super().__getitem__(row)


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_an_interrupted_save_leaves_what_was_there(saved, error):
  expected = UserError if isinstance(error, OSError) else type(error)
  with pytest.raises(expected):
    weights.save(saved, "dit", CONFIG, {"a": Failing(error)})
  assert_same(weights.load(saved, "dit")[1])
  with pytest.raises(expected):
    weights.save(saved, "vae", published_files.CONFIGS["vae"], {"a": Failing(error)})
  assert sorted(path.name for path in saved.iterdir()) == ["dit"]


KILLED = """
import os, signal, sys
import numpy as np
from hiar_jax import weights
from hiar_jax.models.dit import DiTConfig

class Deadly:
  shape, dtype, size = (3, 4), np.dtype(np.float32), 12
  def __getitem__(self, row):
    os.kill(os.getpid(), signal.SIGKILL)

weights.save(sys.argv[1], "dit", DiTConfig(), {"a": np.ones(5, np.float32), "b": Deadly()})
"""


def test_a_kill_leaves_nothing_under_the_final_name(saved):
  for directory in (saved, saved / "new"):
    done = subprocess.run([sys.executable, "-c", KILLED, directory], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert weights.exists(directory, "dit") == (directory == saved)
  assert_same(weights.load(saved, "dit")[1])


def test_what_a_kill_left_is_cleared(saved):
  for name in (".dit.tmp", ".dit.old"):
    shutil.copytree(saved / "dit", saved / name)
  changed = {"a": tiny.random(0, 2)}
  weights.save(saved, "dit", CONFIG, changed)
  assert_same(weights.load(saved, "dit")[1], changed)
  assert [path.name for path in saved.iterdir()] == ["dit"]
