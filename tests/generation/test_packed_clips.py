"""Videos of packed models with ends of their own, loops, timed prompts and takes: in Python and by
the command, which say in one line what a model cannot do.
"""

import hashlib
import json

import numpy as np
from PIL import Image
import pytest

import hiar_jax
from hiar_jax import generate
from hiar_jax.errors import UserError
from hiar_jax.generation import clips, prompts_file
from hiar_jax.video.mp4 import write_mp4
from tests.helpers import tiny_packed, tiny_run
from tests.helpers.untrained import (  # noqa: F401
  PROMPT,
  SEED,
  assert_same_pixels,
  compiles_quickly,
  saved_run,
  untrained,
)
from tests.helpers.video_reader import read_mp4

STAGES = ("teacher", "framepack")
BOTH_ENDS, INVERTED = "shapes_framepack_both_ends", "shapes_framepack_inverted"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  """red.png, blue.png and a video of five frames, which is not whole sections."""
  directory = tmp_path_factory.mktemp("files")
  for name, colour in (("red", (250, 10, 10)), ("blue", (10, 10, 250))):
    Image.fromarray(np.full((16, 16, 3), colour, np.uint8)).save(directory / f"{name}.png")
  grey = (40 * np.arange(1, 6, dtype=np.uint8))[:, None, None, None]
  write_mp4(directory / "five.mp4", np.broadcast_to(grey, (5, 16, 16, 3)), 8)
  return directory


@pytest.fixture
def written(monkeypatch):
  """The frames that the command hands to the encoder of its files: name -> uint8 [F H W 3]."""
  found = {}

  def write(path, pieces, *arguments, **options):
    found[path.name] = np.concatenate(list(pieces))
    write_mp4(path, found[path.name], *arguments, **options)

  monkeypatch.setattr(clips, "write_mp4", write)
  return found


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  return saved_run(tmp_path_factory.mktemp("both_ends"), tiny_packed.make_config(BOTH_ENDS), STAGES)


@pytest.fixture(scope="module")
def model(workdir):
  return hiar_jax.load(workdir)


@pytest.fixture(scope="module")
def inverted(tmp_path_factory):
  config = tiny_packed.make_config(INVERTED)
  return hiar_jax.load(saved_run(tmp_path_factory.mktemp("inverted"), config, STAGES))


def test_an_end_frame_is_the_last_one_and_is_seen(model, files):
  red, blue = (
    model.generate(PROMPT, frames=7, seed=SEED, end_image=files / f"{name}.png")
    for name in ("red", "blue")
  )
  assert red.shape == (7, 16, 16, 3)
  np.testing.assert_array_equal(red[6], np.broadcast_to((250, 10, 10), (16, 16, 3)))
  for section in range(3):
    assert (red[2 * section : 2 * section + 2] != blue[2 * section : 2 * section + 2]).any()


@pytest.mark.slow
def test_from_an_image_to_another(inverted, files):
  ends = {"image": files / "red.png", "end_image": files / "blue.png"}
  latents = inverted.sample_latents([PROMPT], 6, SEED, **ends)
  pictures = inverted.encode(
    np.full((2, 16, 16, 3), [[[(250, 10, 10)]], [[(10, 10, 250)]]], np.uint8)
  )
  assert latents.shape[1] == 6 and np.isfinite(latents).all()
  np.testing.assert_allclose(latents[0, [0, 5]], pictures, atol=1e-6)


@pytest.mark.slow
def test_what_leads_up_to_a_video(model, files):
  """Its frames follow as they are, every one of them."""
  video = model.generate(PROMPT, frames=9, seed=SEED, end_video=files / "five.mp4")
  assert video.shape == (9, 16, 16, 3)
  np.testing.assert_array_equal(video[4:], read_mp4(files / "five.mp4")[0])


def test_a_video_goes_on_from_all_of_its_frames(untold, files):
  clip = planned(untold[None], frames=9, video=files / "five.mp4")
  assert (clip.given, clip.frames) == (5, 4)
  pixels, said = clip.start.read(untold[None].experiment)
  np.testing.assert_array_equal(pixels, read_mp4(files / "five.mp4")[0])
  assert said == ""


