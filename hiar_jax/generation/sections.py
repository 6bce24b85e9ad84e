"""What a packed model's video is told beside a prompt and a seed: where it ends, and section by
section its prompts (a timeline), other seeds (takes) and the order in which they are made.

A section is the frames that the model makes at a time (gN of framepack.packing). Sections are
counted from 0 in the video's time, whatever their order.
"""

from collections.abc import Callable, Mapping, Sequence
import math
import numbers
import re

from hiar_jax.errors import UserError
from hiar_jax.generation.timeline import Timeline
from hiar_jax.packing import orders
from hiar_jax.training.experiment import Experiment

Takes = tuple[tuple[int, int], ...]  # (section, seed), by section
_TAKE = re.compile(r"\s*(\d+)\s*:\s*(\d+)\s*")


def read_takes(takes: str | Mapping[int, int] | None, check_seed: Callable[[int], int]) -> Takes:
  """Returns the takes of a text `2:5, 4:1` (section 2 with seed 5, ...) or of {section: seed}.

  Raises UserError for anything else, a section given twice, and as check_seed.
  """
  if takes is None or (isinstance(takes, str | Mapping) and not takes):
    return ()
  if isinstance(takes, str):
    matches = [_TAKE.fullmatch(part) for part in takes.split(",")]
    if not all(matches):
      raise UserError(f"takes = {takes!r}: expected section:seed, as 2:5 or 2:5,4:1")
    found = [(int(match[1]), int(match[2])) for match in matches]
  elif isinstance(takes, Mapping):
    found = list(takes.items())
  else:
    raise UserError(f"takes = {takes!r}: expected section:seed, as 2:5, or {{section: seed}}")
  for section, seed in found:
    if not isinstance(section, numbers.Integral) or isinstance(section, bool):
      raise UserError(f"takes = {takes!r}: section {section!r} is no whole number")
    check_seed(seed)
    if [number for number, _ in found].count(section) > 1:
      raise UserError(f"takes = {takes!r}: section {section} is given twice")
  return tuple(sorted(found))


def seeds_of(seed: int, takes: Takes, sections: int) -> list[int]:
  """Returns the seed of each section. Raises UserError for a take of one that the video has not."""
  for section, _ in takes:
    if not 0 <= section < sections:
      raise UserError(f"takes: section {section}: the video has sections 0 to {sections - 1}")
  return [dict(takes).get(section, seed) for section in range(sections)]


def prompts_of(base: str, timeline: Timeline, starts: Sequence[float]) -> list[str]:
  """Returns the prompt of each section: the base prompt, a comma and the timeline's.

  starts: seconds at which the sections begin; the first is later than 0 where frames lie before it.
  Raises UserError for an entry behind the last section's start, for two on one section, and for
  `recache`, which is a stream's.
  """
  for entry in timeline.entries:
    if entry.time > starts[-1] + 1e-6:
      raise UserError(
        f"{timeline.source}: {entry.time:g}s is behind the start of the last section, "
        f"{starts[-1]:g}s; a prompt takes effect with a section"
      )
    if entry.recache:
      raise UserError(f"{timeline.source}: recache is for streams; a section reads its own prompt")
  count = len(starts)
  changes = timeline.changes(lambda block: starts[block] if block < count else math.inf)
  said, prompts = {change.block: change.prompt for change in changes}, [""]
  for section in range(count):
    prompts.append(said.get(section, prompts[-1]))
  return [", ".join(filter(None, (base, prompt))) for prompt in prompts[1:]]


def check_order(e: Experiment, order: str) -> None:
  """Raises UserError for an order of sections that the model was not trained for.

  Both ends teach to fill a gap, in time's order, before a later frame that is there; so a model of
  them makes planned ends, and goes in time's order towards a last frame.
  """
  name, trained = order.partition(":")[0], e.framepack.orders
  known = {*trained, *(("vanilla", "endpoints") if "both_ends" in trained else ())}
  orders.steps_of(order, 1 + max([0, *map(int, re.findall(r"\d+", order))]))  # raises if unreadable
  if name not in known:
    raise UserError(
      f"order = {order!r}: the model with schedule {e.framepack.packing!r} is trained for "
      f"framepack.orders = {trained}"
    )


def check_sections(
  e: Experiment, order: str, frames: int, *, given: int, behind: int, loop: bool
) -> None:
  """Raises UserError where a packed model cannot make `frames` new latent frames in this order
  between `given` and `behind` others.
  """
  check_order(e, order)
  schedule = e.framepack.parsed
  if e.given and not given:
    raise UserError(
      f"schedule {schedule.notation!r}: the model makes videos towards a first frame that is given "
      f"(framepack.given = {e.given}); give --image"
    )
  ended = bool(behind or loop)
  steps = orders.steps_of(order, frames // schedule.generate, ended=ended)
  ends = dict(given=given, behind=behind, loop=loop)
  orders.plan(schedule, steps, published=e.framepack.published, **ends)


def check_told(e: Experiment, told: Sequence[str]) -> None:
  """Raises UserError where a causal model is told what only a packed one can do.

  told: names of the options that were given.
  """
  if e.framepack or not told:
    return
  instead = "a packed model can (experiments/shapes_framepack_both_ends.py)"
  if "timeline" in told:
    instead = "python -m hiar_jax.stream takes a --timeline, and " + instead
  if "partial" in told:
    instead = "python -m hiar_jax.stream shows a video while it is made"
  raise UserError(
    f"--{told[0]}: this model is causal, it makes a video block by block in time's order; {instead}"
  )
