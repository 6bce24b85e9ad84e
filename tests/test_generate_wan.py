"""Videos from a config and converted weights of Wan's layout, small and random: text, a picture, a
video; resumed, planned, refused.
"""

import dataclasses
import json
import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from hiar_jax.checkpoints import weights
from hiar_jax.components import wan
from hiar_jax.components.umt5_tokenizer import clean
from hiar_jax.generation import clips, video_model
from hiar_jax.generation.conditioning_frames import Conditioning
from hiar_jax.generation.prompts_file import Job
from hiar_jax.models import dit, vae
from hiar_jax.models.vae_tiling import Tiling
from hiar_jax.parallel.mesh import MeshConfig, make_mesh
from hiar_jax.video import foreign
from hiar_jax.video.frames import to_float, to_uint8
from hiar_jax.video.mp4 import read_metadata, read_mp4, write_mp4
from tests.helpers import tiny_run
from tests.helpers.compiling import quick_jit
from tests.helpers.small_tokenizer import small_tokenizer
from tests.helpers.tiny_wan import CONFIG, DIT, VAE, random_like, save_weights


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """A directory with config.py, weights/, cat.png and before.mp4."""
  root = tmp_path_factory.mktemp("wan")
  (root / "config.py").write_text(CONFIG)
  save_weights(root / "weights")
  pixels = np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8)
  Image.fromarray(pixels).save(root / "cat.png")
  ramp = np.broadcast_to(
    np.linspace(0, 255, 24).astype(np.uint8)[:, None, None, None], (24, 16, 32, 3)
  )
  write_mp4(root / "before.mp4", ramp, 16)
  return root


def commands(
  place, tmp_path_factory, cases: dict[str, list[str]], common: list[str], devices: int = 1
) -> dict[str, tuple[int, str, str]]:
  chain = tiny_run.chain(tmp_path_factory.getbasetemp())
  done = chain.commands(
    [("hiar_jax.generate", [*common, *case]) for case in cases.values()], devices=devices
  )
  return dict(zip(cases, done, strict=True))


def base(place):
  return [f"--config={place}/config.py", f"--weights={place}/weights"]


PROMPTS = ["A cat walks on the grass", "一只狗在海滩上奔跑", ""]
LONG = "قطة تمشي على العشب, кошка идёт по траве. " * 40  # more than 512 tokens


@pytest.fixture(scope="module")
def made(place, tmp_path_factory):
  out = tmp_path_factory.mktemp("made")
  (out / "prompts.txt").write_text(f'{PROMPTS[0]}\nseed=9 out=dog.mp4 | {PROMPTS[1]}\n""\n')
  dog = {"prompt": PROMPTS[1], "seed": 9, "out": "dog.mp4"}
  starts = [{"prompt": "a", "image": f"{place}/cat.png"}, {"prompt": "b"}, dog, {"prompt": "c"}]
  (out / "starts.jsonl").write_text("\n".join(json.dumps(row) for row in starts))
  cat, dog = f"--prompt={PROMPTS[0]}", f"--prompt={PROMPTS[1]}"
  cases = {
    "file": [f"--prompts={out}/prompts.txt", f"--out={out}/many", "--seed=4", "--report_memory"],
    "again": [f"--prompts={out}/prompts.txt", f"--out={out}/many", "--seed=4"],
    "alone": [dog, "--seed=9", "--frames=21", f"--out={out}/alone.mp4"],
    "image": [cat, f"--image={place}/cat.png", f"--out={out}/image.mp4"],
    "video": [cat, f"--video={place}/before.mp4", "--frames=40", f"--out={out}/video.mp4"],
    "starts": [f"--prompts={out}/starts.jsonl", f"--out={out}/starts", "--config.sample.batch=2"],
    "tiny": [cat, "--seed=4", "--decoder=tiny_vae", f"--out={out}/tiny.mp4"],
    "tiled": [
      f"--prompt={LONG}",
      "--height=32",
      "--width=64",
      "--frames=9",
      "--tile=4",
      "--dtype=bfloat16",
      f"--out={out}/tiled.mp4",
    ],
    "plan": ["--dry_run", "--frames=81"],
    "plan, no weights": [
      "--dry_run",
      f"--prompt={PROMPTS[0]}",
      "--weights=",
      f"--image={place}/cat.png",
      "--decoder=tiny_vae",
    ],
  }
  before = tiny_run.files(place / "weights" / "dit")
  results = commands(place, tmp_path_factory, cases, base(place))
  assert tiny_run.files(place / "weights" / "dit") == before
  return results, out


