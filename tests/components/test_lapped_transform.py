"""The lapped transform, against plain loops and its definition; and the code behind it, whose
patches leave no seams.
"""

import functools

import jax
import numpy as np
import pytest

from hiar_jax.components import lapped_transform, patch_pca
from hiar_jax.components.patch_pca import PatchPCAConfig
from hiar_jax.errors import UserError
from hiar_jax.video.frames import to_float
from tests.helpers.compiling import quick_jit

P = 8


def video(height: int = 24, width: int = 40) -> np.ndarray:
  return np.random.default_rng(0).normal(size=(2, 3, height, width, 3)).astype(np.float32)


def by_loops(x: np.ndarray) -> np.ndarray:
  """Each boundary's pixels in float64: sums and differences of mirrored pairs, the differences
  through two cosine transforms.
  """
  x = x.astype(np.float64)
  half = P // 2
  for axis in (2, 3):
    for edge in range(P, x.shape[axis], P):
      at = [slice(None)] * 5
      at[axis] = slice(edge - half, edge + half)
      near = np.moveaxis(x[tuple(at)], axis, -1)
      left, right = near[..., :half], near[..., half:][..., ::-1]  # from the boundary's sides
      total, difference = left + right, left - right
      n = np.arange(half)
      basis2 = np.cos(np.pi * np.outer(n, 2 * n + 1) / (2 * half)) * np.sqrt(2 / half)
      basis2[0] /= np.sqrt(2)
      basis4 = np.cos(np.pi * np.outer(2 * n + 1, 2 * n + 1) / (4 * half)) * np.sqrt(2 / half)
      turned = difference @ basis4.T @ basis2
      out = np.concatenate([(total + turned) / 2, ((total - turned) / 2)[..., ::-1]], -1)
      x[tuple(at)] = np.moveaxis(out, -1, axis)
  return x


def test_it_is_its_definition():
  np.testing.assert_allclose(lapped_transform.forward(video(), P), by_loops(video()), atol=2e-6)


@pytest.mark.parametrize("patch", [4, 8, 16])
def test_it_is_orthogonal_and_keeps_constants(patch):
  x = video(2 * patch, 3 * patch)
  there = lapped_transform.forward(x, patch)
  assert np.abs(there - x).max() > 0.1
  np.testing.assert_allclose((there**2).sum(), (x**2).sum(), rtol=1e-5)
  np.testing.assert_allclose(lapped_transform.inverse(there, patch), x, atol=5e-6)
  flat = np.full_like(x, 0.3)
  np.testing.assert_allclose(lapped_transform.forward(flat, patch), flat, atol=1e-6)


def test_one_patch_is_as_it_is():
  x = video(P, P)
  np.testing.assert_array_equal(lapped_transform.forward(x, P), x)


def waves(count: int = 6) -> np.ndarray:
  """Clips uint8 [n 4 32 48 3] of waves in many directions, finer than a code of few numbers."""
  rng = np.random.default_rng(1)
  t, y, x = np.meshgrid(np.arange(4), np.arange(32), np.arange(48), indexing="ij")
  made = []
  for _ in range(count):
    parts = [
      np.sin(a * x + b * y + 0.2 * t + c)[..., None] * rng.normal(size=3) / (1 + 4 * np.hypot(a, b))
      for a, b, c in rng.normal(scale=0.4, size=(20, 3))
    ]
    made.append(sum(parts))
  made = np.stack(made)
  return np.clip(128 + 90 * made / np.abs(made).max(), 0, 255).astype(np.uint8)


def seams(pixels) -> float:
  """Mean step across the boundaries of patches, over that inside them, along the rows."""
  steps = np.abs(np.diff(np.asarray(pixels), axis=3)).mean((0, 1, 2, 4))
  across = np.arange(1, pixels.shape[3]) % P == 0
  return steps[across].mean() / steps[~across].mean()


@functools.cache
def coded(lapped: bool, channels: int = 8):
  clips = waves()
  codec = patch_pca.fit(clips, PatchPCAConfig(patch=P, channels=channels, lapped=lapped))
  x = to_float(clips)
  through = lambda x: patch_pca.decode(codec, patch_pca.encode(codec, x))
  return x, np.asarray(quick_jit(through)(x)), codec


def test_a_lapped_code_has_no_seams_and_a_smaller_error():
  x, plain, _ = coded(False)
  _, lapped, _ = coded(True)
  assert seams(plain) / seams(x) > 1.3 and abs(seams(lapped) / seams(x) - 1) < 0.1
  assert ((lapped - x) ** 2).mean() < 0.95 * ((plain - x) ** 2).mean()


def test_with_all_components_nothing_is_lost():
  x, through, _ = coded(True, P * P * 3)
  np.testing.assert_allclose(through, x, atol=1e-4)


def test_it_is_stored_and_an_earlier_file_has_none(tmp_path):
  x, through, codec = coded(True)
  config = PatchPCAConfig(patch=P, channels=8, lapped=True)
  patch_pca.save(tmp_path / patch_pca.FILE, codec)
  opened = config.open(tmp_path)
  assert opened.lapped
  np.testing.assert_allclose(opened.latents(waves()), codec.latents(waves()), atol=1e-5)
  _, _, plain = coded(False)
  patch_pca.save(tmp_path / patch_pca.FILE, plain)
  with np.load(tmp_path / patch_pca.FILE) as stored:
    assert "lapped" not in stored.files
  assert not config.open(tmp_path).lapped


def test_the_gradient_passes():
  x, _, codec = coded(True)
  slope = quick_jit(jax.grad(lambda x: (patch_pca.encode(codec, x) ** 2).sum()))(x)
  assert np.isfinite(slope).all() and np.abs(slope).max() > 0


def test_odd_patches_have_no_middle():
  with pytest.raises(UserError, match="codec.lapped with codec.patch = 5: expected an even number"):
    PatchPCAConfig(patch=5, lapped=True)
