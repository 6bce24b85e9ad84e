"""What training carries from step to step: one named tree, the optimizer that moves it, and the
average that inference uses.
"""

from collections.abc import Callable
import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp
import optax
import optax.contrib

from hiar_jax.errors import UserError, at_least
from hiar_jax.types import Batch, Key, Mean, Params, PyTree

SCHEDULES = ("constant", "cosine")
OPTIMIZERS = ("adamw", "muon")


@flax.struct.dataclass
class TrainState:
  """The complete state of a stage; the same tree for all, `critic` being None where there is none.

  step: updates done (critic updates, in distillation). key: never changes; a step's randomness is
  fold_in(key, step).
  params, ema, opt_state: the network in training (teacher or student). critic, critic_opt_state:
  the fake score.
  """

  step: jax.Array
  key: Key
  params: Params
  ema: Params
  opt_state: PyTree
  critic: Params | None = None
  critic_opt_state: PyTree | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
  """How a network is trained: AdamW after clipping by global norm, linear warm-up, then a constant
  or a cosine to zero; EMA.

  rule: `adamw`, or `muon`, which moves the layers' matrices along the orthogonalised momentum at
  `muon_lr` and the rest by AdamW.
  steps: updates. batch: global, taken in `accumulate` parts. ema_decay is ramped up from update
  `ema_start`, before which the average is a copy of the weights.
  """

  steps: int
  batch: int
  lr: float
  warmup: int = 0
  schedule: str = "constant"
  b1: float = 0.9
  b2: float = 0.999
  weight_decay: float = 0.01
  clip: float = 10.0
  ema_decay: float = 0.99
  ema_start: int = 0
  accumulate: int = 1
  rule: str = "adamw"
  muon_lr: float = 0.02

  def __post_init__(self):
    at_least(1, steps=self.steps, batch=self.batch, accumulate=self.accumulate)
    at_least(0, lr=self.lr, warmup=self.warmup, ema_start=self.ema_start)
    if self.rule not in OPTIMIZERS:
      raise UserError(f"rule = {self.rule!r}: expected one of {', '.join(OPTIMIZERS)}")
    if self.schedule not in SCHEDULES:
      raise UserError(f"schedule = {self.schedule!r}: expected one of {', '.join(SCHEDULES)}")
    if self.batch % self.accumulate:
      raise UserError(
        f"batch = {self.batch} cannot be taken in accumulate = {self.accumulate} equal parts"
      )

  def optimizer(
    self, lr: float | None = None, steps: int | None = None
  ) -> optax.GradientTransformation:
    """`lr` and `steps` replace the stage's own, for a network that is trained beside its main
    one.
    """
    lr, steps = self.lr if lr is None else lr, self.steps if steps is None else steps
    rate = functools.partial(self._rate, steps=steps)
    if self.rule == "muon":
      rule = optax.contrib.muon(
        rate(self.muon_lr),
        adam_learning_rate=rate(lr),
        adam_b1=self.b1,
        adam_b2=self.b2,
        weight_decay=self.weight_decay,
        adam_weight_decay=self.weight_decay,
        muon_weight_dimension_numbers=_layer_matrices,
      )
    else:
      rule = optax.adamw(rate(lr), b1=self.b1, b2=self.b2, weight_decay=self.weight_decay)
    return optax.chain(optax.clip_by_global_norm(self.clip), rule)

  def _rate(self, lr: float, steps: int) -> optax.Schedule:
    if self.schedule == "cosine":
      return optax.warmup_cosine_decay_schedule(0.0, lr, self.warmup, max(steps, self.warmup + 1))
    return optax.warmup_constant_schedule(0.0 if self.warmup else lr, lr, self.warmup)


def _layer_matrices(params: Params) -> PyTree:
  """Which axes of a parameter are a matrix's, for Muon: those of the stacked layers' kernels
  [layers, in, out].
  """
  axes = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)
  is_matrix = lambda path, leaf: (
    leaf.ndim == 3 and path[0].key == "layers" and path[-1].key == "kernel"
  )
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: axes if is_matrix(path, leaf) else None, params
  )


def create(
  key: Key, params: Params, optimizer, critic: Params | None = None, critic_optimizer=None
) -> TrainState:
  """A fresh state. Call it under jit with out_shardings, so that nothing is born unsharded."""
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    key=key,
    params=params,
    ema=jax.tree.map(jnp.copy, params),
    opt_state=optimizer.init(params),
    critic=critic,
    critic_opt_state=None if critic is None else critic_optimizer.init(critic),
  )


def update_ema(ema: Params, params: Params, updates, training: TrainConfig) -> Params:
  """The average after `updates` earlier updates.

  Its decay ramps up as (1 + n) / (10 + n), never above `ema_decay`.
  """
  n = updates - training.ema_start
  decay = jnp.where(n < 0, 0.0, jnp.minimum(training.ema_decay, (1.0 + n) / (10.0 + n)))
  return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, ema, params)


Loss = Callable[[Params, Batch], tuple[jax.Array, dict[str, jax.Array]]]


def apply_gradients(
  loss: Loss,
  params: Params,
  opt_state: PyTree,
  optimizer,
  batch: Batch,
  *,
  accumulate: int = 1,
  mean: Mean,
) -> tuple[Params, PyTree, dict[str, jax.Array]]:
  """One update from the mean gradient over the batch, taken in `accumulate` parts; `mean` averages
  over devices.

  loss(params, part) -> (mean over the part, metrics).
  """
  gradient = jax.value_and_grad(loss, has_aux=True)

  def one(part):
    (value, metrics), grads = gradient(params, part)
    return grads, {"loss": value, **metrics}

  if accumulate == 1:
    grads, metrics = one(batch)
  else:
    parts = jax.tree.map(lambda x: _parts(x, accumulate), batch)
    total = jax.eval_shape(one, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), total)
    add = lambda carry, part: (jax.tree.map(jnp.add, carry, one(part)), None)
    total, _ = jax.lax.scan(add, zeros, parts)
    grads, metrics = jax.tree.map(lambda x: x / accumulate, total)
  grads, metrics = mean((grads, metrics))
  updates, opt_state = optimizer.update(grads, opt_state, params)
  return (
    optax.apply_updates(params, updates),
    opt_state,
    {**metrics, "grad_norm": optax.tree.norm(grads)},
  )


def _parts(x: jax.Array, count: int) -> jax.Array:
  """[b ...] -> [count, b / count, ...], every device keeping its own examples."""
  return jnp.swapaxes(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 0, 1)
