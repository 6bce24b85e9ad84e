"""Videos from a trained run: the same for a prompt and a seed, said what was done, and nothing
overwritten by halves.
"""

import json
import shutil

import numpy as np
import pytest

from hiar_jax.errors import UserError
from hiar_jax.generation import clips
from hiar_jax.generation.prompts_file import Job
from tests.helpers import tiny_run
from tests.helpers.video_reader import read_mp4

PROMPTS = ["a red circle moving left", "a purple zebra moving up", "a red circle moving left"]
LONG = "a red circle moving left and " * 40


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
  return tiny_run.chain(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def made(chain, tmp_path_factory):
  """What several commands made: name -> (status, stdout, stderr), and the directory that they wrote
  to.
  """
  out, workdir = tmp_path_factory.mktemp("generate"), chain.straight
  (out / "prompts.txt").write_text("# three prompts\n" + "\n\n".join(PROMPTS) + "\n")
  (out / "old.mp4").write_bytes(b"an old file")
  other = out / "other_batch"  # the same run, but videos are made three at a time
  shutil.copytree(workdir, other)
  config = json.loads((other / "config.json").read_text())
  # and trained on a machine that is not this one
  config["sample"]["batch"], config["mesh"]["data"] = 3, 64
  (other / "config.json").write_text(json.dumps(config))
  before = tiny_run.files(workdir)
  commands = {
    "file": [
      f"--workdir={workdir}",
      f"--prompts={out}/prompts.txt",
      "--frames=7",
      "--seed=5",
      f"--out={out}/new/dir",
    ],
    "batch": [
      f"--workdir={other}",
      f"--prompts={out}/prompts.txt",
      "--frames=8",
      "--seed=5",
      f"--out={out}/batch",
    ],
    "alone": [
      f"--workdir={workdir}",
      f"--prompt={PROMPTS[1]}",
      "--frames=8",
      "--seed=6",
      f"--out={out}/a/b/clip.mp4",
    ],
    "old": [
      f"--workdir={workdir}",
      f"--prompt={PROMPTS[1]}",
      "--frames=8",
      "--seed=7",
      f"--out={out}/old.mp4",
      "--strict",
    ],
  }
  results = dict(
    zip(
      commands,
      chain.commands([("hiar_jax.generate", command) for command in commands.values()]),
      strict=True,
    )
  )
  assert tiny_run.files(workdir) == before  # a run is read and not touched
  return results, out


@pytest.fixture(scope="module")
def made_otherwise(chain, tmp_path_factory):
  """As `made`: of an earlier stage, and as long as it is by default."""
  out, workdir = tmp_path_factory.mktemp("otherwise"), chain.straight
  commands = {
    "init": [
      f"--workdir={workdir}",
      "--prompt=",
      "--frames=8",
      "--stage=causal_init",
      f"--out={out}/empty.mp4",
    ],
    "long": [f"--workdir={workdir}", f"--prompt={LONG}", f"--out={out}/long.mp4"],
  }
  cases = [("hiar_jax.generate", command) for command in commands.values()]
  results = dict(zip(commands, chain.commands(cases), strict=True))
  for name, (status, _, err) in results.items():
    assert status == 0 and "Traceback" not in err, f"{name}: {err}"
  return results, out


NAMES = [
  "a-red-circle-moving-left.mp4",
  "a-purple-zebra-moving-up.mp4",
  "a-red-circle-moving-left-2.mp4",
]


def test_every_command_ends_well(made):
  for name, (status, _, err) in made[0].items():
    assert status == 0 and "Traceback" not in err, f"{name}: {err}"


def test_the_paths_are_printed(made):
  results, out = made
  assert results["file"][1].splitlines() == [f"{out}/new/dir/{name}" for name in NAMES]
  assert results["alone"][1] == f"{out}/a/b/clip.mp4\n"


def test_a_video_depends_on_its_prompt_and_seed_alone(made):
  """Not on the others in the file, nor on how many are made at once."""
  _, out = made
  frames = [read_mp4(out / "new" / "dir" / name)[0] for name in NAMES]
  batch = [read_mp4(out / "batch" / name)[0] for name in NAMES]
  np.testing.assert_array_equal(frames, batch)
  np.testing.assert_array_equal(frames[1], read_mp4(out / "a" / "b" / "clip.mp4")[0])
  assert (frames[0] != frames[2]).any()  # the same prompt, the next seed
  assert (frames[1] != read_mp4(out / "old.mp4")[0]).any()


def test_a_file_says_how_it_was_made(made):
  _, out = made
  for seed, (name, prompt) in enumerate(zip(NAMES, PROMPTS, strict=True), 5):
    frames, fps, said = read_mp4(out / "new" / "dir" / name)
    assert fps == 8 and len(frames) == 8
    assert said["prompt"] == prompt and said["seed"] == str(seed) and said["frames"] == "8"
    assert said["workdir"] == "straight" and said["hiar_jax"]


def test_an_old_file_is_replaced_by_a_whole_one(made):
  _, out = made
  assert len(read_mp4(out / "old.mp4")[0]) == 8
  assert not [*out.rglob("*.tmp")]


def test_rounding_and_unknown_words_are_said(made):
  results, _ = made
  assert "frames = 7 is not whole blocks of 2 frames: making 8\n" in results["file"][2]
  assert results["file"][2].count("the model does not know 'purple', 'zebra'") == 1
  assert "not whole blocks" not in results["alone"][2]


@pytest.mark.slow
def test_without_frames_it_is_four_training_lengths_and_a_long_prompt_is_cut(made_otherwise):
  results, out = made_otherwise
  frames, _, said = read_mp4(out / "long.mp4")
  assert len(frames) == 16 and said["prompt"] == LONG
  assert "the model reads 12 words" in results["long"][2]


@pytest.mark.slow
def test_weights_of_an_earlier_stage(made_otherwise):
  _, out = made_otherwise
  assert len(read_mp4(out / "empty.mp4")[0]) == 8


@pytest.fixture(scope="module")
def refused(chain, tmp_path_factory):
  """What the commands that cannot work say: name -> (status, stdout, stderr)."""
  out, workdir = tmp_path_factory.mktemp("refused"), chain.straight
  (out / "empty.txt").write_text("# nothing\n\n")
  (out / "latin.txt").write_bytes("ein größerer Kreis".encode("latin-1"))
  (out / "not_a_run").mkdir()
  (out / "a_file").write_text("")
  untrained, half = out / "untrained", out / "half"
  for new in (untrained, half):
    new.mkdir()
    shutil.copy(workdir / "config.json", new)
  shutil.copytree(workdir / "data", half / "data")
  run, prompt = f"--workdir={workdir}", "--prompt=a red circle"
  commands = {
    "no workdir": [prompt],
    "a missing workdir": [f"--workdir={out}/nowhere", prompt],
    "not a run": [f"--workdir={out}/not_a_run", prompt],
    "nothing trained": [f"--workdir={untrained}", prompt],
    "stage not trained": [f"--workdir={half}", prompt],
    "no prompt": [run],
    "both prompts": [run, prompt, f"--prompts={out}/empty.txt"],
    "missing prompts": [run, f"--prompts={out}/nowhere.txt"],
    "empty prompts": [run, f"--prompts={out}/empty.txt"],
    "no text": [run, f"--prompts={out}/latin.txt"],
    "not an mp4": [run, prompt, f"--out={out}/clip.gif"],
    "a directory for one": [run, prompt, f"--out={out}"],
    "strict": [run, prompt, "--frames=7", "--strict", f"--out={out}/x.mp4"],
    "no frames": [run, prompt, "--frames=0", f"--out={out}/x.mp4"],
    "frames in words": [run, prompt, "--frames=many"],
    "a negative seed": [run, prompt, "--seed=-1"],
    "a huge seed": [run, prompt, "--seed=5000000000"],
    "another stage": [run, prompt, "--stage=sample"],
    "a mistyped flag": [run, prompt, "--frame=8"],
    "a bare word": [run, prompt, "quickly"],
    "below a file": [run, prompt, "--frames=2", f"--out={out}/a_file/x.mp4"],
  }
  return dict(
    zip(
      commands,
      chain.commands([("hiar_jax.generate", command) for command in commands.values()]),
      strict=True,
    )
  ), out


REFUSED = {
  "no workdir": "--workdir is missing; give the directory of a trained run",
  "a missing workdir": "/nowhere holds no run (no config.json); train one first, or check the path",
  "not a run": "/not_a_run holds no run (no config.json)",
  "nothing trained": "there are no checkpoints in ",
  "stage not trained": "/half/distill/checkpoints: no such directory; train first, or check the "
  "path",
  "no prompt": 'give either --prompt="a red circle moving left" or --prompts=FILE',
  "both prompts": "give either --prompt=",
  "missing prompts": "/nowhere.txt does not exist; write one prompt a line into it",
  "empty prompts": "/empty.txt holds no prompt; write one a line",
  "no text": "/latin.txt is not UTF-8 text",
  "not an mp4": "/clip.gif: expected a name that ends in .mp4",
  "a directory for one": "expected a name that ends in .mp4",
  "strict": "frames = 7 is not whole blocks of 2 frames; the nearest counts are 6 and 8",
  "no frames": "frames = 0: expected at least 1; videos are made in blocks of 2",
  "frames in words": "--frames=many",
  "a negative seed": "--seed=-1: -1 is not an integer in the range [0, 2147483647]",
  "a huge seed": "--seed=5000000000",
  "another stage": "--stage=sample: value should be one of <distill|causal_init|framepack>",
  "a mistyped flag": "Unknown command line flag 'frame'",
  "a bare word": "unexpected argument 'quickly'; flags are written --name=value",
  "below a file": "/a_file/x.mp4: cannot be written",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_done_is_one_line(refused, name):
  results, out = refused
  status, printed, err = results[name]
  # the bar of what had begun
  lines = [line for line in err.splitlines() if not line.startswith("generate: ")]
  assert status == 2 and printed == "" and len(lines) == 1, err
  assert lines[0].startswith("error: ") and REFUSED[name] in lines[0]
  assert not [*out.rglob("*.mp4"), *out.rglob("*.tmp")]


def test_a_file_where_the_videos_should_go(tmp_path):
  (tmp_path / "taken").write_text("")
  with pytest.raises(UserError, match="taken is a file; with --prompts it names the directory"):
    clips.output_paths([Job("a", 0)], str(tmp_path / "taken"), many=True)


def test_where_videos_go_by_default():
  jobs = [Job("A cat", 0), Job("a cat", 1)]
  assert [str(path) for path in clips.output_paths(jobs, None, many=True)] == [
    "videos/a-cat.mp4",
    "videos/a-cat-2.mp4",
  ]
  assert [str(path) for path in clips.output_paths(jobs[:1], None, many=False)] == ["a-cat.mp4"]
