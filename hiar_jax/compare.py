"""The former name of `python -m hiar_jax.evaluate`, with the same flags."""

import sys

from hiar_jax import evaluate
from hiar_jax.config import command_line as configs

if __name__ == "__main__":
  # run_flags would do it too, but starts the process again: the note would come twice.
  configs.use_huge_pages()
  print("note: hiar_jax.compare is now called hiar_jax.evaluate", file=sys.stderr)
  configs.run_flags(evaluate.main)
