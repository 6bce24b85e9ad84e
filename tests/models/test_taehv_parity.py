"""The tiny autoencoder against a restatement of it in torch: frame by frame, on tensors under their
published names.

TAEHV is on no package index, so the published layer lists are written out here once more, from
their description: a block at a time, channels first, with a queue of the frames that each block has
seen. Needs the extra `[parity]` (torch).
"""

import jax
import numpy as np
import pytest

from hiar_jax.conversion.taehv_keys import tiny_vae_key_map
from hiar_jax.models import taehv
from tests.helpers.published_params import from_published

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]  # peers may warn

CONFIG = taehv.TinyVAEConfig(encoder_width=8, decoder_widths=(16, 8, 8, 8))
# Layer by layer: a convolution of 3x3 ("conv", with its stride), a memory block, pairs of frames
# merged or split by 1x1, and the rest.
ENCODER = [
  "conv",
  "relu",
  *["merge", "half", "block", "block", "block"] * 2,
  "point",
  "half",
  "block",
  "block",
  "block",
  "conv",
]
DECODER = [
  "clamp",
  "conv",
  "relu",
  *["block"] * 3,
  "double",
  "point",
  "conv",
  *["block"] * 3,
  "double",
  "split",
  "conv",
]
DECODER += [*["block"] * 3, "double", "split", "conv", "relu", "conv"]


@pytest.fixture(scope="module")
def named():
  rng = np.random.default_rng(0)
  tensors = {}
  for rule in tiny_vae_key_map(CONFIG):
    scale = np.sqrt(2 / np.prod(rule.shape[1:])) if len(rule.shape) > 1 else 0.05
    tensors[rule.name] = (scale * rng.normal(size=rule.shape)).astype(np.float32)
  tensors["decoder.22.weight"] *= 0.01  # pixels around grey: clipping would hide mistakes
  tensors["decoder.22.bias"] += 0.5
  return tensors


class Restated:
  """One half: `frames(x)` yields what comes out as the frames x [b c h w] go in, one after
  another.
  """

  def __init__(self, half, kinds, named):
    import torch

    self.half, self.kinds = half, kinds
    self.named = {
      name: torch.from_numpy(array) for name, array in named.items() if name.startswith(half)
    }
    self.seen = {}

  def convolve(self, name, x, **kwargs):
    import torch.nn.functional as F

    weight = self.named[f"{self.half}.{name}.weight"]
    return F.conv2d(
      x, weight, self.named.get(f"{self.half}.{name}.bias"), padding=weight.shape[-1] // 2, **kwargs
    )

  def push(self, x, layer=0):
    """One frame into a layer -> the list of frames that leave the last layer because of it."""
    import torch
    import torch.nn.functional as F

    if layer == len(self.kinds):
      return [x]
    match self.kinds[layer]:
      case "conv":
        out = [self.convolve(layer, x)]
      case "half":
        out = [self.convolve(layer, x, stride=2)]
      case "point":
        out = [self.convolve(f"{layer}.conv", x)]
      case "relu":
        out = [F.relu(x)]
      case "clamp":
        out = [3 * torch.tanh(x / 3)]
      case "double":
        out = [F.interpolate(x, scale_factor=2, mode="nearest")]
      case "split":
        y = self.convolve(f"{layer}.conv", x)
        out = [y[:, : y.shape[1] // 2], y[:, y.shape[1] // 2 :]]
      case "merge":
        queue = [*self.seen.pop(layer, []), x]
        out = [self.convolve(f"{layer}.conv", torch.cat(queue, dim=1))] if len(queue) == 2 else []
        if not out:
          self.seen[layer] = queue
      case "block":
        y = torch.cat([x, self.seen.get(layer, torch.zeros_like(x))], dim=1)
        for i in (0, 2, 4):
          y = self.convolve(f"{layer}.conv.{i}", F.relu(y) if i else y)
        self.seen[layer] = x
        out = [F.relu(y + x)]
    return [frame for y in out for frame in self.push(y, layer + 1)]


def _run(half, kinds, named, x):
  """[b f h w c] -> the same kind, through the restated half."""
  import torch

  restated = Restated(half, kinds, named)
  with torch.no_grad():
    frames = [
      y
      for i in range(x.shape[1])
      for y in restated.push(torch.from_numpy(np.moveaxis(x[:, i], -1, 1).copy()))
    ]
  return np.stack([np.moveaxis(frame.numpy(), 1, -1) for frame in frames], axis=1)


def _assert_close(actual, expected):
  actual = np.asarray(actual)
  assert actual.shape == expected.shape
  assert np.abs(actual - expected).max() <= 1e-4 * np.abs(expected).max()


def test_encode(named):
  video = np.random.default_rng(1).uniform(0, 1, size=(2, 9, 16, 24, 3)).astype(np.float32)
  filled = np.concatenate([video, *[video[:, -1:]] * 3], axis=1)
  expected = _run("encoder", ENCODER, named, filled)
  assert expected.shape[1] == 3
  params = from_published(named, tiny_vae_key_map(CONFIG), "tiny VAE")
  _assert_close(jax.jit(lambda p, x: taehv.encode(p, x, CONFIG))(params, 2 * video - 1), expected)


def test_decode(named):
  latents = 2 * np.random.default_rng(2).normal(size=(2, 3, 2, 3, 16)).astype(np.float32)
  # the first three frames come before the video
  expected = 2 * _run("decoder", DECODER, named, latents)[:, 3:].clip(0, 1) - 1
  assert expected.shape[1] == 9 and np.abs(expected).max() < 1
  params = from_published(named, tiny_vae_key_map(CONFIG), "tiny VAE")
  _assert_close(jax.jit(lambda p, z: taehv.decode(p, z, CONFIG))(params, latents), expected)
