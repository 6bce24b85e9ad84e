"""Packed history beside the ring: whole videos, streams and training's exit step against loops that
keep nothing, one forward over everything that may be seen, the history packed frame by frame.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hiar_jax.errors import UserError
from hiar_jax.method import MethodConfig
from hiar_jax.models.frames import Frames, Read, bind
from hiar_jax.packing.schedule import parse
from hiar_jax.rollout import exit_step, sample
from hiar_jax.rollout import tick as ticks
from hiar_jax.rollout.past import packed
from hiar_jax.rollout.past.kinds import kind
from tests.helpers import plain_rollout, tiny
from tests.helpers.compiling import quick_jit
from tests.helpers.slow_cases import slow

BLOCKS = 6
NETWORK = dataclasses.replace(tiny.CONFIG, packing=(2, 4), place_embedding=True)
PARAMS = tiny.params(NETWORK)
TAIL, LONG = "tc_f3k2f2k1_g2", "td_f3k4f1k2f2k1_g2"  # ten frames are before the last block
ROWS = {
  "hiar": MethodConfig(block=2, window=4, past="packed", packing=TAIL),
  "hiar, no tail": MethodConfig(block=2, window=4, past="packed", packing=LONG),
  "clean": MethodConfig(block=2, window=4, past="packed", packing=TAIL, level="clean"),
  "input": MethodConfig(block=2, window=4, past="packed", packing=TAIL, level="input"),
  "attached": MethodConfig(
    block=2, window=4, past="packed", packing=TAIL, level="input", gradient="attached"
  ),
  "self_forcing": MethodConfig(
    block=2, window=4, past="packed", packing=TAIL, order="block_first", level="clean"
  ),
}


class Plain(plain_rollout.Plain):
  """A row with packed history; a given first frame may stand alone in block 0."""

  def __init__(self, row: MethodConfig, table):
    super().__init__("dit", row, BLOCKS * row.block, table, PARAMS)

  def velocity(self, context, n, x, sigma):
    blocks = [*(context[m] for m in range(n)), (x, sigma)]
    frames = [np.arange(m * self.row.block, (m + 1) * self.row.block) for m in range(n + 1)]
    groups = []
    for m, (latents, level) in enumerate(blocks):
      seen = [i for i in range(m) if plain_rollout.sees(frames[m][0], frames[i][0], self.row)]
      history = self.history(blocks[:m], m * self.row.block)
      reads = tuple(Read(group=i) for i in seen)
      groups.append(Frames(latents, jnp.float32(level), frames[m], reads, packed=history))
    return np.asarray(forward(len(groups))(tuple(groups)))

  def history(self, before, first: int) -> tuple[Frames, ...]:
    schedule = parse(self.row.packing)
    frames = [latents[:, i] for latents, _ in before for i in range(self.row.block)]
    levels = [level for _, level in before for _ in range(self.row.block)]
    made, end = [], first - schedule.before[-1].frames
    for group in reversed(schedule.before[:-1]):
      numbers = range(end - group.frames, end)
      there = [p for p in numbers if p >= 0]
      blank = np.zeros_like(tiny.video(0, 1)[:, 0])
      x = np.stack([frames[p] if p >= 0 else blank for p in numbers], axis=1)
      level = np.mean([levels[p] for p in there]) if there else 0
      exists = np.asarray([p >= 0 for p in numbers])
      made.append(self.group(group.pool, x, level, [max(p, 0) for p in numbers], exists))
      end -= group.frames
    if schedule.before_tail == "tc" and end > 0:
      x = np.mean(frames[:end], axis=0)[:, None]
      level = np.mean(levels[:end])
      made.append(self.group(schedule.before[0].pool, x, level, [end // 2], np.asarray([True])))
    return tuple(reversed(made))

  def group(self, pool: int, x, level, positions, exists) -> Frames:
    at = np.asarray(positions)
    level = jnp.float32(level)
    return Frames(x, level, at, exists=exists, text=None, projection=f"packed_k{pool}")


def forward(groups: int):
  if groups not in FORWARDS:
    b = bound()
    FORWARDS[groups] = quick_jit(lambda groups: b(groups).velocity[-1])
  return FORWARDS[groups]


FORWARDS = {}


def bound():
  return bind(NETWORK, PARAMS, tiny.text())


def whole_video(row: MethodConfig, table, given=None, blocks: int = BLOCKS) -> np.ndarray:
  method, shape = row.at(tiny.SIGMAS), tiny.shape(blocks * row.block)
  run = quick_jit(lambda b: sample.rollout(b, tiny.lookup(table), method, shape, given))
  return np.asarray(run(bound()))


def plain(row: MethodConfig, table, stop=None, given=None) -> np.ndarray:
  return np.concatenate(Plain(row, table).rollout(BLOCKS, given, stop), axis=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["input", "hiar", "hiar, no tail", "clean", "self_forcing"])
def test_whole_videos(name):
  row = ROWS[name]
  table = tiny.noise_table(row, BLOCKS)
  video = whole_video(row, table)
  plain_rollout.assert_same(video, plain(row, table))
  usual = dataclasses.replace(row, past="ring", packing="")
  difference = np.abs(video - whole_video(usual, table)).max(axis=(0, 2, 3, 4))
  assert difference[: row.window].max() < 2e-5 < 1e-3 < difference[row.window :].max()


@pytest.mark.slow
def test_a_continuation():
  row, given = ROWS["hiar"], tiny.video(5, 6)
  table = tiny.noise_table(row, BLOCKS)
  video = whole_video(row, table, given, BLOCKS - 3)
  expected = plain(row, table, given=[given[:, i : i + 2] for i in (0, 2, 4)])
  plain_rollout.assert_same(video, expected)


@pytest.mark.parametrize("name", ["hiar, no tail", *slow("hiar")])
def test_what_it_keeps_is_what_a_whole_clip_has(name):
  """However long: frames that are dropped are in the tail's mean."""
  row, blocks = ROWS[name], 14
  context = tiny.video(3, blocks * row.block)
  levels = np.repeat(np.linspace(0, 1, blocks, dtype=np.float32), row.block)
  past = kind(row).empty(NETWORK, row.at(tiny.SIGMAS), tiny.shape(len(levels)), tiny.BATCH)
  assert past.shown.positions.size < len(levels) - row.block  # the last blocks drop some
  write = quick_jit(lambda past, kv, block: past.write(kv, block))
  read_by = quick_jit(lambda past, block: past.read((block,))[0][0])
  for n in range(blocks):
    at = n * row.block + np.arange(row.block)
    block = Frames(context[:, at], levels[n * row.block], jnp.asarray(at))
    before = quick_jit(lambda x, n=n: kind(row).packed(row, n, x, np.tile(levels, (tiny.BATCH, 1))))
    expected = before(context[:, : at[0] + 1])
    there = [group for group in read_by(past, block).packed if group.exists.any()]
    assert len(there) == len(expected)
    for got, want in zip(there, expected, strict=True):
      for name in ("x", "sigma", "positions", "exists"):
        np.testing.assert_allclose(getattr(got, name), getattr(want, name), atol=1e-6)
      assert got.projection == want.projection and got.text is None
    kv = NETWORK.empty_kv(row.block, tiny.BATCH, tiny.HEIGHT, tiny.WIDTH)
    past = write(past, kv, block)
  again = write(past, kv, block)  # encoded again
  assert int(again.tail.count) == int(past.tail.count) > 0


