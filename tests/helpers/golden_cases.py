"""Recordings of the published implementation: where they are, and how to read them."""

import dataclasses
import functools
import json
import os
import pathlib

import numpy as np

from hiar_jax.conversion.dit_keys import dit_key_map
from hiar_jax.method import Method
from hiar_jax.models import dit
from hiar_jax.types import LatentShape
from tests.helpers.published_params import from_published

ROOT = pathlib.Path(os.environ.get("HIAR_GOLDEN_DIR", pathlib.Path(__file__).parents[1] / "golden"))
TOLERANCE = 2e-4  # of the largest value
DIT = "weights_generator.npz"  # the file that marks a folder as a recorded DiT


def folders(marker: str) -> list[pathlib.Path]:
  """Case folders that hold a file named `marker`."""
  return sorted(path.parent for path in ROOT.glob(f"*/{marker}"))


def channels_last(array: np.ndarray) -> np.ndarray:
  """[..., f, c, h, w] -> [..., f, h, w, c]."""
  return np.moveaxis(array, -3, -1)


def assert_close(actual, expected, what: str = "") -> None:
  actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
  assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, recorded {expected.shape}"
  error, largest = np.abs(actual - expected).max(), np.abs(expected).max()
  assert error <= TOLERANCE * largest, (
    f"{what}: off by {error:.3g}, largest recorded value {largest:.3g}"
  )


@dataclasses.dataclass(frozen=True)
class Case:
  """One folder of a recorded DiT."""

  path: pathlib.Path

  @functools.cached_property
  def sizes(self) -> dict:
    return json.loads((self.path / "config.json").read_text())

  @functools.cached_property
  def config(self) -> dit.DiTConfig:
    c = self.sizes["config"]
    assert c["in_dim"] == c["out_dim"] and c["qk_norm"] and c["cross_attn_norm"], (
      "a DiT unlike Wan2.1's"
    )
    return dit.DiTConfig(
      dim=c["dim"],
      ffn_dim=c["ffn_dim"],
      num_heads=c["num_heads"],
      num_layers=c["num_layers"],
      patch=tuple(c["patch_size"]),
      channels=c["in_dim"],
      text_dim=c["text_dim"],
      freq_dim=c["freq_dim"],
    )

  @functools.cached_property
  def levels(self) -> np.ndarray:
    """The student's noise levels [s + 1], as any of the folder's recordings states them."""
    for path in sorted(self.path.glob("*.npz")):
      with np.load(path) as arrays:
        if "denoising_timesteps" in arrays.files:
          return levels(arrays["denoising_timesteps"])
    raise AssertionError(f"no recording in {self.path} states denoising_timesteps")

  def load(self, name: str) -> dict[str, np.ndarray]:
    with np.load(self.path / name) as arrays:
      return dict(arrays)

  def params(self, network: str):
    return _params(self, network)

  def history(self, **changes) -> Method:
    return Method(**{"block": self.sizes["config"]["num_frame_per_block"], "window": 0, **changes})

  def shape(self, latents: np.ndarray) -> LatentShape:
    """Of a video like `latents` [b f h w c]."""
    return LatentShape(*latents.shape[1:])


@functools.cache
def _params(case: Case, network: str):
  return from_published(case.load(f"weights_{network}.npz"), dit_key_map(case.config), "DiT")


def levels(timesteps: np.ndarray) -> np.ndarray:
  """Recorded timesteps in (0, 1000] -> sigmas, ending with 0."""
  return np.append(np.asarray(timesteps, np.float32) / np.float32(1000), np.float32(0))


def cases() -> list[Case]:
  return [Case(path) for path in folders(DIT)]


def noise_table(noise: np.ndarray, steps: np.ndarray | None, block: int, count: int) -> np.ndarray:
  """Recorded noise as [level, block, b, k, h, w, c] with `count` levels; levels that draw none are
  0.
  """
  blocks = np.stack(np.split(channels_last(noise), noise.shape[1] // block, axis=1))
  table = np.zeros((count, *blocks.shape), np.float32)
  table[0] = blocks
  if steps is not None:
    table[1 : 1 + len(steps)] = channels_last(steps)[: count - 1]
  return table
