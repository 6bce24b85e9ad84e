"""Boxes of MP4 (ISO/IEC 14496-12): a walk over them, and those by which a closed fragmented file
tells its length (mehd, 8.8.2) and where its fragments lie (mfra, 8.8.9 to 8.8.11).
"""

from collections.abc import Iterator, Sequence
import struct

HEADER = 8  # bytes of a box before its content: size uint32, name 4 bytes
FREE = b"free"  # free space (8.1.2), which players skip, whole or not
_CONTAINERS = ("moov", "mvex", "moof", "traf", "trak", "mdia", "minf", "stbl")
_DURATION = HEADER + 12  # of mehd in version 1: version and flags, the duration in 8 bytes


def boxes(
  content: bytes, start: int = 0, end: int | None = None, deep: bool = False
) -> Iterator[tuple[str, int, int]]:
  """Yields (name, start, end) of the whole boxes between two offsets, headers included.

  deep: each followed by those inside it.
  """
  end = len(content) if end is None else end
  while start + HEADER <= end:
    size, name = struct.unpack_from(">I4s", content, start)
    # sizes 0 and 1 (to the end of the file, 64 bits) are not written here; cut-off boxes end it too
    if size < HEADER or start + size > end:
      return
    name = name.decode("latin-1")
    yield name, start, start + size
    if deep and name in _CONTAINERS:
      yield from boxes(content, start + HEADER, start + size, deep=True)
    start += size


def first_starts(content: bytes) -> dict[str, int]:
  """Returns where the first box of each name starts, those inside others too."""
  starts: dict[str, int] = {}
  for name, start, _ in boxes(content, deep=True):
    starts.setdefault(name, start)
  return starts


def timescale(content: bytes, header: str) -> int:
  """Returns the units a second of `mvhd` (the movie's, 8.2.2) or of `mdhd` (the track's, 8.4.2)."""
  at = first_starts(content)[header] + HEADER
  # version and flags, two times of 4 bytes (8 in version 1), the timescale
  return struct.unpack_from(">I", content, at + 4 + (16 if content[at] else 8))[0]


def with_room(head: bytes) -> bytes:
  """Returns a head (ftyp moov) with free space for a duration, at the start of its mvex."""
  starts = first_starts(head)
  made = bytearray(head)
  for name in ("moov", "mvex"):
    (size,) = struct.unpack_from(">I", made, starts[name])
    struct.pack_into(">I", made, starts[name], size + _DURATION)
  at = starts["mvex"] + HEADER
  made[at:at] = struct.pack(">I4s", _DURATION, FREE) + bytes(_DURATION - HEADER)
  return bytes(made)


def room(head: bytes) -> int | None:
  """Returns where a head has its duration, or the free space for it; None for one without."""
  mvex = first_starts(head)["mvex"]
  size, name = struct.unpack_from(">I4s", head, mvex + HEADER)
  return mvex + HEADER if size == _DURATION and name in (FREE, b"mehd") else None


def duration(seconds: float, head: bytes) -> bytes:
  """Returns the box for a head's room: its duration, in the movie's units; 0 seconds: free space.

  The name is bytes 4 to 8: written last, it makes the box valid in one step.
  """
  name = b"mehd" if seconds else FREE
  units = round(seconds * timescale(head, "mvhd"))
  return struct.pack(">I4sIQ", _DURATION, name, 1 << 24, units)


def index(times: Sequence[int], offsets: Sequence[int]) -> bytes:
  """Returns the mfra box of track 1's fragments: decode times in the track's units, and where their
  moof boxes start.
  """
  entries = b"".join(
    struct.pack(">QQBBB", time, offset, 1, 1, 1)  # the first sample of its first run is a key frame
    for time, offset in zip(times, offsets, strict=True)
  )
  # version 1; track; numbers of traf, trun and sample in one byte each; how many
  table = struct.pack(">IIII", 1 << 24, 1, 0, len(times)) + entries
  tfra = struct.pack(">I4s", HEADER + len(table), b"tfra") + table
  size = HEADER + len(tfra) + 16
  mfro = struct.pack(">I4sII", 16, b"mfro", 0, size)  # the last bytes of a file: where mfra starts
  return struct.pack(">I4s", size, b"mfra") + tfra + mfro
