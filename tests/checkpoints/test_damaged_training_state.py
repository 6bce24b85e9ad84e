"""A damaged checkpoint is left for the one before; a kill or a full disk loses nothing that was
complete.
"""

import errno
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import types
import zlib

from etils import epath
import jax
import pytest

from hiar_jax import files
from hiar_jax.checkpoints import checksums, training_state
from hiar_jax.checkpoints.training_state import Checkpoints
from hiar_jax.errors import Damaged, UserError
from hiar_jax.files import DiskFull
from tests.helpers.small_state import CONFIG, assert_same, make, save_steps

# ------------------------------------------------------------------------------------------- damage


def biggest(directory: pathlib.Path, pattern: str = "*") -> pathlib.Path:
  return max((p for p in directory.rglob(pattern) if p.is_file()), key=lambda p: p.stat().st_size)


def flip(path: pathlib.Path) -> None:
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 0x55
  path.write_bytes(content)


DAMAGES = {
  "a bit": lambda d: flip(biggest(d / "state" / "ocdbt.process_0")),
  "a truncated file": lambda d: os.truncate(biggest(d / "state"), 10),
  "a lost file": lambda d: (d / "state" / "manifest.ocdbt").unlink(),
  "a lost config": lambda d: (d / "config" / "metadata").unlink(),
  "torn checksums": lambda d: os.truncate(d / "checksums.json", 20),
  "a lost item, unchecked": lambda d: [
    (d / "checksums.json").unlink(),
    (d / "state" / "_METADATA").unlink(),
  ],
  "a lost config, unchecked": lambda d: [
    (d / "checksums.json").unlink(),
    (d / "config" / "metadata").unlink(),
  ],
  "torn metadata, unchecked": lambda d: [
    (d / "checksums.json").unlink(),
    os.truncate(d / "state" / "_METADATA", 50),
  ],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_is_used(
  tmp_path, capfd, damage
):
  states = save_steps(tmp_path, 2)
  DAMAGES[damage](tmp_path / "2")
  with Checkpoints(tmp_path, config=CONFIG) as checkpoints:
    step, state = checkpoints.restore(make())
    assert step == 1
    assert_same(state, states[0])
    message = [line for line in capfd.readouterr().err.splitlines() if "damaged" in line]
    assert len(message) == 1 and message[0].startswith(f"checkpoint {tmp_path}/2 is damaged (")
    # Training reaches step 2 again and saves it.
    assert checkpoints.save(2, states[1], states[1].params)
    assert_same(checkpoints.restore(make())[1], states[1])
  assert (tmp_path / "2.damaged").is_dir()
  assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2", "2.damaged"]


def test_weights_for_inference_come_from_the_checkpoint_before_a_damaged_one(tmp_path, capfd):
  states = save_steps(tmp_path, 2)
  flip(biggest(tmp_path / "2" / "params" / "ocdbt.process_0"))
  assert_same(training_state.load_params(tmp_path), states[0].params)
  assert f"checkpoint {tmp_path}/2 is damaged" in capfd.readouterr().err
  assert (tmp_path / "2").is_dir()  # reading changes nothing


def test_weights_for_inference_need_no_whole_state(tmp_path):
  """Reading them does not mean reading the optimizer's numbers too, nor minding damage there."""
  states = save_steps(tmp_path, 2)
  flip(biggest(tmp_path / "2" / "state" / "ocdbt.process_0"))
  assert_same(training_state.load_params(tmp_path), states[1].params)


def test_of_a_huge_checkpoint_the_sizes_are_compared(tmp_path, monkeypatch, capfd):
  monkeypatch.setattr(checksums, "LIMIT", 1000)
  states = save_steps(tmp_path, 2)
  said = capfd.readouterr().err.splitlines()
  assert (
    len(said) == 2 and "are more than 1000 B, so the sizes of its files are recorded" in said[0]
  )
  table = json.loads((tmp_path / "2" / "checksums.json").read_text())
  assert table.pop("config/metadata") == f"{(tmp_path / '2/config/metadata').stat().st_size} bytes"
  with Checkpoints(tmp_path, config=CONFIG) as checkpoints:
    assert checkpoints.restore(make())[0] == 2
    with open(tmp_path / "2" / "config" / "metadata", "a") as file:
      file.write(" ")  # Orbax would read it
    step, state = checkpoints.restore(make())
  assert step == 1
  assert_same(state, states[0])
  assert "2 is damaged (config/metadata has changed)" in capfd.readouterr().err


def test_checksums_of_many_files_read_by_several_threads(tmp_path):
  names = [f"item/{i}" for i in range(20)]
  (tmp_path / "item").mkdir()
  for i, name in enumerate(names):
    (tmp_path / name).write_bytes(bytes([i]) * 1000 * i)
  checksums.write(epath.Path(tmp_path))
  expected = {name: zlib.crc32((tmp_path / name).read_bytes()) for name in names}
  assert json.loads((tmp_path / "checksums.json").read_text()) == expected
  checksums.check(epath.Path(tmp_path))
  (tmp_path / "item" / "7").unlink()
  with pytest.raises(Damaged, match="item/7 is missing"):
    checksums.check(epath.Path(tmp_path))


def test_when_all_are_damaged_it_stops_every_time(tmp_path):
  save_steps(tmp_path, 2)
  for step in "12":
    os.truncate(biggest(tmp_path / step / "state"), 10)
  for _ in range(2):
    with (
      Checkpoints(tmp_path, config=CONFIG) as checkpoints,
      pytest.raises(UserError, match="every checkpoint"),
    ):
      checkpoints.restore(make())
  with pytest.raises(UserError, match="every checkpoint in .* damaged"):
    training_state.load_params(tmp_path)


# ---------------------------------------------------------------------------------- kill, full disk

WRITER = """
import sys
sys.path.insert(0, {root!r})
from tests import conftest
import jax
from tests.helpers.small_state import CONFIG, make
from hiar_jax.checkpoints.training_state import Checkpoints

state = make(width=4096)
with Checkpoints({directory!r}, config=CONFIG) as checkpoints:
  found = checkpoints.restore(jax.eval_shape(lambda: make(width=4096)))
  step, state = found or (0, state)
  print("at", step, flush=True)
  for step in range(step + 1, 100000):
    state = state.replace(step=jax.numpy.int32(step))
    checkpoints.save(step, state, state.params)
    print(step, flush=True)
"""


def killed(directory: pathlib.Path, saves: int, delay: float) -> tuple[int, int]:
  """Kills the writer `delay` seconds into its save number `saves`; -> the step it resumed at, the
  last it had saved.
  """
  root = pathlib.Path(__file__).parents[2]
  code = WRITER.format(root=str(root), directory=str(directory))
  process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
  resumed, saved = int(process.stdout.readline().split()[1]), 0
  for line in process.stdout:
    saved = int(line) - 1  # save() waits for the one before
    if int(line) == resumed + saves:
      time.sleep(delay)
      process.send_signal(signal.SIGKILL)  # the loop ends where the pipe does
  process.stdout.close()
  process.wait()
  return resumed, saved


def test_sigkill_inside_a_write_loses_nothing_that_was_complete(tmp_path):
  saved = 0
  for saves, delay in [(2, 0.0), (3, 0.02), (2, 0.05)]:
    resumed, done = killed(tmp_path, saves, delay)
    assert resumed >= saved
    assert done >= resumed + saves - 1  # it was killed where the test means to
    saved = done
  with Checkpoints(tmp_path, config=CONFIG) as checkpoints:
    step, state = checkpoints.restore(jax.eval_shape(lambda: make(width=4096)))
    # Orbax deletes in the background what the kills left; a save waits for that. Not a save of the
    # step that was killed, which would write over what is left of it.
    assert checkpoints.save(step + 2, state, state.params)
  assert step >= saved > 0
  assert int(state.step) == step  # the numbers are those of that step
  assert not list(tmp_path.glob("*tmp*")) and not list(tmp_path.glob("*.damaged"))


@pytest.fixture
def small_disk(tmp_path):
  """A disk of 4 MiB, where this process may mount one."""
  disk = tmp_path / "disk"
  disk.mkdir()
  mounted = subprocess.run(
    ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], capture_output=True
  )
  if mounted.returncode:
    pytest.skip("may not mount a file system here")
  yield disk
  subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("foreseen", [True, False])
