"""Discretised history: the nearest centroid by brute force, k-means that finds clusters, and a file
that is whole or one clear line.
"""

import dataclasses
import itertools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from hiar_jax.errors import Damaged, UserError
from hiar_jax.packing import codebook
from hiar_jax.packing.codebook import Codebook, CodebookConfig
from tests.helpers.compiling import quick_jit
from tests.helpers.disk_page import differences, files_below

B, F, H, W, C = 2, 3, 4, 6, 5


def random(seed: int, *shape: int) -> np.ndarray:
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def by_hand(book: Codebook, video: np.ndarray) -> np.ndarray:
  """Unit by unit."""
  made, u = np.empty_like(video), book.unit
  for b, f, y, x in itertools.product(range(B), range(F), range(0, H, u), range(0, W, u)):
    square = np.s_[b, f, y : y + u, x : x + u]
    distance = ((video[square].reshape(1, -1) - book.centroids) ** 2).sum(-1)
    made[square] = book.centroids[distance.argmin()].reshape(u, u, C)
  return made


@pytest.mark.parametrize("unit", [1, 2])
@pytest.mark.parametrize("scores", [codebook.SCORES, 7 * 10])
def test_each_unit_becomes_its_nearest_centroid(unit, scores, monkeypatch):
  """Also in pieces: the second holds 10 vectors at once, of 144 or 36."""
  monkeypatch.setattr(codebook, "SCORES", scores)
  book = Codebook(random(0, 7, unit**2 * C), unit)
  video = random(1, B, F, H, W, C)
  got = quick_jit(book.discretise)(video)
  np.testing.assert_array_equal(got, by_hand(book, video))
  np.testing.assert_array_equal(quick_jit(book.discretise)(got), got)


def test_nothing_as_large_as_all_differences_is_made(monkeypatch):
  """No array of vectors x centroids x channels, and of vectors x centroids a piece at a time."""
  monkeypatch.setattr(codebook, "SCORES", 2**12)
  book = Codebook(random(0, 64, 32))
  video = jax.ShapeDtypeStruct((1, 8, 16, 16, 32), np.float32)

  def sizes(jaxpr):
    for equation in jaxpr.eqns:
      yield from (int(np.prod(var.aval.shape)) for var in equation.outvars)
      for inner in jax.extend.core.jaxprs_in_params(equation.params):
        yield from sizes(inner)

  largest = max(sizes(jax.make_jaxpr(book.discretise)(video).jaxpr))
  assert largest <= max(2**12, np.prod(video.shape))


def test_a_frame_that_is_not_there_breaks_no_other():
  book, video = Codebook(random(0, 7, C)), random(1, B, F, H, W, C)
  hole = video.copy()
  hole[:, 1] = np.nan
  got, want = (np.array(quick_jit(book.discretise)(x)) for x in (hole, video))
  np.testing.assert_array_equal(got[:, [0, 2]], want[:, [0, 2]])
  assert np.isfinite(got).all()


def test_one_centroid_forgets_and_many_change_nothing():
  video = random(1, B, F, H, W, C)
  one = Codebook(random(0, 1, C)).discretise(jnp.asarray(video))
  np.testing.assert_array_equal(one, np.broadcast_to(random(0, 1, C), video.shape))
  every = Codebook(video.reshape(-1, C))
  np.testing.assert_array_equal(every.discretise(jnp.asarray(video)), video)


def clusters(seed: int = 0, n: int = 6) -> tuple[np.ndarray, np.ndarray]:
  """(centres [4 C], clips [n F H W C] of them, some far more often than others)."""
  rng = np.random.default_rng(seed)
  centres = 10 * rng.normal(size=(4, C))
  which = rng.choice(4, p=[0.9, 0.06, 0.03, 0.01], size=(n, F, H, W))
  return centres, (centres[which] + 0.01 * rng.normal(size=(n, F, H, W, C))).astype(np.float32)


SMALL = CodebookConfig(centroids=4, per_centroid=100)


def fitted(directory, config=SMALL, clips=None, seed=0) -> Codebook:
  clips = clusters()[1] if clips is None else clips
  config.fit(directory, lambda: clips, lambda video: video, seed)
  return config.open(directory, C)