@pytest.mark.slow
def test_loops_and_takes(model):
  """A section drawn anew leaves those before it as they are, to the bit, and its seed of before
  brings it back; a loop's sections see what they come back to.
  """
  make = lambda **told: model.generate(PROMPT, frames=6, seed=SEED, order="vanilla", **told)
  first, take, back = make(takes={2: SEED}), make(takes="2:9"), make(takes={2: SEED})
  np.testing.assert_array_equal(first, back)
  np.testing.assert_array_equal(first[:4], take[:4])
  assert (first[4:] != take[4:]).any()
  loop = make(loop=True)
  assert loop.shape == first.shape == (6, 16, 16, 3)
  assert_same_pixels(loop[:2], first[:2])  # the start is made before there is anything to return to
  assert (loop[2:] != first[2:]).any()


@pytest.mark.slow
def test_timed_prompts_are_added_to_the_prompt(model, monkeypatch):
  heard = []
  texts = type(model.run).texts
  spied = lambda run, prompts: heard.append(list(prompts)) or texts(run, prompts)
  monkeypatch.setattr(type(model.run), "texts", spied)
  make = lambda said: model.generate(PROMPT, frames=6, seed=SEED, timeline=said)
  timed = make("0s: in red, 0.3s: in blue")
  assert [PROMPT + ", in red"] * 2 + [PROMPT + ", in blue"] in heard
  assert timed.shape == (6, 16, 16, 3) and (timed != make("0s: in red")).any()


@pytest.mark.slow
def test_several_videos_keep_their_own(model, files):
  """Alone or together; ends and takes are everyone's, prompts and seeds their own."""
  prompts = [PROMPT, "a blue square moving up", "a green star"]
  told = dict(frames=7, end_image=f"{files}/red.png", timeline="0s: fast, 0.3s: slow", takes="1:8")
  many = model.generate(prompts, seed=SEED, **told)
  assert_same_pixels(many[1], model.generate(prompts[1], seed=SEED + 1, **told))


@pytest.mark.slow
def test_the_command_writes_the_same_and_says_how(model, workdir, files, tmp_path, capfd, written):
  told = dict(frames=7, seed=SEED, end_image=f"{files}/red.png", timeline="0s: in red", takes="1:8")
  out = tmp_path / "a.mp4"
  options = generate.GenerateOptions(workdir=str(workdir), prompt=PROMPT, out=str(out), **told)
  generate.generate(options)
  np.testing.assert_array_equal(written["a.mp4"], model.generate(PROMPT, **told))
  frames, _, said = read_mp4(out)
  assert len(frames) == 7 and said["frames"] == "7"
  assert said["end"] == "image red.png" and said["takes"] == "1:8"
  assert said["timeline"] == "0s: in red\n" and "loop" not in said and "order" not in said
  capfd.readouterr()
  generate.generate(options)
  assert "is there already" in capfd.readouterr().err


def planned(model, prompt=PROMPT, frames=7, **told) -> clips.Clip:
  jobs = prompts_file.make_jobs([prompt], SEED, **told)
  return clips.plan_clips(model, jobs, [None], frames)[0]


