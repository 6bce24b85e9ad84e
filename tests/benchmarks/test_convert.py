"""The benchmark of the conversion, at a size of which the numbers say nothing."""

import pytest

from tests.helpers.benchmark_reports import report_of

SIZES = [
  "--dim=256",
  "--ffn_dim=64",
  "--num_heads=2",
  "--layers=2",
  "--max_shard_mb=4",
  "--height=16",
  "--width=32",
]


@pytest.mark.slow
def test_it_measures_the_command_and_the_forward(tmp_path):
  found = report_of("convert", *SIZES, f"--directory={tmp_path}")
  assert found["tensors"] == 69 and found["dtype"] == "bfloat16" and found["shards"] > 1
  assert found["bytes"] > 2 * found["parameters"] and found["largest_shard_bytes"] < found["bytes"]
  assert found["forward"]["tokens"] == 3 * 2 and found["forward"]["latents"] == [1, 3, 2, 4, 16]
  assert (
    0 < found["imports_peak_anonymous_bytes"] and 0 < found["convert_peak_anonymous_bytes"] < 2**31
  )
  assert found["peak_to_largest_shard"] == pytest.approx(
    found["convert_peak_anonymous_bytes"] / found["largest_shard_bytes"], abs=1e-3
  )
  assert not list(tmp_path.iterdir())
