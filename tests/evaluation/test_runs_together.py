"""Which runs `python -m hiar_jax.evaluate` measures side by side, and whose causal inits share a
row.
"""

import re

import pytest

from hiar_jax import evaluate
from hiar_jax.config.workdir import save_resolved
from hiar_jax.errors import UserError
from hiar_jax.training.run import open_run
from tests.helpers import tiny_run

LABEL = "step-first, output history"


@pytest.fixture
def opened(tmp_path):
  """Returns (folder, changes of the tiny config) -> its run, of which nothing is trained."""

  def make(folder="first", **changes):
    config = tiny_run.make_config(**changes)
    save_resolved(config, tmp_path / folder)
    return open_run(config, tmp_path / folder, save=False)

  make()
  return make


def same(tmp_path, **changes) -> dict:
  """A run with the first one's stages."""
  return {"stages_from": str(tmp_path / "first"), **changes}


def rows(*runs) -> dict[str, str]:
  """Name of a row -> the folder of the run that makes it."""
  return {name: run.workdir.name for name, run in evaluate.causal_inits(list(runs)).items()}


def test_one_causal_init_is_one_row(opened, tmp_path):
  """Whatever comes after it."""
  changes = {"distill__forward_kl__weight": 0.0, "history__gradient": "attached"}
  later = opened("no_forward_kl", **same(tmp_path, **changes))
  other = opened("self_forcing", history__order="block_first", history__level="clean")
  assert rows(opened(), later, other) == {
    f"causal init, {LABEL}": "first",
    "causal init, block-first, clean history": "self_forcing",
  }


@pytest.mark.parametrize(
  "changes",
  [
    {"history__window": 2},
    {"history__renoise": "euler"},
    {"history__block": 4},
    {"student__shift": 3.0},
    {"causal_init__seed": 1},
  ],
)
def test_methods_of_one_label_have_rows_of_their_own(opened, tmp_path, changes):
  """Also where the weights are the same."""
  runs = [opened(), opened("second", **same(tmp_path, **changes))]
  made = evaluate.baselines(runs, ["a red circle moving left"], 16)
  made = {row.name: row.config for row in made if row.kind == "causal_init"}
  names = [f"causal init of {name}, {LABEL}" for name in ("first", "second")]
  assert [*made] == names
  for name, value in changes.items():
    group, field = name.split("__")
    assert made[names[1]][group][field] == value != made[names[0]][group].get(field)


def test_runs_of_one_name_are_refused(opened):
  with pytest.raises(UserError, match=f"runs of one name .first, {LABEL}; first, {LABEL}.; rename"):
    evaluate.check_together([opened(), opened("other/first")], 16)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"data__frames": 8}, "frames: 4 -> 8"),
    ({"data__difficulty": "textured"}, 'difficulty: "plain" -> "textured"'),
    ({"history__block": 4}, "frames = 18 is not whole blocks of 4 frames; the nearest counts"),
  ],
)
def test_what_no_one_table_can_hold_is_refused(opened, changes, message):
  runs = [opened(), opened("second", **changes)]
  with pytest.raises(UserError, match=re.escape(message)) as error:
    evaluate.check_together(runs, 18)
  said = str(error.value)
  assert f"'second, {LABEL}'" in said and "in a sitting of its own" in said and "\n" not in said
  evaluate.check_together(runs[:1], 18)


def test_which_clips_were_trained_on_is_no_matter(opened):
  evaluate.check_together([opened(), opened("second", data__later=0.5, data__clips=8)], 16)
