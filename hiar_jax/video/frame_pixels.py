"""The pixels of a decoded video frame, as they are meant to be seen, in a wanted size."""

import av
from av.video.reformatter import Interpolation
import numpy as np

# FFmpeg's scaler truncates without both, and colours get about 2 of 255 levels darker with every
# reading. With them they are those of the formulas of BT.601 and BT.709, rounded.
_EXACT = Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT


def cover(frame: av.VideoFrame, height: int, width: int) -> np.ndarray:
  """Returns uint8 [H W 3]: rotated upright, scaled to cover height x width, centre cropped."""
  # the box is rotated here, the frame at the end, where it has the pixels of the result alone
  sideways = frame.rotation % 180 != 0
  box_h, box_w = (width, height) if sideways else (height, width)
  scale = max(box_h / frame.height, box_w / frame.width)
  new_h, new_w = max(box_h, round(frame.height * scale)), max(box_w, round(frame.width * scale))
  # area averaging when shrinking: swscale's bicubic filter would alias
  kernel = Interpolation.AREA if scale < 1 else Interpolation.BICUBIC
  image = frame.reformat(
    width=new_w, height=new_h, format="rgb24", interpolation=int(kernel | _EXACT)
  ).to_ndarray()
  top, left = (new_h - box_h) // 2, (new_w - box_w) // 2
  image = image[top : top + box_h, left : left + box_w]
  return np.ascontiguousarray(np.rot90(image, round(frame.rotation / 90)))
