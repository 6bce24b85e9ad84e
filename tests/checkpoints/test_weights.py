"""A weights directory: what goes in comes out, on any devices, or one line says what is wrong with
it.
"""

import dataclasses
import errno
import json
import pathlib
import shutil
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from hiar_jax.checkpoints import weights
from hiar_jax.errors import Damaged, UserError
from hiar_jax.files import DiskFull
from tests.helpers import published_files, tiny
from tests.helpers.small_weights import CONFIG, PARAMS, Rows, assert_same, chunks

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def saved(tmp_path):
  weights.save(tmp_path, "dit", CONFIG, PARAMS, "a.safetensors")
  return tmp_path


def test_there_and_back(saved):
  config, params = weights.load(saved, "dit")
  assert config == CONFIG and all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))
  assert_same(params)
  assert [path.name for path in saved.iterdir()] == ["dit"]


@pytest.mark.parametrize("kind", weights.KINDS)
def test_every_config_comes_back(tmp_path, kind):
  weights.save(tmp_path, kind, published_files.CONFIGS[kind], PARAMS)
  config = weights.read_config(tmp_path, kind)
  assert config == published_files.CONFIGS[kind] and type(config) is type(
    published_files.CONFIGS[kind]
  )
  changed = dataclasses.replace(config, dtype="bfloat16" if kind == "dit" else jnp.bfloat16)
  assert (
    weights.config_from_json(kind, json.loads(json.dumps(weights.config_to_json(changed))))
    == changed
  )


def test_the_description(tmp_path):
  params = {"a": tiny.random(0, 3), "b": tiny.random(0, 2, 2).astype(jnp.bfloat16)}
  found = weights.save(tmp_path, "dit", CONFIG, params, "x.pth", tensors=7)
  assert (
    found == weights.describe(tmp_path, "dit")
    and weights.exists(tmp_path, "dit")
    and not weights.exists(tmp_path, "vae")
  )
  assert (found.kind, found.source, found.tensors, found.parameters, found.dtype) == (
    "dit",
    "x.pth",
    7,
    7,
    "bfloat16+float32",
  )
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
  assert (
    config == CONFIG
    and kernel.shape == (3, 8, 4)
    and kernel.dtype == np.float32
    and kernel.size == 96
  )
  np.testing.assert_array_equal(kernel[2], PARAMS["layers"]["kernel"][2])
  np.testing.assert_array_equal(np.asarray(kernel), PARAMS["layers"]["kernel"])


def test_orbax_reads_it(saved):
  """Without anything of this project."""
  with ocp.StandardCheckpointer() as checkpointer:
    found = checkpointer.restore(saved / "dit" / "params")
  assert_same(jax.tree.map(np.asarray, found))


# ------------------------------------------------------------------------------------- fingerprints


def test_fingerprints(saved, tmp_path_factory):
  def of(params):
    directory = tmp_path_factory.mktemp("weights")
    weights.save(directory, "dit", CONFIG, params, "another name")
    return weights.describe(directory, "dit").fingerprint

  changed = jax.tree.map(np.copy, PARAMS)
  changed["layers"]["kernel"][2, 7, 3] = np.nextafter(
    changed["layers"]["kernel"][2, 7, 3], np.float32(9)
  )
  renamed = {**PARAMS, "scale_": PARAMS["scale"]}
  del renamed["scale"]
  cast = {**PARAMS, "zeros": PARAMS["zeros"].view(np.int32)}  # the same bytes
  reshaped = {**PARAMS, "zeros": PARAMS["zeros"].reshape(1, 4)}
  first = weights.describe(saved, "dit").fingerprint
  assert of(PARAMS) == first and len(first) == 16
  assert len({first, *map(of, (changed, renamed, cast, reshaped))}) == 5


# ----------------------------------------------------------------------------------------- mistakes


def test_what_is_missing(saved):
  with pytest.raises(
    UserError, match=r"no directory .*nowhere.*hiar_jax\.convert --source=FILES --out=.*nowhere"
  ):
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
    weights.describe(saved, "dit")
  assert "\n" not in str(error.value)


def test_a_config_from_another_version(saved):
  path = saved / "dit" / "model.json"
  found = json.loads(path.read_text())
  path.write_text(json.dumps({**found, "config": {**found["config"], "num_head": 3}}))
  with pytest.raises(UserError, match="did you mean 'num_heads'"):
    weights.load(saved, "dit")


def test_a_download_is_never_where_to_convert_to(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  download = tmp_path / "weights" / "wan"
  (download / "transformer").mkdir(parents=True)
  for given in ("weights/wan", download, "weights/../weights/wan/"):
    with pytest.raises(UserError, match="--source=.*wan/? --out=weights/wan_converted makes these"):
      weights.describe(given, "dit")
  (tmp_path / "notes.txt").write_text("")
  with pytest.raises(UserError, match="notes.txt is no directory; .*--out=weights/notes.txt"):
    weights.describe("notes.txt", "dit")


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
  with pytest.raises(UserError, match=r"dit(/params\S*)? is damaged .*convert again") as error:
    weights.load(saved, "dit")
  assert "\n" not in str(error.value)


def test_damage_that_shows_only_when_a_row_is_read(saved):
  _, arrays = weights.open_arrays(saved, "dit")
  for chunk in chunks(saved):
    chunk.write_bytes(chunk.read_bytes()[:-3])
  with pytest.raises(Damaged, match=r"params/layers\.kernel is damaged .*convert again") as error:
    arrays["layers"]["kernel"][1]
  assert "\n" not in str(error.value)


def test_weights_that_do_not_fit_are_refused_before_anything_is_written(saved, monkeypatch):
  monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=100))
  with pytest.raises(DiskFull, match=r"of .*/dit \(.* needed, 100 B free\); nothing was written"):
    weights.save(saved, "dit", CONFIG, {"a": Failing(AssertionError("read"))})
  assert_same(weights.load(saved, "dit")[1])