def test_every_command_ends_well(made):
  for name, (status, _, err) in made[0].items():
    assert status == 0 and "Traceback" not in err, f"{name}: {err}"


def test_a_file_of_prompts(made):
  results, out = made
  names = ["a-cat-walks-on-the-grass.mp4", "dog.mp4", "prompt.mp4"]
  assert results["file"][1].splitlines() == [f"{out}/many/{name}" for name in names]
  for name, prompt, seed in zip(names, PROMPTS, ("4", "9", "6"), strict=True):
    frames, fps, said = read_mp4(out / "many" / name)
    assert frames.shape == (21, 16, 32, 3) and fps == 16
    assert (said["prompt"], said["seed"], said["frames"], said["weights"]) == (
      prompt,
      seed,
      "21",
      "weights",
    )
    assert frames.std() > 1


def test_a_video_depends_on_its_prompt_and_seed_alone(made):
  _, out = made
  np.testing.assert_array_equal(
    read_mp4(out / "many" / "dog.mp4")[0], read_mp4(out / "alone.mp4")[0]
  )


def test_finished_files_are_not_made_again(made):
  results, out = made
  assert results["again"][1] == ""
  assert (
    results["again"][2].count(
      "is there already, made of the same prompt, seed and weights; --overwrite makes it again"
    )
    == 3
  )


def test_memory_is_said(made):
  assert "peak memory: " in made[0]["file"][2] and "resident in this process" in made[0]["file"][2]
  assert "peak memory" not in made[0]["alone"][2]


def test_a_picture_is_the_first_frame(made, place):
  """One latent frame, then whole blocks: 1 + 6 latent frames.

  The first frame is what the autoencoder makes of the picture.
  """
  results, out = made
  _, params = weights.load(place / "weights", "vae")
  there = quick_jit(
    lambda params, video: vae.decode_chunk(
      params, vae.encode_chunk(params, video, None, VAE)[0], None, VAE
    )[0]
  )
  cat, none = (
    foreign.read_image(place / "cat.png", 16, 32)[0],
    np.full((1, 16, 32, 3), 128, np.uint8),
  )
  # a file halves the resolution of colour
  luma = lambda frame: frame @ np.asarray([0.2126, 0.7152, 0.0722])
  first = luma(read_mp4(out / "image.mp4")[0][0])
  far = [
    np.abs(first - luma(to_uint8(there(params, to_float(x)[None]))[0, 0])).mean()
    for x in (cat, none)
  ]
  assert far[0] < 6 and far[0] < far[1] / 3, far
  frames, _, said = read_mp4(out / "image.mp4")
  assert len(frames) == 25 and said["start"] == "image cat.png"
  assert (
    "cat.png: 50x40, scaled by 0.8 to cover 16x32, 60% of its height cropped\n"
    in results["image"][2]
  )


def test_a_video_goes_on_from_its_end(made):
  results, out = made
  frames, _, said = read_mp4(out / "video.mp4")
  # 21 of 24 frames are two blocks, two more follow
  assert len(frames) == 45 and said["start"] == "video before.mp4"
  assert "frames = 40 is not whole blocks of 3 latent frames: making 45\n" in results["video"][2]
  assert "before.mp4: its last 21 of 24 frames, which are whole blocks\n" in results["video"][2]


def test_starts_in_a_file_of_prompts(made):
  """A picture for one, nothing for the others, which are made two at a time."""
  results, out = made
  assert [
    len(read_mp4(out / "starts" / name)[0]) for name in ("a.mp4", "b.mp4", "dog.mp4", "c.mp4")
  ] == [25, 21, 21, 21]
  together, alone = (
    read_mp4(out / name)[0].astype(int) for name in ("starts/dog.mp4", "alone.mp4")
  )
  assert np.abs(together - alone).mean() < 1  # a batch of another size rounds otherwise