def test_k_means_finds_clusters_of_any_size(tmp_path, monkeypatch):
  centres, clips = clusters()
  for batch in (codebook.BATCH, 4):  # clips at once
    monkeypatch.setattr(codebook, "BATCH", batch)
    book = fitted(tmp_path / str(batch) / "codebook")
    distance = np.abs(book.centroids[:, None] - centres[None]).max(-1).min(0)
    assert distance.max() < 0.05
    shown = np.asarray(book.discretise(jnp.asarray(clips)))
    assert np.abs(shown - clips).max() < 0.1
    assert differences("Codebook", files_below(tmp_path / str(batch))) == (set(), set())


@pytest.mark.slow
def test_more_centroids_are_nearer(tmp_path):
  clips = random(3, 8, F, H, W, C)

  def error(count):
    config = dataclasses.replace(SMALL, centroids=count)
    book = fitted(tmp_path / str(count), config, clips)
    return float(((np.asarray(book.discretise(jnp.asarray(clips))) - clips) ** 2).mean())

  errors = [error(count) for count in (1, 4, 16, 64)]
  assert errors[0] == pytest.approx(clips.var(axis=(0, 1, 2, 3)).mean(), rel=0.02)
  assert all(a > 1.15 * b for a, b in itertools.pairwise(errors))


def test_it_is_fitted_once_and_to_the_same_numbers(tmp_path):
  first, again = (fitted(tmp_path / name) for name in "ab")
  np.testing.assert_array_equal(first.centroids, again.centroids)
  other = fitted(tmp_path / "c", clips=clusters(1)[1])
  assert first.fingerprint == again.fingerprint != other.fingerprint
  assert len(first.fingerprint) == 16

  def refuse():
    raise AssertionError("it is there")

  SMALL.fit(tmp_path / "a", refuse, refuse, seed=5)
  assert SMALL.open(tmp_path / "a", C).fingerprint == first.fingerprint


def test_too_few_different_vectors(tmp_path):
  clips = np.zeros((4, F, H, W, C), np.float32)
  clips[:, 0] = 1.0
  with pytest.raises(UserError, match="codebook.centroids = 4: the clips have 2 different latent"):
    fitted(tmp_path, clips=clips)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    (dict(centroids=0), "centroids = 0: expected at least 1"),
    (dict(unit=0), "unit = 0"),
    (dict(iterations=0), "iterations = 0"),
  ],
)
def test_bad_settings(fields, message):
  with pytest.raises(UserError, match=message):
    CodebookConfig(**fields)
  with pytest.raises(UserError, match="unit = 2: latents of 4 x 5 are not whole squares"):
    CodebookConfig(unit=2).check(4, 5)


@pytest.mark.parametrize("at", [0.02, 0.5, 0.9, 0.99])
def test_a_damaged_file_is_one_line(tmp_path, at):
  fitted(tmp_path)
  path = tmp_path / codebook.FILE
  whole = path.read_bytes()
  flipped = bytearray(whole)
  flipped[int(at * len(whole))] ^= 0xFF
  for content in (bytes(flipped), whole[: int(at * len(whole))], b""):
    path.write_bytes(content)
    try:
      found = SMALL.open(tmp_path, C)
    except Damaged as error:
      assert str(path) in str(error) and "\n" not in str(error) and "run the training" in str(error)
    else:  # a byte of the archive that says nothing about the numbers
      assert content == bytes(flipped)
      path.write_bytes(whole)
      np.testing.assert_array_equal(found.centroids, SMALL.open(tmp_path, C).centroids)


def test_a_missing_file_and_another_codebook(tmp_path):
  with pytest.raises(
    UserError, match=r"codebook.npz is missing: discretised history \(\+D\) needs"
  ):
    SMALL.open(tmp_path, C)
  fitted(tmp_path)
  for config, channels in (
    (dataclasses.replace(SMALL, centroids=5), C),
    (dataclasses.replace(SMALL, unit=2), C),
    (SMALL, C + 1),
  ):
    with pytest.raises(Damaged, match=r"is damaged \(centroids \(4, 5\) of unit 1, not "):
      config.open(tmp_path, channels)
  codebook.save(tmp_path / codebook.FILE, Codebook(np.full((4, C), np.nan, np.float32)))
  with pytest.raises(Damaged, match="a centroid is not finite"):
    SMALL.open(tmp_path, C)
