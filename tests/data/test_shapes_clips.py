"""The shapes data set on disk: whole, the same for a seed, and without tensorflow."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from hiar_jax.data import shapes_clips, shapes_world, tfds_builder
from hiar_jax.data.shapes_world import WorldConfig
from hiar_jax.errors import UserError
from hiar_jax.files import DiskFull

ROOT = pathlib.Path(__file__).parents[2]


def _python(code, **kwargs):
  return subprocess.Popen(
    [sys.executable, "-W", "error", "-c", code],
    cwd=ROOT,
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    **kwargs,
  )


def _files(directory):
  return {
    str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()
  }


def _records(directory):
  return [dict(r) for r in tfds_builder.open_source(directory)]


@pytest.mark.parametrize("difficulty", ["plain", "textured"])
def test_records_are_the_clips_in_order(tmp_path, difficulty):
  config = WorldConfig(difficulty=difficulty)
  shapes_clips.prepare(tmp_path, config, clips=12, seed=3)
  records = _records(tmp_path)
  assert len(records) == 12
  for index, record in enumerate(records):
    clip = shapes_clips.make_clip(config, 3, index)
    assert record.pop("caption").decode() == clip.pop("caption")
    for key, value in record.items():
      np.testing.assert_array_equal(value, clip[key])
      assert value.dtype == clip[key].dtype
  assert len({r["position"].tobytes() for r in records}) == 12
  other = shapes_clips.make_clip(config, 4, 0)
  assert not np.array_equal(other["position"], records[0]["position"])


def test_some_clips_are_cut_from_further_on():
  """The same scenes; a share of them at their video's second to fourth clip, under the caption of
  its beginning.
  """
  early, mixed, late = (
    [shapes_clips.make_clip(WorldConfig(later=share), 0, i) for i in range(200)]
    for share in (0, 0.35, 1)
  )
  assert not any(clip["start"] for clip in early)
  assert 0.25 < np.mean([clip["start"] > 0 for clip in mixed]) < 0.45
  assert {int(clip["start"]) for clip in late} == {9, 18, 27}
  turned = 0
  for first, clip in zip(early, late, strict=True):
    assert first["caption"] == clip["caption"]
    direction = np.array(
      shapes_world.DIRECTIONS[shapes_world.parse_caption(clip["caption"])[0][0].direction]
    )
    assert (first["velocity"][0, 0] @ direction) > 0
    turned += (clip["velocity"][0, 0] @ direction) < 0
  assert 0.4 < turned / 200 < 0.6


def test_state_is_that_of_the_picture(tmp_path):
  shapes_clips.prepare(tmp_path, WorldConfig(later=0.5), clips=8, seed=0)
  for record in _records(tmp_path):
    parsed = shapes_world.parse_caption(record["caption"].decode())[0][0]
    assert list(shapes_world.COLOURS)[record["colour"][0]] == parsed.colour
    assert shapes_world.SHAPES[record["shape"][0]] == parsed.shape
    # Whatever is not ground is the shape; all shapes are symmetric from left to right.
    bright = np.abs(
      record["video"] / 255 - shapes_world.background_image("plain", WorldConfig())
    ).sum(-1)
    bright[bright < 0.02] = 0
    pixel = np.arange(32) + 0.5
    x = (bright * pixel).sum((1, 2)) / bright.sum((1, 2))
    np.testing.assert_allclose(x, record["position"][:, 0, 0], atol=0.05)


def test_written_and_read_without_tensorflow(tmp_path):
  code = f"""
