"""Devices: the same numbers on every layout, and nothing moves between levels but a block."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hiar_jax.method import MethodConfig
from hiar_jax.streaming.compiled_tick import Engine, TickOptions
from hiar_jax.streaming.layout import Layout
from hiar_jax.streaming.live_video import LiveVideo
from tests.helpers import tiny
from tests.helpers.tiny_stream import CONFIG, ROW, SIZE, assert_same, parts, quick_engine, take

LONG = MethodConfig(block=2, window=41)  # caches are larger than anything else
SIZES = [
  (2, 1, 1),
  (4, 1, 1),
  (1, 2, 1),
  (1, 1, 2),
  (2, 2, 1),
  (1, 2, 2),
  (2, 2, 2),
  (4, 2, 1),
  (4, 1, 2),
]
QUICK = ((4, 1, 1),)
LAYOUTS = [
  pytest.param(Layout(*sizes), marks=() if sizes in QUICK else pytest.mark.slow) for sizes in SIZES
]
BYTES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "pred": 1}
KINDS = (
  "all-gather",
  "all-reduce",
  "all-to-all",
  "reduce-scatter",
  "collective-permute",
  "collective-broadcast",
)
COLLECTIVE = re.compile(rf"= (\(?[^=]*?) ({'|'.join(KINDS)})(?:-start)?\(")


@functools.cache
def engine(layout: Layout) -> Engine:
  return quick_engine(parts(), TickOptions(layout=layout))


def video(layout: Layout) -> np.ndarray:
  """A few blocks after a given one, with a change of prompt on the way, and the history encoded
  again.
  """
  start = tiny.random(5, 1, ROW.block, *SIZE, CONFIG.channels)
  generation = LiveVideo(engine(layout), "a red circle", seed=3, start=start)
  first = take(generation, 3)
  generation.change_prompt("a blue square", recache=True)
  return np.concatenate([first, take(generation, 5)], axis=1)


@pytest.fixture(scope="module")
def on_one_device() -> np.ndarray:
  return video(Layout())


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_same_numbers_on_every_layout(layout, on_one_device):
  assert_same(video(layout), on_one_device)
  assert engine(layout).mesh.size == layout.devices


def test_the_same_layout_gives_the_same_bits():
  np.testing.assert_array_equal(video(Layout(4)), video(Layout(4)))


def test_every_level_keeps_its_own_cache():
  """With as many devices as levels, each holds its own level and no other."""
  generation = LiveVideo(engine(Layout(4)), "a", seed=0)
  generation.step()
  pipe = generation._pipe
  for leaf in jax.tree.leaves((pipe.latents, pipe.context, pipe.past)):
    shards = sorted(leaf.addressable_shards, key=lambda shard: shard.index[0].start)
    assert [shard.index[0] for shard in shards] == [slice(i, i + 1) for i in range(4)]
    assert len({shard.device for shard in shards}) == 4


def test_every_device_of_a_level_has_its_share():
  """Of the network's weights and of the caches' heads over `tensor`, of the frame's rows over
  `sequence`.
  """
  share = lambda leaf: {shard.data.size / leaf.size for shard in leaf.addressable_shards}
  split = engine(Layout(4, 2))
  layers = split.params["layers"]
  for kernel in (
    layers["self_attention"]["q"]["kernel"],
    layers["mlp_in"]["kernel"],
    layers["mlp_out"]["kernel"],
  ):
    assert share(kernel) == {1 / 2}
  pipe = LiveVideo(split, "a")._pipe
  assert share(pipe.past.kv.k) == {1 / 8} and share(pipe.latents) == {1 / 4}
  pipe = LiveVideo(engine(Layout(4, 1, 2)), "a")._pipe
  assert share(pipe.past.kv.k) == share(pipe.latents) == share(pipe.past.latents) == {1 / 8}


@functools.cache
def moved(layout: Layout, merge_tokens: bool = False) -> list[tuple[str, int]]:
  """(collective, bytes of its result on a device) of each one in the compiled tick."""
  model = parts(LONG)
  model = dataclasses.replace(
    model, config=dataclasses.replace(model.config, merge_tokens=merge_tokens)
  )
  engine = quick_engine(model, TickOptions(layout=layout))
  text = jax.ShapeDtypeStruct((1, 3, 6), jnp.float32, sharding=engine.whole)
  with jax.set_mesh(engine.mesh):
    lowered = engine.main.compiled_tick.lower(
      engine.params, engine.main.abstract(text), text, jax.ShapeDtypeStruct((), bool)
    )
  found = []
  for line in lowered.compile().as_text().splitlines():
    if match := COLLECTIVE.search(line):
      shapes = re.findall(r"(\w+)\[([\d,]*)\]", match[1])
      found.append(
        (
          match[2],
          sum(
            BYTES[dtype] * math.prod(map(int, filter(None, sizes.split(","))))
            for dtype, sizes in shapes
          ),
        )
      )
  return found


def block_bytes() -> int:
  c, (h, w) = parts().config, parts().size
  return 4 * LONG.block * h * w * c.channels


def test_levels_exchange_one_block_and_nothing_else():
  """Per tick: each block one level on, by collective permute; and the block that leaves, to every
  device that may want it.
  """
  found, block = moved(Layout(4)), block_bytes()
  permutes = [size for kind, size in found if kind == "collective-permute"]
  others = [size for kind, size in found if kind != "collective-permute"]
  assert permutes == [block], found
  assert sum(others) <= block, found


@pytest.mark.slow
def test_two_levels_a_device_exchange_as_little():
  assert sum(size for _, size in moved(Layout(2))) <= 2 * block_bytes()


def test_the_parser_sees_what_moves():
  """On other layouts there is more: were the parser blind, the tests above would hold for
  anything.
  """
  found = moved(Layout(4, 2))
  assert {kind for kind, _ in found} >= {"collective-permute", "all-reduce"}
  assert len(found) > len(moved(Layout(4)))


@pytest.mark.parametrize("layout", [Layout(4, 2), Layout(4, 1, 2)], ids=str)
def test_no_layout_moves_a_cache(layout):
  """Within a level activations move; the smallest thing that must not, one layer's keys of one
  level, is larger than all of them.
  """
  c, (h, w) = parts().config, parts().size
  keys = (
    4 * (LONG.window - LONG.block) * c.tokens(h, w) * c.dim // (layout.tensor * layout.sequence)
  )
  found = moved(layout)
  assert max(size for _, size in found) < keys, found


def test_training_with_merged_tokens_makes_a_stream_move_no_more():
  layout = Layout(4, 1, 2)
  assert moved(layout, merge_tokens=True) == moved(layout)
