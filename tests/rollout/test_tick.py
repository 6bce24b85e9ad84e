"""The pipeline: its diagonals give what the loops of the step-first rollout give, for every row of
the table that can be streamed.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hiar_jax.errors import UserError
from hiar_jax.method import Method, MethodConfig
from hiar_jax.models import frames
from hiar_jax.models.frames import Bound
from hiar_jax.rollout import sample
from hiar_jax.rollout import tick as pipes
from hiar_jax.rollout.blocks import join_blocks
from hiar_jax.types import LatentShape
from tests.helpers import golden_cases, tiny
from tests.helpers.compiling import quick_jit
from tests.helpers.golden_cases import assert_close, channels_last, noise_table
from tests.helpers.slow_cases import few, slow

BLOCKS = 6
ROWS = {
  "hiar": MethodConfig(block=2, window=0),
  "hiar_window": MethodConfig(block=2, window=4),
  "hiar_no_past": MethodConfig(block=2, window=2),
  "hiar_sink": MethodConfig(block=2, window=5, sink=1),
  "hiar_sink_across_blocks": MethodConfig(block=2, window=6, sink=3),
  "hiar_frames": MethodConfig(block=1, window=3, sink=1),
  "euler": MethodConfig(block=2, window=5, renoise="euler"),
  "clean": MethodConfig(block=2, window=5, level="clean"),
  "fixed": MethodConfig(block=2, window=5, level="fixed:0.3"),
  "input": MethodConfig(block=2, window=5, sink=1, level="input"),
}
CASES = [("toy", name) for name in ROWS] + slow(("dit", "hiar_sink"), ("dit", "input"))


def piped(method: Method, bound: Bound, table, given=None, size=(tiny.HEIGHT, tiny.WIDTH)):
  """All new blocks [b f h w c], one scan over ticks; noise is that of `table` [level, block ...],
  which counts the given blocks.
  """
  text = bound.texts[0]
  given_blocks = 0 if given is None else -(-given.shape[1] // method.block)
  shape = LatentShape(table.shape[1] * method.block, *size, bound.network.channels)
  seeds = jnp.zeros(bound.batch, jnp.int32)
  start = pipes.empty(bound, method, shape, jax.random.key(0), seeds)
  if given is not None:
    start = pipes.prefill(bound, start, given, jnp.stack([text] * given_blocks))
  bound = bound.with_texts(bound.texts + jnp.nan)  # a tick hears those of the blocks alone

  def one(state, _):
    noise = lambda level, n: table[level, n]
    return pipes.tick(bound, noise, state, text, jnp.asarray(False))

  ticks = table.shape[1] - given_blocks + method.levels - 1
  _, out = jax.lax.scan(one, start, None, length=ticks)
  return join_blocks(out[method.levels - 1 :])


@functools.cache
def programs(name: str, row: MethodConfig, given: int = 0):
  """(by the pipeline, by the rollout): each (table, given frames or None) -> the new blocks.

  given: how many blocks of the table are given.
  """
  method = row.at(tiny.SIGMAS)

  def by_pipe(params, table, start):
    return piped(method, tiny.bind(name, params), table, start)

  def by_rollout(params, table, start):
    shape = tiny.shape((table.shape[1] - given) * row.block)
    video = sample.rollout(tiny.bind(name, params), tiny.lookup(table), method, shape, start)
    return video[:, 0 if start is None else start.shape[1] :]

  params = tiny.NETWORKS[name][1]
  return tuple(functools.partial(quick_jit(run), params) for run in (by_pipe, by_rollout))


def assert_same(actual, expected):
  assert np.shape(actual) == np.shape(expected)
  np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize(("network", "name"), CASES)
def test_equals_the_step_first_rollout(network, name):
  row = ROWS[name]
  table = jnp.asarray(tiny.noise_table(row, BLOCKS))
  by_pipe, by_rollout = programs(network, row)
  assert_same(by_pipe(table, None), by_rollout(table, None))


@pytest.mark.parametrize(
  ("name", "given"),
  [("hiar_sink", 1), ("hiar_sink_across_blocks", 3), ("input", 2), ("hiar_frames", 2)],
)
def test_continuation_equals_the_rollouts(name, given):
  row = ROWS[name]
  table, start = jnp.asarray(tiny.noise_table(row, BLOCKS)), tiny.video(5, given * row.block)
  by_pipe, by_rollout = programs("toy", row, given)
  assert_same(by_pipe(table, start), by_rollout(table, start))


def test_blocks_after_a_clean_sink_equal_the_rollouts():
  row = MethodConfig(block=2, window=6, sink=2, sink_level="clean", level="input")
  table = jnp.asarray(tiny.noise_table(row, BLOCKS))
  by_pipe, _ = programs("toy", row, 1)
  video = programs("toy", row)[1](table, None)
  assert_same(by_pipe(table, video[:, :2]), video[:, 2:])


@pytest.mark.slow
def test_starting_from_a_picture_equals_the_rollout():
  row = ROWS["hiar_sink"]
  table, picture = jnp.asarray(tiny.noise_table(row, 4)), tiny.video(5, 1)
  by_pipe, by_rollout = programs("dit", row, 1)
  assert_same(by_pipe(table, picture), by_rollout(table, picture))


@pytest.mark.parametrize("row", [ROWS["hiar_sink"], ROWS["input"]], ids=["hiar_sink", "input"])
def test_what_the_filling_pipe_holds_is_seen_by_nobody(row):
  """Blocks that do not exist are made of zeros; were they seen, another beginning would change the
  video.
  """
  bound, method = tiny.bind("toy"), row.at(tiny.SIGMAS)
  text, table = bound.texts[0], jnp.asarray(tiny.noise_table(row, 4))

  def run(fill):
    seeds = jnp.zeros(bound.batch, jnp.int32)
    state = pipes.empty(bound, method, tiny.shape(8), jax.random.key(0), seeds)
    state = state.replace(
      latents=state.latents + fill, context=None if state.context is None else state.context + fill
    )

    def tick(state, _):
      return pipes.tick(bound, tiny.lookup(table), state, text, jnp.asarray(False))

    return jax.lax.scan(tick, state, None, length=6)[1][2:]

  run = quick_jit(run)
  np.testing.assert_array_equal(run(0.0), run(3.0))


# -- recordings of the published implementation

RECORDED = [
  (case, path.name)
  for case in golden_cases.cases()
  for path in sorted(case.path.glob("*_step_first*.npz"))
]


def test_recordings_are_found():
  assert {name.split("_")[0] for _, name in RECORDED} == {"rollout", "continuation"} and len(
    RECORDED
  ) >= 8


# what compiles for long, where a recording of its kind stays, here or in test_tick_golden.py
LONG = {
  ("dit_small", "continuation_step_first.npz"),
  ("dit_framewise", "continuation_step_first.npz"),
  ("dit_small", "rollout_step_first.npz"),
}
QUICK = [(case, file) for case, file in RECORDED if (case.path.name, file) not in LONG]


@pytest.mark.parametrize(
  ("case", "file"),
  few(RECORDED, *QUICK),
  ids=lambda part: part if isinstance(part, str) else part.path.name,
)
def test_recording(case, file):
  z = case.load(file)
  rolled = case.sizes if "window" in file else {}
  row = case.history(
    level="clean" if "clean_context" in file else "output",
    renoise="euler" if "ode" in file else "fresh",
    window=rolled.get("window", 0),
    sink=rolled.get("sink", 0),
  )
  method = row.at(golden_cases.levels(z["denoising_timesteps"]))
  table = noise_table(z["noise"], z.get("step_noise"), row.block, len(method.sigmas))
  video, text = channels_last(z["latents"]), jnp.asarray(z["prompt_embeds"])
  given = channels_last(z["initial_latent"]) if "initial_latent" in z else None
  first = 0 if given is None else given.shape[1] // row.block
  table = np.concatenate([np.zeros_like(table[:, :1])] * first + [table], axis=1)

  def run(params, table, given):
    bound = frames.bind(case.config, params, text)
    return piped(method, bound, table, given, size=video.shape[2:4])

  out = quick_jit(run)(case.params("generator"), jnp.asarray(table), given)
  assert_close(out, video[:, first * row.block :], "video")


# -- refused


@pytest.mark.parametrize(
  ("row", "place", "said"),
  [
    (
      MethodConfig(block=2, window=5, sink=1),
      "moving",
      "sink_positions = 'moving': expected one of absolute, relative",
    ),
    (
      MethodConfig(block=2, window=3, sink=1),
      "relative",
      "window = 3 is too short to carry a sink of 1 along.* at least 4",
    ),
  ],
)
def test_what_a_plan_cannot_be(row, place, said):
  with pytest.raises(UserError, match=said):
    row.at((1.0, 0.5, 0.0), place)
