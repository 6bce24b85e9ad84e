"""gc.collect() that takes no time: imported where tests call it often."""

import gc

import pytest


@pytest.fixture(scope="module")
def small_heap():
  """Whatever was there before is not walked: of a worker's heap a walk takes seconds."""
  gc.freeze()
  yield
  gc.unfreeze()
