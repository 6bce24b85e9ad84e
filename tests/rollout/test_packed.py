"""Sampling from packed context, against a plain loop, and what it may not read."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hiar_jax import flow
from hiar_jax.models.frames import Frames, bind
from hiar_jax.packing import orders
from hiar_jax.packing.codebook import Codebook
from hiar_jax.packing.rows import History, groups_of_row, tables
from hiar_jax.packing.schedule import parse
from hiar_jax.rollout import packed
from hiar_jax.rollout.noise import block_noise
from tests.helpers import tiny
from tests.helpers.compiling import quick_jit
from tests.helpers.slow_cases import few, slow

CONFIG = dataclasses.replace(tiny.CONFIG, packing=(1, 2))
SIGMAS = np.asarray([1.0, 0.6, 0.0], np.float32)
KEY = jax.random.key(3)
AS_PUBLISHED = History()
SEEDS = np.asarray([5, 9], np.int32)
VANILLA = "td_f3k2f1k1_g2"
FILLING, BACKWARDS = "td_f2k2f1k1_g2_x_f1k1", "f1k1_x_g2_f1k1f2k2_td"
CASES = {  # (schedule, steps, given frames, published indices[, frames behind, a loop])
  "vanilla": (VANILLA, orders.vanilla(4), 0, False),
  "vanilla, published": ("f1k1_x_td_f2k2f1k1_g2", orders.vanilla(3), 1, True),
  "both ends": (FILLING, orders.both_ends(4), 0, False),
  "inverted": (BACKWARDS, orders.inverted(5), 1, True),
  "endpoints": ("td_f1k1_g2_x_f1k1", orders.endpoints(5, (0, 2, 4)), 0, False),
  "towards an end": (FILLING, orders.vanilla(3), 0, False, 1),
  "from an image to a video": (BACKWARDS, orders.inverted(3), 1, False, 3),
  "a loop": (FILLING, orders.vanilla(3), 0, False, 0, True),
  "compressed": ("tc_f2k2f1k1_g2", orders.vanilla(5), 0, False),
  "appended": ("ta_f2k2f1k1_g2", orders.vanilla(4), 1, False),
  "compressed behind": ("f1k1_x_g2_f1k1f1k2_tc", orders.inverted(4), 1, False),
  "both tails": ("tc_f1k1_g2_f1k2_ta_x_f1k1", orders.endpoints(7, (0, 3, 5, 6)), 0, False),
}
SIMILAR = History(sort="similarity", time_weight=0.3, frame_seconds=0.5)
SORTED = {
  "sorted": ("td_f2k2f1k1_g2", orders.vanilla(5), 0, False),
  "sorted, first kept": ("f1k1_x_td_f2k2f1k1_g2", orders.vanilla(5), 1, False),
  "sorted, compressed": ("tc_f1k2f1k1_g2_f1k1_td", orders.both_ends(5), 0, False),
  "sorted, appended": ("ta_f1k1_g2", orders.vanilla(4), 0, False),
}


def made_of(schedule, published, **options) -> packed.SectionSampler:
  return packed.SectionSampler(
    network=CONFIG,
    schedule=parse(schedule),
    history=options.get("history", AS_PUBLISHED),
    sigmas=jnp.asarray(SIGMAS),
    negative=0.3 * tiny.text()[:1],
    guidance=options.get("guidance", 0.0),
    key=KEY,
    frame=tiny.shape(1).clip[1:],
    published=published,
    codebook=options.get("codebook"),
  )


def sampler(schedule, steps, given, published, behind=0, loop=False, **options):
  sections = 1 + max(max(step) for step in steps)
  frames = sections * parse(schedule).generate
  made = made_of(schedule, published, **options)
  generate = packed.make_sampler(made, steps, frames, loop=loop)
  return quick_jit(generate)


def sorted_sides(schedule, step, clip):
  """(context of each group, tails) of a clip's step: the frames that are finite, the most similar
  ones next to the section. clip: [f h w c].
  """
  made = np.flatnonzero(np.isfinite(clip).all((1, 2, 3)))
  kept = {int(i) for g in (0, -1) for i in step.context[g] if (schedule.start, schedule.end)[g]}
  context, tails = [step.context[0]] * len(schedule.start), []
  first, last = step.generates[[0, schedule.generate - 1]]
  for groups, free in (
    (schedule.before, [i for i in made if i < first and i not in kept]),
    (schedule.after, [i for i in made if i > last and i not in kept]),
  ):
    past, found = groups is schedule.before, []
    near = (max if past else min)(free, default=0)

    def score(i, near=near):
      a, b = clip[i], clip[near]
      cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
      return cosine.mean() + 0.3 * np.exp(-((0.5 * (i - near)) ** 2))

    ranked = sorted(free, key=score, reverse=True)
    for group in groups[::-1] if past else groups:
      taken, ranked = sorted(ranked[: group.frames]), ranked[group.frames :]
      none = [-1] * (group.frames - len(taken))
      found.append(np.asarray([*none, *taken] if past else [*taken, *none]))
    context += found[::-1] if past else found
    tails.append(np.asarray(sorted(ranked), int))
  return [*context, *[step.context[-1]] * len(schedule.end)], tails


def tail_group(kind, pool, frames, latents, sigma):
  """The tail [b n h w c] as a group."""
  if kind == "tc":
    middle = frames[:, [frames.shape[1] // 2]]
    return Frames(latents.mean(1, keepdims=True), sigma, middle, projection=f"packed_k{pool}")
  mean = np.repeat(latents.mean((2, 3), keepdims=True), pool, axis=1)
  whole = np.tile(mean, (1, 1, 2 * pool, 2 * pool, 1))
  return Frames(whole, sigma, np.repeat(frames, pool, axis=1), projection=f"packed_k{pool}")


def groups_by_hand(schedule, step, video, sigma, similar=False, shown=lambda x: x):
  """Packed groups of a step, frames gathered one by one for each clip. shown: what history shows of
  a frame.
  """
  video = shown(video)
  sides = [
    sorted_sides(schedule, step, clip) if similar else (step.context, step.tails) for clip in video
  ]
  groups = []
  for g, (group, at) in enumerate(zip(schedule.groups, step.context_indices, strict=True)):
    frames = np.stack([context[g] for context, _ in sides])
    latents = np.stack(
      [
        [clip[i] if i >= 0 else np.zeros_like(clip[0]) for i in row]
        for clip, row in zip(video, frames, strict=True)
      ]
    )
    # where nothing is, a place of the schedule's; those of published plans are no frames' numbers
    own = np.broadcast_to(np.maximum(at, 0), frames.shape)
    indices = np.where(frames >= 0, frames, own) if similar else own
    groups.append(
      Frames(latents, sigma, indices.astype(np.int32), projection=f"packed_k{group.pool}")
    )
  kinds = schedule.before_tail, schedule.after_tail
  # the group next to a tail is the one that is farthest from the section
  farthest = schedule.before[:1], schedule.after[-1:]
  places = len(schedule.start), len(groups) - len(schedule.end)
  for side in (1, 0):
    frames = np.stack([tails[side] for _, tails in sides]).astype(np.int32)
    if kinds[side] in ("tc", "ta") and frames.size:
      latents = np.stack([clip[row] for clip, row in zip(video, frames, strict=True)])
      (group,) = farthest[side]
      groups.insert(places[side], tail_group(kinds[side], group.pool, frames, latents, sigma))
  return tuple(groups)


def ends(given: int, behind: int = 0) -> list:
  """Frames that are there, or None."""
  return [tiny.video(seed, k) if k else None for seed, k in ((4, given), (5, behind))]


def plain(schedule, steps, given, published, behind=0, loop=False, **how):
  """The same videos, a forward at a time. how: guidance, and as groups_by_hand."""
  guidance = how.pop("guidance", 0.0)
  schedule = parse(schedule)
  params, text = tiny.params(CONFIG), tiny.text()
  sections = 1 + max(max(step) for step in steps)
  shape = tiny.shape(given + sections * schedule.generate + behind)
  noise = block_noise(KEY, SEEDS, shape.block(schedule.generate))
  video = np.full((tiny.BATCH, *shape.clip), np.nan, np.float32)
  for part, frames in zip((slice(given), slice(-behind, None)), ends(given, behind), strict=True):
    if frames is not None:
      video[:, part] = frames
  run = quick_jit(lambda groups, text: bind(CONFIG, params, text)(groups).velocity[-1])
  where = dict(given=given, behind=behind, loop=loop, published=published)
  for step in orders.plan(schedule, steps, **where):
    x = jnp.concatenate([noise(0, n) for n in step.sections], axis=1)
    for sigma, lower in zip(SIGMAS[:-1], SIGMAS[1:], strict=True):
      packed = groups_by_hand(schedule, step, video, sigma, **how)
      groups = (*packed, Frames(x, sigma, step.indices.astype(np.int32)))
      v = run(groups, text)
      if guidance:
        other = run(groups, np.repeat(0.3 * text[:1], tiny.BATCH, axis=0))
        v = flow.classifier_free_guidance(v, other, guidance)
      x = flow.euler(x, v, sigma, lower)
    assert np.isnan(video[:, step.generates]).all()
    video[:, step.generates] = x
  return video


QUICK = ("both ends", "from an image to a video")


@pytest.mark.parametrize("case", few(CASES, *QUICK))
def test_sections_equal_a_plain_loop(case):
  """And nothing is read before it is made: what is not made yet is NaN."""
  arguments = CASES[case]
  given = ends(arguments[2], *arguments[4:5])
  got = sampler(*arguments)(tiny.params(CONFIG), tiny.text(), SEEDS, *given)
  want = plain(*arguments)
  assert np.isfinite(got).all()
  np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.parametrize("case", few(SORTED, "sorted, first kept"))
def test_sections_from_sorted_history_equal_a_plain_loop(case):
  arguments = SORTED[case]
  given = ends(arguments[2])
  got = sampler(*arguments, history=SIMILAR)(tiny.params(CONFIG), tiny.text(), SEEDS, *given)
  want = plain(*arguments, similar=True)
  assert np.isfinite(got).all()
  np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.slow
def test_sorted_history_reaches_back():
  """To any frame of the past, where history by time reads the last ones alone."""
  notation, first = "td_f1k2f2k1_g2", tiny.video(4, 8)
  first[:, 1] = 1.1 * first[:, 7]  # the oldest but one looks like the last
  params, text = tiny.params(CONFIG), tiny.text()
  for history, reads in ((AS_PUBLISHED, False), (SIMILAR, True)):
    run = sampler(notation, orders.vanilla(1), 8, False, history=history)
    moved = first * (1 + 0.2 * (np.arange(8) == 1))[None, :, None, None, None].astype(np.float32)
    change = run(params, text, SEEDS, moved)[:, 8:] - run(params, text, SEEDS, first)[:, 8:]
    assert bool(np.abs(change).max() > 1e-4) == reads


@pytest.mark.parametrize("case", slow("inverted", "both ends"))
def test_discretised_history_equals_a_plain_loop(case):
  """What sections read is centroids, given frames too; what they make is not."""
  arguments = CASES[case]
  book = Codebook(tiny.random(8, 5, 2))

  def shown(video):  # frames that are not made yet stay what they are
    pixels = np.nan_to_num(video)[..., None, :]
    near = book.centroids[((pixels - book.centroids) ** 2).sum(-1).argmin(-1)]
    return np.where(np.isnan(video), np.nan, near)

  given = ends(arguments[2])
  params, text = tiny.params(CONFIG), tiny.text()
  got = sampler(*arguments, codebook=book)(params, text, SEEDS, *given)
  np.testing.assert_allclose(got, plain(*arguments, shown=shown), atol=2e-5)
  assert (np.abs(got - plain(*arguments)).max((0, 2, 3, 4)) > 1e-3).any()
  if arguments[2]:
    np.testing.assert_array_equal(got[:, : arguments[2]], given[0])


def test_guidance_equals_a_plain_loop():
  arguments = (VANILLA, orders.vanilla(2), 0, False)
  got = sampler(*arguments, guidance=2.0)(tiny.params(CONFIG), tiny.text(), SEEDS)
  want = plain(*arguments, guidance=2.0)
  np.testing.assert_allclose(got, want, atol=5e-5)


def test_a_section_reads_the_frames_of_its_schedule_alone():
  """In time's order section n depends on the four frames before it, and on none further back."""
  schedule, first = parse(VANILLA), tiny.video(4, 8)
  run = sampler(VANILLA, orders.vanilla(1), 8, False)
  params, text = tiny.params(CONFIG), tiny.text()
  moved = [first + 0.1 * (np.arange(8) == i)[:, None, None, None] for i in range(8)]
  base = run(params, text, SEEDS, first)[:, 8:]
  read = [bool((run(params, text, SEEDS, x)[:, 8:] != base).any()) for x in moved]
  assert read == [i >= 8 - schedule.history for i in range(8)]


