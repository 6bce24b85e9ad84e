"""The whole chain in processes of its own: every stage, stopped and killed wherever it hurts, to
the same numbers bit for bit.
"""

import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from hiar_jax import train
from hiar_jax.data import tfds_builder
from hiar_jax.errors import UserError
from tests.helpers import tiny_run
from tests.helpers.disk_page import differences
from tests.helpers.tiny_run import assert_same_run, files, log
from tests.helpers.video_reader import read_mp4


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
  return tiny_run.chain(tmp_path_factory.getbasetemp())


def test_every_stage_leaves_its_result(chain):
  workdir = chain.straight
  stages = [record["stage"] for record in log(workdir)]
  assert stages == ["teacher"] * 6 + ["causal_init"] * 4 + ["distill"] * 6
  assert all(np.isfinite(list(record["scalars"].values())).all() for record in log(workdir))
  assert json.loads((workdir / "config.json").read_text())["teacher"]["steps"] == 6
  points, captions = tiny_run.trajectories(workdir)
  assert points.shape == (6, 5, 4, 2, 2, 8) and len(captions) == 6
  shown = tiny_run.videos(workdir)
  assert len(shown) == 3 and {video.shape for video in shown.values()} == {(16, 128, 128, 3)}
  measured = json.loads((workdir / "sample" / "metrics.json").read_text())
  assert measured["settings"]["frames"] == 16 and len(measured["prompts"]) == 3
  assert list((workdir / "logs").glob("events.*"))
  assert differences("Workdir", files(workdir)) == (set(), set())


def test_a_platform_without_a_device_is_one_line(monkeypatch, tmp_path):
  """As launch/gpu_node.sh where there is no GPU; JAX has no words for it."""

  def none():
    raise AssertionError

  monkeypatch.setattr(jax, "devices", none)
  monkeypatch.setenv("JAX_PLATFORMS", "cuda")
  with pytest.raises(UserError, match="no device .there is none for JAX_PLATFORMS=cuda.; install"):
    train.main(tiny_run.make_config(), str(tmp_path / "w"))
  assert not (tmp_path / "w").exists()


def test_trajectories_are_those_of_the_clips(chain):
  """Caption and start of the clips in their order, some of them from further on in a video."""
  clips, made = (
    tfds_builder.open_source(chain.straight / stage) for stage in ("data", "trajectories")
  )
  for i, record in enumerate(made):
    assert (record["caption"], record["start"]) == (clips[i]["caption"], clips[i]["start"])
  starts = {int(clip["start"]) for clip in clips}
  assert 0 in starts and len(starts) > 1 and all(start % 4 == 0 for start in starts)


def test_the_generator_takes_one_update_every_other_critic_update(chain):
  """Its last one is logged beside each of the critic's."""
  records = [record["scalars"] for record in log(chain.straight, "distill")]
  generator = [record["generator_loss"] for record in records]
  assert generator[0::2] == generator[1::2] and len(set(generator)) == 3
  assert len({record["critic_loss"] for record in records}) == 6


def test_a_second_start_is_quick_and_changes_nothing(chain):
  before = files(chain.straight)
  again = chain.train(chain.straight)
  assert again.returncode == 0 and again.stdout == "", again.stderr
  lines = again.stderr.splitlines()  # no table, no bar: no stage has started
  assert len(lines) == 6 and all(
    re.fullmatch(r"\w+: \d s, peak memory so far .* GiB", line) for line in lines
  ), again.stderr
  after = files(chain.straight)
  for found in (before, after):  # written anew, see below; a line a start
    del found["config.json"], found["logs/starts.jsonl"]
  assert after == before
  assert json.loads((chain.straight / "config.json").read_text())["teacher"]["steps"] == 6


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_goes_on(chain):
  """Between two checkpoints of the teacher, at the end of causal init, and in distillation."""
  workdir = chain.directory / "terminated"
  stopped = chain.train(workdir, die="step::3")
  assert stopped.returncode == 128 + signal.SIGTERM, stopped.stderr
  assert (
    "teacher: stopped and saved at step 3; the same command goes on from there" in stopped.stderr
  )
  assert (workdir / "teacher" / "checkpoints" / "3").is_dir() and len(log(workdir)) == 3
  stopped = chain.train(workdir, die="step::7")
  assert stopped.returncode == 128 + signal.SIGTERM, stopped.stderr
  # asked for in its last update, obeyed
  assert "causal_init: stopped and saved at step 4;" in stopped.stderr
  assert not (workdir / "distill").exists()
  stopped = chain.train(workdir, die="step::5")
  assert (
    stopped.returncode == 128 + signal.SIGTERM
    and (workdir / "distill" / "checkpoints" / "5").is_dir()
  ), stopped.stderr
  finished = chain.train(workdir)
  assert finished.returncode == 0, finished.stderr
  assert_same_run(workdir, chain.straight)


