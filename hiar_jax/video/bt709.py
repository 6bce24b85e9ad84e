"""HDR and wide-gamut video as BT.709, the colours of what is generated.

Signals are decoded to light, moved to BT.709's primaries and encoded for its display, whose light
is the signal to the power of 2.4 (ITU-R BT.1886). HDR white is at 203 cd/m2 (ITU-R BT.2408);
highlights that are brighter, and colours outside of BT.709, are clipped. FFmpeg's own conversion
(swscale) builds its tables for every frame anew, which takes 0.6 s.
"""

from collections.abc import Callable
import dataclasses
import functools

import numpy as np

_WHITE = 203.0  # cd/m2
_DISPLAY_GAMMA = 2.4
# ITU-T H.273: numbers of primaries and of transfer characteristics
_BT2020, _DISPLAY_P3 = 9, 12
_PQ, _HLG = 16, 18
# Linear light in BT.709's primaries: BT.2407 for BT.2020, SMPTE EG 432-1 for Display P3.
_TO_BT709 = {
  _BT2020: np.asarray(
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], "f4"
  ),
  _DISPLAY_P3: np.asarray(
    [[1.2249, -0.2247, 0.0], [-0.0420, 1.0419, 0.0], [-0.0197, -0.0786, 1.0979]], "f4"
  ),
}
_BT2020_LUMINANCE = np.asarray([0.2627, 0.6780, 0.0593], "f4")


def _pq(signal: np.ndarray) -> np.ndarray:
  """SMPTE ST 2084: cd/m2 / 203."""
  m1, m2 = 2610 / 16384, 2523 / 4096 * 128
  c1, c2, c3 = 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32
  root = signal ** (1 / m2)
  return (np.maximum(root - c1, 0) / (c2 - c3 * root)) ** (1 / m1) * 1e4 / _WHITE


def _hlg(signal: np.ndarray) -> np.ndarray:
  """ARIB STD-B67: light of the scene, 0 .. 1."""
  a, b, c = 0.17883277, 0.28466892, 0.55991073
  return np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)


def _sdr(signal: np.ndarray) -> np.ndarray:
  return signal**_DISPLAY_GAMMA


@dataclasses.dataclass(frozen=True)
class Space:
  """A colour space that is not BT.709; decode: its signal in 0 .. 1 -> light."""

  name: str
  decode: Callable[[np.ndarray], np.ndarray]
  primaries: int

  def convert(self, image: np.ndarray) -> np.ndarray:
    """uint16 [H W 3] of full range -> uint8 [H W 3] of BT.709."""
    light = _table(self.decode)[image]
    if self.decode is _hlg:
      # BT.2100's system gamma of 1.2, on its display of 1000 cd/m2
      scene = light @ _BT2020_LUMINANCE
      light = light * scene[..., None] ** np.float32(0.2) * np.float32(1000 / _WHITE)
    light = np.clip(light @ _TO_BT709[self.primaries].T, 0, 1)
    return np.rint(255 * light ** np.float32(1 / _DISPLAY_GAMMA)).astype(np.uint8)


def space(transfer: int, primaries: int) -> Space | None:
  """The space of these numbers of ITU-T H.273; None where its colours are read as BT.709's."""
  if transfer in (_PQ, _HLG):
    name, decode = ("HDR (PQ)", _pq) if transfer == _PQ else ("HDR (HLG)", _hlg)
    return Space(name, decode, _DISPLAY_P3 if primaries == _DISPLAY_P3 else _BT2020)
  if primaries in _TO_BT709:
    return Space("BT.2020" if primaries == _BT2020 else "Display P3", _sdr, primaries)
  return None


@functools.cache
def _table(decode: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
  """The light of every signal of 16 bits, float32."""
  return decode(np.arange(2**16) / (2**16 - 1)).astype(np.float32)