@pytest.mark.slow
def test_two_devices_make_the_same_video(made, place, tmp_path, tmp_path_factory):
  """From a picture: text encoder, autoencoder both ways and network, each with devices of its
  own.
  """
  cat = [f"--prompt={PROMPTS[0]}", f"--image={place}/cat.png"]
  cases = {
    "whole": [*cat, f"--out={tmp_path}/image.mp4"],
    "tiled": [
      *cat,
      "--height=32",
      "--width=64",
      "--frames=9",
      "--tile=4",
      f"--out={tmp_path}/tiled.mp4",
    ],
  }
  results = commands(
    place,
    tmp_path_factory,
    cases,
    [*base(place), f"--config.text.cache={tmp_path}/texts"],
    devices=2,
  )
  for name, (status, _, err) in results.items():
    assert status == 0 and "Traceback" not in err, f"{name}: {err}"
  two, one = (
    read_mp4(path)[0].astype(int) for path in (tmp_path / "image.mp4", made[1] / "image.mp4")
  )
  assert np.abs(two - one).mean() < 1


def test_other_decoders(made):
  _, out = made
  whole = read_mp4(out / "many" / "a-cat-walks-on-the-grass.mp4")[0].astype(int)
  tiny, _, said = read_mp4(out / "tiny.mp4")
  assert (
    tiny.shape == whole.shape and np.abs(tiny - whole).mean() > 0.5 and said["codec"] == "tiny_vae"
  )
  frames, _, said = read_mp4(out / "tiled.mp4")
  assert frames.shape == (9, 32, 64, 3) and said["size"] == "32x64" and said["dtype"] == "bfloat16"


def test_a_prompt_that_is_too_long_is_cut_and_that_is_said(made):
  """The video is made of what fits, its file says the prompt as it was given."""
  results, out = made
  cut = len(small_tokenizer().encode(clean(LONG)).ids) - 512
  assert cut > 0
  assert (
    f"prompt {LONG[:60]!r}...: {512 + cut} tokens, the encoder reads 512; the last {cut} are left "
    "out\n" in results["tiled"][2]
  )
  assert "are left out" not in results["file"][2]  # an empty prompt, and one in Chinese
  assert read_metadata(out / "tiled.mp4")["prompt"] == LONG


def test_a_plan_makes_nothing(made):
  results, out = made
  text = results["plan"][1]
  assert (
    "blocks: 7, 6 tokens each (2 a latent frame)" in text and "compiled for cpu, generate: " in text
  )
  assert "VAE: 0.000 billion" in text
  picture = results["plan, no weights"][1]
  assert "UMT5: 5.681 billion" in picture and "1 of 1 frames on " in picture
  assert len([*out.rglob("*.mp4")]) == 3 + 4 + 5 and not [*out.rglob("*.tmp")]


# ----------------------------------------------------------------------------- resumed, and refused


def test_only_what_is_missing_or_other_is_made(place, tmp_path, tmp_path_factory):
  """Between two commands one file is deleted and one is torn; then everything is asked for
  otherwise.
  """
  (tmp_path / "p.csv").write_text("prompt\na\nb\nc\n")
  other = save_weights(tmp_path / "other", seed=8)
  command = [f"--prompts={tmp_path}/p.csv", f"--out={tmp_path}/v"]
  run = lambda *cases: commands(
    place, tmp_path_factory, {i: [*command, *case] for i, case in enumerate(cases)}, base(place)
  )
  assert run([])[0][0] == 0
  old = {name: (tmp_path / "v" / name).read_bytes() for name in ("a.mp4", "b.mp4", "c.mp4")}
  (tmp_path / "v" / "a.mp4").unlink()
  (tmp_path / "v" / "b.mp4").write_bytes(old["b.mp4"][:100])
  status, out, err = run([])[0]
  assert (
    status == 0
    and out.splitlines() == [f"{tmp_path}/v/a.mp4", f"{tmp_path}/v/b.mp4"]
    and err.count("is there already") == 1
  )
  assert {name: (tmp_path / "v" / name).read_bytes() for name in old} == old
  otherwise = run(
    ["--overwrite"],
    ["--seed=1"],
    ["--seed=1", f"--weights={other}"],
    ["--seed=1", f"--weights={other}"],
  )
  assert [len(out.splitlines()) for _, out, _ in otherwise.values()] == [3, 3, 3, 0]