@pytest.mark.slow
def test_a_video_does_not_depend_on_its_batch():
  run = sampler(*CASES["vanilla"])
  params, text = tiny.params(CONFIG), tiny.text()
  together, alone = run(params, text, SEEDS), run(params, text[1:], SEEDS[1:])
  np.testing.assert_allclose(together[1:], alone, atol=1e-5)


@pytest.mark.slow
def test_a_take_draws_one_section_anew():
  """Section 2 with another seed: those before it stay, to the bit, and so does all of it with the
  seeds of before.
  """
  run, params, text = sampler(*CASES["vanilla"]), tiny.params(CONFIG), tiny.text()
  seeds = np.repeat(SEEDS[:, None], 4, axis=1)
  other = seeds.copy()
  other[0, 2] = 77
  first, take, back = (run(params, text, x) for x in (seeds, other, seeds))
  np.testing.assert_array_equal(first, back)
  np.testing.assert_allclose(first, run(params, text, SEEDS), atol=1e-6)
  np.testing.assert_array_equal(first[1], take[1])  # another video's seeds do not matter
  changed = (first != take)[0].reshape(4, -1).any(axis=1)
  assert changed.tolist() == [False, False, True, True]  # the last one sees another before it
  # as it would with these seeds alone, whoever else is in the batch
  np.testing.assert_allclose(run(params, text[:1], other[:1]), take[:1], atol=1e-5)


