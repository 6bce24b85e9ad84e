"""What a run writes about itself: one schema, whole lines, and a resumed file equal to a straight
one.
"""

import json
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from hiar_jax.progress import Progress
from hiar_jax.training.log import Writer, film_strip, read_log


def without_time(path):
  return [
    {key: value for key, value in record.items() if key != "time"} for record in read_log(path)
  ]


def write(directory, stage, steps):
  with Writer(directory) as writer:
    for step in steps:
      writer.scalars(stage, step, {"loss": 1.0 / step})
  return writer.path


def test_a_line_has_one_schema_and_is_there_at_once(tmp_path):
  before = time.time()
  with Writer(tmp_path / "logs") as writer:
    writer.scalars(
      "teacher", 3, {"loss": jnp.float32(0.5), "seen": np.int64(96), "norm": float("nan")}
    )
    (line,) = (tmp_path / "logs" / "metrics.jsonl").read_text().splitlines()
  record = json.loads(line)
  assert list(record) == ["stage", "step", "time", "scalars"]
  assert record["stage"] == "teacher" and record["step"] == 3
  assert record["scalars"] == {"loss": 0.5, "seen": 96, "norm": None}
  assert before - 1 < record["time"] < time.time() + 1


def test_a_resumed_run_has_the_lines_of_a_straight_one(tmp_path):
  straight = write(tmp_path / "a", "init", range(1, 9))
  write(tmp_path / "b", "init", range(1, 7))  # killed after step 6, its checkpoint is of step 4
  with Writer(tmp_path / "b") as writer:
    writer.resume("init", 4)
    for step in range(5, 9):
      writer.scalars("init", step, {"loss": 1.0 / step})
  assert without_time(writer.path) == without_time(straight)


def test_resuming_a_stage_leaves_the_others(tmp_path):
  write(tmp_path, "teacher", range(1, 6))
  write(tmp_path, "init", range(1, 4))
  with Writer(tmp_path) as writer:
    writer.resume("init", 0)
  assert [(r["stage"], r["step"]) for r in without_time(writer.path)] == [
    ("teacher", s) for s in range(1, 6)
  ]
  assert len(read_log(writer.path, "teacher")) == 5 and not read_log(writer.path, "init")


def test_a_line_torn_by_a_kill_is_dropped(tmp_path):
  path = write(tmp_path, "init", [1, 2])
  path.write_text(path.read_text() + '{"stage": "init", "st')
  write(tmp_path, "init", [3])
  assert [record["step"] for record in read_log(path)] == [1, 2, 3]


@pytest.mark.parametrize(
  "line", [b'{"stage": "in', b"[1]", b"3", b'{"step": 2}', b"\xff\0", b"", b"[" * 10**5]
)
def test_a_damaged_line_is_named_and_dropped(tmp_path, line, capsys):
  path = write(tmp_path, "init", [1])
  path.write_bytes(path.read_bytes() + line + b"\n")
  with open(path, "ab") as file:
    file.write(path.read_bytes().splitlines(keepends=True)[0].replace(b'"step": 1', b'"step": 2'))
  assert [record["step"] for record in read_log(path)] == [1, 2]
  assert capsys.readouterr().err == f"{path}, line 2 is damaged, and left out\n"
  write(tmp_path, "init", [3])
  assert capsys.readouterr().err.count("line 2 is damaged") == 1
  assert [record["step"] for record in read_log(path)] == [1, 2, 3]
  assert capsys.readouterr().err == ""


def test_tensorboard_gets_scalars_and_clips(tmp_path):
  with Writer(tmp_path) as writer:
    writer.scalars("init", 1, {"loss": 0.5})
    writer.video("init", 1, "clip", np.zeros((2, 5, 8, 8, 3), np.uint8))
  (events,) = tmp_path.glob("events.out.tfevents.*")
  content = events.read_bytes()
  for tag in (b"init/loss", b"init/clip"):
    assert tag in content


def test_clips_are_pictures_that_the_log_names(tmp_path):
  clips = np.random.default_rng(0).integers(0, 256, (2, 5, 8, 6, 3)).astype(np.uint8)
  with Writer(tmp_path) as writer:
    writer.scalars("init", 20, {"loss": 0.5})
    writer.video("init", 20, "clip", clips)
  scalars, image = without_time(writer.path)
  assert scalars == {"stage": "init", "step": 20, "scalars": {"loss": 0.5}}
  assert image == {"stage": "init", "step": 20, "image": "clip/init-000020.png"}
  np.testing.assert_array_equal(
    np.asarray(Image.open(tmp_path / image["image"])), film_strip(clips)
  )


def test_pictures_of_another_kind_are_refused(tmp_path):
  with Writer(tmp_path) as writer:
    with pytest.raises(
      ValueError, match=r"expected uint8 \[b, f, h, w, 3\], got uint8 \[5, 8, 8, 3\]"
    ):
      writer.video("init", 1, "clip", np.zeros((5, 8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match=r"got float32"):
      writer.video("init", 1, "clip", np.zeros((2, 5, 8, 8, 3), np.float32))


def test_a_film_strip_runs_from_the_first_frame_to_the_last():
  clips = np.broadcast_to(np.arange(9, dtype=np.uint8)[None, :, None, None, None], (2, 9, 4, 6, 3))
  strip = film_strip(clips, columns=3)
  assert strip.shape == (8, 18, 3)
  np.testing.assert_array_equal(strip[0, ::6, 0], [0, 4, 8])
  assert film_strip(clips[:, :2], columns=8).shape == (8, 12, 3)


def test_only_the_first_process_writes(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  with Writer(tmp_path / "logs") as writer:
    writer.resume("init", 0)
    writer.scalars("init", 1, {"loss": 0.5})
    writer.video("init", 1, "clip", np.zeros((2, 5, 8, 8, 3), np.uint8))
  with Progress("init", 10, seconds=0) as bar:
    bar.update(1, loss=0.5)
  assert not (tmp_path / "logs").exists()
  assert capsys.readouterr() == ("", "")


@pytest.mark.slow
def test_no_tensorflow_and_no_torch_come_with_it(tmp_path):
  """Not even where they are installed."""
  code = """
import sys
from hiar_jax.training.log import Writer
with Writer(sys.argv[1]) as writer:
  writer.scalars("a", 1, {"loss": 1.0})
assert not {"tensorflow", "torch"} & set(sys.modules)
"""
  subprocess.run([sys.executable, "-W", "error", "-c", code, tmp_path], check=True)
  assert list(tmp_path.glob("events*"))