@pytest.fixture(scope="module")
def refused(place, tmp_path_factory):
  out = tmp_path_factory.mktemp("refused")
  larger = dataclasses.replace(DIT, num_layers=3)
  weights.save(out / "larger", "dit", larger, random_like(larger, dit.init, 0, 0.1))
  (out / "text.txt").write_text("no picture")
  (out / "prompts.txt").write_text("a\nimage=nowhere.png | b\n")
  write_mp4(out / "short.mp4", np.zeros((8, 16, 32, 3), np.uint8), 16)
  config, there, prompt = f"--config={place}/config.py", f"--weights={place}/weights", "--prompt=a"
  cases = {
    "no weights": [config, prompt],
    "missing weights": [config, f"--weights={out}/nowhere", prompt],
    "another model": [
      config,
      f"--weights={out}/larger",
      prompt,
      f"--config.codec.weights={place}/weights",
      f"--config.text.weights={place}/weights",
    ],
    "both sources": [config, there, "--workdir=runs/x", prompt],
    "weights of a run": ["--workdir=runs/x", there, prompt],
    "a small world": ["--config=experiments/shapes.py", there, prompt],
    "no prompt": [config, there],
    "both starts": [
      config,
      there,
      prompt,
      f"--image={place}/cat.png",
      f"--video={place}/before.mp4",
    ],
    "odd size": [config, there, prompt, "--height=20", "--width=32"],
    "strict": [config, there, prompt, "--frames=20", "--strict"],
    "too few": [config, there, prompt, f"--video={place}/before.mp4", "--frames=21"],
    "no picture": [config, there, prompt, f"--image={out}/text.txt"],
    "missing picture": [config, there, prompt, f"--image={out}/nowhere.png"],
    "short": [config, there, prompt, f"--video={out}/short.mp4"],
    "in a file": [config, there, f"--prompts={out}/prompts.txt"],
    "tiny tiles": [config, there, prompt, "--decoder=tiny_vae", "--tile=8"],
    "small tiles": [config, there, prompt, "--tile=2"],
    "a dtype": [config, there, prompt, "--dtype=float16"],
    "a decoder": [config, there, prompt, "--decoder=wan"],
  }
  return commands(place, tmp_path_factory, cases, [f"--out={out}/x.mp4"]), out