@pytest.mark.slow
def test_each_section_hears_its_own_text():
  """As made one by one with it; a section hears nothing of the others' texts."""
  params, text = tiny.params(CONFIG), tiny.text()
  texts = np.stack([text, 0.5 * text, text[::-1], 0.1 * text], axis=1)
  got = sampler(*CASES["vanilla"])(params, texts, SEEDS)
  noise = block_noise(KEY, SEEDS, tiny.shape(2).clip)
  run = quick_jit(lambda groups, text: bind(CONFIG, params, text)(groups).velocity[-1])
  schedule, made = parse(VANILLA), np.full_like(got, np.nan)
  for number, table in enumerate(orders.plan(schedule, orders.vanilla(4))):
    x = noise(0, number)
    for sigma, lower in zip(SIGMAS[:-1], SIGMAS[1:], strict=True):
      row = tables([table])[0]
      row = jax.tree.map(lambda part: part[0], row)
      groups = groups_of_row(schedule, AS_PUBLISHED, made, row, x, jnp.float32(sigma))
      x = flow.euler(x, run(groups, texts[:, number]), sigma, lower)
    made[:, table.generates] = x
  np.testing.assert_allclose(got, made, atol=2e-5)
  same = np.repeat(text[:, None], 4, axis=1)
  alike = sampler(*CASES["vanilla"])(params, same, SEEDS)
  np.testing.assert_allclose(alike, sampler(*CASES["vanilla"])(params, text, SEEDS), atol=1e-5)


