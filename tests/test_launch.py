"""The launch scripts, as far as they go without a cluster: syntax, usage, and the command that they
would run.
"""

import os
import pathlib
import runpy
import shlex
import subprocess
import sys

import pytest

from hiar_jax.config.building import build
from hiar_jax.training.experiment import Experiment

LAUNCH = pathlib.Path(__file__).parents[1] / "launch"
SCRIPTS = ["local.sh", "gpu_node.sh", "tpu_pod.sh"]
ARGUMENTS = [
  "--config=experiments/shapes.py:smoke",
  "--workdir=runs/a run",
  "--config.distill.levels=(1.0, 0.5)",
]
POD = {"TPU_NAME": "pod", "ZONE": "zone-a"}


def launch(script, *arguments, folder=None, **environment):
  clean = {
    key: value
    for key, value in os.environ.items()
    if not key.startswith(("SLURM_", "TPU_", "XLA_", "PYTHON"))
  }
  return subprocess.run(
    [str(LAUNCH / script), *arguments],
    capture_output=True,
    text=True,
    env={**clean, **environment},
    cwd=folder,
    timeout=60,
  )


def dry_run(script, **environment):
  """-> the command as a list, environment assignments included."""
  result = launch(script, *ARGUMENTS, "--dry-run", **environment)
  assert result.returncode == 0, result.stderr
  return shlex.split(result.stdout)


def test_every_script_is_tried_here():
  others = ["setup.sh", "long_videos.sh"]  # test_front_door.py; below
  assert sorted(path.name for path in LAUNCH.glob("*.sh")) == sorted([*SCRIPTS, *others])


def test_the_rows_of_long_videos_are_runs_that_can_be_trained():
  result = launch("long_videos.sh", "--dry-run", PYTHON="python")
  lines = [shlex.split(line) for line in result.stdout.splitlines()]
  trains, measures = lines[::2], lines[1::2]
  assert len(trains) == len(measures) == 9
  workdirs = [line[4].partition("=")[2] for line in trains]
  assert [line[3].partition("=")[2] for line in measures] == workdirs
  for line in trains:
    path, _, variant = line[3].removeprefix("--config=").partition(":")
    get_config = runpy.run_path(str(LAUNCH.parent / path))["get_config"]
    config = get_config(*([variant] if variant else []))
    for option in line[5:]:
      name, _, value = option.removeprefix("--config.").partition("=")
      group, _, field = name.rpartition(".")
      fields = config[group] if group else config
      fields[field] = type(fields.get(field, ""))(value)
    assert build(Experiment, config)
    bases = [option for option in line if option.startswith("--config.stages_from=")]
    assert all(option.removeprefix("--config.stages_from=") in workdirs for option in bases)
  # of those that share a table one at most has the rows that are no run's
  assert [line[3] for line in measures if "--baselines=" not in line] == ["--workdirs=runs/screen"]
  refused = launch("long_videos.sh", "framepak")
  assert refused.returncode == 2 and refused.stderr.count("\n") == 1


@pytest.mark.parametrize("script", [*SCRIPTS, "setup.sh", "long_videos.sh"])
def test_bash_can_read_it(script):
  subprocess.run(["bash", "-n", str(LAUNCH / script)], check=True)


@pytest.mark.parametrize("script", SCRIPTS)
def test_without_arguments_it_tells_its_usage(script):
  result = launch(script, **POD)
  assert result.returncode == 2
  assert result.stderr.startswith("usage:") and len(result.stderr.splitlines()) == 1


def test_local_runs_one_python_line():
  words = dry_run("local.sh", PYTHON="python3.11")
  assert words[0] == "env"
  assert words[-6:] == ["python3.11", "-m", "hiar_jax.train", *ARGUMENTS]


def test_local_runs_what_the_dry_run_prints(tmp_path):
  """With an interpreter that prints its arguments in the place of Python."""
  echo = tmp_path / "echo.sh"
  echo.write_text('#!/bin/sh\nfor argument in "$@"; do echo "$argument"; done\n')
  echo.chmod(0o755)
  result = launch("local.sh", *ARGUMENTS, PYTHON=str(echo))
  assert result.stdout.splitlines() == ["-m", "hiar_jax.train", *ARGUMENTS]


@pytest.mark.parametrize("script", ["local.sh", "gpu_node.sh"])
def test_paths_are_those_of_the_callers_folder(tmp_path, script):
  """With an interpreter that says where it is called, and with what."""
  tell = tmp_path / "tell.sh"
  tell.write_text('#!/bin/sh\npwd; for argument in "$@"; do echo "$argument"; done\n')
  tell.chmod(0o755)
  (tmp_path / "mine.py").write_text("")
  for config, found in (
    ("mine.py:smoke", "mine.py:smoke"),
    ("experiments/shapes.py:smoke", f"{LAUNCH.parent}/experiments/shapes.py:smoke"),
    ("experiments/none.py", "experiments/none.py"),
  ):
    given = [f"--config={config}", "--workdir=runs/a run"]
    result = launch(script, *given, PYTHON=str(tell), folder=tmp_path)
    assert result.stdout.splitlines() == [
      str(tmp_path),
      "-m",
      "hiar_jax.train",
      f"--config={found}",
      "--workdir=runs/a run",
    ]


@pytest.mark.parametrize("script", ["local.sh", "gpu_node.sh"])
def test_the_package_is_that_of_the_checkout(tmp_path, script):
  assert f"PYTHONPATH={LAUNCH.parent}" in dry_run(script)
  result = launch(script, "--config=", "--workdir=w", PYTHON=sys.executable, folder=tmp_path)
  assert result.returncode == 2 and "--config=: there is no file ''" in result.stderr


def test_a_node_uses_its_gpus_and_slurm_makes_one_job_of_many():
  words = dry_run("gpu_node.sh", PYTHON=sys.executable, XLA_FLAGS="--mine=1")
  assert "JAX_PLATFORMS=cuda" in words and "HIAR_DISTRIBUTED=1" not in words
  assert [word for word in words if word.startswith("XLA_FLAGS=")][0].endswith(" --mine=1")
  assert words[-6:] == [sys.executable, "-m", "hiar_jax.train", *ARGUMENTS]
  assert "HIAR_DISTRIBUTED=1" in dry_run("gpu_node.sh", SLURM_NTASKS="4")


def test_a_pod_runs_the_same_line_on_every_host():
  words = dry_run("tpu_pod.sh", **POD, PROJECT="project")
  assert words[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "pod"]
  assert {"--zone=zone-a", "--project=project", "--worker=all"} <= set(words)
  (remote,) = [word.removeprefix("--command=") for word in words if word.startswith("--command=")]
  there = shlex.split(remote)
  assert there[:3] == ["cd", "~/hiar_jax", "&&"]
  assert "HIAR_DISTRIBUTED=1" in there
  assert there[-6:] == ["python3", "-m", "hiar_jax.train", *ARGUMENTS]


@pytest.mark.parametrize(
  "directory, there", [("/my dir/x", r"/my\ dir/x"), ("~/my dir", r"~/my\ dir"), ("a;b", r"a\;b")]
)
def test_the_checkout_of_a_pod_may_have_any_name(directory, there):
  words = dry_run("tpu_pod.sh", **POD, DIRECTORY=directory)
  assert words[-1].startswith(f"--command=cd {there} && env ")


def test_a_pod_needs_a_name_and_a_zone():
  result = launch("tpu_pod.sh", *ARGUMENTS, "--dry-run", TPU_NAME="pod")
  assert result.returncode == 2 and "ZONE=ZONE" in result.stderr
