"""The DiT over groups of frames: what each group sees, against masks written by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hiar_jax.errors import UserError
from hiar_jax.models import dit, frames
from hiar_jax.models.frames import Frames, Read, whole_clip
from tests.helpers import masked, tiny
from tests.helpers.compiling import quick_jit
from tests.helpers.slow_cases import few

TOLERANCE = 2e-6
TEXTS = np.stack([tiny.text(), tiny.random(98, *tiny.text().shape)])
PAST = (3, 2)  # frames of the entries of the past

apply = quick_jit(lambda bound, groups, past: bound(groups, past))


def bound(config: dit.DiTConfig = tiny.CONFIG, start=None) -> frames.Bound:
  return frames.Bound(config, tiny.params(config), jnp.asarray(TEXTS), start)


def group(first: int, count: int, sigma=0.5, reads=(), **kwargs) -> Frames:
  """Frames `first` ... of the video."""
  positions = first + np.arange(count, dtype=np.int32)
  return Frames(tiny.video(first, count), sigma, positions, reads, **kwargs)


def bits(rows: str) -> np.ndarray:
  """'110 1, 001 1' -> a mask of two rows."""
  return np.asarray([[c == "1" for c in row if c in "01"] for row in rows.split(",")])


@dataclasses.dataclass(frozen=True)
class Case:
  """groups, and the mask over [past | their frames] that they amount to; None = all."""

  groups: tuple[Frames, ...]
  mask: np.ndarray | None
  past: tuple[int, ...] = ()


LEVELS = np.asarray([[0.9, 0.2], [0.4, 0.7]], np.float32)  # [b k]
CASES = {
  "a whole clip": Case((group(0, 3),), None),
  "block-causal": Case(
    (
      group(0, 2, 0.9),
      group(2, 1, LEVELS[:, 0], (Read(group=0),)),
      group(3, 2, LEVELS, (Read(group=0, frames=(1, 2)), Read(group=1))),
    ),
    bits("11 0 00, 11 0 00, 11 1 00, 01 1 11, 01 1 11"),
  ),
  "runs of a past": Case(
    (group(5, 1, reads=(Read(past=1), Read(past=0, frames=(0, 1)), Read(past=0, frames=(2, 3)))),),
    bits("101 11 1"),
    PAST,
  ),
  "all of a past": Case((group(5, 2, reads=(Read(past=0), Read(past=1))),), None, PAST),
  "slots": Case(
    (group(5, 2, reads=(Read(past=1), Read(past=0, seen=bits("1 0 1")[0]))),),
    bits("101 11 11, 101 11 11"),
    PAST,
  ),
  "a pair with texts of their own": Case(
    (
      group(
        5,
        2,
        0.2,
        (Read(past=0, frames=(1, 3)), Read(past=1, seen=bits("1 0")[0])),
        exists=bits("1 0")[0],
      ),
      group(7, 2, LEVELS, (Read(past=0, frames=(0, 1)), Read(group=0)), text=1),
    ),
    bits("011 10 10 00, 011 10 10 00, 100 00 10 11, 100 00 10 11"),
    PAST,
  ),
  "some frames of a group": Case(
    (group(5, 2, exists=bits("1 1")[0]), group(7, 1, reads=(Read(group=0, seen=bits("0 1")[0]),))),
    bits("11 0, 11 0, 01 1"),
  ),
  "none of the frames there": Case((group(5, 2, exists=bits("0 0")[0]),), None),
}


def kept(sizes: tuple[int, ...], config: dit.DiTConfig = tiny.CONFIG) -> tuple[dit.KV, ...]:
  """A past whose entries hold frames 0 ... in turn."""
  firsts = np.cumsum((0, *sizes))
  return tuple(
    apply(bound(config), (group(int(first), k),), ()).kv[0]
    for first, k in zip(firsts, sizes, strict=False)
  )


def by_mask(case: Case, config: dit.DiTConfig = tiny.CONFIG, start=None):
  """(velocity, KV) of all frames of a case, from one call with its mask."""
  past = kept(case.past, config)
  of_frame = lambda g: np.reshape(g.sigma, (*np.shape(g.sigma), 1, 1)[:2])  # [b k]
  sigma = [np.broadcast_to(of_frame(g), g.x.shape[:2]) for g in case.groups]
  texts = [TEXTS[g.text] for g in case.groups]
  text = texts[0] if len({g.text for g in case.groups}) == 1 else np.stack(texts, axis=1)

  def run(params, past):
    joined = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=2), *past) if past else None
    return masked.bind(config, params, text, start)(
      np.concatenate([g.x for g in case.groups], axis=1),
      np.concatenate(sigma, axis=1),
      jnp.concatenate([g.positions for g in case.groups]),
      None if case.mask is None else jnp.asarray(case.mask),
      joined,
    )

  return quick_jit(run)(tiny.params(config), past)


def assert_near(found, expected) -> None:
  assert found.shape == expected.shape and found.dtype == expected.dtype
  error, largest = np.abs(found - expected).max(), np.abs(expected).max()
  assert error <= TOLERANCE * max(largest, 1), (error, largest)


# -- what is read


@pytest.mark.parametrize("name", CASES)
def test_reads_are_a_mask(name):
  """Known where they are numpy's, and the same where they are known at run time alone."""
  case = CASES[name]
  for make in (masked.frame_mask, jax.jit(masked.frame_mask, static_argnums=1)):
    mask = make(case.groups, case.past)
    if mask is not None and case.mask is None:  # only a traced mask of ones may be left
      assert make is not masked.frame_mask and np.asarray(mask).all()
    elif case.mask is None:
      assert mask is None
    else:
      np.testing.assert_array_equal(mask, case.mask)


