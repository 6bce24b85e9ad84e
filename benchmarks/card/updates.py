"""Training updates of one clip on one card: flow matching of the 1.3B, and the distillation of HiAR
with teachers of 1.3B and 14B parameters.

Float32 weights, AdamW and averages of student and critic, a bfloat16 teacher, full remat: what the
published run keeps, without sharding. Each update draws its own exit level, so updates differ.
"""

import functools

import jax
import jax.numpy as jnp

from benchmarks.card.network import SIGMAS, latent_shape, network, text, weights
from benchmarks.card.programs import Program, normal
from benchmarks.card.sizes import Sizes
from hiar_jax.method import Method
from hiar_jax.training import distill, teacher
from hiar_jax.training.state import TrainState, create_state
from hiar_jax.types import Batch


def batch_of(sizes: Sizes) -> Batch:
  """Returns a clip with the keys of every stage, encoded."""
  clip = latent_shape(sizes).clip
  clips = {"text": text(sizes), "example_id": jnp.zeros(1, jnp.int32)}
  trajectories = {**clips, "trajectory": normal(4, (1, len(SIGMAS), *clip), "bfloat16")}
  return {**clips, "latents": normal(3, (1, *clip)), "trajectories": trajectories}


def programs(sizes: Sizes) -> list[Program]:
  """Returns the updates, smallest first."""
  return [
    _flow_matching(sizes, sizes.kernel),
    _distillation(sizes, "critic", sizes.kernel, "student"),
    _distillation(sizes, "generator", sizes.kernel, "student"),
    _distillation(sizes, "generator", sizes.kernel, "teacher"),
  ]


def _flow_matching(sizes: Sizes, attention: str) -> Program:
  config = teacher.TeacherConfig(steps=1000, batch=1, lr=1e-5)
  net = network(sizes, attention)
  optimizer = config.optimizer(net)

  def fill():
    params = weights(net, "float32")
    state = create_state(jax.random.key(1), params, optimizer)
    return state, batch_of(sizes), text(sizes)

  step = teacher.make_step(config, net, optimizer)
  return Program(f"flow matching, 1.3B/{attention}", step, fill, repeats=2, donate=True)


def _distillation(sizes: Sizes, update: str, attention: str, who: str) -> Program:
  """An update of `critic` or `generator`; who: whose size the teacher has."""
  config = distill.DistillConfig(steps=1000, batch=1, lr=2e-6, critic_lr=3e-7, b1=0.0)
  student, scores = (network(sizes, attention, size) for size in ("student", who))
  method = Method(block=sizes.block, window=sizes.frames, sigmas=SIGMAS)
  networks = distill.Networks(student=student, critic=student, teacher=scores)
  generator, critic = config.generator_optimizer(student), config.critic_optimizer(student)
  make = {"critic": distill.make_critic_step, "generator": distill.make_generator_step}[update]
  optimizer = {"critic": critic, "generator": generator}[update]
  step = make(config, networks, method, latent_shape(sizes), optimizer)

  def fill():
    params = weights(student, "float32")
    copy = jax.tree.map(jnp.copy, params)
    state = create_state(jax.random.key(1), params, generator, copy, critic)
    frozen = None
    if update == "generator":
      frozen = distill.Frozen(weights(scores), text(sizes))
    return state, batch_of(sizes), frozen

  def next_step(state: TrainState, batch: Batch, frozen):
    state, metrics = step(state, batch, frozen)
    # the draws depend on the step's number, which a generator's update leaves alone
    return (state if update == "critic" else state.replace(step=state.step + 1)), metrics

  name = f"{update}, {'1.3B' if who == 'student' else '14B'} teacher/{attention}"
  return Program(name, functools.wraps(step)(next_step), fill, repeats=3, donate=True)
