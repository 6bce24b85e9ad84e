"""Imports the teacher trajectories of HiAR's and Self-Forcing's `generate_ode_pairs.py` as a
trajectory data set.

Their folder holds one `.pt` file per prompt, {prompt: tensor [1, s, f, c, h, w]}: normalised
latents of Wan2.1 1.3B, from noise to data, at s of the levels of its sampler (48 Euler steps,
shift 8, guidance scale 6; the levels before steps 0, 12, 24, 36 and the last one). The files are
read without PyTorch and without running the code that a pickle may hold.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from typing import Any

import numpy as np
import tqdm

from hiar_jax import flow
from hiar_jax.checkpoints.torch_files import read_torch
from hiar_jax.data.trajectories import TrajectoryWriter
from hiar_jax.errors import UserError, at_least

_FLOATING = ("float32", "float16", "bfloat16", "float64")
_AXES = "[1, levels, frames, channels, height, width]"


@dataclasses.dataclass(frozen=True)
class Sampler:
  """Settings of the sampler that made the trajectories; defaults: the published scripts'."""

  steps: int = 48
  shift: float = 8.0  # of the sigma schedule
  kept: tuple[int, ...] = (0, 12, 24, 36, -1)  # indices, of the steps + 1 levels, in the files

  def __post_init__(self):
    at_least(1, steps=self.steps)
    # Checked before `sigmas` looks the indices up.
    in_range = all(-self.steps - 1 <= index <= self.steps for index in self.kept)
    if len(self.kept) < 2 or not in_range or (np.diff(self.sigmas) >= 0).any():
      raise UserError(
        f"kept = {self.kept}: expected at least two of the levels 0 to {self.steps} (-1 is the "
        "last), from noise to data"
      )

  @property
  def sigmas(self) -> list[float]:
    """Kept noise levels, noisiest first; with the defaults 1, .96, .8889, .7273, 0."""
    schedule = flow.sigma_schedule(self.steps, self.shift)
    return [float(schedule[index]) for index in self.kept]


def list_pairs(folder: str | os.PathLike) -> list[tuple[pathlib.Path, str]]:
  """Returns (file, prompt) of each trajectory of a folder, in the order of the file names, without
  reading latents.

  Raises:
    UserError: no such folder, no `.pt` file in it, or one that holds no {prompt: tensor}.
  """
  folder = pathlib.Path(folder)
  paths = sorted(folder.glob("*.pt"))
  if not paths:
    problem = "holds no .pt file" if folder.is_dir() else "is no folder"
    raise UserError(
      f"{folder} {problem}; give the folder that generate_ode_pairs.py wrote, with 00000.pt and so "
      "on"
    )
  return [
    (path, prompt)
    for path in tqdm.tqdm(paths, desc="ode pairs", unit="file")
    for prompt in _entries(path)
  ]


def _entries(path: pathlib.Path) -> dict[str, Any]:
  """Returns {prompt: array} of a file; arrays are mapped from the file, not read."""
  content = read_torch(path)
  if isinstance(content, dict) and content and all(isinstance(key, str) for key in content):
    return content
  found = (
    f"a dict of {len(content)} entries" if isinstance(content, dict) else type(content).__name__
  )
  raise UserError(f"{path} holds {found}; expected a trajectory, {{prompt: tensor {_AXES}}}")


def read_latents(path: pathlib.Path, prompt: str, levels: int, channels: int = 16) -> np.ndarray:
  """Returns the latents of a trajectory, [s, f, h, w, c], noisiest first, in the file's dtype.

  Raises:
    UserError: a tensor of another shape or dtype.
  """
  array = _entries(path)[prompt]
  shape = getattr(array, "shape", ())
  # The leading axis of one prompt may be missing.
  if len(shape) < 5 or shape[:-5] not in ((), (1,)) or array.dtype.name not in _FLOATING:
    raise UserError(f"{path} holds {_describe(array)}; expected floating numbers {_AXES}")
  array = array.reshape(shape[-5:])
  if array.shape[0] != levels or array.shape[2] != channels:
    raise UserError(
      f"{path} holds {_describe(array)}; expected {levels} levels and {channels} channels, "
      f"{_AXES}; say which levels were kept if there are others"
    )
  return np.moveaxis(array, 2, -1)  # [s, f, c, h, w] -> [s, f, h, w, c]


def prepare(
  directory: str | os.PathLike,
  folder: str | os.PathLike,
  sampler: Sampler = Sampler(),
  *,
  dtype: str = "float16",
  part_size: int = 8,
  channels: int = 16,
) -> None:
  """Writes the trajectory data set of a folder of `.pt` files; resumes where it was stopped.

  dtype: of the data set; the published pipeline keeps float16 too. part_size: trajectories between
  two points of resumption, held in memory at once (42 MB each at 480p in float32).

  Raises:
    UserError: files that hold something else, values that are not finite, or a directory with other
      trajectories.
  """
  pairs = list_pairs(folder)
  # Identifies the source without reading its gigabytes: names and prompts, not latents.
  digest = hashlib.sha256(
    json.dumps([(path.name, prompt) for path, prompt in pairs]).encode()
  ).hexdigest()[:16]
  recipe = {
    "source": "ode_pairs",
    "digest": digest,
    "steps": sampler.steps,
    "shift": sampler.shift,
    "kept": list(sampler.kept),
  }
  writer = TrajectoryWriter(directory, sampler.sigmas, len(pairs), part_size, dtype, recipe)
  for part in tqdm.tqdm(writer.missing_parts(), desc="trajectories", unit="part"):
    chosen = [pairs[row] for row in writer.rows(part)]
    latents = [read_latents(path, prompt, len(sampler.kept), channels) for path, prompt in chosen]
    for (path, _), array in zip(chosen, latents, strict=True):
      if array.shape != latents[0].shape:
        raise UserError(
          f"{path} holds {_describe(array)}, {chosen[0][0]} {_describe(latents[0])}; expected one "
          "size, import them apart"
        )
    writer.write_part(part, np.stack(latents), [prompt for _, prompt in chosen])
  writer.finish()


def _describe(value: Any) -> str:
  return (
    f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__
  )
