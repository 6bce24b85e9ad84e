"""Videos from a config and converted weights of Wan's layout, small and random: text, a picture, a
video; resumed, planned.
"""

import json

import numpy as np
import pytest

from hiar_jax.checkpoints import weights
from hiar_jax.components.umt5_tokenizer import clean
from hiar_jax.models import vae
from hiar_jax.video import conditioning_files
from hiar_jax.video.frames import to_float, to_uint8
from hiar_jax.video.mp4 import read_metadata
from tests.helpers import tiny_run, tiny_wan
from tests.helpers.compiling import quick_jit
from tests.helpers.small_tokenizer import small_tokenizer
from tests.helpers.tiny_wan import VAE, save_weights
from tests.helpers.video_reader import read_mp4

# A video of Wan by command takes half a minute: tests/test_model.py compares one, in this process.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  return tiny_wan.directory(tmp_path_factory.getbasetemp())


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
  results = tiny_wan.generate(place.parent, cases, base(place))
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
    conditioning_files.read_image(place / "cat.png", 16, 32)[0],
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


def test_two_devices_make_the_same_video(made, place, tmp_path):
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
  results = tiny_wan.generate(
    place.parent,
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
    "blocks: 7, 6 tokens each (2 a latent frame)" in text and "generate on here: 1 device" in text
  )
  assert "VAE: 0.000 billion" in text
  picture = results["plan, no weights"][1]
  assert "UMT5: 5.681 billion" in picture and "after 1 given latent frames, " in picture
  assert len([*out.rglob("*.mp4")]) == 3 + 4 + 5 and not [*out.rglob("*.tmp")]


def test_only_what_is_missing_or_other_is_made(place, tmp_path):
  """Between two commands one file is deleted and one is torn; then everything is asked for
  otherwise.
  """
  (tmp_path / "p.csv").write_text("prompt\na\nb\nc\n")
  other = save_weights(tmp_path / "other", seed=8)
  command = [f"--prompts={tmp_path}/p.csv", f"--out={tmp_path}/v"]
  run = lambda *cases: tiny_wan.generate(
    place.parent, {i: [*command, *case] for i, case in enumerate(cases)}, base(place)
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
