"""Whatever is wrong with a training command: one clear line, exit status 2, and nothing lost that
was complete.
"""

import json
import re
import shutil
import subprocess

import av
import numpy as np
import pytest

from tests.helpers import tiny_run
from tests.helpers.video_reader import read_mp4


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
  return tiny_run.chain(tmp_path_factory.getbasetemp())


# What is given beyond the tiny run -> what the line must say.
CASES = {
  "--config.distill.lrr=1": "--config.distill.lrr: the config experiments/shapes.py:smoke has no "
  "such key; did you mean 'distill.lr'?",
  "--config.teacher.steps=many": "--config.teacher.steps=many: expected int",
  "--config.teacher.lr=fast": "--config.teacher.lr=fast: expected float",
  "--config.history.level=nope": "history.level = 'nope': expected one of clean, fixed, "
  "input, output",
  "--config.history.order=random": "history.order = 'random': expected one of step_first, "
  "block_first",
  "--config.history.order=block_first": "block_first finishes each block first, so its history is "
  "'clean'",
  "--config.history.window=1": "history.window = 1 cannot hold a block (2) and the sink (0)",
  "--config.history.sink=1 "
  "--config.history.sink_level=clean": "history.sink = 1 is not a multiple of block = 2",
  "--config.history.block=0": "history.block = 0",
  "--config.data.frames=7": "data.frames = 7 is not whole blocks of history.block = 2 frames; the "
  "nearest is 8",
  "--config.data.frames=0": "data: frames = 0: expected at least 1",
  "--config.data.size=17": "data.size = 17 is not a multiple of codec.patch = 8",
  "--config.data.size=8": "use size >= 16",
  "--config.data.source=films": "data.source = 'films': expected one of shapes, videos",
  "--config.data.source=videos": "data.source = 'videos' needs data.folder",
  "--config.data.source=videos "
  "--config.data.folder=/no/where": "data.folder = '/no/where' is not a folder",
  "--config.data.source=videos --config.data.folder={nothing}": "no video files there",
  "--config.data.size=many": "data.size: expected int | tuple[int, int], got 'many'",
  "--config.data.size=(16,24)": "data.size = (16, 24): the shapes world is square",
  "--config.data.size=(16,24,3)": "data.size: expected int | tuple[int, int], got (16, 24, 3)",
  "--config.teacher.lr=nan": "teacher: lr = nan: expected more than 0, finite",
  "--config.data.difficulty=hard": "difficulty 'hard' is unknown",
  "--config.data.clips=2": "teacher.batch = 4 is more than data.clips = 2",
  "--config.codec.channels=999": "codec.channels = 999: a patch of 8 x 8 pixels has 192 numbers",
  "--config.model.num_heads=3": "dim = 16 must split into num_heads = 3 heads of even width",
  "--config.model.patch=(1,4,4)": "cannot be cut into model.patch = (1, 4, 4)",
  "--config.model.remat=some": "remat = 'some': expected one of none, dots, attention, offload",
  "--config.model.num_layers=0": "num_layers = 0: expected at least 1",
  "--config.student.timesteps=(500,750)": "timesteps must fall",
  "--config.student.timesteps=(1000,700)": "trajectories.steps = 4: the teacher's levels must "
  "include the student's timesteps",
  "--config.teacher.batch=0": "teacher: batch = 0: expected at least 1",
  "--config.teacher.accumulate=3": "teacher: batch = 4 cannot be taken in accumulate = 3 equal "
  "parts",
  "--config.distill.critic_updates=0": "distill: critic_updates = 0: expected at least 1",
  "--config.distill.forward_kl.steps=5": "distill.forward_kl.steps = 5: the student has 4 levels",
  "--config.distill.forward_kl.target=y": "distill.forward_kl: target = 'y': expected one of",
  "--config.causal_init.shows=all": "causal_init: shows = 'all': expected one of noisy, history",
  "--config.causal_init.batch=8": "causal_init.batch = 8 is more than trajectories.count = 6",
  "--config.mesh.data=3": "mesh data = 3, fsdp = 1 does not fit 1 devices; their product must be 1",
  "--config.mesh.mapping=vmap": "mesh.mapping = 'vmap': expected one of jit, pmap",
  "--config.log.every=0": "log: every = 0: expected at least 1",
  "--config.sample.prompts=/no/prompts.txt": "prompts file /no/prompts.txt does not exist",
  "--config.sample.prompts={empty}": "holds no prompt; write one a line",
  "--config.stages_from={nothing}": "holds no run; give a workdir that went through causal_init",
  "--config.stages_from={straight} --config.data.seed=5": "was made with another config "
  "(stored -> given: data.seed: 0 -> 5)",
  "--config.stages_from={unfinished}": "its causal_init is not there, not finished or damaged",
}
COMMANDS = {  # whole command lines
  "--workdir={new} --config=experiments/shapes.py:nope": "there is no variant 'nope'; there is "
  "full, main, smoke",
  "--workdir={new} "
  "--config=experiments/shapes_self_forcing.py:smok": "there is no variant 'smok'; did you mean "
  "'smoke'?",
  "--workdir={new} --config=experiments/shape.py": "there is no file 'experiments/shape.py'; did "
  "you mean 'experiments/shapes.py'?",
  "--workdir={new}": "--config is missing",
  "--config=experiments/shapes.py:smoke --workdir=/dev/null/x": "/dev/null/x: cannot be written "
  "(Not a directory); choose another place",
  "--config=experiments/shapes.py:smoke "
  "--workdir={empty}": "empty.txt: cannot be written (File exists); choose another place",
  "--config=experiments/shapes.py:smoke --workdir=/proc/x": "/proc/x: cannot be written (No such "
  "file or directory); choose another place",
  "--config=experiments/shapes.py:smoke": "--workdir is missing",
}
ON_EIGHT = {
  "--config.teacher.batch=12": "teacher.batch = 12 must be a multiple of 8 (8 devices x "
  "accumulate = 1); the nearest is 16",
  "--config.mesh.fsdp=3": "mesh data = -1, fsdp = 3 does not fit 8 devices",
  "--config.mesh.mapping=pmap --config.mesh.fsdp=2": "mesh.fsdp = 2: pmap replicates the weights",
}


