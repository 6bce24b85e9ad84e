"""One process at a time writes to a folder; whoever is refused is told who does."""

import json
import os
import re
import signal
import socket
import subprocess
import sys

import pytest
from safetensors.numpy import save_file

from hiar_jax import train
from hiar_jax.checkpoints import lock
from hiar_jax.conversion.export import export
from hiar_jax.convert import convert
from hiar_jax.errors import UserError
from tests.helpers import tiny_run
from tests.helpers.published_files import tensors

HOLDER = """
import sys, time
from hiar_jax.checkpoints import lock
with lock.held(sys.argv[1], "--out"):
  print("held", flush=True)
  time.sleep(100)
"""


def test_the_second_is_refused_and_told_who_is_first(tmp_path):
  with lock.held(tmp_path, "--workdir=w"):
    who = json.loads((tmp_path / ".lock").read_text())
    assert who["pid"] == os.getpid() and who["host"] == socket.gethostname()
    said = f"--workdir=w is in use: process {os.getpid()} on {who['host']}, since {who['since']}, "
    with pytest.raises(UserError, match=re.escape(said)), lock.held(tmp_path, "--workdir=w"):
      pass
    assert (tmp_path / ".lock").exists()  # the one who is refused leaves it


def test_it_is_released_on_every_exit(tmp_path):
  for error in (ValueError, SystemExit, KeyboardInterrupt):
    with pytest.raises(error), lock.held(tmp_path, "--workdir=w"):
      raise error
    assert not (tmp_path / ".lock").exists()
  with lock.held(tmp_path, "--workdir=w"):
    pass


def test_folders_that_stay_empty_are_removed_again(tmp_path):
  with lock.held(tmp_path / "a" / "b", "--out"):
    assert (tmp_path / "a" / "b").is_dir()
  assert list(tmp_path.iterdir()) == []
  with lock.held(tmp_path / "a" / "b", "--out"):
    (tmp_path / "a" / "kept").write_text("")
  assert [path.name for path in tmp_path.rglob("*")] == ["a", "kept"]


def test_a_killed_process_holds_nobody_up(tmp_path):
  command = [sys.executable, "-c", HOLDER, str(tmp_path)]
  process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
  with process.stdout:
    assert process.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"process {process.pid} on "), lock.held(tmp_path, "--out"):
      pass
    process.send_signal(signal.SIGKILL)
    process.wait()
  assert json.loads((tmp_path / ".lock").read_text())["pid"] == process.pid
  with lock.held(tmp_path, "--out"):
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


def test_a_file_that_its_holder_has_just_removed_is_no_lock(tmp_path, monkeypatch):
  """Opened before, locked after: another process may have a file of its own by now."""
  path, locks = tmp_path / ".lock", []

  def late(file, path_, given):
    if not locks:
      path.unlink()
    locks.append(os.fstat(file).st_ino)

  monkeypatch.setattr(lock, "_lock", late)
  with lock.held(tmp_path, "--out"):
    assert len(locks) == 2 and path.stat().st_ino == locks[-1]


def test_a_second_training_is_one_line(tmp_path):
  """In the place of a first one, before anything is read or written."""
  with lock.held(tmp_path, "--workdir"):
    with pytest.raises(UserError, match=f"--workdir={tmp_path} is in use: process {os.getpid()} "):
      train.main(tiny_run.make_config(), str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def tiny_vae(folder) -> str:
  """A published file of one small model."""
  save_file(tensors("tiny_vae"), folder / "taew2_1.safetensors")
  return str(folder / "taew2_1.safetensors")


def converting(source, out):
  return convert(source, str(out))


def exporting(source, out):
  weights = out.parent / "weights"
  for _ in convert(source, str(weights)):
    pass
  return export(weights, "original", out)


@pytest.mark.parametrize("start", [converting, exporting])
def test_one_conversion_at_a_time_from_python_too(tmp_path, start):
  """From the first step of the generator to its end, close() or an error."""
  out, source = tmp_path / "out", tiny_vae(tmp_path)
  first, second = start(source, out), start(source, out)
  next(first)  # a line of report, and it is not at its end
  said = f"--out={out} is in use: process {os.getpid()} on "
  with pytest.raises(UserError, match=re.escape(said)):
    next(second)
  assert (out / ".lock").exists()
  first.close()
  assert out.is_dir() and not (out / ".lock").exists()
  with pytest.raises(UserError, match="check the path|give another --out"):
    next(start("none" if start is converting else source, out))
  with lock.held(out, "--out"):
    pass


@pytest.mark.slow
def test_a_second_conversion_is_one_line(tmp_path):
  command = [sys.executable, "-W", "ignore", "-m", "hiar_jax.convert", "--source=none.safetensors"]
  environment = {**os.environ, "PYTHONPATH": str(tiny_run.ROOT)}
  with lock.held(tmp_path, "--out"):
    command.append(f"--out={tmp_path}")
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
  assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
  assert f"error: --out={tmp_path} is in use: process {os.getpid()} on " in done.stderr