def stream(row: MethodConfig, table):
  """(state, tick) of an empty stream."""
  method, b, noise = row.at(tiny.SIGMAS), bound(), tiny.lookup(table)
  seeds = jnp.zeros(tiny.BATCH, jnp.int32)
  state = ticks.empty(b, method, tiny.shape(BLOCKS * row.block), jax.random.key(0), seeds)
  return state, quick_jit(lambda state: ticks.tick(b, noise, state, tiny.text(), False))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hiar", "input"])
def test_a_stream(name):
  row = ROWS[name]
  table = tiny.noise_table(row, BLOCKS + 4)
  state, tick = stream(row, table)
  blocks, levels = [], tiny.SIGMAS.size - 1
  for _ in range(BLOCKS + levels - 1):
    state, block = tick(state)
    blocks.append(np.asarray(block))
  streamed = np.concatenate(blocks[levels - 1 :], axis=1)
  plain_rollout.assert_same(streamed, plain(row, table))


@pytest.mark.slow
def test_a_stream_from_given_frames():
  """What the filling pipe holds is not written over them."""
  row, given, levels = ROWS["hiar"], tiny.video(5, 6), tiny.SIGMAS.size - 1
  table = tiny.noise_table(row, BLOCKS + 4)
  state, tick = stream(row, table)
  prefill = quick_jit(lambda state: ticks.prefill(bound(), state, given, texts))
  texts = np.repeat(tiny.text()[None], 3, axis=0)
  state = prefill(state)
  blocks = []
  for _ in range(BLOCKS - 3 + levels - 1):
    state, block = tick(state)
    blocks.append(np.asarray(block))
  expected = plain(row, table, given=[given[:, i : i + 2] for i in (0, 2, 4)])
  plain_rollout.assert_same(np.concatenate(blocks[levels - 1 :], axis=1), expected[:, 6:])