@pytest.fixture(scope="module")
def said(chain, tmp_path_factory):
  """-> {what was given: (status, stdout, stderr)}, and which of them left a workdir."""
  out, straight = tmp_path_factory.mktemp("bad_input"), chain.straight
  (out / "nothing").mkdir()
  (out / "empty.txt").write_text("\n# nothing\n")
  shutil.copytree(
    straight, out / "unfinished", ignore=shutil.ignore_patterns("distill", "sample", "4")
  )
  names = {
    "empty": out / "empty.txt",
    "nothing": out / "nothing",
    "straight": straight,
    "unfinished": out / "unfinished",
  }
  results, claimed = {}, set()
  for cases, devices in ((CASES, 1), (ON_EIGHT, 8)):
    workdirs = {case: out / f"w{devices}_{i}" for i, case in enumerate(cases)}
    commands = [
      ("hiar_jax.train", tiny_run.arguments(workdirs[case], *case.format(**names).split()))
      for case in cases
    ]
    results |= dict(zip(cases, chain.commands(commands, devices=devices), strict=True))
    claimed |= {case for case, workdir in workdirs.items() if workdir.exists()}
  whole = [("hiar_jax.train", case.format(new=out / "w", **names).split()) for case in COMMANDS]
  results |= dict(zip(COMMANDS, chain.commands(whole), strict=True))
  return results, claimed


# These find out only when a stage is at work.
LATE = (
  "--config.stages_from={unfinished}",
  "--config.data.source=videos --config.data.folder={nothing}",
)


@pytest.mark.parametrize("given", [*CASES, *COMMANDS, *ON_EIGHT])
def test_it_is_one_line_that_says_what_to_do(said, given):
  results, claimed = said
  status, out, err = results[given]
  assert status == 2 and out == "", err
  last = err.splitlines()[-1]
  assert last.startswith("error: ") and {**CASES, **COMMANDS, **ON_EIGHT}[given] in last
  assert "Traceback" not in err
  if given not in LATE:
    assert len(err.splitlines()) == 1, err
    assert given not in claimed  # so that the corrected command may have the same workdir


def test_help_lists_the_flags(chain):
  [(_, out, err)] = chain.commands([("hiar_jax.train", ["--help"])])
  for flag in ("--config: config file", "--workdir: directory", "--[no]extend: train the stage"):
    assert f"\n  {flag}" in out, out
  assert err == ""