class Failing(Rows):
  """Comes to grief at its second row."""

  def __init__(self, error):
    super().__init__(PARAMS["layers"]["kernel"])
    self.error = error

  def __getitem__(self, row):
    if row:
      raise self.error
    return super().__getitem__(row)


@pytest.mark.parametrize(
  "error", [ValueError("no"), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")]
)
def test_an_interrupted_save_leaves_what_was_there(saved, error):
  expected = UserError if isinstance(error, OSError) else type(error)
  with pytest.raises(expected):
    weights.save(saved, "dit", CONFIG, {"a": Failing(error)})
  assert_same(weights.load(saved, "dit")[1])
  with pytest.raises(expected):
    weights.save(saved, "vae", published_files.CONFIGS["vae"], {"a": Failing(error)})
  assert sorted(path.name for path in saved.iterdir()) == ["dit"]


# A fork for each step of a save: killed there, what it leaves is read by another; after some a
# third saves again and is left alone.
KILLS = """
import json, os, pathlib, shutil, signal, sys
import numpy as np
from hiar_jax.checkpoints import stored_arrays, weights
from hiar_jax.errors import UserError
from hiar_jax.models.dit import DiTConfig

STEPS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir")
NEW = {"a": np.full((3, 2), 2, np.float32)}
root, before = pathlib.Path(sys.argv[1]), sys.argv[2]

def fork(work):
  read, write = os.pipe()
  if not os.fork():
    try:
      os.write(write, json.dumps(work()).encode())
    except BaseException:
      import traceback
      traceback.print_exc()
    os._exit(0)
  os.close(write)
  with os.fdopen(read) as file:
    said = file.read()
  os.wait()
  return json.loads(said) if said else None

def save(directory, last=None):
  steps = 0
  def audit(event, args):
    nonlocal steps
    if event in STEPS and (event != "open" or args[2] & os.O_CREAT):
      steps += 1
      if steps == last:
        os.kill(os.getpid(), signal.SIGKILL)
  sys.addaudithook(audit)
  weights.save(directory, "dit", DiTConfig(), NEW)
  return steps

def found(directory):
  try:
    return float(np.asarray(weights.load(directory, "dit")[1]["a"]).mean())
  except UserError as error:
    return str(error)

def again(directory):
  save(directory)
  return [found(directory), sorted(path.name for path in (directory / "dit").iterdir())]

def prepare(name):
  if before:
    shutil.copytree(before, root / name)
  return root / name

total = fork(lambda: save(prepare("whole")))
results = []
for step in range(1, total + 1):
  directory = prepare(str(step))
  killed = fork(lambda: save(directory, step)) is None
  third = step % 3 == total % 3
  results.append([
    killed, fork(lambda: found(directory)), fork(lambda: again(directory)) if third else None
  ])
print(json.dumps(results))
"""


@pytest.mark.slow
@pytest.mark.parametrize("there", [True, False])
def test_a_kill_at_any_step_leaves_the_old_or_the_new(tmp_path, there):
  if there:
    weights.save(tmp_path / "old", "dit", CONFIG, {"a": np.ones((3, 2), np.float32)})
  done = subprocess.run(
    [sys.executable, "-W", "ignore", "-c", KILLS, tmp_path, tmp_path / "old" if there else ""],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
  results = json.loads(done.stdout)
  assert sum(killed for killed, *_ in results) > 10
  states = [found for _, found, _ in results]
  new = states.index(2.0) if 2.0 in states else len(states)
  if there:
    assert set(states[:new]) == {1.0}, states
  else:
    assert all(
      "no weights of kind 'dit'" in found or "no directory" in found for found in states[:new]
    ), states
  assert new > 5 and all(found == 2.0 for found in states[new:]), states
  for found, names in filter(None, (again for *_, again in results)):
    assert found == 2.0 and len(names) == 2 and names[0] == "model.json", names


def test_an_interrupt_just_after_the_change_keeps_the_new(saved, monkeypatch):
  write_atomic, changed = weights.write_atomic, {"a": tiny.random(0, 2)}

  def interrupted(*args):
    write_atomic(*args)
    raise KeyboardInterrupt

  monkeypatch.setattr(weights, "write_atomic", interrupted)
  with pytest.raises(KeyboardInterrupt):
    weights.save(saved, "dit", CONFIG, changed)
  assert_same(weights.load(saved, "dit")[1], changed)


def test_saving_again_and_again_leaves_one(saved):
  for i in range(3):
    changed = {"a": tiny.random(i, 2)}
    weights.save(saved, "dit", CONFIG, changed)
    assert_same(weights.load(saved, "dit")[1], changed)
    assert len(list((saved / "dit").iterdir())) == 2
  assert [path.name for path in saved.iterdir()] == ["dit"]


def test_weights_over_a_damaged_description(saved):
  (saved / "dit" / "model.json").write_text("{")
  weights.save(saved, "dit", CONFIG, PARAMS)
  assert_same(weights.load(saved, "dit")[1])
  assert len(list((saved / "dit").iterdir())) == 2


def test_a_place_where_nothing_can_be_made(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(
    UserError, match=r"file/dit: cannot be written \(Not a directory\); choose another place"
  ):
    weights.save(tmp_path / "file", "dit", CONFIG, PARAMS)


def test_a_description_names_no_other_folder(saved):
  path = saved / "dit" / "model.json"
  path.write_text(json.dumps({**json.loads(path.read_text()), "params": "../dit/params"}))
  with pytest.raises(UserError, match="dit is damaged"):
    weights.load(saved, "dit")
