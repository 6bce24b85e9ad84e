"""docs/errands.md tells the truth: its blocks go where it says, and its commands run.

All errands are done to one copy of the tree. Their commands are run by slow tests.
"""

import pathlib
import re
import shlex
import shutil

import numpy as np
import pytest

from hiar_jax.training.run import open_run
from hiar_jax.training.stages import prepare_data
from tests.helpers import tiny_run
from tests.helpers.untrained import saved_run

PAGE = tiny_run.ROOT / "docs" / "errands.md"
TEXT = PAGE.read_text()
NEW = re.compile(r"^New file `([^`]+)`:\n```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
# the line is between the last two backticks, and may hold others
EDIT = re.compile(
  r"^In `([^`]+)`, (before|after|instead of) `([^\n]+)`:\n```python\n(.*?)^```",
  re.DOTALL | re.MULTILINE,
)
CONFIG = re.compile(r"^Config `([^`]+)` with (.*)$", re.MULTILINE)
COMMANDS = {
  re.search(r"--workdir=runs/(\w+)", line)[1]: shlex.split(line)
  for line in re.findall(r"^python -m hiar_jax\.train .*$", TEXT, re.MULTILINE)
}
OTHERS = [name for name in COMMANDS if name not in ("smoke", "smooth", "between")]


def edit(root: pathlib.Path, file: str, where: str, line: str, block: str) -> None:
  path = root / file
  lines = path.read_text().splitlines(keepends=True)
  found = [i for i, text in enumerate(lines) if text.strip() == line]
  assert len(found) == 1, f"{file} has {len(found)} lines {line!r}"
  first = found[0] + (where == "after")
  # the page's blocks end without the empty lines that the place asks for
  if block.startswith(("@", "def ", "class ")):
    block += "\n\n"
  elif block.startswith("import "):
    block += "\n"
  lines[first : first + (where == "instead of")] = [block]
  path.write_text("".join(lines))


def do_errands(root: pathlib.Path) -> set[pathlib.Path]:
  """Does to a tree what the page says; returns the files that it touches."""
  created = {file: block for file, block in NEW.findall(TEXT)}
  for file, said in CONFIG.findall(TEXT):
    changes = re.findall(r"`([^`]+)`", said)
    example = next(iter(created.values())).splitlines()
    assert changes and example[5].startswith("  c.history.window")
    example[5:6] = [f"  {change}" for change in changes]
    created[file] = "\n".join(example) + "\n"
  edits = EDIT.findall(TEXT)
  for file, block in created.items():
    assert not (root / file).exists(), file
    (root / file).write_text(block)
  for one in edits:
    edit(root, *one)
  return {root / file for file in (*created, *(one[0] for one in edits))}


@pytest.fixture(scope="module")
def fork(tmp_path_factory) -> pathlib.Path:
  root = tmp_path_factory.mktemp("fork")
  for name in ("hiar_jax", "experiments"):
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(tiny_run.ROOT / name, root / name, symlinks=True, ignore=ignored)
  for path in do_errands(root):
    compile(path.read_text(), path, "exec")
  return root


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
  return tiny_run.chain(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def smoke(tmp_path_factory) -> pathlib.Path:
  """The run that the page's commands go on from, with random weights; its causal init has seen no
  history, so that one of another level may go on from it.
  """
  config = tiny_run.make_config()
  config.causal_init.shows = "noisy"
  stages = ("teacher", "causal_init")
  workdir = saved_run(tmp_path_factory.mktemp("runs") / "smoke", config, stages)
  prepare_data(open_run(config, workdir, save=False))
  return workdir


def arguments(name: str, smoke: pathlib.Path, **changes) -> list[str]:
  """The page's command at a tiny size, without `python -m hiar_jax.train`."""
  command = COMMANDS[name]
  assert command[:3] == ["python", "-m", "hiar_jax.train"]
  sizes = {**tiny_run.TINY, **{key.replace("__", "."): value for key, value in changes.items()}}
  overrides = [f"--config.{key}={value}" for key, value in sizes.items()]
  return [*(word.replace("=runs/smoke", f"={smoke}") for word in command[3:]), *overrides]


# short runs of distribution matching alone
SHORT = {
  "causal_init__shows": "noisy",  # as the smoke run
  "distill__forward_kl__weight": 0,
  "distill__steps": 3,
  "sample__length": 2.0,
}


def train(chain, fork, *cases: list[str]) -> pathlib.Path:
  """Runs the commands on the copy; returns where their workdirs lie."""
  for status, _, said in chain.commands([("hiar_jax.train", case) for case in cases], root=fork):
    assert status == 0, said[-2000:]
  return fork / "runs"


def scalars(workdir) -> list[dict]:
  return [record["scalars"] for record in tiny_run.log(workdir, "distill")]


def moved(a: pathlib.Path, b: pathlib.Path, step: int) -> float:
  """The largest difference between the parameters of two distilled students."""
  a, b = (tiny_run.state(workdir, "distill", step) for workdir in (a, b))
  return max(np.abs(a[name] - b[name]).max() for name in a if name.startswith("params"))


@pytest.mark.slow
def test_the_loss_term_is_trained_and_logged(fork, chain, smoke):
  """Beside a run that differs in its weight alone."""
  smooth = arguments("smooth", smoke, **SHORT)
  without = [word.replace("runs/smooth", "runs/without") for word in smooth]
  runs = train(chain, fork, smooth, [*without, "--config.distill.smoothness=0"])
  ours, theirs = scalars(runs / "smooth"), scalars(runs / "without")
  assert len(ours) == 3 and all(record["generator_smoothness"] > 0 for record in ours)
  assert not any("generator_smoothness" in record for record in theirs)
  # until the first update the other is what it was: a term's draws are its own
  assert ours[0]["generator_dmd"] == pytest.approx(theirs[0]["generator_dmd"], rel=1e-3)
  total = ours[0]["generator_dmd"] + 0.1 * ours[0]["generator_smoothness"]
  assert ours[0]["generator_loss"] == pytest.approx(total, rel=1e-3)
  assert theirs[0]["generator_loss"] == pytest.approx(theirs[0]["generator_dmd"], rel=1e-3)
  assert moved(runs / "smooth", runs / "without", 3) > 1e-6


@pytest.mark.slow
def test_the_context_level_is_trained_and_generated_with(fork, chain, smoke):
  """Beside a run that differs in the level alone."""
  # almost the critic's updates alone: they are on rollouts of the student
  between = arguments("between", smoke, **SHORT, distill__critic_warmup=2)
  output = [word.replace("runs/between", "runs/output") for word in between]
  runs = train(chain, fork, between, [*output, "--config.history.level=output"])
  ours, theirs = scalars(runs / "between")[0], scalars(runs / "output")[0]
  assert abs(ours["critic_loss"] / theirs["critic_loss"] - 1) > 1e-4
  ours, theirs = tiny_run.videos(runs / "between"), tiny_run.videos(runs / "output")
  assert ours.keys() == theirs.keys()
  assert any((ours[name] != theirs[name]).any() for name in ours)


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_the_other_commands(fork, chain, name, monkeypatch):
  sizes = {"history__sink": 2} if name == "noisy_history" else {}  # a block of the tiny size
  if name == "arrays":
    monkeypatch.chdir(fork)
    (code,) = re.findall(r"^Sixteen clips.*?```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
    exec(compile(code, PAGE, "exec"), {})
    sizes = {"data__frames": 9, "data__size": 32, "history__block": 3, "history__window": 6}
  command = arguments(name, chain.straight, **sizes)
  ((status, _, said),) = chain.commands([("hiar_jax.train", command)], root=fork)
  assert status == 0, said[-2000:]
  workdir = fork / "runs" / name
  assert len(scalars(workdir)) == 6 and tiny_run.videos(workdir)
  if name == "gained":
    assert np.ptp(tiny_run.state(workdir, "distill", 6)["params/gain"]) > 0
  elif name not in ("arrays", "longer_window"):  # whose clips and whose window are others
    ours, theirs = tiny_run.videos(workdir), tiny_run.videos(chain.straight)
    assert any((ours[prompt] != theirs[prompt]).any() for prompt in theirs)


def test_every_python_block_has_a_place_and_compiles():
  blocks = re.findall(r"```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
  placed = [found[-1] for pattern in (NEW, EDIT) for found in pattern.findall(TEXT)]
  assert len(blocks) == len(placed) + 1  # the clips to try a data source with
  for block in set(blocks) - set(placed):
    compile(block, PAGE, "exec")
  assert len(COMMANDS) == 9


def test_what_the_page_names_is_there():
  created = {found[0] for pattern in (NEW, CONFIG) for found in pattern.findall(TEXT)}
  for name in re.findall(r"\b(?:hiar_jax|tests|experiments|docs)/[\w/]+\.(?:py|md)", TEXT):
    assert name in created or (tiny_run.ROOT / name).exists(), name
  for anchor in re.findall(r"\]\(#([^)]+)\)", TEXT):
    titles = re.findall(r"^## (.*)$", TEXT, re.MULTILINE)
    assert anchor in [re.sub(r"[^\w ]", "", title).lower().replace(" ", "-") for title in titles]
  # names of things in files: the file that a row or a sentence names holds them
  for file, names in (
    ("hiar_jax/conversion/layouts.py", "FOLDERS_AND_STEMS MARKER_TENSORS CLASSES key_map"),
    ("hiar_jax/conversion/infer_config.py", "_STATED infer"),
    ("hiar_jax/components/registry.py", "AUTOENCODERS TEXT_ENCODERS"),
    ("hiar_jax/components/interfaces.py", "AutoencoderConfig TextEncoderConfig"),
    ("hiar_jax/models/frames.py", "Network whole_clip put take moved"),
    ("hiar_jax/rollout/past/ring.py", "Ring visible capacity slots_of blocks_before"),
    ("hiar_jax/training/state.py", "TrainConfig rule schedule"),
    ("hiar_jax/data/sources.py", "DataConfig check prepare captions_only"),
    ("hiar_jax/method.py", "MethodConfig"),
    ("tests/seams/plain_wan.py", "PlainWan"),
    ("tests/seams/test_other_past.py", "EveryOther"),
    ("tests/helpers/plain_rollout.py", "ROWS"),
    ("tests/test_experiments.py", "RIVALS"),
  ):
    code = (tiny_run.ROOT / file).read_text()
    for name in names.split():
      assert name in TEXT and re.search(rf"\b{name}\b", code), (file, name)
  assert "a level of one's own" in (tiny_run.ROOT / "tests" / "test_context.py").read_text()