QUICK = ("runs of a past", "a pair with texts of their own")


@pytest.mark.parametrize("name", few(CASES, *QUICK))
def test_groups_are_one_forward_under_their_mask(name):
  case = CASES[name]
  out = apply(bound(), case.groups, kept(case.past))
  velocity, kv = by_mask(case)
  end = 0
  assert len(out.velocity) == len(out.kv) == len(case.groups)
  for g, v, own in zip(case.groups, out.velocity, out.kv, strict=True):
    first, end = end, end + g.x.shape[1]
    assert v.shape == g.x.shape
    assert_near(v, velocity[:, first:end])
    assert_near(own.k, kv.k[:, :, first:end])
    assert_near(own.v, kv.v[:, :, first:end])


def test_a_text_is_heard_by_its_group_alone():
  """Groups that see nothing of each other: the other's text changes nothing, bit for bit."""
  pair = (group(0, 2), group(2, 2, text=1))
  first, second = apply(bound(), pair, ()).velocity
  other = np.stack([TEXTS[0], TEXTS[1] + 1])
  changed = apply(bound().with_texts(jnp.asarray(other)), pair, ())
  np.testing.assert_array_equal(changed.velocity[0], first)
  assert np.abs(changed.velocity[1] - second).max() > 1e-3


def test_the_past_is_in_the_order_of_the_entries():
  """K/V of earlier forwards are what their groups would have been in the same one."""
  alone = Case((group(0, 3), group(3, 2)), None)
  seeing = group(5, 2, 0.3, (Read(group=0, frames=(1, 3)), Read(group=1)))
  within = apply(bound(), (*alone.groups, seeing), ()).velocity[2]
  reads = (Read(past=0, frames=(1, 3)), Read(past=1))
  cached = apply(bound(), (seeing.replace(reads=reads),), kept(PAST)).velocity[0]
  np.testing.assert_allclose(cached, within, rtol=0, atol=1e-5 * np.abs(within).max())


@pytest.mark.slow
def test_clips_may_start_anywhere():
  config, start = dataclasses.replace(tiny.CONFIG, place_embedding=True), jnp.asarray([0, 5])
  case = CASES["block-causal"]
  out, expected = apply(bound(config, start), case.groups, ()), by_mask(case, config, start)[0]
  assert_near(jnp.concatenate(out.velocity, axis=1), expected)
  assert np.abs(expected - by_mask(case, config)[0]).max() > 1e-2


def test_starts_may_be_of_numpy():
  config, x = dataclasses.replace(tiny.CONFIG, place_embedding=True), tiny.video(0, 3)
  made = frames.bind(config, tiny.params(config), tiny.text(), np.asarray([0, 5]))
  velocity = jax.eval_shape(lambda: made(whole_clip(x, LEVELS[:, 0])).velocity[0])
  assert velocity.shape == x.shape and np.asarray(made.start).tolist() == [0, 5]


def test_a_whole_clip():
  expected = apply(bound(), (group(0, 3, LEVELS[:, 0]),), ()).velocity[0]
  run = quick_jit(lambda b, x, sigma: b(whole_clip(x, sigma)).velocity[0])
  found = run(bound(), tiny.video(0, 3), LEVELS[:, 0])
  assert_near(found, expected)


def test_a_stopped_network_has_no_gradient():
  def loss(bound, stop):
    return stop(bound)(whole_clip(tiny.video(0, 1), 0.5)).velocity[0].sum()

  for stop, moved in ((jax.lax.stop_gradient, False), (lambda x: x, True)):
    gradient = quick_jit(jax.grad(lambda b, stop=stop: loss(b, stop)))(bound())
    assert any(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradient.params)) == moved


# -- K/V