def test_a_stream_of_any_length_has_a_state_of_one_size():
  row = ROWS["hiar"]
  sizes = []
  for frames in (20, 2000):
    make = lambda frames=frames: kind(row).empty(
      NETWORK, row.at(tiny.SIGMAS), tiny.shape(frames), 1, True
    )
    sizes.append(jax.tree.map(jnp.shape, jax.eval_shape(make)))
  assert sizes[0] == sizes[1]


@pytest.mark.slow
def test_blocks_that_are_encoded_again_see_their_packed_history():
  """The ring holds two blocks: the older one sees its history alone, the other one both."""
  row = dataclasses.replace(ROWS["hiar"], window=6, packing="tc_f3k2f4k1_g2")
  table, text, level = tiny.noise_table(row, BLOCKS + 4), tiny.text(), 1
  state, tick = stream(row, table)
  for _ in range(BLOCKS + level):
    state = tick(state)[0]
  b, levels = bound(), tiny.SIGMAS.size - 1
  past = quick_jit(lambda s: ticks.recache(b, s, text, jnp.ones(levels, bool)))(state).past
  plain = Plain(row, table)
  sigma = tiny.SIGMAS[level + 1]
  contexts = [(x, sigma) for x in plain.before(BLOCKS, level)[1]]
  # the level works on block BLOCKS next; block BLOCKS - 1 is not in the ring yet
  older, newer = BLOCKS - 3, BLOCKS - 2
  k = row.block
  groups = [
    Frames(
      contexts[m][0],
      jnp.float32(sigma),
      m * k + np.arange(k),
      (Read(group=0),) if m == newer else (),
      packed=plain.history(contexts[:m], m * k),
    )
    for m in (older, newer)
  ]
  kv = quick_jit(lambda groups: b(groups).kv)(tuple(groups))
  for m, own in zip((older, newer), kv, strict=True):
    slots = np.asarray([list(past.positions[level]).index(m * k + i) for i in range(k)])
    plain_rollout.assert_same(past.kv.k[level][:, :, slots], own.k)
    plain_rollout.assert_same(past.kv.v[level][:, :, slots], own.v)


