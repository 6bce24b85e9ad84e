"""Lists the commands, each with what it does:

python -m hiar_jax
"""

import ast
import pathlib

HERE = pathlib.Path(__file__).parent
COMMANDS = ("train", "generate", "stream", "serve", "evaluate", "convert", "plan")


def main() -> None:
  """Prints the first sentence of each command's docstring; imports none of them."""
  for name in COMMANDS:
    said = ast.get_docstring(ast.parse((HERE / f"{name}.py").read_text()))
    sentence = " ".join(said.split("\n\n")[0].split()).rstrip(":")
    print(f"python -m hiar_jax.{name:<10} {sentence}")
  print("--help behind any of them lists its flags.")


if __name__ == "__main__":
  main()
