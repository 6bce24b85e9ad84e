"""`hiar_jax.load`: the pixels that the commands write, from Python, with weights loaded once."""

import dataclasses
import shutil

import numpy as np
from PIL import Image
import pytest

import hiar_jax
from hiar_jax import context, generate, method
from hiar_jax.config.command_line import load_config
from hiar_jax.errors import UserError
from hiar_jax.generation import clips
from hiar_jax.generation.video_model import VideoModel
from hiar_jax.training.run import open_run, read_config
from tests.helpers import tiny_run, tiny_wan
from tests.helpers.untrained import (  # noqa: F401
  PROMPT,
  SEED,
  assert_same_pixels,
  compiles_quickly,
  frames,
  saved_run,
)

PROMPTS = [PROMPT, "a blue square moving up", "a green star"]  # a batch and a half


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  return saved_run(tmp_path_factory.mktemp("model"), tiny_run.make_config())


@pytest.fixture(scope="module")
def model(workdir):
  return hiar_jax.load(workdir)


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
  return tiny_wan.directory(tmp_path_factory.getbasetemp())


@pytest.fixture
def written(monkeypatch):
  """The frames that the command hands to the encoder of its files: path -> uint8 [F H W 3]."""
  found = {}

  def write_mp4(path, pieces, fps, metadata, *, scale):
    found[path.name] = np.concatenate(list(pieces))

  monkeypatch.setattr(clips, "write_mp4", write_mp4)
  return found


def test_a_video_is_the_one_that_the_command_writes(model, workdir, written, tmp_path):
  options = {"workdir": str(workdir), "prompt": PROMPT, "frames": 8, "seed": SEED}
  generate.generate(generate.GenerateOptions(**options, out=f"{tmp_path}/a.mp4"))
  video = model.generate(PROMPT, frames=8, seed=SEED)
  assert video.dtype == np.uint8 and video.shape == (8, 16, 16, 3)
  np.testing.assert_array_equal(video, written["a.mp4"])
  assert (video != model.generate(PROMPT, frames=8, seed=SEED + 1)).any()


def test_a_run_that_was_copied_without_its_data(model, workdir, written, tmp_path):
  copy = shutil.copytree(workdir, tmp_path / "copy")
  open_run(read_config(copy), copy, save=False).origins.keep()  # as its data stage does
  shutil.rmtree(copy / "data")
  options = {"workdir": str(copy), "prompt": PROMPT, "frames": 8, "seed": SEED}
  generate.generate(generate.GenerateOptions(**options, out=f"{tmp_path}/a.mp4"))
  np.testing.assert_array_equal(written["a.mp4"], model.generate(PROMPT, frames=8, seed=SEED))
  assert not (copy / "data").exists()