def test_put_and_take():
  ring, (new,) = tiny.CONFIG.empty_kv(4, tiny.BATCH, tiny.HEIGHT, tiny.WIDTH), kept((3,))
  assert jax.tree.map(jnp.shape, ring.take(0, 3)) == jax.tree.map(jnp.shape, new)
  held = ring.put(jnp.asarray([3, 4, 0]), new)  # 4 is out of range
  for leaf, given in zip(jax.tree.leaves(held), jax.tree.leaves(new), strict=True):
    np.testing.assert_array_equal(leaf[:, :, 3], given[:, :, 0])
    np.testing.assert_array_equal(leaf[:, :, 0], given[:, :, 2])
    assert not np.asarray(leaf[:, :, 1:3]).any()
  jax.tree.map(np.testing.assert_array_equal, held.take(3, 4), new.take(0, 1))


def test_put_keeps_the_dtype_of_what_is_written_to():
  half = dataclasses.replace(tiny.CONFIG, dtype="bfloat16")
  ring = half.empty_kv(4, tiny.BATCH, tiny.HEIGHT, tiny.WIDTH)
  held = ring.put(jnp.arange(3), kept((3,))[0])
  assert {leaf.dtype for leaf in jax.tree.leaves(held)} == {jnp.dtype("bfloat16")}
  assert_near(held.k[:, :, :3], kept((3,))[0].k.astype(jnp.bfloat16))


def test_moved_keys_are_those_of_later_frames():
  """Latents at frames 700 ... give the keys of frames 0 ... moved by 700, and the same values."""
  (near,) = kept((3,))
  there = group(0, 3).replace(positions=700 + np.arange(3, dtype=np.int32))
  far = apply(bound(), (there,), ()).kv[0]
  moved = quick_jit(dit.KV.moved)(near, jnp.int32(700))
  np.testing.assert_allclose(moved.k, far.k, rtol=0, atol=1e-5 * np.abs(far.k).max())
  np.testing.assert_array_equal(moved.v, near.v)
  assert np.abs(moved.k - near.k).max() > 1e-1
  still = quick_jit(dit.KV.moved)(near, jnp.int32(0))
  np.testing.assert_allclose(still.k, near.k, rtol=0, atol=1e-6 * np.abs(near.k).max())


# -- what a DiT cannot do


@pytest.mark.parametrize(
  ("groups", "match"),
  [
    ((group(0, 2, projection="patch_embedding_2x"),), "^projection 'patch_embedding_2x': expec"),
    ((group(0, 2, projection="packed_k2"), group(2, 2)), "^kernel k2: the model has .* no packed"),
    ((group(0, 2, text=None),), "^DiT: without packed frames all groups hear a text"),
    ((group(0, 2), group(2, 2, text=None)), "^DiT: without packed frames all groups hear a text"),
  ],
  ids=["another projection", "packed", "no text", "no text for one"],
)
def test_groups_of_other_networks_are_refused(groups, match):
  with pytest.raises(UserError, match=match):
    bound()(groups)


def test_positions_may_differ_from_example_to_example():
  """As the packed forward takes them: one group, equal to the forward of each clip alone."""
  moved = np.stack([np.arange(2, dtype=np.int32) * (1 + i) for i in range(tiny.BATCH)])
  frames = group(0, 2)
  together = apply(bound(), (frames.replace(positions=moved),), ()).velocity[0]
  for i in range(tiny.BATCH):
    alone = apply(bound(), (frames.replace(positions=moved[i]),), ()).velocity[0]
    np.testing.assert_allclose(together[i], alone[i], atol=2e-6)


def test_texts_of_unequal_groups_are_refused():
  with pytest.raises(UserError, match="^DiT: groups with texts of their own must have as many"):
    bound()((group(0, 2), group(2, 1, text=1)))
  out = apply(bound(), (group(0, 2, text=1), group(2, 1, text=1)), ())  # one text may be any
  assert [v.shape[1] for v in out.velocity] == [2, 1]


def test_a_text_that_is_not_there_is_refused():
  with pytest.raises(UserError, match="^DiT: a group hears text 2, of which there are 2"):
    bound()((group(0, 2, text=2),))


@pytest.mark.parametrize(
  ("read", "match"),
  [
    (Read(past=1), "reads past 1, of which there are 1"),
    (Read(group=2), "reads group 2, of which there are 2"),
    (Read(), "reads group None"),
    (Read(group=0, frames=(1, 3)), "frames 1 to 2 of group 0, which has 2"),
    (Read(past=0, frames=(2, 2)), "frames 2 to 1 of past 0, which has 3"),
    (Read(past=0, seen=np.ones(2, bool)), "one bool for each of its 3"),
    (Read(past=0, frames=(0, 3), seen=np.ones(3, bool)), "and no `frames`"),
  ],
)
def test_reads_of_what_is_not_there_are_refused(read, match):
  """As a mask they would be dropped in silence."""
  with pytest.raises(ValueError, match=match):
    masked.frame_mask((group(0, 2), group(2, 2, reads=(read,))), (3,))
