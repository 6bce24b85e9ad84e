"""The operations that a forward of the DiT needs, by hand: matrix products alone, two operations a
multiply-add, as in the papers. Tests compare the counts of traced programs with it.
"""

import math

from hiar_jax.models.dit import DiTConfig


def forward(net: DiTConfig, frames: float, keys: float, tokens: int, text: int) -> float:
  """Returns those of one video: `frames` frames of `tokens` tokens that attend to `keys` frames
  (their mean) and `text` tokens.
  """
  n, m, d = frames * tokens, keys * tokens, net.dim
  patch = math.prod(net.patch) * net.channels
  # Of one layer: self-attention's q, k, v, o, cross-attention's q, o and the MLP on the video's
  # tokens; cross-attention's k, v on the text's.
  projections = 2 * n * (4 * d * d + 2 * d * d + 2 * d * net.ffn_dim) + 2 * text * 2 * d * d
  # Logits and weighted values: 2 d each for a query and key.
  products = 4 * n * m * d + 4 * n * text * d
  # Outside of the layers: patches in and out, the text's MLP, the timestep's.
  ends = 2 * n * 2 * patch * d + 2 * text * (net.text_dim * d + d * d) + frames * level(net)
  return float(net.num_layers * (projections + products) + ends)


def packed_forward(
  net: DiTConfig, tokens: int, packed: tuple[tuple[int, int], ...], text: int, deaf: int = 0
) -> float:
  """Returns those of a noisy section of `tokens` tokens and groups of packed frames, each (tokens,
  kernel), that all attend to each other. deaf: packed tokens that hear no text.
  """
  d, patch = net.dim, math.prod(net.patch) * net.channels
  history = sum(n for n, _ in packed)
  # one frame of all tokens, but for kernels larger than a patch, packed tokens that have no output,
  # and a noise level a group
  whole = forward(net, 1, 1, tokens + history, text)
  kernels = sum(2 * n * (pool**3 - 1) * patch * d for n, pool in packed)
  unheard = net.num_layers * 4 * deaf * (d * d + text * d)
  return whole + kernels + len(packed) * level(net) - 2 * history * patch * d - unheard


def level(net: DiTConfig) -> float:
  """Returns those of one noise level: its MLP, and modulations (6 d + d)."""
  return 2 * (net.freq_dim * net.dim + 7 * net.dim**2)
