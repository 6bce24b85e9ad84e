"""Changes of bytes, texts and values, each drawn by a generator of numbers: what breaks files."""

from collections.abc import Sequence
import struct

import numpy as np

Dice = np.random.Generator
SIZES = (0, 1, 7, 0x7F, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1)
LETTERS = (
  "\u2028",
  "\x00",
  "\ufeff",
  "\r",
  "\x1b",
  "\u202e",
  "e\u0301",
  "\U0001f600",
  "\ud83d",
  "İ",
)
TOKENS = (
  *("nan", "inf", "-1", "1e999", "9" * 400, "0x10", "١", "1_0", "-0", "null", "true", '""', "''"),
  *("|", "=", ":", ",", ";", "{", "}", "[", "]", '"', "'", "\\", "\t", "../..", "/dev/zero", "~"),
)
# what a field of a config or a number on a command line may be set to by mistake
VALUES = (
  *(-1, 0, 1, 7, 2**31, 2**63, -(2**63), 10**400, 0.5, -0.5, 1e-320, 1e308, float("nan")),
  *(float("inf"), True, False, None, "", "x", "nan", "a" * 10_000, "\x00", (), (1,), (1, 2, 3)),
  *([], [1.0, "x"], {}, {"a": 1}),
)


def flip(data: bytes, dice: Dice) -> bytes:
  made = bytearray(data)
  for _ in range(int(dice.integers(1, 17))):
    made[dice.integers(len(made))] ^= 1 << int(dice.integers(8))
  return bytes(made)


def cut(data: bytes, dice: Dice) -> bytes:
  return data[: dice.integers(len(data))]


def leave_out(data: bytes, dice: Dice) -> bytes:
  first, end = sorted(dice.integers(len(data) + 1, size=2))
  return data[:first] + data[end:]


def double(data: bytes, dice: Dice) -> bytes:
  first, end = sorted(dice.integers(len(data) + 1, size=2))
  return data[:end] + data[first:]


def set_size(data: bytes, dice: Dice) -> bytes:
  """Writes a telling number over four bytes, often near the start, where headers are."""
  made = bytearray(data)
  reach = len(made) if dice.random() < 0.3 else min(len(made), 256)
  order = ">I" if dice.random() < 0.5 else "<I"
  at = int(dice.integers(max(1, reach - 4)))
  made[at : at + 4] = struct.pack(order, int(dice.choice(SIZES)))
  return bytes(made)


def zeros(data: bytes, dice: Dice) -> bytes:
  first, end = sorted(dice.integers(len(data) + 1, size=2))
  return data[:first] + bytes(end - first) + data[end:]


def noise(data: bytes, dice: Dice) -> bytes:
  first = int(dice.integers(len(data) + 1))
  return data[:first] + dice.bytes(int(dice.integers(1, 400))) + data[first:]


BYTES = (flip, cut, leave_out, double, set_size, zeros, noise)


def mutated(data: bytes, dice: Dice) -> bytes:
  """Returns bytes after one to three changes."""
  for _ in range(int(dice.integers(1, 4))):
    if data:
      data = BYTES[dice.integers(len(BYTES))](data, dice)
  return data


def spliced(a: bytes, b: bytes, dice: Dice) -> bytes:
  """Returns the start of one file and the end of another."""
  return a[: dice.integers(len(a) + 1)] + b[dice.integers(len(b) + 1) :]


def rewritten(text: str, dice: Dice) -> bytes:
  """Returns a text after one to four changes, as bytes in some encoding."""
  for _ in range(int(dice.integers(1, 5))):
    at = int(dice.integers(len(text) + 1))
    kind = int(dice.integers(6))
    if kind == 0:
      text = text[:at] + LETTERS[dice.integers(len(LETTERS))] + text[at:]
    elif kind == 1:
      text = text[:at] + TOKENS[dice.integers(len(TOKENS))] + text[at:]
    elif kind == 2:
      text = (
        text[:at] + TOKENS[dice.integers(len(TOKENS))] * int(dice.integers(2, 3000)) + text[at:]
      )
    elif kind == 3:
      end = int(dice.integers(at, len(text) + 1))
      text = text[:at] + text[end:]
    elif kind == 4:
      text = text[:at] + text[int(dice.integers(len(text) + 1)) :]
    else:
      words = text.split(" ")
      words[dice.integers(len(words))] = TOKENS[dice.integers(len(TOKENS))]
      text = " ".join(words)
  # half a letter may be written in UTF alone
  encodings = (("utf-8", "surrogatepass"), ("utf-16", "surrogatepass"), ("latin-1", "replace"))
  data = text.encode(*encodings[dice.choice(3, p=(0.7, 0.2, 0.1))])
  return mutated(data, dice) if dice.random() < 0.2 else data


def value(dice: Dice, values: Sequence = VALUES):
  return values[dice.integers(len(values))]
