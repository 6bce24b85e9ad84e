"""The patch autoencoder: as good as a linear one can be, the same every time, and of unit size
inside.
"""

import tracemalloc

import jax.numpy as jnp
import numpy as np
import pytest

from hiar_jax.components import patch_pca
from hiar_jax.components.patch_pca import PatchPCAConfig
from hiar_jax.errors import UserError
from hiar_jax.video.frames import to_float, to_uint8


def clips(n: int = 3, size: int = 16) -> np.ndarray:
  """Smooth moving pictures in [-1, 1], whose patches have a spread of variances."""
  rng = np.random.default_rng(0)
  y, x, t = np.meshgrid(np.arange(size), np.arange(size), np.arange(4), indexing="ij")
  waves = [
    np.sin(0.3 * a * x + 0.4 * b * y + 0.7 * t + c)[..., None] * rng.normal(size=3)
    for a, b, c in rng.normal(size=(6 * n, 3))
  ]
  video = np.stack([sum(waves[6 * i : 6 * i + 6]) for i in range(n)])
  return np.clip(np.moveaxis(video, 3, 1) / 5, -1, 1).astype(np.float32)


def test_patches_are_cut_row_by_row():
  video = np.arange(2 * 1 * 4 * 6 * 3).reshape(2, 1, 4, 6, 3)
  cut = patch_pca.patches(video, 2)
  assert cut.shape == (2, 1, 2, 3, 12)
  np.testing.assert_array_equal(cut[1, 0, 1, 2], video[1, 0, 2:4, 4:6].reshape(-1))


@pytest.mark.parametrize("whitening", [0.0, 0.5, 1.0])
def test_no_linear_code_of_its_size_is_better(whitening):
  """Its error is that of numpy's singular values that are left out (Eckart and Young)."""
  video = clips()
  codec = patch_pca.fit(video, PatchPCAConfig(patch=4, channels=7, whitening=whitening))
  rows = patch_pca.patches(video, 4).reshape(-1, 48).astype(np.float64)
  singular = np.linalg.svd(rows - rows.mean(0), compute_uv=False)
  best = (singular[7:] ** 2).sum() / rows.size
  assert best > 1e-4  # the test means something
  through = patch_pca.decode(codec, patch_pca.encode(codec, jnp.asarray(video)))
  assert ((np.asarray(through) - video) ** 2).mean() == pytest.approx(best, rel=1e-3)


def test_with_all_components_nothing_is_lost():
  video = clips()
  codec = patch_pca.fit(video, PatchPCAConfig(patch=4, channels=48))
  through = patch_pca.decode(codec, patch_pca.encode(codec, jnp.asarray(video)))
  np.testing.assert_allclose(through, video, atol=1e-4)


@pytest.mark.parametrize("whitening", [0.0, 0.5, 1.0])
def test_latents_have_unit_variance_spread_as_asked(whitening):
  video = clips()
  codec = patch_pca.fit(video, PatchPCAConfig(patch=4, channels=7, whitening=whitening))
  latents = np.asarray(patch_pca.encode(codec, jnp.asarray(video))).reshape(-1, 7)
  variances = latents.var(0)
  np.testing.assert_allclose(latents.mean(0), 0, atol=1e-3)
  assert variances.mean() == pytest.approx(1, rel=1e-3)
  rows = patch_pca.patches(video, 4).reshape(-1, 48).astype(np.float64)
  true = np.linalg.svd(rows - rows.mean(0), compute_uv=False)[:7] ** 2
  np.testing.assert_allclose(
    variances / variances[0], (true / true[0]) ** (1 - whitening), rtol=1e-2
  )


