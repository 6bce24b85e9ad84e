"""The benchmark of packed history, at sizes of which the times say nothing."""

import pytest

from benchmarks import needed_flops
from benchmarks.packing import TEXT, network
from hiar_jax.packing.schedule import parse
from tests.helpers.benchmark_reports import report_of


@pytest.mark.slow
def test_cost_does_not_grow_with_the_history():
  found = report_of(
    "packing",
    "--schedule=f1k1_x_td_f4k4f1k1_g2",
    "--histories=3",
    "--histories=300",
    "--repeats=1",
  )
  short, long = found["histories"]["3"], found["histories"]["300"]
  assert short["tokens"] == long["tokens"] == 96 + 2 * 3 + 96 + 2 * 96
  assert short["tokens_480p"] == long["tokens_480p"] < long["unpacked_480p"] == 302 * 1560
  assert short["flops"] == long["flops"] and found["programs"] == 1
  products = needed_flops.forward(network(parse(found["schedule"])), 1, 1, short["tokens"], TEXT)
  assert 1 < short["flops"] / products < 1.2  # norms, softmax and the like are counted too
  assert long["forward_s"]["median"] > 0 and found["versions"]["jax"]
