"""Meshes that an experiment may have."""

import pytest

from hiar_jax.config.building import build
from hiar_jax.errors import UserError
from hiar_jax.training.experiment import Experiment
from tests.helpers import tiny_packed, tiny_run


def test_a_ring_takes_more_devices_than_heads():
  e = build(Experiment, tiny_run.make_config(mesh__ring=4, model__attention="auto"))
  assert e.mesh.ring > e.dit.num_heads


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"ring": 3}, "mesh.ring x sequence = 3 does not divide the 4 tokens of a frame"),
    (
      {"kernel": "splash"},
      "mesh.ring = 2 does not divide the frames, which attention = 'splash' takes whole; use "
      "'auto' or 'blockwise'",
    ),
    ({"kernel": "cudnn"}, "attention = 'cudnn' takes whole"),
    ({"kernel": "xla"}, "attention = 'xla' takes whole"),
  ],
)
def test_what_a_ring_cannot_split(changes, message):
  kernel = changes.get("kernel", "auto")
  config = tiny_run.make_config(mesh__ring=changes.get("ring", 2), model__attention=kernel)
  with pytest.raises(UserError, match=message):
    build(Experiment, config)


def test_packed_frames_have_no_ring():
  with pytest.raises(UserError, match="mesh.ring = 2 does not divide packed frames"):
    build(Experiment, tiny_packed.make_config(mesh__ring=2, model__attention="auto"))
