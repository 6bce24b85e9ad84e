"""What devices send each other in a training step, read from the compiled program.

No collective may have the examples of all devices in its result: that is how a partitioner that is
not told otherwise saves on weights (4 TB a device and update of the published run).
"""

import re

import jax
import numpy as np
import pytest

from hiar_jax.models import dit_layers
from hiar_jax.parallel.mapping import map_step
from hiar_jax.parallel.mesh import MeshConfig, make_mesh, put_batch, replicated
from hiar_jax.parallel.rules import tree_shardings
from tests.helpers import training_steps
from tests.helpers.slow_cases import few, slow
from tests.helpers.training_steps import (
  MODEL,
  compiled_quickly,  # noqa: F401
  linear_optimizer,  # noqa: F401
  make_batch,
  make_case,
)

BATCH = 40  # five examples a device; no other size of the program is a multiple of it
COLLECTIVE = re.compile(r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute)(-start)?\(")


def collectives(kind: str, config: MeshConfig) -> list[tuple[str, list[int]]]:
  """(kind, shape) of each result."""
  mesh, case = make_mesh(config), make_case(kind)
  with jax.set_mesh(mesh):
    shapes = jax.eval_shape(case.create)
    shardings = tree_shardings(shapes, mesh, MODEL.sharding_rules, min_shard=config.min_shard)
    state = jax.jit(case.create, out_shardings=shardings)()
    frozen = jax.device_put(case.frozen, replicated(mesh))
    step = map_step(case.make_step, shardings, mesh)
    text = step.lower(state, put_batch(make_batch(0), mesh), frozen).compile().as_text()
  found = []
  for results, name, _ in COLLECTIVE.findall(text):
    for shape in re.findall(r"\w+\[([\d,]*)\]", results):
      found.append((name, [int(n) for n in shape.split(",") if n]))
  return found


@pytest.mark.parametrize("kind", few(["generator", "critic"], "critic"))
@pytest.mark.parametrize("pinned", [True, *slow(False)], ids=["pinned", "left to the compiler"])
def test_activations_stay_with_their_examples(kind, pinned, monkeypatch):
  monkeypatch.setattr(training_steps, "BATCH", BATCH)
  if not pinned:
    monkeypatch.setattr(dit_layers, "constrained", lambda x, path: x)
  found = collectives(kind, MeshConfig(data=1, fsdp=8, min_shard=1))
  assert found
  everybody = [shape for _, shape in found if BATCH in shape[:2] and np.prod(shape) > BATCH]
  assert bool(everybody) != pinned, everybody