# Every kill leaves something half done; after each the same command is given.
KILLS = {
  "the second part of the trajectories": "os.rename:part-00001:1",
  "the data set of trajectories": "os.rename:trajectories/float32:1",
  "a checkpoint of the distillation, its arrays half written": "open:distill/checkpoints/4.orbax:2",
  "the second video": "os.rename:.mp4:2",
}
RARER_KILLS = {
  "data": "os.rename:codec.npz:1",
  "a checkpoint of the teacher, complete but for its "
  "name": "os.rename:teacher/checkpoints/6.orbax:1",
  "a checkpoint of causal init, its checksums": "open:checksums.json:5",
  "the measurements": "os.rename:metrics.json:1",
}

HALF_WRITTEN = "a checkpoint of the distillation, its arrays half written"
ALL_KILLS = {
  "once": {HALF_WRITTEN: KILLS[HALF_WRITTEN]},  # all before it is there
  "often": KILLS,
  "rarely": RARER_KILLS,
}


@pytest.mark.slow
@pytest.mark.parametrize("kills", ALL_KILLS)
def test_sigkill_anywhere_and_the_same_command_goes_on(chain, kills):
  workdir = chain.directory / f"killed_{kills}"
  if kills == "once":
    shutil.copytree(chain.straight, workdir, ignore=shutil.ignore_patterns("distill", "sample"))
  kept = {}
  for where, die in ALL_KILLS[kills].items():
    killed = chain.train(workdir, die=die)
    assert killed.returncode == -signal.SIGKILL, f"{where}: {killed.returncode}\n{killed.stderr}"
    now = files(workdir)
    for name, stamp in kept.items():
      assert now.get(name) == stamp, f"{where}: {name} was made again"
    if where == "the second part of the trajectories":
      kept = {
        name: stamp for name, stamp in now.items() if name.endswith("part-00000-of-00002.npz")
      }
      assert len(kept) == 1
    else:
      kept = {}
    if where == "the second video":
      whole = [read_mp4(path) for path in (workdir / "sample").glob("*.mp4")]
      assert len(whole) == 1 and len(whole[0][0]) == 16
  finished = chain.train(workdir)
  assert finished.returncode == 0, finished.stderr
  assert_same_run(workdir, chain.straight)


@pytest.mark.slow
def test_sigkill_at_random_moments(chain):
  workdir, dice, deaths = chain.directory / "unlucky", random.Random(time.time_ns()), 0
  command = [sys.executable, "-m", "hiar_jax.train", *tiny_run.arguments(workdir)]
  for attempt in range(40):
    process = subprocess.Popen(
      command,
      cwd=tiny_run.ROOT,
      env=tiny_run.environment(),
      stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE,
    )
    try:
      _, err = process.communicate(timeout=dice.uniform(2, 8 + 3 * attempt))
    except subprocess.TimeoutExpired:
      process.kill()
      _, err = process.communicate()
      deaths += 1
    else:
      break
  assert process.returncode == 0 and deaths, err.decode()
  assert_same_run(workdir, chain.straight)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_trained_again_from_the_one_before(chain):
  """The last one of a stage that is done: the others are not touched, and the numbers are what they
  were.
  """
  workdir = chain.directory / "damaged"
  shutil.copytree(chain.straight, workdir)
  checkpoint = workdir / "teacher" / "checkpoints" / "6"
  biggest = max(
    (p for p in (checkpoint / "state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
  )
  content = bytearray(biggest.read_bytes())
  content[len(content) // 2] ^= 1
  biggest.write_bytes(content)
  repaired = chain.train(workdir)
  assert repaired.returncode == 0
  [line] = [line for line in repaired.stderr.splitlines() if "damaged" in line]
  assert str(checkpoint) in line and "trying the one before" in line
  shutil.rmtree(workdir / "teacher" / "checkpoints" / "6.damaged")
  assert sorted(log(workdir), key=json.dumps) == sorted(log(chain.straight), key=json.dumps)
  tiny_run.assert_same_arrays(
    tiny_run.state(workdir, "teacher", 6), tiny_run.state(chain.straight, "teacher", 6)
  )


@pytest.mark.slow
@pytest.mark.parametrize(
  "mesh",
  [{"mesh__fsdp": 2, "mesh__min_shard": 64}, {"mesh__mapping": "pmap"}],
  ids=["data and fsdp", "pmap"],
)
def test_every_stage_on_four_devices(chain, mesh):
  """Learning what one device learns: each stage's first losses are the same, before rounding can
  grow.
  """
  workdir = chain.directory / f"four_{len(mesh)}"
  done = chain.train(workdir, devices=4, **mesh)
  assert done.returncode == 0, done.stderr
  expected = {(r["stage"], r["step"]): r["scalars"]["loss"] for r in log(chain.straight)}
  found = {(r["stage"], r["step"]): r["scalars"]["loss"] for r in log(workdir)}
  assert found.keys() == expected.keys()
  for step in range(1, 4):
    assert found["teacher", step] == pytest.approx(expected["teacher", step], rel=1e-4)
  assert len(tiny_run.videos(workdir)) == 3
