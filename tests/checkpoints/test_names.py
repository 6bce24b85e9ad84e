"""Names of folders: Orbax reads back what it wrote there, or they are refused before it writes."""

import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from hiar_jax import stream, train
from hiar_jax.checkpoints import stored_arrays, training_state, weights
from hiar_jax.checkpoints.training_state import Checkpoints, load_params
from hiar_jax.errors import UserError
from hiar_jax.generation.model_options import ModelOptions
from hiar_jax.training.run import open_run
from tests.helpers import tiny_run

REFUSED = {"lr=1e-3,b[16]": "brackets", "r[0:10]": "brackets", "back\\slash": "a backslash"}
FINE = ("two words", "b16]", "[b16", "ü码", "%20?#*{x};'$HOME:-dash&~", "a[b/c]d")


def save(directory) -> dict[str, np.ndarray]:
  params = {"a": jnp.arange(3.0)}
  with Checkpoints(directory) as checkpoints:
    checkpoints.save(1, params, params)
  return params


@pytest.mark.parametrize("name", [*REFUSED, *FINE])
def test_a_checkpoint_is_read_back_or_refused(tmp_path, name, monkeypatch):
  if name in FINE:
    np.testing.assert_array_equal(save(tmp_path / name)["a"], load_params(tmp_path / name)["a"])
    return
  with pytest.raises(UserError, match=f"has {REFUSED[name]}.*; give a folder without") as line:
    save(tmp_path / name)
  assert str(tmp_path / name) in str(line.value) and not (tmp_path / name).exists()
  # it would not be read back
  monkeypatch.setattr(training_state, "check_name", lambda *args, **options: None)
  save(tmp_path / name)
  with pytest.raises(UserError, match="is damaged"):
    load_params(tmp_path / name)


def test_a_run_that_was_moved_to_brackets_is_read(tmp_path):
  params = save(tmp_path / "run")
  (tmp_path / "run").rename(tmp_path / "run[1]")
  np.testing.assert_array_equal(load_params(tmp_path / "run[1]")["a"], params["a"])


def test_weights_may_have_brackets_but_no_backslash(tmp_path):
  stored_arrays.write(tmp_path / "w[1]", {"a": np.ones(2)})
  assert stored_arrays.shapes(tmp_path / "w[1]")["a"].shape == (2,)
  weights.exists(tmp_path / "w[1]", "dit")
  for use in (weights.exists, weights.describe, weights.load):
    with pytest.raises(UserError, match="w.1 has a backslash"):
      use(tmp_path / "w\\1", "dit")


def test_a_name_that_is_not_utf8(tmp_path):
  """Here Orbax writes nothing, and of what lay there before it would say that it is damaged."""
  folder, said = tmp_path / "caf\udce9", "has a byte that is not UTF-8 in its name"
  with pytest.raises(UserError, match=said):
    save(folder)
  with pytest.raises(UserError, match=f"--workdir=.* {said}"):
    train.main(tiny_run.make_config(), str(folder))
  assert list(tmp_path.iterdir()) == []
  save(tmp_path / "run")
  (tmp_path / "run").rename(folder)
  for use in (load_params, lambda path: weights.describe(path, "dit")):
    with pytest.raises(UserError, match=said):
      use(folder)


def test_an_address_is_no_folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  bucket = "gs://bucket/runs/a"
  for use in (
    save,
    load_params,
    lambda path: train.main(tiny_run.make_config(), path),
    lambda path: weights.describe(path, "dit"),
    lambda path: ModelOptions(workdir=path).open_model(),
    lambda path: open_run(tiny_run.make_config(stages_from=path), tmp_path / "w"),
  ):
    with pytest.raises(UserError, match=f"{bucket}: expected a folder.* mount the bucket") as error:
      use(bucket)
    assert "\n" not in str(error.value)
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", REFUSED)
def test_training_says_so_at_once(tmp_path, name):
  with pytest.raises(UserError, match="--workdir=.* has ") as line:
    train.main(tiny_run.make_config(), f"{tmp_path}/{name}")
  assert len(str(line.value).splitlines()) == 1
  assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_conversion_and_streams_say_so_at_once(tmp_path):
  command = [sys.executable, "-W", "ignore", "-m", "hiar_jax.convert", "--source=none.safetensors"]
  command.append(f"--out={tmp_path}/back\\slash")
  done = subprocess.run(command, cwd=tiny_run.ROOT, capture_output=True, text=True)
  assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
  assert "error: --out=" in done.stderr and "has a backslash in its name" in done.stderr
  options = stream.read_options({"prompt": "a", "workdir": "none"})
  with pytest.raises(UserError, match=r"--save=.* has brackets"):
    stream.write(options, str(tmp_path / "a.mp4"), str(tmp_path / "b[1]"))
  assert list(tmp_path.iterdir()) == []
