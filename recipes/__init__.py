"""The recipes, one package for each task."""

import common  # noqa: F401  (sets the environment of torch before a recipe imports torch)
