"""A run, a weights directory and saved streams of an earlier commit (golden_runs/), used anew.

Only what stays is used: command lines, and files as Orbax, PyAV, NumPy and json read them. So
nothing here changes when modules of the package are renamed.
"""

from collections.abc import Callable
from concurrent import futures
import functools
import hashlib
import io
import json
import lzma
import pathlib
import tarfile
from typing import Any

import av
import jax
import numpy as np
import orbax.checkpoint as ocp
from PIL import Image

from tests.helpers import tiny_run

FOLDER = pathlib.Path(__file__).parents[1] / "golden_runs"
ARCHIVE = FOLDER / "files.tar.xz"
NUMBERS, FACTS = FOLDER / "recorded.npz.xz", FOLDER / "recorded.json"

SHOWN, CHANGED = "a red circle moving left", "a blue square moving up"
CACHED = "A cat walks on the grass"  # its text is kept beside the weights
NEW = "一只狗在海滩上奔跑"  # this one's is not
TAKEN = {"shapes": 4, "wan": 9}  # frames of the streams when they were saved
STREAMED = {"shapes": 12, "wan": 33}  # and when they have been gone on with
SCALE = 8  # of all mp4 files: enlarged so much, H.264 hardly changes a pixel

# Of the run: its distillation was stopped at update 4 of 6. Since 2026-11 that has to be said.
AS_IT_IS = ["--step=4"]

# golden_runs/README.md says what was measured. TOLERANCE: of the largest value of an array.
# FRAMES: largest and mean difference in levels of 255; where one pixel is rounded otherwise, x264
# may decide otherwise for a few around it.
TOLERANCE, FRAMES = 2e-5, (16, 0.03)


def unpack(place: pathlib.Path) -> pathlib.Path:
  """Makes `place`, with shapes/ and wan/ in it, each with its config.py."""
  place.mkdir(parents=True)
  with tarfile.open(ARCHIVE) as archive:
    archive.extractall(place, filter="data")
  return place


# ------------------------------------------------------------------------------------ commands


def train(place: pathlib.Path) -> list[str]:
  """The command that made the run, and that goes on with it."""
  shapes = place / "shapes"
  return ["hiar_jax.train", f"--config={shapes}/config.py", f"--workdir={shapes}/run"]


def make_clip(place: pathlib.Path) -> list[str]:
  """The command that made shapes/clip.mp4."""
  out = ["--frames=4", f"--out={place}/shapes/clip.mp4"]
  return [
    "hiar_jax.generate",
    f"--workdir={place}/shapes/run",
    *AS_IT_IS,
    f"--prompt={SHOWN}",
    *out,
  ]


def wan(place: pathlib.Path, verb: str) -> list[str]:
  """The start of every command on the weights directory."""
  return [f"hiar_jax.{verb}", f"--config={place}/wan/config.py", f"--weights={place}/wan/weights"]


def resume(folder: pathlib.Path, out: str) -> list[str]:
  """Goes on with the stream of shapes/ or wan/, and saves it again."""
  frames, saved = STREAMED[folder.name], f"{folder}/saved"
  return [f"--resume={saved}", f"--frames={frames}", f"--out={folder}/{out}", f"--save={saved}"]


def uses(place: pathlib.Path) -> dict[str, list[str]]:
  """The commands that only read the run and the weights, by their names here."""
  run, mp4 = place / "shapes", lambda name: f"--out={place}/{name}.mp4"
  shapes = ["hiar_jax.generate", f"--workdir={run}/run", *AS_IT_IS, f"--prompt={CHANGED}"]
  shapes = [*shapes, "--frames=8"]
  given = [*wan(place, "generate"), f"--prompt={CACHED}", f"--image={place}/wan/start.png"]
  text = [*wan(place, "generate"), f"--prompt={NEW}", "--seed=3", "--frames=9"]
  return {
    "clip": make_clip(place),
    "generate": [*shapes, "--seed=3", mp4("shapes/generated")],
    "continue": [*shapes, f"--video={run}/clip.mp4", mp4("shapes/continued")],
    "stream": ["hiar_jax.stream", f"--workdir={run}/run", *AS_IT_IS, *resume(run, "stream.mp4")],
    "weights": [*text, mp4("wan/generated")],
    "picture": [*given, "--frames=13", mp4("wan/picture")],
    "tiny": [*given, "--frames=13", "--decoder=tiny_vae", mp4("wan/tiny")],
    "stream of weights": [*wan(place, "stream"), *resume(place / "wan", "pictures")],
  }


