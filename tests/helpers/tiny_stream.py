"""A model of a few thousand numbers to stream with, its prompts and its noise."""

import dataclasses
import functools
import zlib

import jax
import numpy as np

from hiar_jax.method import MethodConfig
from hiar_jax.rollout.noise import block_noise
from hiar_jax.streaming.compiled_tick import Engine, StreamParts, TickOptions
from tests.helpers import compiling, tiny
from tests.helpers.plain_stream import PlainStream

CONFIG = dataclasses.replace(tiny.CONFIG, num_heads=4)  # 4 heads of 4, 2 layers
SIGMAS = (1.0, 0.9, 0.7, 0.4, 0.0)
SIZE = (4, 4)
ROW = MethodConfig(block=2, window=7, sink=1)
SAF = MethodConfig(
  block=2, window=6, sink=2, sink_level="clean", level="input", gradient="attached"
)
PACKED = MethodConfig(block=2, window=4, past="packed", packing="tc_f3k2f2k1_g2")
KEY = 11


def text(prompt: str) -> np.ndarray:
  """[l d]"""
  return tiny.random(zlib.crc32(prompt.encode()), 3, CONFIG.text_dim)


def parts(row: MethodConfig = ROW, config=CONFIG, identity: str = "tiny") -> StreamParts:
  texts = lambda prompts: np.stack([text(prompt) for prompt in prompts])
  return StreamParts(
    config, row, SIGMAS, tiny.params(config), jax.random.key(KEY), SIZE, texts, identity
  )


def quick_engine(parts: StreamParts, options: TickOptions) -> Engine:
  """One that compiles quickly and runs slowly."""
  return Engine(parts, options, compiler_options=dict(compiling._known_options()))


@functools.cache
def noise(seed: int, block: int):
  """noise(level, n) as a generation of this seed draws it."""
  shape = (block, *SIZE, CONFIG.channels)
  return jax.jit(block_noise(jax.random.key(KEY), np.asarray([seed]), shape))


def plain(
  row: MethodConfig, blocks: int, prompts: dict[int, str], *, seed: int = 0, given=None, **options
) -> np.ndarray:
  """[1 f h w c] of all blocks. prompts: by the first block that has them."""
  last = lambda n: prompts[max(start for start in prompts if start <= n)]
  stream = PlainStream(
    CONFIG,
    tiny.params(CONFIG),
    row,
    SIGMAS,
    blocks,
    lambda n: text(last(n))[None],
    noise(seed, row.block),
    **options,
  )
  return np.concatenate(stream.run(given), axis=1)


def take(generation, blocks: int) -> np.ndarray:
  """The next `blocks` blocks: [1 f h w c]."""
  taken = []
  while len(taken) < blocks:
    if emitted := generation.step():
      taken.append(np.asarray(emitted.latents))
  return np.concatenate(taken, axis=1)


def assert_same(actual, expected, rounding: float = 2e-5) -> None:
  actual, expected = np.asarray(actual), np.asarray(expected)
  assert actual.shape == expected.shape
  np.testing.assert_allclose(actual, expected, rtol=0, atol=rounding * np.abs(expected).max())
