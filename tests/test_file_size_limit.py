"""`ulimit -f`, the limit on the size of a file: one line, and nothing half written."""

import contextlib
import gc
import os
import resource
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest

from hiar_jax.checkpoints.training_state import Checkpoints
from hiar_jax.conversion.export import export
from hiar_jax.convert import convert
from hiar_jax.files import DiskFull, write_atomic
from hiar_jax.video.fragmented_mp4 import FragmentedMP4
from hiar_jax.video.mp4 import read_metadata, write_mp4
from tests.helpers import tiny_run, untrained
from tests.helpers.published_files import original_folder
from tests.helpers.small_state import assert_same, make

SAID = r"this process may write files of at most .* \(ulimit -f\); "


@contextlib.contextmanager
def limited(size: int):
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def names(folder) -> list[str]:
  return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def noise(count: int) -> np.ndarray:
  return np.random.default_rng(0).integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
  return original_folder(tmp_path_factory.mktemp("published") / "source")


@pytest.fixture(scope="module")
def converted(published, tmp_path_factory):
  out = tmp_path_factory.mktemp("weights") / "out"
  list(convert(str(published), str(out)))
  return out


def test_a_file(tmp_path):
  write_atomic(tmp_path / "a.txt", b"old")
  said = rf"^{tmp_path}/a\.txt: {SAID}nothing is left half written; raise that limit and run the"
  with limited(100), pytest.raises(DiskFull, match=said):
    write_atomic(tmp_path / "a.txt", b"new" * 100)
  assert (tmp_path / "a.txt").read_bytes() == b"old" and names(tmp_path) == ["a.txt"]


def test_a_file_that_the_disk_itself_does_not_take(tmp_path, monkeypatch):
  """As FAT32 does of 4 GiB."""

  def fsync(_):
    raise OSError(27, "File too large")

  monkeypatch.setattr(os, "fsync", fsync)
  with pytest.raises(DiskFull, match="a: the disk takes no files of this size; .*another place"):
    write_atomic(tmp_path / "a", b"x")


@pytest.mark.parametrize(
  ("count", "size"), [(1, 0), (1, 500), (1, 3000), (40, 0), (40, 3000), (40, 100_000)]
)
def test_a_video(tmp_path, count, size, capfd):
  write_mp4(tmp_path / "a.mp4", noise(2), metadata={"seed": "old"})
  with limited(size), pytest.raises(DiskFull, match=rf"a\.mp4: {SAID}"):
    write_mp4(tmp_path / "a.mp4", noise(count))
  assert capfd.readouterr().err == ""  # nor what FFmpeg meets afterwards
  assert names(tmp_path) == ["a.mp4"] and read_metadata(tmp_path / "a.mp4") == {"seed": "old"}


def test_a_video_that_streams(tmp_path):
  said = rf"a\.mp4: {SAID}the video is whole up to its last fragment"
  with pytest.raises(DiskFull, match=said), FragmentedMP4(tmp_path / "a.mp4", 8) as file:
    file.write(noise(2))
    with limited(20_000):
      file.write(noise(20))
  with FragmentedMP4(tmp_path / "a.mp4", 8, keep=2) as file:
    file.write(noise(2))


@pytest.mark.parametrize("size", [100, 20_000, 500_000])
def test_a_conversion(published, tmp_path, size):
  out = tmp_path / "made" / "out"
  with limited(size), pytest.raises(DiskFull, match=SAID):
    list(convert(str(published), str(out)))
  assert names(tmp_path) == []


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_an_export(converted, tmp_path, layout):
  with limited(500_000), pytest.raises(DiskFull, match=SAID):
    list(export(converted, layout, tmp_path / "made" / "out"))
  assert names(tmp_path) == []
  list(export(converted, layout, tmp_path, kind="vae"))
  before = tiny_run.files(tmp_path)
  with limited(20_000), pytest.raises(DiskFull, match=SAID):
    list(export(converted, layout, tmp_path, kind="vae", overwrite=True))
  assert tiny_run.files(tmp_path) == before


@pytest.mark.parametrize("size", [100, 3000, 20_000])
def test_a_checkpoint(tmp_path, size, capfd, caplog):
  state, big = make(), {"w": list(jax.random.normal(jax.random.key(0), (4, 64, 256)))}
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, state, state.params)
  before = tiny_run.files(tmp_path)
  said = rf"^{tmp_path}: {SAID}the last complete checkpoint is 1; "
  with limited(size), pytest.raises(DiskFull, match=said), Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(2, state, big)
    checkpoints.wait()
  gc.collect()  # asyncio says of tasks that are collected what became of them
  assert "Traceback" not in capfd.readouterr().err + caplog.text
  assert tiny_run.files(tmp_path) == before
  with Checkpoints(tmp_path) as checkpoints:
    step, found = checkpoints.restore(make())
  assert step == 1
  assert_same(found, state)


def test_writes_that_end_late_leave_nothing(tmp_path):
  """As those of other threads do after the first one has failed."""
  late, stop = tmp_path / "2.orbax-checkpoint-tmp" / "state" / "late", time.monotonic() + 1.5

  def write() -> None:
    while time.monotonic() < stop:
      with contextlib.suppress(OSError):
        late.mkdir(parents=True, exist_ok=True)
        (late / "part").write_bytes(b"late")

  big = {"w": list(jax.random.normal(jax.random.key(0), (4, 64, 256)))}
  with limited(3000), pytest.raises(DiskFull), Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(2, make(), big)
    thread = threading.Thread(target=write)
    thread.start()
    checkpoints.wait()
  thread.join()
  assert not [*tmp_path.glob("2*")]


def command(module: str, blocks: int, *arguments: str) -> subprocess.CompletedProcess:
  limit = ["sh", "-c", f'ulimit -f {blocks}; exec "$@"', "sh"]  # of 512 bytes
  return subprocess.run(
    [*limit, sys.executable, "-W", "ignore", "-m", f"hiar_jax.{module}", *arguments],
    env={**os.environ, "PYTHONPATH": str(tiny_run.ROOT)},
    cwd=tiny_run.ROOT,
    capture_output=True,
    text=True,
  )


def assert_one_line(done: subprocess.CompletedProcess) -> None:
  assert done.returncode == 2, done.stderr
  lines = done.stderr.splitlines()
  assert lines[-1].startswith("error: ") and "(ulimit -f)" in lines[-1], done.stderr
  assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_commands(published, converted, tmp_path):
  out = f"--out={tmp_path / 'out'}"
  assert_one_line(command("convert", 1000, f"--source={published}", out))
  for layout in ("original", "diffusers"):
    given = f"--export={converted}", f"--layout={layout}"
    assert_one_line(command("convert", 1000, *given, out))
  assert names(tmp_path) == []
  run = untrained.saved_run(tmp_path / "run", tiny_run.make_config())
  given = f"--workdir={run}", "--prompt=a red circle moving left", "--frames=8"
  before = names(run)
  assert_one_line(command("generate", 1, *given, f"--out={tmp_path / 'videos' / 'a.mp4'}"))
  assert names(run) == before and names(tmp_path / "videos") == []
