"""Errors for users: one line of a length that can be read."""

import pytest

from hiar_jax.errors import LONGEST, Damaged, UserError, without_flags


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


@pytest.mark.parametrize(
  ("said", "wanted"),
  [
    (
      "--workdir=a--b: give --step or --config.model.dim",
      "workdir=a--b: give step or config.model.dim",
    ),
    (
      "--weights=x: python -m hiar_jax.convert --source=x --out=y makes them; or --workdir",
      "weights=x: python -m hiar_jax.convert --source=x --out=y makes them; or workdir",
    ),
    ("1 -- 2", "1 -- 2"),
  ],
)
def test_options_are_named_as_in_python(said, wanted):
  def fail():
    raise UserError(said)

  with pytest.raises(UserError) as error:
    without_flags(fail)()
  assert str(error.value) == wanted


def test_the_kind_of_an_error_stays():
  @without_flags
  def fail():
    raise Damaged("a", "b", "use --overwrite")

  with pytest.raises(Damaged, match="use overwrite") as error:
    fail()
  assert error.value.reason == "b"
