"""Readers that do what the fuzzer must notice; `python -m` this module serves them."""

import os
import time

from benchmarks.fuzz.worker import Kind, serve
from hiar_jax.errors import UserError

EATEN = []


def broken(right, place, dice):
  return int(dice.integers(2**31))


def well(given):
  if given % 2:
    raise UserError("it is odd; give an even one")


def eats(given):
  """From the second time on."""
  if EATEN:
    bytearray(b"x") * (300 * 2**20)
  EATEN.append(given)


def raises(given):
  raise ValueError("a reader's own")


def says_nothing(given):
  raise UserError(" ")


def exits(given):
  os._exit(7)


def hangs(given):
  time.sleep(60)


READERS = {
  "well": well,
  "eats": eats,
  "raises": raises,
  "says nothing": says_nothing,
  "exits": exits,
  "hangs": hangs,
}

if __name__ == "__main__":
  serve({name: Kind(lambda folder: None, broken, read) for name, read in READERS.items()})