def test_each_of_it_is_part_of_the_recipe(model, files, tmp_path):
  """And a video with none of it has the recipe that it had before there was any."""
  Image.fromarray(np.full((16, 16, 3), 90, np.uint8)).save(tmp_path / "red.png")
  told = [
    {},
    {"end_image": files / "red.png"},
    {"end_image": files / "blue.png"},
    {"end_image": tmp_path / "red.png"},
    {"end_video": files / "five.mp4", "frames": 9},
    {"loop": True},
    {"order": "vanilla"},
    {"timeline": "0s: in red"},
    {"timeline": "0s: in red, 0.3s: in blue"},
    {"takes": {1: 8}},
  ]
  recipes = [planned(model, **{"frames": 6, **one}).provenance(model)["recipe"] for one in told]
  assert len(set(recipes)) == len(told)
  # what one program cannot make at once is not made in one batch
  shapes = [planned(model, **{"frames": 6, **told[i]}).shape for i in (0, 1, 4, 5, 6, 7, 9)]
  assert len(set(shapes)) == 7
  e = model.experiment
  names = ("prompt", "seed", "frames", "size", "dtype", "codec", "start")
  plain = {name: planned(model, frames=6).provenance(model)[name] for name in names}
  content = [plain, model.identity, "", e.sample.fps, e.sample.scale]
  text = json.dumps(content, sort_keys=True).encode()
  assert recipes[0] == hashlib.sha256(text).hexdigest()[:16]


def test_rows_of_a_file_have_their_own(workdir, files, tmp_path):
  (files / "p.jsonl").write_text(
    '{"prompt": "a", "end_image": "red.png", "takes": "1:5, 0:2"}\n'
    '{"prompt": "b", "timeline": "0s: one, 2s: two", "end_video": "five.mp4"}\n{"prompt": "c"}\n'
  )
  (files / "when.txt").write_text("0s: from a file\n")
  (files / "p.txt").write_text('timeline=when.txt | a\ntimeline="0s: b, 1s: c" takes=0:3 | d\n')
  options = dict(end_image=f"{files}/blue.png", takes="2:7", order="vanilla")
  read = lambda name: generate.read_jobs(
    generate.GenerateOptions(prompts=f"{files}/{name}", **options)
  )
  a, b, c = read("p.jsonl")
  assert (a.end_image, a.takes, a.timeline) == (files / "red.png", ((0, 2), (1, 5)), None)
  assert (b.end_image, b.end_video, b.takes) == (None, files / "five.mp4", ((2, 7),))
  assert [entry.prompt for entry in b.timeline.entries] == ["one", "two"]
  assert (c.end_image, c.takes, c.order) == (files / "blue.png", ((2, 7),), "vanilla")
  a, d = read("p.txt")
  assert a.timeline.entries[0].prompt == "from a file" and d.takes == ((0, 3),)
  for row, message in (
    ("takes=x | a", "line 1: takes = 'x': expected section:seed, as 2:5"),
    ("timeline=none.txt | a", "line 1: timeline 'none.txt': No such file"),
    ("end_image=red.png end_video=five.mp4 | a", "line 1: a video ends with an image or with a"),
  ):
    (files / "wrong.txt").write_text(row)
    with pytest.raises(UserError, match=message):
      prompts_file.read_jobs(files / "wrong.txt")


def test_a_timeline_is_a_prompt_too():
  (job,) = [generate.read_jobs(generate.GenerateOptions(timeline="0s: a cat, 4s: a dog"))[0]]
  assert job.prompt == "" and job.title == "a cat"
  for wrong in (
    {"prompt": "a", "prompts": "b"},
    {"prompts": "b", "prompt": "", "timeline": "0s: c"},
  ):
    with pytest.raises(UserError, match="give either --prompt="):
      generate.read_jobs(generate.GenerateOptions(**wrong))
  with pytest.raises(UserError, match="give one of --end_image, --end_video and --loop"):
    generate.read_jobs(generate.GenerateOptions(prompt="a", end_image="b.png", loop=True))


