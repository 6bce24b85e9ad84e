"""Sizes of a packed model's generation job (FramePack), counted from the plan of its sections."""

import collections
from collections.abc import Mapping
import dataclasses

from hiar_jax.components.chunked_decoder import ChunkedDecoder
from hiar_jax.models.frames import Network
from hiar_jax.packing.orders import Step, Steps, plan
from hiar_jax.packing.rows import History
from hiar_jax.packing.schedule import Schedule
from hiar_jax.planning.sizes import check_job, fixed_bytes
from hiar_jax.types import PyTree


@dataclasses.dataclass(frozen=True)
class PackedJobSize:
  """Sizes of a job: the sections that `steps` makes, of latents of height x width, after `given`
  frames. network: with the schedule's projections. steps: packing.orders. levels: of a section.
  guidance: where it is not 0, each level takes two forwards; distilled: one, it is an input of the
  network. The others as planning.sizes.JobSize.

  Raises UserError for sizes below 1, an unknown dtype, or sides that the patches do not divide.
  """

  network: Network
  schedule: Schedule
  history: History
  steps: Steps
  levels: int
  height: int
  width: int
  guidance: float = 0.0
  distilled: bool = False
  published: bool = False
  solver: str = "euler"
  batch: int = 1
  given: int = 0
  text: int = 512
  dtype: str = "bfloat16"
  others: Mapping[str, tuple[PyTree, str]] = dataclasses.field(default_factory=dict)
  decoder: ChunkedDecoder | None = None

  def __post_init__(self):
    check_job(self)

  @property
  def sections(self) -> int:
    return sum(len(step) for step in self.steps)

  @property
  def frames(self) -> int:
    """New latent frames."""
    return self.sections * self.schedule.generate

  @property
  def tokens(self) -> int:
    """Tokens of one latent frame."""
    return self.network.tokens(self.height, self.width)

  @property
  def planned(self) -> list[Step]:
    return plan(
      self.schedule,
      self.steps,
      given=self.given,
      published=self.published,
      similar=self.history.similar,
    )


@dataclasses.dataclass(frozen=True)
class SectionCost:
  """`count` evaluations of the network on the tokens of `frames` new frames and on packed ones.

  packed: (tokens, kernel) of each group of packed frames.
  """

  count: int
  frames: int
  tokens: int
  packed: tuple[tuple[int, int], ...]

  @property
  def history(self) -> int:
    """Packed tokens."""
    return sum(tokens for tokens, _ in self.packed)


def sections(request: PackedJobSize) -> tuple[SectionCost, ...]:
  """Returns the network evaluations of one video in rollout.packed, alike ones together."""
  counts = collections.Counter()
  forwards = request.levels * (2 if request.guidance and not request.distilled else 1)
  for step in request.planned:
    counts[step.generates.size, packed_groups(request, step)] += forwards
  return tuple(
    SectionCost(count, frames, frames * request.tokens, packed)
    for (frames, packed), count in counts.items()
  )


def packed_groups(request: PackedJobSize, step: Step) -> tuple[tuple[int, int], ...]:
  """Returns (tokens, kernel) of each group of packed frames that a step reads."""
  schedule, (_, ph, pw) = request.schedule, request.network.patch
  grid = request.height // ph, request.width // pw
  found = [(group.tokens(*grid), group.pool) for group in schedule.groups]
  farthest = schedule.before[:1], schedule.after[-1:]
  for kind, tail, group in zip(step.tail_kinds, step.tails, farthest, strict=True):
    if tail.size:
      # one frame's, under the kernel of the group; or one for each frame
      mean = dataclasses.replace(group[0], frames=1)
      tokens = mean.tokens(*grid) if kind == "tc" else tail.size
      found.append((tokens, mean.pool))
  return tuple(found)


def flops(request: PackedJobSize, call: SectionCost) -> float:
  """Returns the operations of one of a call's forwards, of one video."""
  deaf = 0 if request.history.hears else call.history
  return request.network.packed_flops(call.tokens, call.packed, request.text, deaf)


def activation_bytes(request: PackedJobSize, calls: tuple[SectionCost, ...]) -> int:
  """Returns a lower bound of the bytes of activations of the whole batch, as that of
  planning.sizes: all tokens of a forward are one row that attends to itself.
  """
  tokens = max(call.tokens + call.history for call in calls)
  activations = request.network.activation_bytes(1, 1, tokens)
  return request.batch * (activations + fixed_bytes(request))