def test_a_full_disk_is_one_line_and_the_checkpoint_before_stays(small_disk, monkeypatch, foreseen):
  """Refused before anything is written; or, where somebody else fills the disk meanwhile, by the
  threads that write.
  """
  small = make()
  # 8 MB that do not compress, in many arrays: when the write of one has failed, others still run
  big = list(jax.random.normal(jax.random.key(0), (32, 64, 1024)))
  if not foreseen:
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=2**40))
  with Checkpoints(small_disk / "c") as checkpoints:
    checkpoints.save(1, small, small.params)
    checkpoints.wait()
    before = tree_of(small_disk)
    with pytest.raises(
      DiskFull,
      match=r"no space left on the disk of .* \(8.* MiB needed, .* free\); the last complete "
      "checkpoint is 1; ",
    ):
      checkpoints.save(2, small, {"w": big})
      assert not foreseen
      checkpoints.wait()
    assert tree_of(small_disk) == before
    step, state = checkpoints.restore(make())
    assert step == 1
    assert_same(state, small)
  with (
    pytest.raises(UserError, match="no space left"),
    Checkpoints(small_disk / "c") as checkpoints,
  ):
    checkpoints.save(2, small, {"w": big})  # unforeseen, the end of the `with` is where it shows
  with Checkpoints(small_disk / "c") as checkpoints:  # as after a restart
    assert checkpoints.latest_step() == 1
    assert checkpoints.save(2, small, small.params)
    assert checkpoints.restore(make())[0] == 2