def work(
  chain: tiny_run.Chain, training: pathlib.Path, using: pathlib.Path
) -> dict[str, tuple[int, str, str]]:
  """Goes on with the run in one place, and meanwhile uses what is in the other one.

  Returns (exit status, stdout, stderr) by the commands' names.
  """
  lanes = {"train": train(training)}, uses(using)
  cases = [[(module, arguments) for module, *arguments in lane.values()] for lane in lanes]
  # as the recordings were made, not as the tests compile: with jax 0.12 their preset is 2.2e-5 off
  run = functools.partial(chain.commands, XLA_FLAGS="")
  with futures.ThreadPoolExecutor() as threads:
    done = list(threads.map(run, cases))
  names = [name for lane in lanes for name in lane]
  return dict(zip(names, done[0] + done[1], strict=True))


# ---------------------------------------------------------------------------- what they leave


def arrays(item: pathlib.Path) -> dict[str, np.ndarray]:
  """An item of a checkpoint: path of each leaf -> its numbers (of a random key its integers)."""
  with ocp.PyTreeCheckpointer() as checkpointer:
    tree = checkpointer.metadata(item).item_metadata.tree
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    found = checkpointer.restore(item, ocp.args.PyTreeRestore(restore_args=as_numpy))
  name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
  leaves = jax.tree_util.tree_leaves_with_path(found)
  return {name(path): np.asarray(leaf) for path, leaf in leaves}


def newest(checkpoints: pathlib.Path) -> pathlib.Path:
  steps = [path for path in checkpoints.iterdir() if path.name.isdigit()]
  return max(steps, key=lambda path: int(path.name))


