"""The training state, the optimizer's settings, one update from accumulated gradients, and the EMA
that inference uses.
"""

from collections.abc import Callable
import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp
import optax
import optax.contrib

from hiar_jax.errors import MAX_SEED, UserError, above, at_least, decay, one_of, within
from hiar_jax.models.frames import Network
from hiar_jax.types import Batch, Key, Mean, Params, PyTree

SCHEDULES = ("constant", "cosine")
OPTIMIZERS = ("adamw", "muon")


@flax.struct.dataclass
class TrainState:
  """The complete state of a stage; all stages have the same tree.

  step: updates done (critic updates, in distillation). key: constant; a step draws from
  fold_in(key, step). params, ema, opt_state: the network in training (teacher or student). critic,
  critic_opt_state: the fake score, None outside distillation.
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
  """The training of a network: clipping by global norm, AdamW or Muon, a schedule, and an EMA.

  steps: updates. batch: global examples, taken in `accumulate` equal parts. clip: 0 = none.
  schedule: linear warm-up over `warmup` updates, then `constant`, or `cosine` down to zero.
  rule: `adamw`, or `muon`, which moves the layers' matrices along their orthogonalised momentum at
  `muon_lr` and all other parameters by AdamW at `lr`. Both of these with Nesterov's momentum, the
  default of optax's Muon; the rule `adamw` is without.
  ema_decay: from update `ema_start` on; until then the average is a copy of the weights. ema_ramp:
  the decay rises to it.
  decayed: which parameters weight_decay pulls to zero: `all`, as the published trainings, or
  `kernels`, not biases, gains and modulation; under Muon, the matrices that it moves.
  seed: of what the stage draws; None: the experiment's.
  """

  steps: int
  batch: int
  lr: float
  warmup: int = 0
  schedule: str = "constant"
  b1: float = 0.9  # AdamW's defaults
  b2: float = 0.999
  weight_decay: float = 0.01
  clip: float = 10.0  # HiAR's published config
  ema_decay: float = 0.99
  ema_start: int = 0
  ema_ramp: bool = dataclasses.field(default=True, metadata={"since": "2026-11"})
  accumulate: int = 1
  rule: str = "adamw"
  muon_lr: float = 0.02  # Keller Jordan's default
  decayed: str = dataclasses.field(default="all", metadata={"since": "2026-11"})
  seed: int | None = dataclasses.field(default=None, metadata={"since": "2026-11"})

  def __post_init__(self):
    at_least(1, steps=self.steps, batch=self.batch, accumulate=self.accumulate)
    above(0, lr=self.lr, muon_lr=self.muon_lr)
    at_least(0, warmup=self.warmup, ema_start=self.ema_start)
    within(0, MAX_SEED, seed=self.seed or 0)
    at_least(0, clip=self.clip, weight_decay=self.weight_decay)
    decay(b1=self.b1, b2=self.b2, ema_decay=self.ema_decay)
    one_of(OPTIMIZERS, rule=self.rule)
    one_of(SCHEDULES, schedule=self.schedule)
    one_of(DECAYED, decayed=self.decayed)
    if self.batch % self.accumulate:
      raise UserError(
        f"batch = {self.batch} cannot be taken in accumulate = {self.accumulate} equal parts"
      )

  @property
  def averaged(self) -> int:
    """The updates of the network whose weights are averaged."""
    return self.steps

  def check_average(self, stage: str) -> None:
    """Raises UserError where the average would not start within the stage's updates."""
    if 0 < self.ema_start >= self.averaged:
      raise UserError(
        f"{stage}.ema_start = {self.ema_start}: there are {self.averaged} updates to average, so "
        "it would never start; set a lower one, or 0"
      )

  def optimizer(
    self, network: Network, *, lr: float | None = None, steps: int | None = None
  ) -> optax.GradientTransformation:
    """Returns the optimizer of a network, which says what Muon moves; `lr` and `steps` replace the
    config's own, as the critic's do.
    """
    lr = self.lr if lr is None else lr  # 0.0 is a rate, so no `or`
    steps = self.steps if steps is None else steps
    rate = functools.partial(self._rate, steps=steps)
    if self.rule == "muon":
      rule = optax.contrib.muon(
        rate(self.muon_lr),
        adam_learning_rate=rate(lr),
        adam_b1=self.b1,
        adam_b2=self.b2,
        # alike for the matrices and the rest; optax's default is 0 for both
        weight_decay=self.weight_decay,
        adam_weight_decay=self.weight_decay if self.decayed == "all" else 0.0,
        muon_weight_dimension_numbers=functools.partial(_matrices, network),
      )
    else:
      rule = optax.adamw(
        rate(lr),
        b1=self.b1,
        b2=self.b2,
        weight_decay=self.weight_decay,
        mask=DECAYED[self.decayed],
        # without momentum the first moment is never read again: half of its memory
        mu_dtype=jnp.bfloat16 if self.b1 == 0 else None,
      )
    # both have an empty state, so that a run may go on with the other
    clip = optax.clip_by_global_norm(self.clip) if self.clip else optax.identity()
    return optax.chain(clip, rule)

  def _rate(self, lr: float, steps: int) -> optax.Schedule:
    """Returns the learning rate by update, with peak `lr`."""
    if self.schedule == "cosine":
      # optax refuses a decay that ends within the warm-up
      return optax.warmup_cosine_decay_schedule(0.0, lr, self.warmup, max(steps, self.warmup + 1))
    # a linear schedule of 0 steps stays at its initial value
    return optax.warmup_constant_schedule(0.0 if self.warmup else lr, lr, self.warmup)