@pytest.mark.slow
def test_ends_that_are_made_at_once_hear_their_own_texts():
  """They see each other, each with the velocity that its own text gives."""
  params, text = tiny.params(CONFIG), tiny.text()
  steps = orders.both_ends(3)
  texts = np.stack([text, text[::-1], 0.2 * text], axis=1)
  got = sampler(FILLING, steps, 0, False)(params, texts, SEEDS)
  noise = block_noise(KEY, SEEDS, tiny.shape(2).clip)
  x = jnp.concatenate([noise(0, 0), noise(0, 2)], axis=1)
  run = quick_jit(lambda groups, text: bind(CONFIG, params, text)(groups).velocity[-1])
  first = orders.plan(parse(FILLING), steps)[0]
  row = jax.tree.map(lambda part: part[0], tables([first])[0])
  for sigma, lower in zip(SIGMAS[:-1], SIGMAS[1:], strict=True):
    groups = groups_of_row(parse(FILLING), AS_PUBLISHED, got, row, x, jnp.float32(sigma))
    v = [run(groups, texts[:, number]) for number in (0, 2)]
    x = flow.euler(x, jnp.concatenate([v[0][:, :2], v[1][:, 2:]], axis=1), sigma, lower)
  np.testing.assert_allclose(got[:, [0, 1, 4, 5]], x, atol=2e-5)
  one = sampler(FILLING, steps, 0, False)(params, text, SEEDS)
  alike = sampler(FILLING, steps, 0, False)(params, np.repeat(text[:, None], 3, axis=1), SEEDS)
  np.testing.assert_allclose(alike, one, atol=1e-5)


