"""Compiled updates of a small Wan whose sizes are products of other primes each: arrays of queries
x keys, and exchanges of all clips or of whole keys and values, are known by their sizes.

Compiled by XLA for eight CPU devices, and with the extras of hiar_jax.plan by the compilers of TPUs
and GPUs for four chips each (slow).
"""

import functools
import math
import pathlib
import re

import pytest

from hiar_jax import plan
from hiar_jax.attention import attend as kernels
from hiar_jax.attention import blockwise
from hiar_jax.config.building import build
from hiar_jax.errors import UserError
from hiar_jax.experiments import hiar_wan_1_3b
from hiar_jax.models import dit, dit_layers
from hiar_jax.parallel.mesh import make_mesh
from hiar_jax.planning import collectives, compiled, targets
from hiar_jax.planning.abstract_run import AbstractRun
from hiar_jax.training.experiment import Experiment
from tests.helpers.slow_cases import few

ROWS, COLUMNS, FRAMES, BLOCK = 14, 13, 9, 3
TOKENS = ROWS * COLUMNS  # 2 x 7 x 13 of a frame, 7 x 13 of them on one of two devices
PRIMES = 7 * 13  # in no other size
HEADS, WIDTH = 2, 128  # a width that every kernel takes
CLIPS, TEXT, HIDDEN = 22, 37, 2 * 251
ARRAY = re.compile(r"\b(?:pred|bf16|[fsu]\d+)\[([\d,]+)\]")


def experiment(attention: str) -> Experiment:
  c = hiar_wan_1_3b.get_config()
  c.data.size, c.data.frames = (16 * ROWS, 16 * COLUMNS), 4 * (FRAMES - 1) + 1
  sizes = dict(dim=HEADS * WIDTH, ffn_dim=HIDDEN, num_heads=HEADS, num_layers=2, freq_dim=16)
  for model in (c.model, c.teacher_model):
    model.update(attention=attention, **sizes)
  c.text.update(dim=41, length=TEXT)
  c.history.window = 6
  for stage in (c.causal_init, c.distill, c.teacher):
    stage.batch, stage.ema_start = CLIPS, 0
  c.mesh.update(data=-1, fsdp=2, sequence=2, min_shard=4096)
  return build(Experiment, c)


def compiled_text(name: str, attention: str, on: str = "here", devices: int = 4) -> str:
  e, target = experiment(attention), targets.parse(on)
  mesh = make_mesh(e.mesh, list(target.devices[:devices]))
  program = plan.ENTRIES[name].make(AbstractRun(e, pathlib.Path(), mesh))
  # without a card to try on, XLA's own products for GPUs find no tiles for such sizes
  options = {"xla_gpu_enable_triton_gemm": False} if on.startswith("h100") else None
  return program.lower().compile(compiler_options=options).as_text()


def arrays(text: str) -> set[tuple[int, ...]]:
  return {tuple(map(int, sizes.split(","))) for sizes in ARRAY.findall(text)}


def of_queries_and_keys(shapes: set[tuple[int, ...]], padded: tuple[int, ...] = ()) -> list:
  """Shapes with two sizes of tokens, or one of their product. padded: lengths of whole blocks that
  a kernel asks for.
  """
  tokens = lambda n: n and (n % PRIMES == 0 or n in padded)
  return sorted(
    s for s in shapes if sum(map(tokens, s)) > 1 or any(n and n % PRIMES**2 == 0 for n in s)
  )


def exchanged(text: str) -> list[collectives.Collective]:
  mesh = {"data": 1, "fsdp": 2, "sequence": 2}
  return [one for one, _ in collectives.read(text, mesh).calls]


def over_the_clips(found: list[collectives.Collective]) -> list[str]:
  return [one.result for one in found if compiled._holds_batch(one, CLIPS)]


def whole_keys(found: list[collectives.Collective]) -> list[str]:
  """Results that hold all heads of all tokens of a frame: of an all-gather, since what becomes
  split by heads instead of tokens goes by all-to-all.
  """
  return [
    one.result
    for one in found
    for _, sizes in one.shapes
    if math.prod(sizes) % (TOKENS * HEADS * WIDTH) == 0 and one.kind == "all-gather"
  ]


def check(text: str, padded: tuple[int, ...] = ()) -> None:
  found = exchanged(text)
  assert "all-to-all" in {one.kind for one in found}  # tokens -> heads, and back
  assert of_queries_and_keys(arrays(text), padded) == []
  assert over_the_clips(found) == [] and whole_keys(found) == []


# ------------------------------------------------------------------------------------------ on CPUs


@pytest.fixture
def small_blocks(monkeypatch):
  """Blocks shorter than a frame: at these lengths the usual one holds all."""
  attend = kernels._flat(functools.partial(blockwise.attend, block=64))
  monkeypatch.setitem(kernels.KERNELS, "blockwise", attend)


@pytest.mark.parametrize("name", few(["causal_init", "critic", "generator"], "causal_init"))
def test_on_cpus(name, small_blocks):
  check(compiled_text(name, "blockwise"))


@pytest.mark.slow
def test_all_logits_are_seen():
  """The control of the first sum: attention that holds them."""
  assert of_queries_and_keys(arrays(compiled_text("causal_init", "xla")))


@pytest.mark.slow
def test_what_the_compiler_would_exchange_is_seen(small_blocks, monkeypatch):
  """The controls of the others: activations that are pinned nowhere."""
  for module in (dit, dit_layers):
    monkeypatch.setattr(module, "constrained", lambda x, path: x, raising=False)
  found = exchanged(compiled_text("causal_init", "blockwise"))
  assert over_the_clips(found) or whole_keys(found)


# ------------------------------------------------------------------------- by the chips' compilers


@pytest.mark.slow
@pytest.mark.parametrize("name", ["causal_init", "critic", "generator"])
@pytest.mark.parametrize(
  ("on", "attention", "kernel"),
  [("v5p:2x2x1", "splash", "tpu_custom_call"), ("h100:1x4", "cudnn", "fmha")],
)
def test_on_chips(name, on, attention, kernel):
  try:
    targets.parse(on)
  except UserError as error:
    assert "no compiler for" in str(error)
    pytest.skip(str(error))
  text = compiled_text(name, attention, on)
  assert kernel in text
  # splash pads: 546 tokens to 640, 1,092 and 1,638 to 2,048
  check(text, padded=(640, 2048) if attention == "splash" else ())
