"""Mesh recipes by name: which axes suit which machine. They come with the package, in configs/meshes."""

import dataclasses
import json
from pathlib import Path

from jax.sharding import Mesh

from dbrx_jax.config import configs_folder
from dbrx_jax.errors import MeshError
from dbrx_jax.sharding.partition import make_mesh, parse_axes


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The axes of a mesh for a number of devices of one kind."""

    kind: str  # as in dbrx_jax.planning.targets, or "cpu"
    axes: dict[str, int]


def recipe_names() -> list[str]:
    """The names of the recipes that come with the package."""
    return sorted(f.name.removesuffix(".json") for f in _folder().iterdir() if f.name.endswith(".json"))


def find_recipe(name: str) -> Recipe:
    """The recipe of this name.

    Raises:
      MeshError: there is none.
    """
    if name not in recipe_names():
        raise MeshError(
            f'mesh: expected axes such as "expert=16,tensor=4" or one of {", ".join(recipe_names())}, got {name!r:.40}'
        )
    data = json.loads((_folder() / f"{name}.json").read_text())
    return Recipe(data["kind"], data["axes"])


def find_axes(text: str) -> dict[str, int]:
    """Sizes of axes from the name of a recipe, or from a text such as "expert=16,tensor=4".

    Raises:
      MeshError: it is neither.
    """
    return parse_axes(text) if "=" in text else find_recipe(text).axes


def find_mesh(text: str) -> Mesh:
    """The mesh that a text describes, over all devices.

    Raises:
      MeshError: as :func:`find_axes`, or the devices are not as many.
    """
    return make_mesh(find_axes(text))


def _folder() -> Path:
    return configs_folder() / "meshes"