@pytest.mark.slow
def test_clean_history_is_another_forward():
  arguments = CASES["vanilla"]
  params, text = tiny.params(CONFIG), tiny.text()
  as_section = sampler(*arguments)(params, text, SEEDS)
  for history in (History("clean"), History(hears=False)):
    other = sampler(*arguments, history=history)(params, text, SEEDS)
    assert np.isfinite(other).all()
    assert np.abs(other[:, 2:] - as_section[:, 2:]).max() > 1e-3


@pytest.mark.parametrize("case", ["both ends", *slow("from an image to a video", "both tails")])
def test_a_sampler_that_is_watched_makes_the_same_video(case):
  """To the bit; after each step what is made is there, the rest is NaN, and the tables of the order
  have a program each.
  """
  schedule, steps, given, published, *rest = CASES[case]
  behind, loop = [*rest, 0, False][:2]
  sections = made_of(schedule, published)
  frames = (1 + max(max(step) for step in steps)) * sections.schedule.generate
  arguments = tiny.params(CONFIG), tiny.text(), SEEDS, *ends(given, behind)
  whole = jax.jit(packed.make_sampler(sections, steps, frames, loop=loop))(*arguments)
  traced = []
  bind_of = packed.SectionSampler.bind
  count = lambda self, *bound: traced.append(1) or bind_of(self, *bound)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(packed.SectionSampler, "bind", count)
    run = packed.make_stepper(sections, steps, frames, loop=loop)
    seen = [(np.asarray(video), made) for video, made in run(*arguments)]
    planned = sections.plan(steps, given, behind, loop)
    assert len(traced) == len(tables(planned)) < len(seen) == len(steps)
  known = np.ones(given + frames + behind, bool)
  known[given : given + frames] = False
  for (video, made), step in zip(seen, planned, strict=True):
    known[step.generates] = True
    np.testing.assert_array_equal(made, known)
    np.testing.assert_array_equal(video[:, known], whole[:, known])
    assert np.isnan(video[:, ~known]).all()
  assert known.all()
