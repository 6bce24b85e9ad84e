"""The sizes of a video that a model can make: sides that its codec and patches divide, and frames
in whole blocks.
"""

import bisect
from collections.abc import Callable

from hiar_jax.errors import UserError

Frames = Callable[[int], int]  # latent frames -> pixel frames


def wan_pixel_frames(latent: int) -> int:
  """F = 1 + 4 (f - 1): Wan2.1's VAE."""
  return 1 + 4 * (latent - 1)


def check_sides(height: int, width: int, multiple: int = 16) -> None:
  """Raises UserError unless both are positive multiples of `multiple` (Wan2.1: 8 of the VAE times
  patches of 2), naming the nearest.
  """
  wrong = [
    f"--{name}={side}"
    for name, side in (("height", height), ("width", width))
    if side < 1 or side % multiple
  ]
  if wrong:
    near = [max(multiple, round(side / multiple) * multiple) for side in (height, width)]
    raise UserError(
      f"{', '.join(wrong)}: the sides of a video are multiples of {multiple}; the nearest size is "
      f"{near[0]}x{near[1]}"
    )


def fit_blocks(
  frames: int,
  block: int,
  pixel_frames: Frames = wan_pixel_frames,
  *,
  given: int = 0,
  strict: bool = False,
) -> tuple[int, str]:
  """(latent frames to make, message): the fewest whole blocks after `given` latent frames that fill
  a video of `frames` pixel frames.

  The message says that more are made than were asked for, '' where it fits. Raises UserError where
  `frames` is not at least 1 and more than is given, and, if `strict`, where it does not fit, naming
  the nearest counts.
  """
  there = pixel_frames(given) if given else 0
  if frames < 1:
    raise UserError(
      f"frames = {frames}: expected at least 1; {_counts(block, pixel_frames, given)}"
    )
  if frames <= there:
    after = pixel_frames(given + block)
    raise UserError(
      f"frames = {frames}, but the given start has {there} already; ask for more, from {after} on"
    )
  filled = lambda blocks: pixel_frames(given + blocks * block)
  blocks = 1 + bisect.bisect_left(range(1, frames + 1), frames, key=filled)
  fits = filled(blocks)
  if fits == frames:
    return blocks * block, ""
  line = (
    f"frames = {frames} is not whole blocks of {block} "
    f"{'' if fits == given + blocks * block else 'latent '}frames"
  )
  if strict:
    below = filled(blocks - 1) if blocks > 1 else 0
    raise UserError(
      f"{line}; the nearest {f'counts are {below} and {fits}' if below else f'count is {fits}'}"
    )
  return blocks * block, f"{line}: making {fits}"


def crop_to_blocks(
  frames: int, block: int, pixel_frames: Frames = wan_pixel_frames
) -> tuple[int, int]:
  """(pixel frames, latent frames) of the most whole blocks that `frames` given pixel frames hold;
  (0, 0) for less than one.
  """
  blocks = bisect.bisect_right(range(1, frames + 1), frames, key=lambda n: pixel_frames(n * block))
  return (pixel_frames(blocks * block), blocks * block) if blocks else (0, 0)


def _counts(block: int, pixel_frames: Frames, given: int) -> str:
  counts = [pixel_frames(given + n * block) for n in (1, 2, 3)]
  if counts == [block, 2 * block, 3 * block]:
    return f"videos are made in blocks of {block}"
  return (
    f"videos are made in blocks of {block} latent frames, they have "
    f"{', '.join(map(str, counts))}, ... frames"
  )