@pytest.mark.slow
def test_videos_are_those_that_the_command_writes(model, workdir, written, tmp_path):
  (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
  options = {"workdir": str(workdir), "prompts": f"{tmp_path}/prompts.txt", "seed": SEED}
  generate.generate(generate.GenerateOptions(**options, frames=6, out=f"{tmp_path}/videos"))
  videos = model.generate(PROMPTS, frames=6, seed=SEED)
  assert len(videos) == len(written) == 3
  for video, same in zip(videos, written.values(), strict=True):
    np.testing.assert_array_equal(video, same)
  again = model.generate(PROMPTS[::-1], frames=6, seed=[SEED + 2, SEED + 1, SEED])
  for video, same in zip(videos, again[::-1], strict=True):
    assert_same_pixels(video, same)


@pytest.mark.slow
def test_a_video_from_a_picture(model, workdir, written, tmp_path):
  Image.fromarray(np.full((16, 16, 3), (250, 10, 10), np.uint8)).save(tmp_path / "red.png")
  start = {"image": f"{tmp_path}/red.png", "frames": 5, "seed": SEED}
  options = {"workdir": str(workdir), "prompt": PROMPT, "out": f"{tmp_path}/a.mp4"}
  generate.generate(generate.GenerateOptions(**options, **start))
  np.testing.assert_array_equal(model.generate(PROMPT, **start), written["a.mp4"])


@pytest.mark.slow
def test_wan_is_the_one_that_the_command_writes(wan, written, tmp_path, capfd):
  config, weights = f"{wan}/config.py", f"{wan}/weights"
  start = {"video": f"{wan}/before.mp4", "frames": 37, "seed": SEED}
  options = {"config": load_config(config), "weights": weights, "decoder": "tiny_vae"}
  generate.generate(
    generate.GenerateOptions(**options, **start, prompt="A cat", out=f"{tmp_path}/a.mp4")
  )
  model = hiar_jax.load(config=config, weights=weights, decoder="tiny_vae")
  capfd.readouterr()
  np.testing.assert_array_equal(model.generate("A cat", **start), written["a.mp4"])
  assert "before.mp4: its last 21 of 24 frames" in capfd.readouterr().err
  latents = model.encode(written["a.mp4"][:5])
  assert latents.shape == (2, 2, 4, 16) and model.decode(latents).shape == (5, 16, 32, 3)


@pytest.mark.slow
def test_without_frames_it_is_the_commands_length(model):
  assert len(model.generate(PROMPT)) == 16  # four training lengths


@pytest.mark.slow
def test_a_stream_shares_the_weights(workdir, monkeypatch):
  loads = []
  params = VideoModel.params
  monkeypatch.setattr(VideoModel, "params", lambda self: loads.append(1) or params(self))
  model = hiar_jax.load(workdir)
  assert not loads
  video = model.generate(PROMPT, frames=8, seed=SEED)
  for _ in range(2):
    with model.stream(PROMPT, frames=8, seed=SEED, level_devices=1) as stream:
      assert_same_pixels(frames(stream), video)
  assert len(model._streaming) == 1  # and so the compiled tick
  model.with_method(window=6).generate(PROMPT, frames=2)
  assert len(loads) == 1


def test_latents_there_and_back(model):
  latents = model.sample_latents(PROMPTS[:2], frames=6, seeds=[SEED, 0])
  e = model.experiment.latent
  assert latents.shape == (2, 6, e.height, e.width, e.channels) and latents.dtype == np.float32
  pixels = model.decode(latents)
  np.testing.assert_array_equal(pixels[0], model.decode(latents[0]))
  np.testing.assert_array_equal(pixels, model.generate(PROMPTS[:2], frames=6, seed=[SEED, 0]))
  np.testing.assert_array_equal(model.encode(pixels)[1], model.encode(pixels[1]))
  batch = {"video": pixels, "tokens": model.run.text_encoder.tokens(PROMPTS[:2])}
  # as the teacher's training encodes them
  np.testing.assert_allclose(model.encode(pixels), model.run.encode(batch)["latents"], atol=1e-5)


@pytest.mark.slow
def test_texts_of_one_prompt(model):
  np.testing.assert_array_equal(model.texts(PROMPT), model.texts([PROMPT]))


def test_a_method_with_changes(model):
  changed = model.with_method(level="clean", window=6)
  assert isinstance(changed.method, method.Method)
  assert (changed.method.level, changed.method.window) == ("clean", 6)
  assert (model.method.level, model.method.window) == ("output", 4)
  assert changed.method.sigmas == model.method.sigmas
  assert changed.run.autoencoder is model.run.autoencoder
  a, b = (x.generate(PROMPT, frames=8, seed=SEED) for x in (model, changed))
  assert (a != b).any()
  same = changed.with_method(level="output", window=4)
  np.testing.assert_array_equal(same.generate(PROMPT, frames=8, seed=SEED), a)


@pytest.mark.slow
def test_a_context_level_of_ones_own(model, monkeypatch):
  @dataclasses.dataclass(frozen=True)
  class Same(context.Output):
    share: float

  monkeypatch.setitem(context.LEVELS, "same", Same)
  own, clean = (
    model.with_method(level=level).generate(PROMPT, frames=8, seed=SEED)
    for level in ("same:0.5", "clean")
  )
  np.testing.assert_array_equal(own, model.generate(PROMPT, frames=8, seed=SEED))
  assert (own != clean).any()


REFUSED = {
  "no frames": (lambda m: m.generate("a", frames=0), "frames = 0: expected at least 1"),
  "frames in words": (lambda m: m.generate("a", frames="x"), "frames = 'x': expected a whole"),
  "a seed": (lambda m: m.generate("a", seed=-1), "seed = -1: expected a whole number from 0"),
  "a seed of another": (
    lambda m: m.generate("a", seed=2**32),
    "seed = 4294967296: expected a whole",
  ),
  "a truth for a seed": (lambda m: m.generate("a", seed=True), "seed = True: expected a whole"),
  "parts of frames": (lambda m: m.generate("a", frames=4.7), "frames = 4.7: expected a whole"),
  "truth for frames": (lambda m: m.generate("a", frames=True), "frames = True: expected a whole"),
  "a picture": (lambda m: m.generate("a", image=5), r"image = 5: expected str \| None"),
  "a number": (lambda m: m.generate(5), "prompt = 5: expected text"),
  "a loop": (lambda m: m.generate("a", loop="no"), "loop = 'no': expected bool"),
  "half a seed": (lambda m: m.generate("a", seed=0.5), "seed = 0.5: expected a whole number"),
  "seeds": (lambda m: m.generate(["a"], seed=[1, 2]), "2 seeds for 1 prompts: give one each"),
  "no prompt": (lambda m: m.generate([]), "there is no prompt"),
  "no text": (lambda m: m.generate([3]), "prompt = 3: expected text"),
  "texts of a number": (lambda m: m.texts(5), "prompt = 5: expected text"),
  "texts of numbers": (lambda m: m.texts([PROMPT, 5]), "prompt = 5: expected text"),
  "no UTF-8": (
    lambda m: m.generate("a\udcff"),
    r"prompt = 'a.udcff' holds .*not UTF-8; give it as",
  ),
  "no UTF-8 to stream": (lambda m: m.stream("a\udcff"), r"prompt = 'a.udcff' holds half a char"),
  "no texts": (lambda m: m.texts([]), "there is no prompt"),
  "takes of a number": (lambda m: m.generate("a", takes=5), "takes = 5: expected section:seed"),
  "takes of numbers": (lambda m: m.generate("a", takes=np.arange(3)), "expected section:seed"),
  "takes of texts": (lambda m: m.generate("a", takes={"0": 1}), "section '0' is no whole number"),
  "a name that is too long": (lambda m: m.generate("a", image="a" * 999), "a does not exist"),
  "a name with a zero byte": (lambda m: m.generate("a", timeline="a\0b"), "zero|null byte; give"),
  "more than any video": (
    lambda m: m.generate("a", frames=2**70),
    "expected at most 1,000,000,000,000,000",
  ),
  "two starts": (lambda m: m.generate("a", image="b", video="c"), "starts from one of them"),
  "no file": (lambda m: m.generate("a", image="nowhere.png"), "nowhere.png"),
  "no option": (lambda m: m.stream("a", sed=1), "stream has no option 'sed'; did you mean 'seed'"),
  "another model": (lambda m: m.stream("a", workdir="b"), "stream has no option 'workdir'"),
  "nothing to stream": (lambda m: m.stream(), "give either prompt="),
  "a seed to stream": (lambda m: m.stream("a", seed=-1), "seed = -1: expected a whole number"),
  "frames to stream": (lambda m: m.stream("a", frames=4.7), r"frames = 4.7: expected int \| str"),
  "truth to stream": (lambda m: m.stream("a", frames=True), r"frames = True: expected int \| str"),
  "half a seed to stream": (lambda m: m.stream("a", seed=0.9), "seed = 0.9: expected int"),
  "none to stream": (lambda m: m.stream("a", seed=None), "seed = None: expected int"),
  "half ahead": (lambda m: m.stream("a", prefetch=1.5), "prefetch = 1.5: expected int"),
  "devices": (lambda m: m.stream("a", level_devices="2"), "level_devices = '2': expected int"),
  "no text to stream": (lambda m: m.stream(5), r"prompt = 5: expected str \| None"),
  "half a window": (lambda m: m.with_method(window=4.5), "window = 4.5: expected int"),
  "latents": (
    lambda m: m.decode(np.zeros((2, 3, 4))),
    r"latents of shape \(2, 3, 4\): expected \(frames, 2, 2, 8\)",
  ),
  "a dtype": (lambda m: m.encode(np.zeros((2, 16, 16, 3))), "frames float64 .*: expected uint8"),
  "a size": (lambda m: m.encode(np.zeros((2, 8, 8, 3), np.uint8)), r"\(frames, 16, 16, 3\)"),
  "a field": (lambda m: m.with_method(windw=9), "a method has no 'windw'; did you mean 'window'"),
  "a value": (lambda m: m.with_method(level="x"), "history.level = 'x': expected one of"),
  "blocks": (lambda m: m.with_method(block=3), "data.frames = 4 is not whole blocks"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_one_line(model, name):
  ask, line = REFUSED[name]
  with pytest.raises(UserError, match=line) as error:
    ask(model)
  assert "--" not in str(error.value)


def test_frames_that_no_wan_video_has(wan):
  model = hiar_jax.load(config=f"{wan}/config.py", weights=f"{wan}/weights")
  with pytest.raises(UserError, match="4 frames cannot be encoded; the nearest count is 5"):
    model.encode(np.zeros((4, 16, 32, 3), np.uint8))


LOADS = {
  "nothing": ({}, "workdir is missing"),
  "no run": ({"workdir": "nowhere"}, "nowhere holds no run"),
  "a name that is too long": (
    {"workdir": "a" * 999},
    "a name of 999 bytes; a file's has at most 255",
  ),
  "a name with a zero byte": ({"workdir": "a\0b"}, "a zero byte, which no file's name has"),
  "weights of a long name": (
    {"config": "{wan}/config.py", "weights": "a" * 300},
    "a name of 300 bytes; a file's has at most 255",
  ),
  "both": ({"workdir": "a", "config": "{wan}/config.py"}, "give either workdir"),
  "no config": ({"weights": "{wan}/weights", "workdir": "a"}, "weights needs config"),
  "no file": ({"config": "{wan}/confg.py"}, "there is no file .*did you mean"),
  "no weights": ({"config": "{wan}/config.py", "weights": "{wan}"}, "dit"),
  "a stage": ({"workdir": "{run}", "stage": "teacher"}, "stage = 'teacher': expected one of"),
  "a dtype": ({"workdir": "{run}", "dtype": "int8"}, "dtype = 'int8': expected one of"),
  "a height": ({"workdir": "{run}", "height": 0}, "height = 0: expected at least 1"),
  "a decoder": ({"workdir": "{run}", "decoder": "tiny"}, "decoder = 'tiny': expected one of"),
  "a height of truth": ({"workdir": "{run}", "height": True}, r"height = True: expected int \| N"),
  "a workdir": ({"workdir": 5}, r"workdir = 5: expected str \| None"),
  "a step": ({"workdir": "{run}", "step": "6"}, r"step = '6': expected int \| None"),
  "a tile": ({"workdir": "{run}", "tile": 8}, "decoder and tile are for Wan's autoencoder"),
}


@pytest.mark.parametrize("name", LOADS)
def test_what_cannot_be_loaded_is_one_line(workdir, wan, name):
  options, line = LOADS[name]
  fill = lambda x: x.format(run=workdir, wan=wan) if isinstance(x, str) else x
  with pytest.raises(UserError, match=line) as error:
    hiar_jax.load(**{key: fill(x) for key, x in options.items()})
  assert "--" not in str(error.value).split("python -m")[0]


@pytest.mark.slow
def test_a_run_of_another_size(workdir):
  small = hiar_jax.load(workdir, height=24, width=8)
  assert small.generate(PROMPT, frames=2).shape == (2, 24, 8, 3)
  assert "24x8" in repr(small)
