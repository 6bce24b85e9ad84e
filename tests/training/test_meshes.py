"""Meshes that an experiment may have."""

import math
import pathlib

import jax
import pytest

from hiar_jax.config.building import build
from hiar_jax.errors import UserError
from hiar_jax.models.frames import abstract_weights
from hiar_jax.parallel.mesh import MeshConfig, make_mesh
from hiar_jax.planning import device_memory, programs
from hiar_jax.planning.abstract_run import AbstractRun
from hiar_jax.planning.stage_steps import STAGES
from hiar_jax.training import device_mesh
from hiar_jax.training.device_mesh import open_mesh
from hiar_jax.training.experiment import Experiment
from hiar_jax.training.lora import Adapters, LoRAConfig
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


# ------------------------------------------------------------------- what the state of a run needs


OPEN = {"mesh__data": -1, "mesh__fsdp": -1, "mesh__min_shard": 1}


def both_open(**changes) -> Experiment:
  adamw = {"teacher__rule": "adamw", "distill__rule": "adamw"}
  return build(Experiment, tiny_run.make_config(**OPEN, **adamw, **changes))


def state_bytes(e: Experiment) -> int:
  """Those of distillation on one device: weights, average and AdamW's moments of the student, of
  which the first has 16 bits here (b1 = 0), the same of the critic but for an average, and the
  teacher.
  """
  count = sum(leaf.size for leaf in jax.tree.leaves(abstract_weights(e.dit)))
  return count * ((4 + 4 + 2 + 4) + (4 + 2 + 4) + 4)


@pytest.mark.parametrize(
  ("room", "shape"),
  [(2.05, (8, 1)), (1.9, (4, 2)), (0.9, (2, 4)), (0.1, (1, 8))],
  ids=["half of the memory", "a little more", "twice", "never"],
)
def test_the_state_takes_half_of_the_memory(room, shape):
  e = both_open()
  mesh = open_mesh(e, jax.devices(), memory=int(room * state_bytes(e)))
  assert mesh.devices.shape == shape and mesh.axis_names == ("data", "fsdp")


def test_devices_that_share_a_clip_are_not_counted_twice():
  e = both_open(mesh__ring=4, model__attention="auto")
  mesh = open_mesh(e, memory=int(1.9 * state_bytes(e)))
  assert dict(mesh.shape) == {"data": 1, "fsdp": 2, "ring": 4}
  with pytest.raises(UserError, match="mesh: ring 4 does not divide the 6 devices"):
    open_mesh(e, jax.devices()[:6], memory=1)


def test_it_is_said_why(monkeypatch):
  e, said = both_open(), []
  monkeypatch.setattr(device_mesh.logging, "info", said.append)
  open_mesh(e, memory=int(1.9 * state_bytes(e)))
  (line,) = said
  assert "data = 4, fsdp = 2" in line and "at most half of its" in line


def test_sizes_that_are_given_are_kept():
  e = build(Experiment, tiny_run.make_config(mesh__data=-1, mesh__fsdp=2))
  assert dict(open_mesh(e, memory=1).shape) == {"data": 4, "fsdp": 2}


def test_a_critic_of_adapters_needs_less():
  """Its base is the real score's own here."""
  whole, adapted = (
    device_mesh._bytes(device_mesh._distillation(e), MeshConfig(data=1))
    for e in (both_open(), both_open(distill__critic_lora={"rank": 2}))
  )
  network = both_open().dit
  count = sum(leaf.size for leaf in jax.tree.leaves(abstract_weights(network)))
  start = Adapters(network, LoRAConfig(rank=2)).start
  adapters = jax.eval_shape(start, jax.random.key(0), abstract_weights(network))
  few = sum(leaf.size for leaf in jax.tree.leaves(adapters))
  # weights, AdamW's second moment, and the first in 16 bits; counters are the rest
  assert whole - adapted == pytest.approx((4 + 4 + 2) * (count - few), rel=0.01)


def test_adapters_leave_the_weights_as_they_are():
  """Muon has one moment of the layers' matrices, AdamW two of the rest."""
  config, found = tiny_packed.make_config(**OPEN), []
  for rank in (0, 2):
    if rank:
      config.framepack.lora = {"rank": rank, "alpha": 4.0}
    e = build(Experiment, config)
    count = sum(leaf.size for leaf in jax.tree.leaves(abstract_weights(e.packed_dit)))
    parts = device_mesh._states(e)[-1]
    found.append(device_mesh._bytes(parts, MeshConfig(data=1)) / (4 * count))
  assert 3 < found[0] <= 4 and 1 < found[1] < found[0] - 1, found


def counted(e: Experiment) -> int:
  """Bytes of the last stage on one device."""
  return device_mesh._bytes(device_mesh._states(e)[-1], MeshConfig(data=1))


def lowered(e: Experiment) -> int:
  """What the updates behind the teacher's hold on one device, texts left out."""
  mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
  run = programs.on_one_device(AbstractRun(e, pathlib.Path(), mesh), mesh.devices.flat[0])
  text = 4 * math.prod(run.negative.shape)
  held = []
  for name in STAGES.keys() - {"teacher"}:
    if programs.PROGRAMS[name].exists(e):
      program = programs.PROGRAMS[name].make(run)
      held.append(program.bytes_of("state") + max(0, program.bytes_of("frozen") - text))
  return max(held)


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("packed", [False, True], ids=["distilled", "packed"])
def test_what_is_counted_is_what_updates_hold(packed, rank):
  if packed:
    config = tiny_packed.make_config(framepack__lora={"rank": rank, "alpha": 4.0})
  else:
    config = tiny_run.make_config(distill__critic_lora={"rank": rank})
  e = build(Experiment, config)
  assert counted(e) == pytest.approx(lowered(e), rel=1e-3)


def test_the_memory_here_is_that_of_the_host():
  device = jax.devices()[0]
  assert device_memory.counted(device) is None
  whole = device_memory.of_host([device])
  assert device_memory.of_host(jax.devices()) == whole // 8 > 2**20


def test_a_run_is_opened_on_what_was_chosen(monkeypatch, tmp_path):
  monkeypatch.setattr(device_memory, "counted", lambda device: 100)
  assert tiny_run.make_run(tmp_path, **OPEN).mesh.shape["fsdp"] == 8
