"""What a video would cost: counted by hand, against the loops as they run, the compiler's count,
and the published sizes.
"""

import dataclasses
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest

from hiar_jax import peak_memory
from hiar_jax.components.umt5_encoder import UMT5TextConfig
from hiar_jax.components.wan_autoencoder import WanCodecConfig
from hiar_jax.errors import UserError
from hiar_jax.method import MethodConfig
from hiar_jax.models import dit, vae
from hiar_jax.models.frames import Out, bind
from hiar_jax.parallel.mesh import MeshConfig, make_mesh
from hiar_jax.planning import costs, sizes
from hiar_jax.planning.sizes import ForwardCost, JobSize
from hiar_jax.rollout import sample
from tests.helpers import masked, tiny

SMALL = dit.DiTConfig(
  dim=64, ffn_dim=160, num_heads=4, num_layers=3, channels=4, text_dim=24, freq_dim=32
)
LARGE = dit.DiTConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)
ROWS = {
  "hiar": MethodConfig(block=2, window=4),
  "hiar_sink": MethodConfig(block=2, window=6, sink=2),
  "clean_sink": MethodConfig(block=2, window=6, sink=4, sink_level="clean"),
  "self_aligned": MethodConfig(
    block=2, window=6, sink=2, sink_level="clean", level="input", gradient="attached"
  ),
  "self_forcing": MethodConfig(block=2, window=4, order="block_first", level="clean"),
  "packed": MethodConfig(block=2, window=4, past="packed", packing="tc_f3k2f2k1_g2"),
}


# the autoencoder and the text encoder of Wan2.1
PUBLISHED = {
  "others": {**WanCodecConfig().networks(), **UMT5TextConfig().networks()},
  "decoder": WanCodecConfig().abstract_decoder(),
}


def small(**changes):
  return JobSize(
    **{
      "network": SMALL,
      "method": ROWS["hiar"],
      "levels": 3,
      "frames": 6,
      "height": 4,
      "width": 6,
      "text": 8,
      "dtype": "float32",
      **changes,
    }
  )


