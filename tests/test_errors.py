"""Errors for users: one line of a length that can be read."""

import pytest

from hiar_jax.errors import LONGEST, Damaged, UserError


def test_a_message_is_kept():
  assert str(UserError("a: expected b; do c")) == "a: expected b; do c"
  assert str(Damaged("a.npz", ValueError("x\ny"), "remove it")) == "a.npz is damaged (x); remove it"


def test_of_a_long_message_the_middle_is_left_out():
  """What was given, and what to do, stand at its ends."""
  message = f"prompt = {'x' * 1_000_000}: expected less; cut it"
  with pytest.raises(UserError) as error:
    raise UserError(message)
  text = str(error.value)
  assert len(text) < LONGEST + 40
  assert text.startswith("prompt = xxx") and text.endswith("x: expected less; cut it")
  assert f"({len(message) - LONGEST} letters)" in text
