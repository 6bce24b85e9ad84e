"""The pipe: its diagonals give what the loops of the step-first rollout give, for every row of the
table that can be piped.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hiar_jax.errors import UserError
from hiar_jax.method import Method
from hiar_jax.models import dit, rope
from hiar_jax.rollout import image_to_video, sample
from hiar_jax.rollout import tick as pipes
from hiar_jax.rollout.blocks import block_positions, join_blocks
from hiar_jax.rollout.past import relative_sink
from hiar_jax.rollout.tick import PipelineMethod
from tests.helpers import golden_cases, tiny
from tests.helpers.compiling import quick_jit
from tests.helpers.golden_cases import assert_close, channels_last, noise_table

BLOCKS = 6
ROWS = {
  "hiar": Method(block=2, window=0),
  "hiar_window": Method(block=2, window=4),
  "hiar_no_past": Method(block=2, window=2),
  "hiar_sink": Method(block=2, window=5, sink=1),
  "hiar_sink_across_blocks": Method(block=2, window=6, sink=3),
  "hiar_frames": Method(block=1, window=3, sink=1),
  "euler": Method(block=2, window=5, renoise="euler"),
  "clean": Method(block=2, window=5, level="clean"),
  "input": Method(block=2, window=5, sink=1, level="input"),
}
CASES = [("toy", name) for name in ROWS] + [("dit", "hiar_sink"), ("dit", "input")]


def piped(
  plan: PipelineMethod, network, config, table, text, given=None, size=(tiny.HEIGHT, tiny.WIDTH)
):
  """All new blocks [b f h w c], one scan over ticks; noise is that of `table` [level, block ...],
  which counts the given blocks.
  """
  k = plan.method.block
  given_blocks = 0 if given is None else -(-given.shape[1] // k)
  frames = table.shape[1] * k
  start = pipes.empty(
    plan,
    config,
    text,
    jax.random.key(0),
    jnp.zeros(len(text), jnp.int32),
    frames=frames,
    height=size[0],
    width=size[1],
  )
  if given is not None:
    start = pipes.prefill(plan, network, start, given, jnp.stack([text] * given_blocks))
  noise = lambda level, n: table[level, n]

  def one(state, _):
    return pipes.tick(plan, network, noise, state, text, jnp.asarray(False))

  _, out = jax.lax.scan(one, start, None, length=table.shape[1] - given_blocks + plan.levels - 1)
  return join_blocks(out[plan.levels - 1 :])


def tiny_network(name: str, params):
  return (
    (lambda text: tiny.toy(params))
    if name == "toy"
    else functools.partial(dit.bind, tiny.CONFIG, params)
  )


@functools.cache
def programs(name: str, row: Method, given: int = 0):
  """(by the pipe, by the rollout): each (table, given or None) -> the new blocks."""
  _, params, config = tiny.NETWORKS[name]
  plan, text = PipelineMethod(row, tuple(tiny.SIGMAS.tolist())), jnp.asarray(tiny.text())

  def by_pipe(params, table, start):
    return piped(plan, tiny_network(name, params), config, table, text, start)

  def by_rollout(params, table, start):
    cache = tiny.cache(row, table.shape[1] * row.block, config)
    video = sample.rollout(
      tiny.NETWORKS[name][0](params),
      tiny.lookup(table),
      cache,
      jnp.asarray(tiny.SIGMAS),
      row,
      table.shape[1] - given,
      given=start,
    )
    return video[:, given * row.block :]

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
  row = Method(block=2, window=6, sink=2, sink_level="clean", level="input")
  table = jnp.asarray(tiny.noise_table(row, BLOCKS))
  by_pipe, _ = programs("toy", row, 1)
  video = programs("toy", row)[1](table, None)
  assert_same(by_pipe(table, video[:, :2]), video[:, 2:])


def test_starting_from_a_picture_equals_the_rollout():
  row, params = ROWS["hiar_sink"], tiny.NETWORKS["dit"][1]
  table, picture = jnp.asarray(tiny.noise_table(row, 4)), tiny.video(5, 1)
  cache = tiny.cache(row, 4 * row.block)
  expected = quick_jit(
    lambda params: image_to_video.rollout(
      tiny.bind(params),
      tiny.lookup(table),
      cache,
      jnp.asarray(tiny.SIGMAS),
      row,
      3,
      jnp.asarray(picture),
    )
  )(params)
  by_pipe, _ = programs("dit", row)
  assert_same(by_pipe(table, picture), expected[:, 1:])


@pytest.mark.parametrize("row", [ROWS["hiar_sink"], ROWS["input"]], ids=["hiar_sink", "input"])
def test_what_the_filling_pipe_holds_is_seen_by_nobody(row):
  """Blocks that do not exist are made of zeros; were they seen, another beginning would change the
  video.
  """
  plan = PipelineMethod(row, tuple(tiny.SIGMAS.tolist()))
  _, params, config = tiny.NETWORKS["toy"]
  text, table = jnp.asarray(tiny.text()), jnp.asarray(tiny.noise_table(row, 4))

  def run(fill):
    state = pipes.empty(
      plan,
      config,
      text,
      jax.random.key(0),
      jnp.zeros(2, jnp.int32),
      frames=8,
      height=tiny.HEIGHT,
      width=tiny.WIDTH,
    )
    state = state.replace(
      latents=state.latents + fill, context=None if state.context is None else state.context + fill
    )
    network = tiny_network("toy", params)
    tick = lambda state, _: pipes.tick(
      plan, network, tiny.lookup(table), state, text, jnp.asarray(False)
    )
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


@pytest.mark.parametrize(
  ("case", "file"), RECORDED, ids=lambda part: part if isinstance(part, str) else part.path.name
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
  sigmas = golden_cases.levels(z["denoising_timesteps"])
  table = noise_table(z["noise"], z.get("step_noise"), row.block, len(sigmas))
  video, text = channels_last(z["latents"]), jnp.asarray(z["prompt_embeds"])
  given = channels_last(z["initial_latent"]) if "initial_latent" in z else None
  first = 0 if given is None else given.shape[1] // row.block
  table = np.concatenate([np.zeros_like(table[:, :1])] * first + [table], axis=1)
  plan = PipelineMethod(row, tuple(float(sigma) for sigma in sigmas))

  def run(params, table, given):
    return piped(
      plan,
      functools.partial(dit.bind, case.config, params),
      case.config,
      table,
      text,
      given,
      size=video.shape[2:4],
    )

  out = quick_jit(run)(case.params("generator"), jnp.asarray(table), given)
  assert_close(out, video[:, first * row.block :], "video")


# -- a sink at relative positions


def test_turned_keys_are_those_of_frames_further_on():
  keys, far = tiny.random(3, 2, 1, 3, 4, 2, 12), 700_000_001
  at = lambda positions: rope.rotation(jnp.asarray(positions), 2, 2, 12)
  here, there = at([0, 1, 2]), at([far, far + 1, far + 2])
  rotate = lambda rotation: jnp.stack([rope.apply(layer, *rotation) for layer in keys])
  assert_same(relative_sink.rotate(rotate(here), jnp.asarray(far)), rotate(there))


def test_the_sink_is_carried_as_far_as_the_window_rolls():
  row = Method(block=2, window=6, sink=2)
  moved = [int(relative_sink.distance(block_positions(n, row), row)) for n in range(6)]
  assert moved == [0, 0, 0, 2, 4, 6]  # block n ends at 2 n + 1; its window of 4 is full at n = 2


# -- refused


def test_block_first_is_refused_with_its_reason():
  with pytest.raises(
    UserError, match="block_first.*only when the one before it is done.*hiar_jax.generate"
  ):
    PipelineMethod(Method(order="block_first", level="clean"), (1.0, 0.0))


@pytest.mark.parametrize(
  ("row", "place", "said"),
  [
    (
      Method(block=2, window=5, sink=1),
      "moving",
      "sink_positions = 'moving': expected one of absolute, relative",
    ),
    (
      Method(block=2, window=3, sink=1),
      "relative",
      "window = 3 is too short to carry a sink of 1 along.* at least 4",
    ),
  ],
)
def test_what_a_plan_cannot_be(row, place, said):
  with pytest.raises(UserError, match=said):
    PipelineMethod(row, (1.0, 0.5, 0.0), place)
