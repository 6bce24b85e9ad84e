"""A stream's tick, of shapes alone: what is planned before there are weights or devices."""

import jax
import numpy as np

from hiar_jax.models.frames import abstract_weights
from hiar_jax.parallel.rules import sharded_shapes, tree_shardings
from hiar_jax.planning.abstract_run import AbstractRun
from hiar_jax.planning.programs import Entry, Program, at
from hiar_jax.streaming.compiled_tick import Engine, StreamParts, TickOptions
from hiar_jax.streaming.layout import Layout


def tick(run: AbstractRun) -> Program:
  """Returns one tick of one stream: levels over devices where there are enough, else on one."""
  e = run.experiment
  devices = list(run.mesh.devices.flat)
  sigmas = tuple(float(sigma) for sigma in run.sigmas)
  levels = len(sigmas) - 1
  size = e.latent.height, e.latent.width
  nothing = StreamParts(e.student_dit, e.history, sigmas, {}, run.noise_key, size, run.texts, "")
  layout = Layout(level=levels if len(devices) >= levels else 1)
  engine = Engine(nothing, TickOptions(layout=layout), devices)
  weights = abstract_weights(e.stored_student, e.model.dtype)
  shardings = tree_shardings(weights, engine.mesh, e.student_dit.sharding_rules)
  text = at(run.prompts(1), engine.whole)
  recache = jax.ShapeDtypeStruct((), np.bool_, sharding=engine.whole)
  with jax.set_mesh(engine.mesh):
    state = engine.main.abstract(text)
  arguments = {
    "weights": sharded_shapes(weights, shardings),
    "state": state,
    "text": text,
    "recache": recache,
  }
  return Program(engine.main.compiled_tick, arguments, engine.mesh, 1)


TICK = Entry(
  tick,
  lambda e: e.framepack is None and e.history.order == "step_first" and bool(e.history.window),
  "it cannot be streamed level by level",
  trains=False,
)