REFUSED = {
  "no weights": "--weights is missing; give a directory of converted weights",
  "missing weights": "hiar_jax.convert",
  "another model": "holds another model than the config describes: num_layers 3, not 2",
  "both sources": "give either --workdir, a trained run, or --config with --weights",
  "weights of a run": "--weights needs --config",
  "a small world": "codec.kind = 'patches' is fitted by a run: give --workdir",
  "no prompt": "give either --prompt=",
  "both starts": "give either --image or --video",
  "odd size": "--height=20: the sides of a video are multiples of 16; the nearest size is 16x32",
  "strict": "frames = 20 is not whole blocks of 3 latent frames; the nearest counts are 9 and 21",
  "too few": "frames = 21, but the given start has 21 already; ask for more, from 33 on",
  "no picture": "text.txt is not an image",
  "missing picture": "image /",
  "short": "short.mp4 has 8 frames at 16 a second, a start needs whole blocks, at least 9 frames",
  "in a file": "line 2: image = 'nowhere.png': there is no file",
  "tiny tiles": "--tile=8: the tiny autoencoder decodes whole frames",
  "small tiles": "--tile=2: expected at least 4 latents a side (32 pixels), or 0 for whole frames",
  "a dtype": "--dtype=float16: value should be one of <float32|bfloat16>",
  "a decoder": "--decoder=wan: value should be one of <vae|tiny_vae>",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_done_is_one_line(refused, name):
  results, out = refused
  status, printed, err = results[name]
  lines = [line for line in err.splitlines() if line.startswith("error: ")]
  assert status == 2 and printed == "" and len(lines) == 1 and "Traceback" not in err, err
  assert REFUSED[name] in lines[0], err
  assert not (out / "x.mp4").exists() and not [*out.rglob("*.tmp")]


# -------------------------------------------------------------------------- what the model is given


@pytest.fixture(scope="module")
def model(place):
  config = runpy.run_path(str(place / "config.py"))["get_config"]()
  found = video_model.from_config(config, str(place / "weights"), video_model.ModelChanges())
  one = make_mesh(MeshConfig(), jax.devices()[:1])
  return dataclasses.replace(found, run=dataclasses.replace(found.run, mesh=one))


def clip(model, kind, path, given, prompt="A cat"):
  return clips.Clip(Job(prompt, 3), pathlib.Path("x.mp4"), Conditioning(path, kind), given, 3)


@pytest.mark.parametrize("kind, name, given", [("image", "cat.png", 1), ("video", "before.mp4", 6)])
def test_what_is_given_is_kept_and_shown(model, place, kind, name, given):
  """The first latents of the result are the autoencoder's of the start, to the bit; and what
  follows depends on them.
  """
  start = clip(model, kind, place / name, given)
  pixels, _ = start.start.read(model.experiment)
  assert pixels.shape == (1 + 4 * (given - 1), 16, 32, 3)
  _, params = weights.load(place / "weights", "vae")
  expected = np.asarray(vae.encode(params, jnp.asarray(pixels[None] / 127.5 - 1, jnp.float32), VAE))
  np.testing.assert_allclose(clips.start_latents(model, start), expected, atol=1e-4)
  model.prepare_texts(["A cat"])
  made = model.generator(3)
  args = model.params(), model.texts(["A cat"]), np.asarray([3])
  latents = np.asarray(made(*args, expected))
  assert latents.shape == (1, given + 3, 2, 4, 16)
  np.testing.assert_array_equal(latents[:, :given], expected)
  assert np.abs(np.asarray(made(*args, expected + 1))[:, given:] - latents[:, given:]).max() > 1e-3


def test_pictures_of_a_size_are_encoded_by_one_program(model):
  """A file of prompts may hold a hundred of them.

  The mesh that the network runs on is set around it.
  """
  sizes = []
  for value in (0, 255):
    with jax.set_mesh(make_mesh(MeshConfig(data=8))):
      latents = model.run.components.latents(np.full((1, 1, 16, 32, 3), value, np.uint8))
    sizes.append(model.run.components._encode._cache_size())
  assert latents.shape == (1, 1, 2, 4, 16) and sizes[0] == sizes[1] >= 1


def test_small_memories_encode_in_tiles_too(model, monkeypatch):
  seen = []

  def encode(params, video, config, tiling):
    seen.append((video.shape, config, tiling))
    return jnp.zeros((1, 1, 4, 8, 16))

  monkeypatch.setattr(wan.vae_tiling, "encode", encode)
  e = model.experiment
  tiled = wan.WanComponents(dataclasses.replace(e.codec, tile=4), e.text, e.latent)
  assert tiled.latents(np.zeros((1, 1, 32, 64, 3), np.uint8)).shape == (1, 1, 4, 8, 16)
  assert seen == [((1, 1, 32, 64, 3), VAE, Tiling(4, 1))]


def test_a_frame_is_decoded_over_all_devices(model):
  """Inside the mesh that the network runs on, which is another: a width of 4 latents goes to 4 of
  the 8.
  """
  latents = np.random.default_rng(0).normal(size=(1, 1, 2, 4, 16)).astype(np.float32)
  assert len(model.run.components._wide_stream.place(4).device_set) == 4
  mesh = make_mesh(MeshConfig(data=8))
  with jax.set_mesh(mesh):
    (piece,) = model.run.components.pieces(
      jax.device_put(latents, jax.NamedSharding(mesh, jax.P()))
    )
  (expected,) = model.run.components.stream(latents)
  assert np.abs(piece.astype(int) - expected).max() <= 1 and piece.std() > 1


def test_identity_is_of_what_matters(model, place, tmp_path):
  """Another place on the disk is the same model; other weights, another dtype, window or decoder
  are not.
  """
  config = lambda: runpy.run_path(str(place / "config.py"))["get_config"]()
  identity = lambda c, folder, **changes: (
    video_model.from_config(c, str(folder), video_model.ModelChanges(**changes)).identity
  )
  moved, other = save_weights(tmp_path / "moved"), save_weights(tmp_path / "other", seed=5)
  assert identity(config(), moved) == model.identity
  wider = config()
  wider.history.window = 9
  others = [identity(wider, moved), identity(config(), other)]
  others += [
    identity(config(), moved, **change)
    for change in ({"dtype": "bfloat16"}, {"decoder": "tiny_vae"}, {"tile": 4})
  ]
  assert len({model.identity, *others}) == 6
