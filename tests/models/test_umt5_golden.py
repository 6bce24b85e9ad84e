"""The recorded UMT5 encoder."""

import functools
import json
import os

import numpy as np
import pytest

from hiar_jax.conversion.umt5_keys import umt5_key_map
from hiar_jax.models import umt5
from tests.helpers.golden_cases import assert_close, folders
from tests.helpers.published_params import from_published, to_published

FILES = {"config.json", "umt5.npz", "umt5_weights.npz"}
ARRAYS = {"token_ids", "mask", "prompt_embeds"}
CASES = folders("umt5.npz")
each_case = pytest.mark.parametrize("case", CASES, ids=lambda path: path.name)


def test_a_case_is_found():
  assert CASES or "HIAR_GOLDEN_DIR" in os.environ


@functools.cache
def _load(case):
  config = umt5.UMT5Config(**json.loads((case / "config.json").read_text()))
  weights = dict(np.load(case / "umt5_weights.npz"))
  return (
    config,
    dict(np.load(case / "umt5.npz")),
    weights,
    from_published(weights, umt5_key_map(config), "UMT5"),
  )


@each_case
def test_nothing_is_unknown(case):
  assert {path.name for path in case.iterdir()} == FILES
  assert set(_load(case)[1]) == ARRAYS


@each_case
def test_prompt_embeds(case):
  config, arrays, _, params = _load(case)
  text = umt5.encode_text(
    params, arrays["token_ids"].astype(np.int32), arrays["mask"].astype(np.int32), config
  )
  assert_close(text, arrays["prompt_embeds"], "prompt_embeds")


@each_case
def test_weights_go_there_and_back_bit_for_bit(case):
  config, _, weights, params = _load(case)
  back = to_published(params, umt5_key_map(config), "UMT5")
  assert set(back) == set(weights)
  for name, array in weights.items():
    assert back[name].dtype == array.dtype and back[name].tobytes() == array.tobytes(), name
