"""The pixels of decoded video frames, as they are meant to be seen, in a wanted size."""

from fractions import Fraction

import av
from av.sidedata.sidedata import Type
from av.video.reformatter import Interpolation
import numpy as np

from hiar_jax.video import bt709

# FFmpeg's scaler truncates without both, and colours get about 2 of 255 levels darker with every
# reading. With them they are those of the formulas of BT.601 and BT.709, rounded.
_EXACT = Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT


class Look:
  """How the frames of a stream are to be seen.

  pixel: width / height of a stored pixel, None where it is not known. changes: what was done for it
    to the frames that were covered so far, in words.
  """

  def __init__(self, pixel: Fraction | None = None):
    self._aspect = float(pixel or 1)
    self.changes: list[str] = []
    if self._aspect != 1:
      self.changes.append(f"its pixels of {pixel.numerator}:{pixel.denominator} made square")

  def size(self, frame: av.VideoFrame) -> tuple[int, int]:
    """(height, width) of a frame that is upright and has square pixels."""
    size = frame.height, round(frame.width * self._aspect)
    return size[::-1] if _is_sideways(_display_matrix(frame)) else size

  def cover(self, frame: av.VideoFrame, height: int, width: int) -> np.ndarray:
    """Returns uint8 [H W 3]: upright, scaled to cover height x width, centre cropped; BT.709."""
    matrix = _display_matrix(frame)
    if matrix[0, 0] * matrix[1, 1] < matrix[0, 1] * matrix[1, 0]:
      self.say("mirrored by its container's note")
    elif _is_sideways(matrix) or matrix[0, 0] < 0:
      self.say("turned upright by its container's note")
    # the box is turned here, the frame at the end, where it has the pixels of the result alone
    box_h, box_w = (width, height) if _is_sideways(matrix) else (height, width)
    frame = self._opaque(frame)
    scale = max(box_h / frame.height, box_w / (frame.width * self._aspect))
    new_h = max(box_h, round(frame.height * scale))
    new_w = max(box_w, round(frame.width * self._aspect * scale))
    image = self._colours(frame, new_h, new_w)
    top, left = (new_h - box_h) // 2, (new_w - box_w) // 2
    return _upright(image[top : top + box_h, left : left + box_w], matrix)

  def say(self, change: str) -> None:
    """Adds a change, once."""
    if change not in self.changes:
      self.changes.append(change)

  def _opaque(self, frame: av.VideoFrame) -> av.VideoFrame:
    """Composes a frame with an alpha channel over black, as `read_image` does."""
    if not any(component.is_alpha for component in frame.format.components):
      return frame
    image = _reformat(frame, frame.height, frame.width, "rgba").to_ndarray()
    if image[..., 3].min() < 255:
      self.say("transparency shown on black")
    colours = (image[..., :3] * image[..., 3:].astype(np.uint16) + 127) // 255
    opaque = av.VideoFrame.from_ndarray(colours.astype(np.uint8), format="rgb24")
    opaque.color_trc, opaque.color_primaries = frame.color_trc, frame.color_primaries
    return opaque

  def _colours(self, frame: av.VideoFrame, height: int, width: int) -> np.ndarray:
    """Scales a frame to uint8 [H W 3] with the colours of BT.709."""
    space = bt709.space(frame.color_trc, frame.color_primaries)
    if space is None:
      return _reformat(frame, height, width, "rgb24").to_ndarray()
    self.say(f"made BT.709 from {space.name}")
    return space.convert(_reformat(frame, height, width, "rgb48le").to_ndarray())


def _reformat(frame: av.VideoFrame, height: int, width: int, form: str) -> av.VideoFrame:
  shrinks = height < frame.height or width < frame.width
  # area averaging when shrinking: swscale's bicubic filter would alias
  kernel = Interpolation.AREA if shrinks else Interpolation.BICUBIC
  return frame.reformat(width, height, form, interpolation=int(kernel | _EXACT))


def _display_matrix(frame: av.VideoFrame) -> np.ndarray:
  """[2 2] of ISO/IEC 14496-12: (x, y) @ matrix is the place of a stored pixel, y downwards."""
  note = frame.side_data.get(Type.DISPLAYMATRIX)
  if note is None:
    return np.eye(2)
  return np.frombuffer(bytes(note), np.int32).reshape(3, 3)[:2, :2] / 2**16


def _is_sideways(matrix: np.ndarray) -> bool:
  return bool(abs(matrix[0, 1]) > abs(matrix[0, 0]))


def _upright(image: np.ndarray, matrix: np.ndarray) -> np.ndarray:
  """Turns and mirrors [H W 3] by a display matrix, to the nearest right angle."""
  if _is_sideways(matrix):
    image, right, down = image.transpose(1, 0, 2), matrix[1, 0], matrix[0, 1]
  else:
    right, down = matrix[0, 0], matrix[1, 1]
  return np.ascontiguousarray(image[:: -1 if down < 0 else 1, :: -1 if right < 0 else 1])
