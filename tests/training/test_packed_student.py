"""A student with packed history as a run: what its config refuses, and the commands on what it
trained.
"""

import itertools

import numpy as np
import pytest

from experiments import shapes_hiar_packed
import hiar_jax
from hiar_jax.config.building import build
from hiar_jax.errors import UserError
from hiar_jax.training.experiment import Experiment
from tests.helpers import tiny_run
from tests.helpers.video_reader import read_mp4

CONFIG = "experiments/shapes_hiar_packed.py:smoke"


def config(**history):
  c = shapes_hiar_packed.get_config("smoke")
  with c.unlocked():
    c.history.update(history)
  return c


def test_the_student_alone_has_projections():
  e = build(Experiment, config())
  assert e.student_dit.packing == e.stored_student.packing == (2,) and e.stored_student != e.dit
  assert e.dit.packing == e.teacher_dit.packing == ()
  plain = build(Experiment, config(past="ring", packing=""))
  assert plain.stored_student == plain.dit and plain.student_dit.packing == ()


@pytest.mark.parametrize(
  ("history", "message"),
  [
    ({"past": "ring"}, "is for history.past = 'packed', not 'ring'"),
    ({"packing": "td_f3k3f3k1_g3"}, "schedule 'td_f3k3f3k1_g3': 'f3k3'"),
    ({"window": 9}, "window = 9: expected packed groups, .* as tc_f16k4f2k2f6k1_g3"),
  ],
)
def test_what_does_not_fit_is_refused(history, message):
  with pytest.raises(UserError, match=message):
    build(Experiment, config(**history))


@pytest.fixture
def chain(tmp_path_factory):
  return tiny_run.chain(tmp_path_factory.getbasetemp())


@pytest.mark.slow
def test_smoke_goes_through_every_stage_and_command(chain, tmp_path):
  workdir = tmp_path / "packed"
  train = ("-m", "hiar_jax.train", f"--config={CONFIG}", f"--workdir={workdir}")
  done = chain.python(*train)
  assert done.returncode == 0, done.stderr
  kept = lambda: tiny_run.kept(workdir)
  before = kept()
  done = chain.python(*train)
  assert done.returncode == 0 and kept() == before

  def command(name, out, *options):
    prompt = "--prompt=a red circle moving left"
    done = chain.python(
      "-m", f"hiar_jax.{name}", f"--workdir={workdir}", prompt, f"--out={out}", *options
    )
    return done.returncode, done.stderr

  for name in ("generate", "stream"):
    status, said = command(name, tmp_path / f"{name}.mp4", "--frames=30", "--seed=3")
    assert status == 0, said
    assert len(read_mp4(tmp_path / f"{name}.mp4")[0]) == 30
  # the files are compressed; these are the frames
  model = hiar_jax.load(workdir)
  whole = model.generate("a red circle moving left", frames=30, seed=3)
  stream = model.stream("a red circle moving left", seed=3)
  streamed = [piece.frames for piece in itertools.islice(stream, 10)]  # of a block each
  difference = whole.astype(int) - np.concatenate(streamed)
  assert len(whole) == 30 and abs(difference).max() <= 1
  status, said = command("stream", tmp_path / "a.mp4", "--frames=9", "--window=9")
  assert status == 2 and "expected packed groups, then the window's past frames" in said
