"""The package and its extras.

requirements.txt and requirements-parity.txt hold the exact versions that the tests ran with.
"""

import pathlib
import re

import setuptools

ROOT = pathlib.Path(__file__).parent


def _version() -> str:
  text = (ROOT / "hiar_jax" / "__init__.py").read_text()
  return re.search(r'__version__ = "([^"]+)"', text).group(1)


def _readme() -> str:
  path = ROOT / "README.md"
  return path.read_text() if path.exists() else ""


setuptools.setup(
  name="hiar_jax",
  version=_version(),
  description="Long video by hierarchical denoising (HiAR), in JAX",
  long_description=_readme(),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  python_requires=">=3.11",
  packages=setuptools.find_namespace_packages(include=["hiar_jax", "hiar_jax.*"]),
  package_data={"": ["*.json", "*.txt", "*.html", "*.css", "*.js", "py.typed"]},
  install_requires=[
    "absl-py>=2.1",
    "array-record>=0.8",
    "av>=18",  # earlier ones cannot convert colours exactly
    "beartype>=0.21",
    "clu>=0.0.12",
    "flax>=0.12",
    "ftfy>=6.3",
    "grain>=0.2.16",
    "jax>=0.10",
    "jaxtyping>=0.3.2",
    "matplotlib>=3.9",
    "ml-collections>=1.1",
    "numpy>=2.0",
    "optax>=0.2.5",
    "orbax-checkpoint>=0.12",
    "pillow>=11",
    "safetensors>=0.5",
    "scipy>=1.13",
    "tensorboardX>=2.6.4",
    "tensorflow-datasets>=4.9.10",
    "tokenizers>=0.21",
    "tqdm>=4.66",
  ],
  extras_require={
    "serve": ["aiohttp>=3.11"],  # the page of hiar_jax.serve
    # with selenium: Debian's chromium and chromium-driver
    "test": [
      "pytest>=8",
      "pytest-xdist>=3.6",
      "aiohttp>=3.11",
      "selenium>=4.20",
      "ruff>=0.12",
      "setuptools>=64",
    ],
    # .pt and .pth are read without it; files from before PyTorch 1.6 must be saved anew
    "convert": ["torch>=2.4"],
    # live comparisons: pytest -m parity
    "parity": ["torch>=2.4", "transformers>=4.50", "diffusers>=0.33", "accelerate>=1.0"],
    # the compilers of hiar_jax.plan, each in an environment of its own; no chip is needed
    "plan-tpu": ["jax[tpu]>=0.10"],
    "plan-gpu": ["jax[cuda12]>=0.10"],
    "tpu": ["jax[tpu]>=0.10"],
    "cuda": ["jax[cuda12]>=0.10"],
  },
)