def test_a_workdir_of_another_config_names_the_field_and_stays(chain):
  before = tiny_run.files(chain.straight)
  [(status, _, err)] = chain.commands(
    [
      (
        "hiar_jax.train",
        tiny_run.arguments(chain.straight, "--config.teacher.lr=0.5", "--config.text.length=9"),
      )
    ]
  )
  assert status == 2 and len(err.splitlines()) == 1
  assert (
    "belongs to another config (stored -> given: teacher.lr: " in err
    and "; text.length: 12 -> 9)" in err
    and "--extend" not in err
  )
  longer = tiny_run.arguments(chain.straight, "--config.distill.steps=9")
  [(status, _, err)] = chain.commands([("hiar_jax.train", longer)])
  assert status == 2 and len(err.splitlines()) == 1
  assert "distill.steps: 6 -> 9" in err and "--extend trains distill on from its checkpoint" in err
  assert tiny_run.files(chain.straight) == before


@pytest.mark.slow
def test_when_all_checkpoints_of_a_stage_are_damaged_it_says_so(chain, tmp_path):
  workdir = tmp_path / "w"
  shutil.copytree(chain.straight, workdir, ignore=shutil.ignore_patterns("distill", "sample"))
  for step in (2, 4):
    (workdir / "causal_init" / "checkpoints" / str(step) / "params" / "_METADATA").write_text("{")
  [(status, _, err)] = chain.commands([("hiar_jax.train", tiny_run.arguments(workdir))])
  assert status == 2 and "Traceback" not in err
  assert (
    "every checkpoint in " in err.splitlines()[-1]
    and "delete the directory to start this stage again" in err.splitlines()[-1]
  )


@pytest.fixture
def small_disk(tmp_path):
  """disk(size in KiB) -> a directory on a disk of that size, where this process may mount one; call
  it again to resize.
  """
  disk, mounted = tmp_path / "disk", []
  disk.mkdir()

  def resize(kibibytes: int):
    options = f"size={kibibytes}k" + (",remount" if mounted else "")
    done = subprocess.run(
      ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)], capture_output=True
    )
    if done.returncode:
      pytest.skip("may not mount a file system here")
    mounted.append(True)
    return disk

  yield resize
  if mounted:
    subprocess.run(["umount", str(disk)], check=True)