import sys
from hiar_jax.data import pipeline, shapes_clips, shapes_world as world, tfds_builder as store
shapes_clips.prepare({str(tmp_path)!r}, world.WorldConfig(), 4, 0)
assert len(store.open_source({str(tmp_path)!r})) == 4
print([m for m in sys.modules if m.split(".")[0] in ("tensorflow", "torch")])
"""
  out, err = _python(code).communicate(timeout=120)
  assert out.strip() == "[]", out + err
  assert "shapes_clips: 100%" in err  # the progress bar, and nothing of TFDS' own


def test_preparing_again_touches_nothing(tmp_path):
  shapes_clips.prepare(tmp_path, WorldConfig(), clips=5, seed=0)
  stamps = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
  shapes_clips.prepare(tmp_path, WorldConfig(), clips=5, seed=0)
  assert stamps == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}


def test_shards_hold_all_clips_in_order(tmp_path, monkeypatch):
  shapes_clips.prepare(tmp_path / "one", WorldConfig(), clips=11, seed=0)
  monkeypatch.setattr(tfds_builder, "_SHARD_BYTES", 4 * 9 * 32 * 32 * 3)
  shapes_clips.prepare(tmp_path / "three", WorldConfig(), clips=11, seed=0)
  assert len(list((tmp_path / "three").rglob("*array_record-*"))) == 3
  for a, b in zip(_records(tmp_path / "one"), _records(tmp_path / "three"), strict=True):
    np.testing.assert_array_equal(a["video"], b["video"])


def test_killed_in_the_middle_then_the_same(tmp_path):
  killed, straight = tmp_path / "killed", tmp_path / "straight"
  prepare = (
    "from hiar_jax.data import shapes_clips, shapes_world as world; shapes_clips.prepare({!r}, "
    "world.WorldConfig(), 30, 1)"
  )
  # Stops for good at clip 15, so that the kill always falls in the middle of the write.
  stall = """
import time
from hiar_jax.data import shapes_clips as s
make = s.make_clip
s.make_clip = lambda *a: make(*a) if a[-1] < 15 else time.sleep(100)
"""
  process = _python(stall + prepare.format(str(killed)), start_new_session=True)
  deadline = time.monotonic() + 60
  while not list(killed.glob("*/*/incomplete.*/*array_record*")) and time.monotonic() < deadline:
    assert process.poll() is None, process.communicate()
    time.sleep(0.05)
  os.kill(process.pid, signal.SIGKILL)
  process.communicate()
  assert not tfds_builder.is_complete(killed) and list(killed.glob("*/*/incomplete.*"))
  with pytest.raises(UserError, match="no complete data set"):
    tfds_builder.open_source(killed)
  shapes_clips.prepare(killed, WorldConfig(), 30, 1)
  shapes_clips.prepare(straight, WorldConfig(), 30, 1)
  assert _files(killed) == _files(straight)


def test_killed_before_it_got_its_name(tmp_path):
  shapes_clips.prepare(tmp_path, WorldConfig(), 3, 0)
  (done,) = tmp_path.glob("*/*/1.0.0")
  expected = _files(tmp_path)
  done.rename(done.with_name("incomplete.ABC123_1.0.0"))
  assert not tfds_builder.is_complete(tmp_path)
  shapes_clips.prepare(tmp_path, WorldConfig(), 3, 0)
  assert _files(tmp_path) == expected


@pytest.mark.slow
def test_full_disk_is_one_clear_line_and_leaves_nothing_half_made(tmp_path):
  code = f"""
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
from hiar_jax.data import shapes_clips, shapes_world as world
from hiar_jax.errors import UserError
try:
  shapes_clips.prepare({str(tmp_path)!r}, world.WorldConfig(), 2000, 0)
except UserError as error:
  print(error)
"""
  out, err = _python(code).communicate(timeout=120)
  assert (
    "(ulimit -f); no data set is left half made; raise that limit" in out and out.count("\n") == 1
  ), out + err
  assert not tfds_builder.is_complete(tmp_path)
  assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["recipe.json"]


def test_a_full_disk_is_told_with_what_was_needed(tmp_path, monkeypatch):
  def full(self, **_):
    raise RuntimeError("array_record_writer.cc: No space left on device")

  monkeypatch.setattr(tfds_builder._Builder, "download_and_prepare", full)
  with pytest.raises(
    DiskFull, match=r"no space left on the disk of .* \(.* KiB needed, .* free\); no data set"
  ):
    shapes_clips.prepare(tmp_path, WorldConfig(), 3, 0)


@pytest.mark.parametrize(
  "change, field",
  [
    ({"clips": 6}, "clips=5"),
    ({"seed": 1}, "seed=0"),
    ({"world": WorldConfig(size=64)}, "size=32"),
  ],
)
def test_another_recipe_names_the_field(tmp_path, change, field):
  asked = {"world": WorldConfig(), "clips": 5, "seed": 0}
  shapes_clips.prepare(tmp_path, **asked)
  with pytest.raises(UserError, match=field) as error:
    shapes_clips.prepare(tmp_path, **(asked | change))
  assert "\n" not in str(error.value)


def test_no_clips_is_refused(tmp_path):
  with pytest.raises(UserError, match="0 clips"):
    shapes_clips.prepare(tmp_path, WorldConfig(), clips=0, seed=0)
  assert not list(tmp_path.iterdir())