def videos(*paths: pathlib.Path) -> dict[str, Any]:
  """Frames uint8 [F H W 3] at their own size, and what the files say of themselves."""
  found: dict[str, Any] = {}
  for path in paths:
    with av.open(str(path)) as container:
      said = json.loads(container.metadata["comment"])
      decoded = [
        frame.reformat(format="rgb24", src_colorspace="ITU709")
        for frame in container.decode(video=0)
      ]
    frames = np.stack([frame.to_ndarray() for frame in decoded])
    f, height, width, _ = frames.shape
    squares = frames.reshape(f, height // SCALE, SCALE, width // SCALE, SCALE, 3)
    found[path.name] = np.rint(squares.mean((2, 4))).astype(np.uint8)
    for name in ("hiar_jax", "stage", "step"):  # the latter two are said since 2026-11
      said.pop(name, None)
    found[f"{path.name} says"] = said
  return found


def trained(place: pathlib.Path) -> dict[str, Any]:
  """The last checkpoint of the distillation, the log, the samples."""
  run = place / "shapes" / "run"
  last = newest(run / "distill" / "checkpoints")
  state, inferred = arrays(last / "state"), arrays(last / "params")
  average = {name: leaf for name, leaf in state.items() if name.startswith("ema/")}
  assert {f"ema/{name}" for name in inferred} == average.keys()
  assert all((average[f"ema/{name}"] == leaf).all() for name, leaf in inferred.items())
  lines = [json.loads(line) for line in (run / "logs" / "metrics.jsonl").read_text().splitlines()]
  for line in lines:
    line.get("scalars", {}).pop("generator_dmd_not_finite", None)  # logged since 2026-11
  return {
    # The optimizers' states, as they were before, have had their effect on the weights.
    **{name: leaf for name, leaf in state.items() if "opt_state" not in name},
    **videos(*(run / "sample").glob("*.mp4")),
    "files": sorted(path.name for path in (run / "sample").iterdir()),
    "measured": json.loads((run / "sample" / "metrics.json").read_text()),
    "checkpoint": int(last.name),
    "described": json.loads((last / "config" / "metadata").read_text()),
    "log": [{key: value for key, value in line.items() if key != "time"} for line in lines],
  }


def saved(folder: pathlib.Path) -> dict[str, Any]:
  """A stream as it was saved last: its arrays and its facts."""
  last = newest(folder)
  facts = json.loads((last / "config" / "metadata").read_text())
  return {**arrays(last / "state"), "saved": int(last.name), "facts": facts}


def pictures(folder: pathlib.Path, first: int) -> dict[str, Any]:
  """Names of all pictures, and those from number `first` on: uint8 [F H W 3]."""
  names = sorted(path.name for path in folder.iterdir())
  shown = [np.asarray(Image.open(folder / name)) for name in names[first:]]
  return {"files": names, "pictures": np.stack(shown)}


def texts(weights: pathlib.Path) -> dict[str, Any]:
  """Names of the texts that are kept beside the weights."""
  paths = (weights / "texts").rglob("*.safetensors")
  return {"texts": sorted(str(path.relative_to(weights)) for path in paths)}


# What is compared, by the command that it comes of.
RESULTS: dict[str, Callable[[pathlib.Path], dict[str, Any]]] = {
  "train": trained,
  "generate": lambda place: videos(place / "shapes" / "generated.mp4"),
  "continue": lambda place: videos(place / "shapes" / "continued.mp4"),
  "stream": lambda place: (
    videos(place / "shapes" / "stream.mp4") | saved(place / "shapes" / "saved")
  ),
  "weights": lambda place: (
    videos(place / "wan" / "generated.mp4") | texts(place / "wan" / "weights")
  ),
  "picture": lambda place: videos(place / "wan" / "picture.mp4"),
  "tiny": lambda place: videos(place / "wan" / "tiny.mp4"),
  "stream of weights": lambda place: (
    pictures(place / "wan" / "pictures", TAKEN["wan"]) | saved(place / "wan" / "saved")
  ),
}


def digests(folder: pathlib.Path) -> dict[str, tuple[str, int]]:
  """Path -> (digest of the content, time of change) of every file below a folder."""
  files = sorted(path for path in folder.rglob("*") if path.is_file())
  digest = lambda path: (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
  return {str(path.relative_to(folder)): digest(path) for path in files}


# ----------------------------------------------------------------------- and what was recorded


def recorded(command: str) -> dict[str, Any]:
  """What the earlier commit made of the same files: a result of RESULTS[command]."""
  with lzma.open(NUMBERS) as file, np.load(io.BytesIO(file.read())) as numbers:
    names = [name for name in numbers.files if name.startswith(f"{command}:")]
    found = {name.removeprefix(f"{command}:"): numbers[name] for name in names}
  return found | json.loads(FACTS.read_text())[command]


def record(found: dict[str, dict[str, Any]]) -> None:
  """Writes what `recorded` reads. found: results by their commands."""
  numbers: dict[str, np.ndarray] = {}
  facts: dict[str, dict] = {command: {} for command in found}
  for command, results in found.items():
    for name, value in results.items():
      if isinstance(value, np.ndarray):
        numbers[f"{command}:{name}"] = value
      else:
        facts[command][name] = value
  with lzma.open(NUMBERS, "wb", preset=9) as file:  # zip would not compress headers
    np.savez(file, **numbers)
  text = json.dumps(facts, indent=1, sort_keys=True, ensure_ascii=False)
  FACTS.write_text(text + "\n")


def assert_same(found: Any, expected: Any, what: str) -> None:
  """Floating numbers within TOLERANCE, frames within FRAMES; all else exactly."""
  if isinstance(expected, np.ndarray):
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype), what
    off = np.abs(found.astype(np.float64) - expected.astype(np.float64))
    if expected.dtype == np.float32:
      scale = np.abs(expected).max()
      assert off.max() <= TOLERANCE * scale, f"{what}: off by {off.max():.3g} of {scale:.3g}"
    else:
      largest, mean = FRAMES if expected.dtype == np.uint8 else (0, 0)
      assert off.max() <= largest and off.mean() <= mean, f"{what}: off by {off.max():.0f}"
  elif isinstance(expected, dict):
    assert found.keys() == expected.keys(), f"{what}: {sorted(found.keys() ^ expected.keys())}"
    for name in expected:
      assert_same(found[name], expected[name], f"{what}, {name}")
  elif isinstance(expected, list):
    assert len(found) == len(expected), what
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
      assert_same(a, b, f"{what}, {i}")
  elif isinstance(expected, float):
    near = abs(found - expected) <= TOLERANCE * abs(expected)
    assert near, f"{what}: {found}, not {expected}"
  else:
    assert found == expected, f"{what}: {found!r}, not {expected!r}"
