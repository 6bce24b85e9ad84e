"""Trajectories: parts survive a stop anywhere, the data set holds all of them in order."""

import numpy as np
import pytest

from hiar_jax.data import parts, tfds_builder, trajectories
from hiar_jax.data.trajectories import TrajectoryWriter
from hiar_jax.errors import UserError

SIGMAS = (1.0, 0.9375, 0.8333, 0.625)


def _part(rows, dtype=np.float32):
  latents = np.stack([np.random.default_rng(r).normal(size=(4, 3, 2, 2, 5)) for r in rows]).astype(
    dtype
  )
  return latents, [f"clip number {r} é" for r in rows]


def _writer(directory, **changes):
  return TrajectoryWriter(directory, **{"sigmas": SIGMAS, "total": 10, "part_size": 4, **changes})


def _compute(writer, parts):
  for index in parts:
    writer.write_part(index, *_part(writer.rows(index)), [9 * row for row in writer.rows(index)])


def _check(directory, atol=0.0):
  source = tfds_builder.open_source(directory)
  assert len(source) == 10
  latents, captions = _part(range(10))
  for i, record in enumerate(source):
    np.testing.assert_allclose(record["trajectory"], latents[i], atol=atol, rtol=0)
    assert record["caption"].decode() == captions[i] and record["start"] == 9 * i


def test_a_stop_anywhere_resumes_at_the_first_missing_part(tmp_path):
  writer = _writer(tmp_path)
  assert writer.missing_parts() == [0, 1, 2] and len(writer.rows(2)) == 2
  _compute(writer, [0])
  # killed inside a write
  (tmp_path / "parts" / ".part-00001-of-00003.npz.77.tmp").write_bytes(b"half a part")
  writer = _writer(tmp_path)
  assert writer.missing_parts() == [1, 2] and not writer.complete
  with pytest.raises(ValueError, match=r"\[1, 2\] are missing"):
    writer.finish()
  _compute(writer, writer.missing_parts())
  assert not writer.complete
  writer.finish()
  assert writer.complete and writer.missing_parts() == []
  assert not (tmp_path / "parts").exists()
  _check(tmp_path)


def test_a_stop_inside_finish(tmp_path, monkeypatch):
  """Before the data set has its name: all parts are still there.

  After it: only the parts remain to be removed.
  """
  writer = _writer(tmp_path)
  _compute(writer, writer.missing_parts())
  with monkeypatch.context() as patch:
    patch.setattr(parts, "_read_part", _dies_after(parts._read_part, 2))
    with pytest.raises(KeyboardInterrupt):
      writer.finish()
  assert not writer.complete and writer.missing_parts() == []
  with monkeypatch.context() as patch:
    patch.setattr(parts.shutil, "rmtree", _dies_after(None, 0))
    with pytest.raises(KeyboardInterrupt):
      writer.finish()
  writer = _writer(tmp_path)
  assert writer.complete and (tmp_path / "parts").exists()
  writer.finish()
  assert not (tmp_path / "parts").exists()
  _check(tmp_path)


def _dies_after(function, calls):
  left = iter(range(calls))

  def wrapped(*args, **kwargs):
    if next(left, None) is None:
      raise KeyboardInterrupt
    return function(*args, **kwargs)

  return wrapped


def test_hosts_share_the_parts(tmp_path):
  shares = [_writer(tmp_path, part_size=2).missing_parts(p, 3) for p in range(3)]
  assert shares == [[0, 3], [1, 4], [2]]
  for share in shares:
    _compute(_writer(tmp_path, part_size=2), share)
  _writer(tmp_path, part_size=2).finish()
  _check(tmp_path)


def test_float16_halves_the_file(tmp_path):
  for dtype in ("float32", "float16"):
    writer = _writer(tmp_path / dtype, dtype=dtype)
    _compute(writer, writer.missing_parts())
    writer.finish()
  assert tfds_builder.open_source(tmp_path / "float16")[0]["trajectory"].dtype == np.float16
  _check(tmp_path / "float16", atol=2e-3)


def test_a_damaged_part_is_computed_anew(tmp_path):
  writer = _writer(tmp_path)
  _compute(writer, writer.missing_parts())
  path = sorted((tmp_path / "parts").iterdir())[1]
  path.write_bytes(path.read_bytes()[:1000])
  with pytest.raises(UserError, match="part-00001-of-00003.npz is damaged") as error:
    writer.finish()
  assert "\n" not in str(error.value)
  assert writer.missing_parts() == [1] and not writer.complete
  _compute(writer, [1])
  writer.finish()
  _check(tmp_path)


def test_values_that_are_not_finite_are_refused(tmp_path):
  latents, captions = _part(range(4))
  latents[1, 2] = np.nan
  with pytest.raises(UserError, match="not finite"):
    _writer(tmp_path / "a").write_part(0, latents, captions)
  with pytest.raises(UserError, match="not finite as float16"):
    _writer(tmp_path / "b", dtype="float16").write_part(0, np.full_like(latents, 1e6), captions)
  assert _writer(tmp_path / "a").missing_parts() == [0, 1, 2]


def test_a_part_of_the_wrong_shape_is_a_bug(tmp_path):
  latents, captions = _part(range(4))
  for bad in (latents[:3], latents[:, :3], latents[..., 0]):
    with pytest.raises(ValueError, match="part 0 needs"):
      _writer(tmp_path).write_part(0, bad, captions)
  with pytest.raises(ValueError, match="part 0 needs"):
    _writer(tmp_path).write_part(0, latents, captions[:3])


def test_sigmas_are_kept_and_checked(tmp_path):
  _writer(tmp_path)
  assert trajectories.read_sigmas(tmp_path) == list(SIGMAS)
  trajectories.check_sigmas(tmp_path, np.array(SIGMAS, np.float32))
  for other in (SIGMAS[:3], (1.0, 0.9375, 0.8333, 0.5)):
    with pytest.raises(UserError, match="1.0000, 0.9375, 0.8333, 0.6250, but the student"):
      trajectories.check_sigmas(tmp_path, other)
  with pytest.raises(UserError, match="holds no trajectories"):
    trajectories.read_sigmas(tmp_path / "nowhere")


@pytest.mark.parametrize(
  "change, message",
  [
    ({"sigmas": (1.0, 0.5)}, "sigmas="),
    ({"part_size": 5}, "part_size=4"),
    ({"recipe": {"guidance": 3.0}}, "guidance=2.0.*guidance=3.0"),
    ({"total": 0}, "at least 1"),
    ({"dtype": "int8"}, "use 'float32' or 'float16'"),
  ],
)
def test_other_settings_are_refused(tmp_path, change, message):
  _writer(tmp_path, recipe={"guidance": 2.0})
  with pytest.raises(UserError, match=message):
    _writer(tmp_path, **({"recipe": {"guidance": 2.0}} | change))