def _kernels(params: Params) -> PyTree:
  return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


# `decayed` -> optax's mask
DECAYED: dict[str, Callable[[Params], PyTree] | None] = {"all": None, "kernels": _kernels}


def _matrices(network: Network, params: Params) -> PyTree:
  """Returns the matrix axes of each parameter for optax's Muon, None for those that AdamW moves."""

  def dimensions(path, leaf):
    axes = network.matrix_axes(tuple(entry.key for entry in path), leaf.ndim)
    return axes and optax.contrib.MuonDimensionNumbers(*axes)

  return jax.tree_util.tree_map_with_path(dimensions, params)


def create_state(
  key: Key, params: Params, optimizer, critic: Params | None = None, critic_optimizer=None
) -> TrainState:
  """Returns the state before the first update.

  To be called under jit with out_shardings, so that no array is ever held unsharded.
  """
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    key=key,
    params=params,
    # a copy: buffers of the state are donated to the next step, and none may be donated twice
    ema=jax.tree.map(jnp.copy, params),
    opt_state=optimizer.init(params),
    critic=critic,
    critic_opt_state=None if critic is None else critic_optimizer.init(critic),
  )


def identity(tree: PyTree) -> PyTree:
  """The mean over devices where arrays are global: a mean over the batch is one over devices."""
  return tree


def update_ema(ema: Params, params: Params, updates, training: TrainConfig) -> Params:
  """Returns the average after one more update, `updates` of which came before it.

  The decay is ema_decay from update `ema_start` on, and 0 before; with the ramp (of TensorFlow's
  ExponentialMovingAverage) it is at most (1 + n) / (10 + n) for the n-th of these updates.
  """
  n = updates - training.ema_start
  decay = training.ema_decay
  if training.ema_ramp:
    decay = jnp.minimum(decay, (1.0 + n) / (10.0 + n))
  decay = jnp.where(n < 0, 0.0, decay)
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
  """Returns (params, opt_state, metrics) after one update from the batch's mean gradient.

  loss(params, part) -> (mean over the part, metrics). The batch is taken in `accumulate` equal
  parts; `mean` averages over devices.
  """
  value_and_grad = jax.value_and_grad(loss, has_aux=True)

  if accumulate == 1:
    found = value_and_grad(params, batch)
  else:

    def split(x):
      # [b ...] -> [b / count, count, ...] -> [count, b / count, ...]. The rows of a device lie
      # together, so with the count innermost each part takes rows of every device and none moves.
      return jnp.swapaxes(x.reshape(x.shape[0] // accumulate, accumulate, *x.shape[1:]), 0, 1)

    def add(total, part):
      return jax.tree.map(jnp.add, total, value_and_grad(params, part)), None

    parts = jax.tree.map(split, batch)
    # a scan compiles one part and holds the activations of one part at a time
    total = jax.eval_shape(value_and_grad, params, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), total)
    total, _ = jax.lax.scan(add, zeros, parts)
    found = jax.tree.map(lambda x: x / accumulate, total)
  (value, metrics), grads = found
  metrics = {"loss": value, **metrics}
  # averaged over devices before the optimizer clips: the norm is the global gradient's
  grads, metrics = mean((grads, metrics))
  updates, opt_state = optimizer.update(grads, opt_state, params)
  params = optax.apply_updates(params, updates)
  return params, opt_state, {**metrics, "grad_norm": optax.tree.norm(grads)}  # before clipping


def averaged_update(
  config: TrainConfig, state: TrainState, loss: Loss, optimizer, batch: Batch, *, mean: Mean
) -> tuple[TrainState, dict[str, jax.Array]]:
  """Returns (state, metrics) after one update of the network and of its average; arguments as
  apply_gradients.
  """
  params, opt_state, metrics = apply_gradients(
    loss, state.params, state.opt_state, optimizer, batch, accumulate=config.accumulate, mean=mean
  )
  ema = update_ema(state.ema, params, state.step, config)
  state = state.replace(step=state.step + 1, params=params, ema=ema, opt_state=opt_state)
  return state, metrics
