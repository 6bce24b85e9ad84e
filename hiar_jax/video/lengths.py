"""Sizes of a video that a model can generate: sides that its codec and patches divide, and frame
counts of whole blocks.
"""

import bisect
from collections.abc import Callable

from hiar_jax.errors import UserError

Frames = Callable[[int], int]  # latent frames -> pixel frames
MOST = 10**15  # frames of a video: no machine makes as many


def check_sides(height: int, width: int, multiple: int = 16) -> None:
  """Raises UserError, with the nearest size, unless both sides are positive multiples.

  multiple: in pixels; the default is Wan2.1's, 8 of the VAE times patches of 2.
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
  pixel_frames: Frames,
  *,
  given: int = 0,
  behind: int = 0,
  strict: bool = False,
) -> tuple[int, str]:
  """Returns (new latent frames, message) of a video of at least `frames` pixel frames.

  frames: pixel frames, those of the conditioning included. block: latent frames of a block. given:
  latent frames of the conditioning; the fewest whole blocks follow them. behind: pixel frames that
  the video ends with. The message names the count that is made instead of `frames`, '' where both
  are equal.

  Raises UserError where `frames` is below 1, above MOST or not more than the conditioning has; if
  `strict`, also where `frames` is not reached exactly, with the nearest counts.
  """
  # not pixel_frames(0), which is negative for Wan2.1
  conditioning = behind + (pixel_frames(given) if given else 0)
  if frames < 1:
    counts = [pixel_frames(given + n * block) for n in (1, 2, 3)]
    made = f"videos are made in blocks of {block}"
    if counts != [block, 2 * block, 3 * block]:
      made += f" latent frames, they have {', '.join(map(str, counts))}, ... frames"
    raise UserError(f"frames = {frames}: expected at least 1; {made}")
  if frames > MOST:
    raise UserError(f"frames = {frames}: expected at most {MOST:,}")
  if frames <= conditioning:
    after = pixel_frames(given + block) + behind
    has = "frames are" if behind else "start has"
    raise UserError(
      f"frames = {frames}, but the given {has} {conditioning} already; ask for more, from "
      f"{after} on"
    )

  def total(blocks: int) -> int:
    return pixel_frames(given + blocks * block) + behind

  # Binary search: pixel_frames has no inverse here, and grows with the count. At most `frames`
  # blocks are needed, as each adds a frame or more.
  blocks = 1 + bisect.bisect_left(range(1, frames + 1), frames, key=total)
  above = total(blocks)
  if above == frames:
    return blocks * block, ""
  # "latent" only where a latent frame is not a pixel frame
  unit = "frames" if above == given + blocks * block + behind else "latent frames"
  message = f"frames = {frames} is not whole blocks of {block} {unit}"
  if strict:
    below = total(blocks - 1) if blocks > 1 else 0
    nearest = f"counts are {below} and {above}" if below else f"count is {above}"
    raise UserError(f"{message}; the nearest {nearest}")
  return blocks * block, f"{message}: making {above}"


def crop_to_blocks(frames: int, block: int, pixel_frames: Frames) -> tuple[int, int]:
  """Returns (pixel frames, latent frames) of the most whole blocks in `frames` pixel frames.

  (0, 0) where they are less than one block.
  """
  blocks = bisect.bisect_right(range(1, frames + 1), frames, key=lambda n: pixel_frames(n * block))
  return (pixel_frames(blocks * block), blocks * block) if blocks else (0, 0)