@dataclasses.dataclass(frozen=True, eq=False)
class Counted(tiny.Toy):
  """Returns what it is given, and counts its forwards by (frames, frames seen with the past)."""

  calls: dict[tuple[int, int], int] = dataclasses.field(default_factory=dict)

  def apply(self, params, groups, texts, past=(), start=None):
    # of 2 x 1 tokens a frame, k2 makes one of two frames
    packed = [-(-h.x.shape[1] // 2) / 2 for g in groups for h in g.packed]
    frames = sum(g.x.shape[1] for g in groups) + sum(packed)
    key = (frames, frames + sum(kv.k.shape[2] for kv in past))
    self.calls[key] = self.calls.get(key, 0) + 1
    kv = tuple(self.empty_kv(g.x.shape[1], *g.x.shape[:1], *g.x.shape[2:4]) for g in groups)
    return Out(tuple(g.x for g in groups), kv)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("given", [0, 1, 4])
@pytest.mark.parametrize("frames", [4, 8])
def test_forwards_are_those_that_run(name, given, frames):
  """The loops of the rollout itself, unrolled in Python around a network that counts its calls."""
  row, network = ROWS[name], Counted()
  request = small(
    network=tiny.CONFIG,
    method=row,
    frames=frames,
    given=given,
    height=tiny.HEIGHT,
    width=tiny.WIDTH,
  )
  noise = lambda level, n: jnp.zeros((tiny.BATCH, 2, tiny.HEIGHT, tiny.WIDTH, 2))
  start = jnp.asarray(tiny.video(0, given)) if given else None
  with jax.disable_jit():
    bound = bind(network, None, tiny.text())
    # of shapes alone: each operation on numbers would be compiled
    jax.eval_shape(
      lambda start: sample.rollout(bound, noise, row.at(tiny.SIGMAS), tiny.shape(frames), start),
      start,
    )
  expected = {}
  for call in sizes.forwards(request):
    expected[call.frames, call.keys] = expected.get((call.frames, call.keys), 0) + call.count
  assert network.calls == expected


@pytest.mark.slow
def test_flops_are_the_compilers():
  """Of one forward with all layers written out, since the compiler counts a loop's body once."""
  config = dataclasses.replace(SMALL, dim=256, ffn_dim=640, unroll=3)
  tokens, text = config.tokens(8, 12), 8
  for frames, past in ((2, 4), (3, 0), (1, 9)):
    kv = jax.ShapeDtypeStruct((3, 1, past, tokens, 4, config.head_dim), jnp.float32)

    def forward(params, text, x, kv, past=past, frames=frames):
      mask = jnp.ones((frames, past + frames), bool)
      past_kv = dit.KV(kv, kv) if past else None
      return masked.bind(config, params, text)(
        x, jnp.float32(0.5), jnp.arange(frames) + past, mask=mask, past=past_kv
      )

    shapes = jax.eval_shape(lambda: config.init(jax.random.key(0)))
    texts, x = (
      jax.ShapeDtypeStruct((1, text, 24), jnp.float32),
      jax.ShapeDtypeStruct((1, frames, 8, 12, 4), jnp.float32),
    )
    counted = jax.jit(forward).lower(shapes, texts, x, kv).compile().cost_analysis()["flops"]
    by_hand = config.flops(frames, frames + past, tokens, text)
    assert by_hand == pytest.approx(counted, rel=0.05)
    assert by_hand < counted  # norms, softmax and gates are not in it


@pytest.mark.parametrize(
  "config, parameters, flops",
  [(dit.DiTConfig(), 1_418_996_800, 41e12), (LARGE, 14_288_491_584, 240e12)],
)
def test_the_published_sizes(config, parameters, flops):
  """In a second, allocating nothing.

  One forward of a block at 480x832 that sees 21 frames: 12 TFLOP of products and 28 of attention.
  """
  begin = time.process_time()
  found = costs.make_plan(
    JobSize(config, MethodConfig(), 4, frames=21, height=60, width=104, **PUBLISHED), compile=False
  )
  assert time.process_time() - begin < 20
  assert (
    found.parts["DiT"].parameters == parameters
    and found.parts["DiT"].bytes == 2 * parameters == found.weights
  )
  assert (
    found.parts["VAE"].parameters == 126_892_531 and found.parts["UMT5"].parameters == 5_680_910_336
  )
  assert (found.tokens_frame, found.tokens_block, found.blocks) == (1560, 4680, 7)
  assert found.cache == 2 * 18 * 1560 * config.dim * config.num_layers * 2 + 18 * 4
  assert found.forwards == (ForwardCost(4, 3, 21), ForwardCost(24, 6, 24))
  assert config.flops(3, 21, 1560, 512) == pytest.approx(flops, rel=0.05)
  assert found.flops_video == pytest.approx(7 * found.flops_block)
  assert found.compiled == {} and "nothing was compiled" in found.note
  assert found.floor > found.weights + found.cache


@pytest.mark.slow
def test_compiled_memory_is_that_of_the_program():
  """Arguments are weights, text and seeds; a cache twice as wide costs as much more of the
  temporary memory.
  """
  narrow, wide = (
    costs.make_plan(small(method=MethodConfig(block=2, window=w), frames=24, height=8, width=12))
    for w in (4, 20)
  )
  weights = narrow.parts["DiT"].bytes
  assert narrow.weights == weights
  generate_ = narrow.compiled["generate"]
  assert generate_.arguments == pytest.approx(weights + 8 * 24 * 4 + 4, rel=0.01)
  assert generate_.outputs == 24 * 8 * 12 * 4 * 4
  assert wide.compiled["generate"].temporary - generate_.temporary > wide.cache - narrow.cache
  assert narrow.floor < generate_.total and wide.floor < wide.compiled["generate"].total


def test_devices_share_what_is_sharded():
  config = dataclasses.replace(SMALL, dim=1024, ffn_dim=1024, num_heads=4)
  request = small(network=config, batch=4)
  alone = costs.make_plan(request, compile=False)
  mesh = make_mesh(MeshConfig(data=1, fsdp=4), jax.devices()[:4])
  spread = costs.make_plan(request, mesh)
  assert spread.devices == 4 and alone.devices == 1
  assert alone.weights / 4 < spread.weights < alone.weights / 3  # small leaves are everywhere
  arguments = spread.compiled["generate"].arguments
  assert arguments == pytest.approx(spread.weights + 8 * 24 * 4, rel=0.01)
  assert spread.floor < alone.floor / 3
  # three videos are not split over four devices
  odd = costs.make_plan(small(network=config, batch=3), mesh, compile=False)
  assert odd.floor - odd.weights > 2 * (spread.floor - spread.weights)


@pytest.mark.slow
def test_decoding_is_planned_as_it_runs():
  """One video at a time, its frames over the devices, or in tiles on one."""
  config = vae.VAEConfig(
    dim=8,
    z_dim=4,
    dim_mult=(1, 1),
    num_res_blocks=1,
    temporal_downsample=(True,),
    latents_mean=(0.0,) * 4,
    latents_std=(1.0,) * 4,
  )
  mesh = make_mesh(MeshConfig(data=4, fsdp=1), jax.devices()[:4])
  params = vae.abstract_params(config)
  request = small(decoder=WanCodecConfig().decoder(config, params), frames=2, height=32, width=48)
  decode = lambda request, mesh=None: costs.make_plan(request, mesh).compiled["decode"]
  whole, spread = decode(request), decode(request, mesh)
  assert decode(dataclasses.replace(request, batch=2)).total == whole.total
  assert (
    spread.arguments < 0.3 * whole.arguments
    and spread.outputs < 0.3 * whole.outputs
    and spread.flops < 0.5 * whole.flops
  )
  tiled = dataclasses.replace(request, decoder=WanCodecConfig(tile=8).decoder(config, params))
  assert decode(tiled).temporary < 0.5 * whole.temporary


@pytest.mark.slow
def test_a_picture_and_a_continuation_can_be_planned():
  for given in (1, 4):
    found = costs.make_plan(small(given=given))
    assert found.compiled["generate"].outputs == (given + 6) * 4 * 6 * 4 * 4


def test_what_is_said():
  found = costs.make_plan(
    JobSize(dit.DiTConfig(), MethodConfig(), 4, frames=21, height=60, width=104, **PUBLISHED),
    compile=False,
  )
  text = found.text()
  for part in (
    "DiT: 1.419 billion parameters, 2.64 GiB",
    "VAE: 0.127 billion",
    "UMT5: 5.681 billion parameters, 10.6 GiB",
    "blocks: 7, 4680 tokens each (1560 a latent frame)",
    "forwards: 28 (4 of 3 frames on 21, 24 of 6 frames on 24)",
    "FLOPs: 328.5 T a block, 2.299 P the video",
    "KV cache: 4.82 GiB",
    "memory of each of 1 cpu device: at least ",
  ):
    assert part in text, text
  assert len(text.splitlines()) <= 10 and dataclasses.asdict(found)["tokens_block"] == 4680


def test_a_kernel_for_gpus_alone_is_not_compiled_here():
  found = costs.make_plan(small(network=dataclasses.replace(SMALL, attention="cudnn")))
  assert found.compiled == {} and found.note.startswith(
    "nothing was compiled: attention = 'cudnn' is for GPUs"
  )


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"frames": 5}, "frames = 5 latent frames are not whole blocks of 2"),
    ({"given": 3}, "given = 3 latent frames: expected one, or whole"),
    ({"dtype": "float64"}, "dtype = 'float64': expected one of"),
    ({"height": 5}, "latents of 5x6 cannot be cut into patches of 2x2"),
    ({"levels": 0}, "levels = 0: expected at least 1"),
  ],
)
def test_what_does_not_fit_together(changes, message):
  with pytest.raises(UserError, match=message):
    small(**changes)


def test_memory_of_this_process():
  """In a fresh one, whose peak nothing before it has raised."""
  code = (
    "import numpy as np; from hiar_jax import peak_memory\n"
    "before = peak_memory.peak()[1]; held = np.ones(2**25)\n"
    "print(peak_memory.peak()[1] - before)"
  )
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert float(done.stdout) == pytest.approx(2**28, rel=0.1)
  devices, after = peak_memory.peak()
  assert devices == {}
  said = peak_memory.report(devices, after)
  assert "resident in this process (the cpu devices keep no count of their own)" in said
  assert (
    peak_memory.report({"gpu:0": 3 * 2**30}, 2**20)
    == "peak memory: 3 GiB on gpu:0; 1 MiB resident in this process"
  )
  assert [peak_memory.size(n) for n in (0, 1023, 1536, 200 * 2**20, 2**50)] == [
    "0 B",
    "1023 B",
    "1.5 KiB",
    "200 MiB",
    "1024 TiB",
  ]