def test_it_is_fitted_on_as_many_clips_as_fit_into_memory(tmp_path, monkeypatch):
  """Evenly spread ones; long clips of large pictures are fewer, but never none."""
  video, config = to_uint8(clips(6)), PatchPCAConfig(patch=4, channels=7)
  for limit, used in ((3 * video[0].size + 5, 3), (7 * video[0].size, 6), (1, 1)):
    monkeypatch.setattr(patch_pca, "FIT_NUMBERS", limit)
    (tmp_path / str(used)).mkdir()
    config.fit(tmp_path / str(used), lambda: video)
    expected = patch_pca.fit(to_float(video[[6 * i // used for i in range(used)]]), config)
    found = config.open(tmp_path / str(used))
    np.testing.assert_array_equal(found.basis, expected.basis)
    np.testing.assert_array_equal(found.mean, expected.mean)


def test_the_basis_is_orthonormal_and_its_signs_are_fixed():
  """The largest entry of a component is positive, so that two machines fit the same codec."""
  video = clips()
  one = patch_pca.fit(video, PatchPCAConfig(patch=4, channels=7))
  basis = np.asarray(one.basis)
  np.testing.assert_allclose(basis.T @ basis, np.eye(7), atol=1e-5)
  assert (basis[np.abs(basis).argmax(0), np.arange(7)] > 0).all()
  again = patch_pca.fit(video.copy(), PatchPCAConfig(patch=4, channels=7))
  for name in ("mean", "basis", "scale"):
    np.testing.assert_array_equal(getattr(one, name), getattr(again, name))


def test_a_picture_of_one_colour_is_not_divided_by_nothing():
  video = np.full((2, 3, 8, 8, 3), 0.25, np.float32)
  codec = patch_pca.fit(video, PatchPCAConfig(patch=4, channels=5))
  latents = patch_pca.encode(codec, jnp.asarray(video))
  assert np.isfinite(latents).all()
  np.testing.assert_allclose(patch_pca.decode(codec, latents), video, atol=1e-5)


def test_bytes_come_back():
  video = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16, 1).repeat(3, -1)
  unit = patch_pca.to_unit(jnp.asarray(video))
  assert float(unit.min()) == -1 and float(unit.max()) == 1
  np.testing.assert_array_equal(to_uint8(unit), video)
  np.testing.assert_array_equal(to_uint8(np.array([-3.0, 3.0, 0.0039])), [0, 255, 128])


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"patch": 4, "channels": 49}, "codec.channels = 49: a patch of 4 x 4 pixels has 48 numbers"),
    ({"patch": 0}, "patch = 0: expected at least 1"),
    ({"channels": 0}, "channels = 0: expected at least 1"),
  ],
)
def test_sizes_that_cannot_be(fields, message):
  with pytest.raises(UserError, match=message):
    PatchPCAConfig(**fields)


def test_the_memory_of_a_fit_does_not_grow_with_the_clips():
  """Nor do the numbers depend on how the clips come: it is the covariance of all patches."""
  config, peaks = PatchPCAConfig(patch=4, channels=7), []
  video = to_uint8(clips(48, size=32))
  for count in (12, 48):
    tracemalloc.start()
    codec = patch_pca.fit(video[:count], config)
    peaks.append(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
  assert peaks[1] < 1.5 * peaks[0] and peaks[1] < video[0].nbytes * 8 * 8
  rows = patch_pca.patches(to_float(video), 4).reshape(-1, 48).astype(np.float64)
  np.testing.assert_allclose(codec.mean, rows.mean(0), atol=1e-7)
  shares = np.linalg.eigvalsh(np.cov(rows.T, bias=True))[::-1][:7]
  through = (rows - rows.mean(0)) @ np.asarray(codec.basis, np.float64)
  np.testing.assert_allclose(through.var(0), shares, rtol=1e-6)


DAMAGED = {
  "empty": lambda data: b"",
  "no archive": lambda data: b"a codec",
  "cut off": lambda data: data[: len(data) // 2],
  "a number changed": lambda data: data.replace(data[200:204], b"\0\1\2\3", 1),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_is_one_line(tmp_path, kind):
  config = PatchPCAConfig(patch=4, channels=7)
  path = tmp_path / patch_pca.FILE
  patch_pca.save(path, patch_pca.fit(clips(), config))
  path.write_bytes(DAMAGED[kind](path.read_bytes()))
  with pytest.raises(UserError, match=r"codec.npz is damaged .*; remove it: the data stage fits"):
    config.open(tmp_path)


@pytest.mark.parametrize("name", ["mean", "basis", "scale", "patch"])
def test_arrays_that_do_not_fit_are_damage(tmp_path, name):
  config = PatchPCAConfig(patch=4, channels=7)
  path = tmp_path / patch_pca.FILE
  patch_pca.save(path, patch_pca.fit(clips(), config))
  with np.load(path) as stored:
    arrays = dict(stored)
  for change in (arrays[name][..., None], None):
    changed = {k: v for k, v in arrays.items() if k != name}
    np.savez(path, **changed, **({} if change is None else {name: change}))
    with pytest.raises(UserError, match="codec.npz is damaged"):
      config.open(tmp_path)