@pytest.mark.parametrize(
  ("name", "level"),
  slow(("input", 1), ("hiar", 0), ("hiar, no tail", 1), ("self_forcing", 1)),
)
def test_the_exit_step(name, level):
  """Its parallel forwards see what the loop saw."""
  row = ROWS[name]
  table = tiny.noise_table(row, BLOCKS)
  shape = tiny.shape(BLOCKS * row.block)
  arguments = bound(), tiny.lookup(table), row.at(tiny.SIGMAS), shape, level
  expected = plain(row, table, level)
  plain_rollout.assert_same(quick_jit(lambda: exit_step.self_rollout(*arguments))(), expected)
  values = quick_jit(lambda: exit_step.self_rollout_without_gradient(*arguments))()
  plain_rollout.assert_same(values, expected)


@pytest.mark.slow
def test_a_level_for_each_frame():
  """As causal init gives them: equal ones are one level."""
  row, f = ROWS["hiar"], 2 * BLOCKS
  context, noisy = tiny.video(1, f), tiny.video(2, f)

  @quick_jit
  def run(context_sigma, sigma):
    return exit_step.teacher_forcing(bound(), context, context_sigma, noisy, sigma, row)

  one = run(jnp.float32(0.6), jnp.float32(0.9))
  levels = lambda *of_halves: jnp.tile(jnp.repeat(jnp.asarray(of_halves), f // 2), (tiny.BATCH, 1))
  plain_rollout.assert_same(run(levels(0.6, 0.6), levels(0.9, 0.9)), one)


def test_a_packed_group_has_the_mean_of_its_levels():
  row, context = ROWS["hiar"], tiny.video(1, 2 * BLOCKS)
  levels = lambda *of_halves: jnp.tile(jnp.repeat(jnp.asarray(of_halves), BLOCKS), (tiny.BATCH, 1))
  schedule, k = parse(row.packing), row.block
  groups = kind(row).packed(row, 5, context, levels(0.2, 0.6))
  # before frame 10: the ring's 8 and 9, the frames 5 to 7 by k2, and the tail's 0 to 4
  assert schedule.history == 5 and k == 2 and len(groups) == 2
  np.testing.assert_allclose([g.sigma[0] for g in groups], [0.2, 1.4 / 3], atol=1e-6)
  np.testing.assert_array_equal([g.positions[-1] for g in groups], [2, 7])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["attached", "hiar"])
def test_the_exit_step_trains_the_packed_projections(name):
  row = ROWS[name]
  table, shape = tiny.noise_table(row, BLOCKS), tiny.shape(BLOCKS * row.block)

  def loss(params):
    b = bind(NETWORK, params, tiny.text())
    return jnp.sum(
      exit_step.self_rollout(b, tiny.lookup(table), row.at(tiny.SIGMAS), shape, 1) ** 2
    )

  gradient = quick_jit(jax.grad(loss))(PARAMS)
  assert np.abs(gradient["packed_k2"]["kernel"]).max() > 1e-3


@pytest.mark.parametrize(
  "changes, said",
  [
    (dict(packing="td_f4k2f2k1_g3"), "_g2"),
    (dict(packing="td_f4k2f4k1_g2"), "expected packed groups, then the window's past frames"),
    (dict(packing="td_f2k1_g2"), "expected packed groups"),
    (dict(packing="ta_f4k2f2k1_g2"), "'ta_f4k2f2k1_g2': expected td or tc"),
    (dict(packing="td_f4k2f2k1_g2_x_f1k1"), "frames before a block alone"),
    (dict(packing="td_f4k2f2k1_g2+D"), "frames before a block alone"),
    (dict(packing=""), "exactly one gN"),
    (dict(window=5, sink=1, packing="td_f4k2f3k1_g2"), "no history.sink"),
    (dict(window=3, packing="td_f4k2f1k1_g2"), "at least two blocks"),
  ],
)
def test_schedules_that_do_not_fit(changes, said):
  with pytest.raises(UserError) as error:
    packed.schedule_of(dataclasses.replace(ROWS["hiar"], **changes))
  assert said in str(error.value)