REFUSED = {  # (model, what it is told) -> the one line
  "an end": (
    None,
    {"end_image": "red.png"},
    "'td_f2k2f1k1_g2': the last section does not see",
  ),
  "a loop": (None, {"loop": True}, "the start, to which a loop returns; groups behind the section"),
  "no image": (INVERTED, {}, "towards a first frame that is given .framepack.given = 1.; give --i"),
  "a video backwards": (INVERTED, {"video": "five.mp4"}, "does not see the last of the 5 frames"),
  "an order": (None, {"order": "both_ends"}, "'td_f2k2f1k1_g2' is trained for framepack.orders = "),
  "ends": (None, {"order": "endpoints:0,1"}, "'endpoints:0,1': the model with schedule 'td_f2k2"),
  "no end": (BOTH_ENDS, {"order": "endpoints:0,9"}, "endpoint 9: the video has sections 0 to 2"),
  "no order": (BOTH_ENDS, {"order": "sideways"}, "order = 'sideways': expected one of vanilla"),
  "no section": (None, {"takes": {3: 1}}, "takes: section 3: the video has sections 0 to 2"),
  "no takes": (None, {"takes": "2=5"}, "takes = '2=5': expected section:seed, as 2:5 or 2:5,4:1"),
  "two takes": (None, {"takes": "2:5,2:6"}, "section 2 is given twice"),
  "a wrong seed": (None, {"takes": {2: -5}}, "seed = -5: expected a whole number from 0"),
  "too late": (
    None,
    {"timeline": "0s: a, 9s: b"},
    "9s is behind the start of the last section, 0",
  ),
  "too close": (
    None,
    {"timeline": "0s: a, 0.3s: b, 0.4s: c"},
    "0.4s falls on the same block as 0.3",
  ),
  "recache": (None, {"timeline": "0s recache: a"}, "timeline: recache is for streams"),
  "few frames": (
    BOTH_ENDS,
    {"end_video": "five.mp4", "frames": 5},
    "given frames are 5 already",
  ),
}


@pytest.fixture(scope="module")
def untold(tmp_path_factory):
  """Models by the name of their experiment; None is that of shapes_framepack."""
  names = {None: "shapes_framepack", BOTH_ENDS: BOTH_ENDS, INVERTED: INVERTED}
  return {
    key: untrained(tmp_path_factory.mktemp(name), tiny_packed.make_config(name))
    for key, name in names.items()
  }


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_schedule_cannot_do_is_one_line(untold, files, case):
  name, told, message = REFUSED[case]
  told = {
    key: files / value if key in ("video", "end_image", "end_video") else value
    for key, value in told.items()
  }
  with pytest.raises(UserError, match=message) as error:
    planned(untold[name], **{"frames": 6 + ("video" in told) + ("end_image" in told), **told})
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  "told",
  [
    {"end_image": "red.png"},
    {"end_video": "five.mp4"},
    {"loop": True},
    {"order": "vanilla"},
    {"timeline": "0s: a"},
    {"takes": {0: 1}},
  ],
  ids=lambda told: next(iter(told)),
)
def test_a_causal_model_says_that_it_is_one(files, tmp_path, told):
  causal = untrained(tmp_path, tiny_run.make_config())
  told = {key: files / value if key.startswith("end_") else value for key, value in told.items()}
  (name,) = told
  with pytest.raises(UserError, match=f"--{name}: this model is causal.* a packed model can") as e:
    planned(causal, frames=8, **told)
  assert ("hiar_jax.stream takes a --timeline" in str(e.value)) == (name == "timeline")


def test_prompts_of_what_is_given_and_of_sections(untold, files):
  """Times count from the video's start; what falls into the given frames holds from section 0."""
  prompts = lambda said: planned(
    untold[None], "at night", frames=11, video=files / "five.mp4", timeline=said
  ).prompts(untold[None])
  night = lambda *words: [f"at night, {word}" for word in words]
  assert prompts("0s: a, 0.7s: b, 1s: c") == night("a", "b", "c")
  assert prompts("0s: a, 0.2s: b, 0.625s: c") == night("c", "c", "c")
  assert prompts('0s: "", 1s: c') == ["at night", "at night", "at night, c"]


def test_seeds_of_sections(untold):
  clip = planned(untold[None], takes={1: 5}, frames=6)
  assert clip.seeds(untold[None]) == [SEED, 5, SEED] and clip.sections == {}
  clip = planned(untold[BOTH_ENDS], order="endpoints:0,2", frames=6)
  assert clip.seeds(untold[None]) == [SEED] and clip.sections == {"order": "endpoints:0,2"}
