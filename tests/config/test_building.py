"""Dataclasses from configs: filled field by field, or refused in a line that names the field."""

import dataclasses
import json
from typing import Literal

from ml_collections import ConfigDict
import pytest

from hiar_jax.config.building import build
from hiar_jax.config.workdir import to_json
from hiar_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Window:
  frames: int
  sink: int = 0


@dataclasses.dataclass(frozen=True)
class Model:
  width: int
  lr: float
  levels: tuple[float, ...]
  window: Window
  order: Literal["step_first", "block_first"] = "step_first"
  teacher: Window | None = None
  dtype: object = None


def good() -> dict:
  return {"width": 8, "lr": 1, "levels": (1.0, 0.5), "window": {"frames": 3}}


@pytest.mark.parametrize("wrap", [dict, ConfigDict])
def test_build_fills_the_dataclass_and_those_inside(wrap):
  model = build(Model, wrap({**good(), "teacher": {"frames": 5, "sink": 1}}), dtype=float)
  assert model == Model(8, 1, (1.0, 0.5), Window(3), teacher=Window(5, 1), dtype=float)
  assert isinstance(model.levels, tuple)


def test_build_reads_back_its_own_json():
  model = build(Model, good())
  assert build(Model, json.loads(json.dumps(to_json(model)))) == model


@pytest.mark.parametrize(
  "change, message",
  [
    ({"widht": 8}, r"^Model has no field 'widht'; did you mean 'width'\?$"),
    (
      {"window": {"frames": 3, "sinks": 1}},
      r"^Model\.window has no field 'sinks'; did you mean 'sink'\?$",
    ),
    (
      {"window": {"sink": 1}},
      r"^Model\.window needs a field 'frames' \(int\); the config gives sink$",
    ),
    ({"width": 1.5}, r"^Model\.width: expected int, got 1\.5$"),
    ({"width": True}, r"^Model\.width: expected int, got True$"),
    ({"levels": ("a",)}, r"^Model\.levels: expected tuple\[float, \.\.\.\], got \('a',\)$"),
    (
      {"order": "both"},
      r"^Model\.order: expected Literal\['step_first', 'block_first'\], got 'both'$",
    ),
    ({"window": 3}, r"^Model\.window: expected Window, got 3$"),
  ],
)
def test_build_refuses_what_does_not_fit(change, message):
  with pytest.raises(UserError, match=message):
    build(Model, {**good(), **change})


def test_build_names_a_missing_field():
  given = good()
  del given["lr"]
  with pytest.raises(
    UserError, match=r"^Model needs a field 'lr' \(float\); the config gives width, levels, window$"
  ):
    build(Model, given)