def used(disk) -> int:
  """KiB taken."""
  free = shutil.disk_usage(disk)
  return -(-free.used // 1024)


@pytest.mark.slow
def test_a_disk_that_fills_up_in_a_checkpoint_loses_nothing(chain, small_disk):
  disk = small_disk(64 << 10)
  shutil.copytree(
    chain.straight, disk / "w", ignore=shutil.ignore_patterns("distill", "sample", "4")
  )
  shutil.copytree(chain.straight / "teacher", disk / "w" / "teacher", dirs_exist_ok=True)
  small_disk(used(disk) + 100)
  full = chain.train(disk / "w")
  assert full.returncode == 2, full.stderr
  assert "Traceback" not in full.stderr and "exception" not in full.stderr, full.stderr
  [said] = [line for line in full.stderr.splitlines() if line.startswith("error: ")]
  assert said.startswith("error: no space left on the disk of ")
  assert "the last complete checkpoint is 2; free some space and run the same command" in said
  small_disk(64 << 10)
  done = chain.train(disk / "w")
  assert done.returncode == 0, done.stderr
  tiny_run.assert_same_arrays(
    tiny_run.state(disk / "w", "distill", 6), tiny_run.state(chain.straight, "distill", 6)
  )
  tiny_run.assert_same_arrays(tiny_run.videos(disk / "w"), tiny_run.videos(chain.straight))


@pytest.mark.slow
def test_a_disk_without_any_space_is_one_line_at_once(chain, small_disk):
  disk = small_disk(256)
  (disk / "rest").write_bytes(b"x" * (shutil.disk_usage(disk).free))
  [(status, _, err)] = chain.commands([("hiar_jax.train", tiny_run.arguments(disk / "w"))])
  assert status == 2 and len(err.splitlines()) == 1, err
  assert err.startswith("error: no space left on the disk")


@pytest.mark.slow
@pytest.mark.parametrize("room", [0, 8, 24])
def test_a_disk_that_fills_up_in_the_last_stage_loses_nothing(chain, small_disk, room):
  disk = small_disk(64 << 10)
  shutil.copytree(chain.straight, disk / "w", ignore=shutil.ignore_patterns("sample"))
  small_disk(used(disk) + room)
  full = chain.train(disk / "w")
  assert full.returncode == 2 and "Traceback" not in full.stderr, full.stderr
  assert (
    full.stderr.splitlines()[-1].startswith("error: ") and "space" in full.stderr.splitlines()[-1]
  )
  small_disk(64 << 10)
  assert chain.train(disk / "w").returncode == 0
  tiny_run.assert_same_run(disk / "w", chain.straight)


@pytest.mark.slow
def test_a_loss_that_is_no_number_keeps_the_checkpoint_before(chain):
  workdir = chain.directory / "diverged"
  failed = chain.train(
    workdir,
    causal_init__lr=1e30,
    causal_init__warmup=3,
    causal_init__rule="adamw",
    causal_init__steps=40,
  )
  assert failed.returncode == 2 and "Traceback" not in failed.stderr, failed.stderr
  last = failed.stderr.splitlines()[-1]
  assert (
    last.startswith("error: causal_init: ")
    and "is not finite at step" in last
    and "lower learning rate" in last
  )
  saved = [
    int(p.name) for p in (workdir / "causal_init" / "checkpoints").iterdir() if p.name.isdigit()
  ]
  assert saved and all(
    np.isfinite(x).all() for x in tiny_run.state(workdir, "causal_init", max(saved)).values()
  )


def test_a_table_that_cannot_be_written_is_refused_before_a_video_is_made(chain, tmp_path):
  given = [f"--workdirs={chain.straight}", f"--rows={tmp_path}/rows", "--videos=2"]
  given += ["--length=1", "--baselines=data"]
  places = ("/dev/null/x", str(chain.straight / "config.json"))
  made = chain.commands([("hiar_jax.evaluate", [*given, f"--out={out}"]) for out in places])
  for (status, said, err), out in zip(made, places, strict=True):
    assert (status, said, err.count("\n")) == (2, "", 1), err
    assert f"error: {out}: cannot be written" in err
  assert not (tmp_path / "rows").exists()


def write_clip(path, seconds: float, fps: int, size: tuple[int, int], caption: str) -> None:
  """A bright square that moves over a dark ground, in H.264."""
  width, height = size
  with av.open(str(path), "w") as container:
    stream = container.add_stream("libx264", rate=fps)
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    for i in range(round(seconds * fps)):
      image = np.full((height, width, 3), 30, np.uint8)
      image[height // 4 : height // 2, 2 * i : 2 * i + width // 4] = (250, 200, 40)
      container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
    container.mux(stream.encode())
  path.with_suffix(".txt").write_text(caption)


@pytest.mark.slow
def test_a_folder_of_real_videos_goes_through_every_stage(chain, tmp_path):
  """Of any size and frame rate; a file that is no video is named and left out, and there is no
  truth to measure against.
  """
  folder = tmp_path / "clips"
  folder.mkdir()
  write_clip(folder / "a.mp4", 2.0, 24, (64, 48), "a yellow square on the way")
  write_clip(folder / "b.mp4", 2.5, 10, (32, 80), "Another one, slower")
  write_clip(folder / "c.mp4", 1.0, 8, (96, 32), "a wide one")
  (folder / "broken.mp4").write_bytes((folder / "a.mp4").read_bytes()[:700])
  (folder / "broken.txt").write_text("half a file")
  workdir = tmp_path / "w"
  done = chain.train(workdir, data__source="videos", data__folder=folder)
  assert done.returncode == 0, done.stderr
  assert "skipped broken.mp4" in done.stderr
  assert re.search(r"3 of 4 videos used, 1 skipped, \d\d clips", done.stderr), done.stderr
  shown = sorted((workdir / "sample").glob("*.mp4"))
  assert [path.stem for path in shown] == [
    "a-wide-one",
    "a-yellow-square-on-the-way",
    "another-one-slower",
  ]
  for path in shown:
    frames, _, metadata = read_mp4(path)
    assert frames.shape == (16, 128, 128, 3)
    assert metadata["seed"] == str(["a-yellow", "another-", "a-wide-o"].index(path.stem[:8]))
  assert (workdir / "sample" / "contact_sheet.png").exists()
  measured = json.loads((workdir / "sample" / "metrics.json").read_text())
  assert measured["frames"] == 16 and len(measured["prompts"]) == 3 and measured["clips"] > 3
  assert measured["motion"]["total"] > 0 and measured["codec"]["psnr"] > 10
  assert "as shares of the footage's: motion" in done.stderr
  assert {record["stage"] for record in tiny_run.log(workdir)} == set(tiny_run.STAGES)