def test_only_late_writes_are_hidden(tmp_path, monkeypatch):
  shown = []
  monkeypatch.setattr(sys, "unraisablehook", shown.append)
  for _ in range(2):
    with Checkpoints(tmp_path):
      pass
  late, other = RuntimeError("Event loop is closed"), RuntimeError("another")
  for error in late, other:
    sys.unraisablehook(types.SimpleNamespace(exc_value=error))
  assert [unraisable.exc_value for unraisable in shown] == [other]


def tree_of(directory) -> set[str]:
  return {str(path) for path in directory.rglob("*")}


def test_a_disk_that_fills_up_in_the_background_is_one_line_too(tmp_path, monkeypatch, caplog):
  state = make()

  def full(path):
    raise OSError(errno.ENOSPC, "No space left on device")

  with Checkpoints(tmp_path, keep=1) as checkpoints:
    checkpoints.save(1, state, state.params)
    checkpoints.wait()
    with monkeypatch.context() as patch:
      # the last thing that Orbax's thread does before the rename
      patch.setattr(training_state.checksums, "write", full)
      checkpoints.save(2, state, state.params)
      with pytest.raises(
        UserError, match="no space left on the disk of .*; the last complete checkpoint is 1; "
      ):
        checkpoints.wait()
    assert "Traceback" not in caplog.text
    assert checkpoints.latest_step() == 1
    assert checkpoints.restore(make())[0] == 1
    assert checkpoints.save(2, state, state.params)  # there is space again
    assert checkpoints.restore(make())[0] == 2


def test_a_full_disk_is_told_from_its_cause():
  error = ValueError("INTERNAL: writing: No space left on device")
  assert files.is_disk_full(OSError(errno.ENOSPC, "No space left on device"))
  assert files.is_disk_full(error)
  wrapped = RuntimeError("save failed")
  wrapped.__cause__ = error
  assert files.is_disk_full(wrapped)
  assert not files.is_disk_full(OSError(errno.EACCES, "Permission denied"))
