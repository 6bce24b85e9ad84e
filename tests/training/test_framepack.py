"""FramePack's training step: the loss by hand, where its gradient goes, what it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hiar_jax import flow
from hiar_jax.errors import UserError
from hiar_jax.losses.flow_matching import flow_matching, sample_sigma
from hiar_jax.models.frames import bind
from hiar_jax.packing import orders
from hiar_jax.packing.codebook import Codebook
from hiar_jax.packing.rows import groups_of_row, tables
from hiar_jax.packing.similarity import choose
from hiar_jax.rollout.noise import example_keys, example_normal
from hiar_jax.training import framepack, teacher
from hiar_jax.training.framepack import FramePackConfig
from hiar_jax.training.state import create_state
from tests.helpers import tiny
from tests.helpers.compiling import quick_jit
from tests.helpers.slow_cases import few

NETWORK = dataclasses.replace(tiny.CONFIG, packing=(1, 2))
FRAMES = 6
NEGATIVE = framepack.Frozen(jnp.asarray(0.1 * tiny.text()[:1]))


def config(**changes) -> FramePackConfig:
  fields = dict(steps=10, batch=2, lr=1e-3, packing="td_f2k2f1k1_g2", caption_dropout=0.0)
  return FramePackConfig(**fields | changes)


def batch(frames: int = FRAMES) -> dict:
  index = np.arange(tiny.BATCH, dtype=np.int32)
  return {"latents": tiny.video(1, frames), "text": tiny.text(), "example_id": index}


windows = jax.jit(teacher.windows, static_argnums=2, static_argnames="openings")


def loss_alone(step):
  """(state, batch, frozen) -> loss: what an update does with the gradient is not compiled."""
  return quick_jit(lambda *given: step(*given)[1]["loss"])


def run(c: FramePackConfig, frames: int = FRAMES, optimizer=None, state=None, **changes):
  optimizer = optimizer or optax.sgd(1.0)
  state = state or create_state(jax.random.key(0), tiny.params(NETWORK), optimizer)
  step = quick_jit(framepack.make_step(c, NETWORK, optimizer, frames))
  return state, *step(state, batch(frames) | changes, NEGATIVE)


def test_the_loss_by_hand():
  """One section without history: the flow matching of a clip whose context is zeros."""
  c = config()
  state = create_state(jax.random.key(0), tiny.params(NETWORK), optax.sgd(1.0))
  step = loss_alone(framepack.make_step(c, NETWORK, optax.sgd(1.0), 2))
  found = step(state, batch(2), NEGATIVE)
  key = jax.random.fold_in(jax.random.fold_in(state.key, 0), 1)
  keys = jax.vmap(lambda k: jax.random.split(k, 4))(example_keys(key, batch()["example_id"]))
  sigma = framepack.sample_sigma(keys[:, 1], c.shift)
  x0 = tiny.video(1, 2)
  eps = framepack.example_normal(keys[:, 3], x0.shape[1:])
  x = flow.add_noise(x0, eps, sigma)
  (table,) = c.rows(2)
  row = jax.tree.map(lambda part: part[0], table)
  groups = quick_jit(lambda *given: groups_of_row(c.parsed, c.history, *given))(x0, row, x, sigma)
  groups = jax.device_get(groups)
  assert all((group.x == 0).all() for group in groups[:-1])
  forward = quick_jit(lambda params, groups: bind(NETWORK, params, tiny.text())(groups))
  v = forward(tiny.params(NETWORK), groups).velocity[-1]
  want = np.mean((v - (eps - x0)) ** 2)
  np.testing.assert_allclose(found, want, rtol=1e-5)


def test_a_later_clip_of_a_video_has_later_places():
  """Frame indices go on where the clip starts: without them its caption would be of the start."""
  places = dataclasses.replace(NETWORK, place_embedding=True, places=(4, 4))
  state = create_state(jax.random.key(0), tiny.params(places), optax.sgd(1.0))
  step = loss_alone(framepack.make_step(config(), places, optax.sgd(1.0), FRAMES))
  starts = [None, np.zeros(2, np.int32), np.asarray([0, 4], np.int32)]
  clips = [batch() | ({} if x is None else {"start": x}) for x in starts]
  plain, first, later = (step(state, clip, NEGATIVE) for clip in clips)
  assert plain == first and abs(later - plain) > 1e-4


def test_the_teacher_is_trained_on_windows_of_clips():
  """The loss by hand: frames, and their indices, from where the window begins."""
  places = dataclasses.replace(tiny.CONFIG, place_embedding=True, places=(FRAMES, 1))
  c = teacher.TeacherConfig(steps=10, batch=2, lr=1e-3, caption_dropout=0.0, frames=2)
  state = create_state(jax.random.key(0), tiny.params(places), optax.sgd(1.0))
  step = loss_alone(teacher.make_step(c, places, optax.sgd(1.0)))
  start = np.asarray([0, 1], np.int32)
  found = step(state, batch() | {"start": start}, NEGATIVE.negative)
  examples = example_keys(jax.random.fold_in(state.key, 0), batch()["example_id"])
  x0, first = teacher.windows(examples, jnp.asarray(batch()["latents"]), 2)
  for i, at in enumerate(np.asarray(first)):
    np.testing.assert_array_equal(x0[i], batch()["latents"][i, at : at + 2])
  assert first.max() > 0
  keys = jax.vmap(lambda k: jax.random.split(k, 3))(examples)
  sigma, eps = sample_sigma(keys[:, 1], c.shift), example_normal(keys[:, 2], x0.shape[1:])
  loss = quick_jit(
    lambda params: flow_matching(
      bind(places, params, tiny.text(), start + first), x0, eps, sigma
    ).mean()
  )
  np.testing.assert_allclose(found, loss(tiny.params(places)), rtol=1e-6)


def test_windows_begin_anywhere():
  clips = np.broadcast_to(
    np.arange(4.0, dtype=np.float32)[None, :, None, None, None], (64, 4, 1, 1, 1)
  )
  cut, first = jax.device_get(windows(jax.random.split(jax.random.key(1), 64), clips, 2))
  assert set(first.tolist()) == {0, 1, 2}
  np.testing.assert_array_equal(cut[:, :, 0, 0, 0], first[:, None] + np.arange(2)[None])


@pytest.mark.slow
def test_a_share_of_the_windows_opens_its_clip():
  """The others stay where they were drawn."""
  keys, clips = jax.random.split(jax.random.key(1), 256), np.zeros((256, 40, 1, 1, 1), np.float32)
  drawn = lambda openings: np.asarray(windows(keys, clips, 2, openings=openings)[1])
  anywhere, half = drawn(0.0), drawn(0.5)
  assert 0.4 < (half == 0).mean() < 0.6
  np.testing.assert_array_equal(half, np.where(half == 0, 0, anywhere))
  assert not drawn(1.0).any()
  c = teacher.TeacherConfig(steps=10, batch=2, lr=1e-3, frames=2, openings=1.0)
  step = loss_alone(teacher.make_step(c, tiny.CONFIG, optax.sgd(1.0)))
  state = create_state(jax.random.key(0), tiny.params(), optax.sgd(1.0))
  opening = batch() | {"latents": batch()["latents"][:, :2]}
  assert step(state, batch(), NEGATIVE.negative) == step(state, opening, NEGATIVE.negative)
  with pytest.raises(UserError, match=r"openings = 1.5: expected 0 to 1"):
    dataclasses.replace(c, openings=1.5)


@pytest.mark.slow
def test_discretised_history_is_read_and_not_learnt():
  """One section with two frames behind it: as if the clip had centroids there, and itself after;
  history_noise comes on top of both.
  """
  book = Codebook(tiny.random(8, 5, 2))
  c = config(given=2, packing="td_f2k2f1k1_g2+D", history_noise=0.3)
  clip = batch(4)["latents"]
  shown = np.asarray(book.discretise(jnp.asarray(clip)))
  past = np.concatenate([shown[:, :2], clip[:, 2:]], axis=1)
  state = create_state(jax.random.key(0), tiny.params(NETWORK), optax.sgd(1.0))

  def loss_with(codebook):
    step = loss_alone(framepack.make_step(c, NETWORK, optax.sgd(1.0), 4, codebook=codebook))
    return lambda clip: step(state, batch(4) | {"latents": clip}, NEGATIVE)

  discretised, as_it_is = loss_with(book), loss_with(None)
  got = discretised(clip)
  np.testing.assert_allclose(got, as_it_is(past), rtol=1e-6)
  assert abs(got - as_it_is(clip)) > 1e-4 and abs(got - as_it_is(shown)) > 1e-4


def test_rows_are_the_steps_of_all_orders():
  c = config(packing="td_f2k2f1k1_g2_x_f1k1", orders=("vanilla", "both_ends"))
  one, two = sorted(c.rows(8), key=lambda table: table.sections.shape[1])
  assert one.sections.tolist() == [[0], [1], [2], [3], [1], [2]]
  assert two.sections.tolist() == [[0, 3]] and two.generates.tolist() == [[0, 1, 6, 7]]
  # in time's order what lies behind is not there; with both ends made it is
  assert one.context[-1].tolist() == [[-1]] * 4 + [[6]] * 2


@pytest.mark.slow
def test_what_is_trained():
  """The packed projections get a gradient, and so do the parameters that the teacher had."""
  before, after, _ = jax.device_get(run(config()))
  moved = jax.tree.map(lambda x, y: float(np.abs(x - y).max()), before.params, after.params)
  for name in ("packed_k1", "packed_k2", "patch_embedding", "head"):
    assert moved[name]["kernel"] > 0, name


def test_every_order_of_sections_is_drawn():
  """Over steps: losses of clips that agree in all but one section part for some of them alone."""
  c = config()
  optimizer = optax.sgd(0.0)
  state = create_state(jax.random.key(0), tiny.params(NETWORK), optimizer)
  step = loss_alone(framepack.make_step(c, NETWORK, optimizer, FRAMES))
  changed = batch()["latents"].copy()
  changed[:, 4:] += 1.0  # the last section, which is nobody's context
  seen = set()
  for i in range(12):
    at = state.replace(step=jnp.asarray(i, jnp.int32))
    losses = [step(at, batch() | {"latents": x}, NEGATIVE) for x in (batch()["latents"], changed)]
    seen.add(bool(losses[0] == losses[1]))
  assert seen == {True, False}


@pytest.mark.slow
def test_mixed_orders_train():
  c = config(packing="td_f2k2f1k1_g2_x_f1k1", orders=("vanilla", "both_ends"), history_noise=0.2)
  optimizer = c.optimizer(NETWORK)
  state = create_state(jax.random.key(0), tiny.params(NETWORK), optimizer)
  step = quick_jit(framepack.make_step(c, NETWORK, optimizer, 8))
  losses = []
  for _ in range(8):
    state, metrics = step(state, batch(8), NEGATIVE)
    losses.append(float(metrics["loss"]))
  assert np.isfinite(losses).all() and int(state.step) == 8
  assert np.isfinite(float(metrics["grad_norm"]))


KEPT = {
  "tc": dict(packing="tc_f2k2f1k1_g2"),
  "ta": dict(packing="ta_f2k2f1k1_g2"),
  "similar": dict(sort="similarity"),
  "similar, tc": dict(packing="tc_f2k2f1k1_g2", sort="similarity"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", KEPT)
def test_tails_and_sorted_history_train(name):
  c = config(**KEPT[name])
  optimizer = optax.adam(3e-3)
  state = create_state(jax.random.key(0), tiny.params(NETWORK), optimizer)
  step = quick_jit(framepack.make_step(c, NETWORK, optimizer, 8))
  losses = []
  for _ in range(30):
    state, metrics = step(state, batch(8), NEGATIVE)
    losses.append(float(metrics["loss"]))
  assert np.isfinite(losses).all() and np.mean(losses[-8:]) < 0.8 * np.mean(losses[:8])


@pytest.mark.parametrize("name", few(KEPT, "similar, tc"))
def test_their_loss_by_hand(name):
  """Of one step of one example, its context gathered frame by frame."""
  c, clip = config(**KEPT[name]), tiny.video(1, 8)
  steps = orders.plan(c.parsed, orders.vanilla(4), similar=c.sort == "similarity")
  assert sum(len(table.generates) for table in c.rows(8)) == len(steps) == 4
  (table,) = tables(steps[3:])
  keys = jax.vmap(lambda k: jax.random.split(k, 2))(jax.random.split(jax.random.key(1), 2))
  sigma = np.asarray([0.3, 0.8], np.float32)
  shown = clip.copy()
  shown[:, 6:] = np.nan  # the section itself: x0 stands apart
  x0 = clip[:, 6:]
  sizes = c.parsed, c.history, shown

  @quick_jit
  def given(keys, row):
    eps = example_normal(keys[:, 1], x0.shape[1:])
    row = choose(*sizes, row)
    x = flow.add_noise(x0, eps, sigma)
    return eps, row, groups_of_row(*sizes, row, x, sigma, patch=NETWORK.patch)

  eps, row, groups = jax.device_get(given(keys, jax.tree.map(lambda part: part[0], table)))
  tail = c.packing.partition("_")[0]
  used = np.concatenate(
    [np.broadcast_to(numbers, (2, numbers.shape[-1])) for numbers in row.context], 1
  )
  for i, frames in enumerate(used):
    rest = [clip[i, n] for n in range(6) if n not in frames]
    if tail == "tc":
      np.testing.assert_allclose(groups[0].x[i, 0], np.mean(rest, 0), atol=1e-6)
    elif tail == "ta":
      np.testing.assert_allclose(
        groups[0].x[i, ::2, 0, 0], [frame.mean((0, 1)) for frame in rest], atol=1e-6
      )
  text = tiny.text()

  def by_hand(params, groups):
    v = bind(NETWORK, params, text)(groups).velocity[-1]
    return jnp.mean((v - (eps - x0)) ** 2, axis=(1, 2, 3, 4))

  loss = lambda params: framepack._loss_of(
    c, bind(NETWORK, params, text), *[jnp.asarray(clip)] * 2, jnp.zeros(2, int), sigma, keys, table
  )()
  params = tiny.params(NETWORK)
  np.testing.assert_allclose(quick_jit(loss)(params), quick_jit(by_hand)(params, groups), rtol=1e-5)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(packing="f2k3_g2"), "schedule 'f2k3_g2': 'f2k3'"),
    (dict(packing="tc_f2k2f1k1_g2", published=True), "no place for a tail; expected td"),
    (dict(sort="similarity", published=True), "frames sorted by similarity keep their own"),
    (dict(sort="colour"), "sort = 'colour': expected one of time, similarity"),
    (dict(orders=("vanilla", "sideways")), "order = 'sideways': expected one of vanilla"),
    (dict(history_level="noisy"), "level = 'noisy': expected one of section, clean"),
  ],
)
def test_bad_settings(changes, message):
  with pytest.raises(UserError, match=message):
    config(**changes)


def test_clips_that_are_not_whole_sections():
  with pytest.raises(UserError, match="makes 2 frames a section: a clip of 7 latent frames is not"):
    config().rows(7)
  assert config(given=1).sections(7) == 3
  assert orders.vanilla(3) == [(0,), (1,), (2,)]
