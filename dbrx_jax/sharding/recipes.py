"""Mesh recipes: axes that suit a machine, by name. They are files of the package, in configs/meshes."""

import dataclasses
import json

from jax.sharding import Mesh

from dbrx_jax.config import configs_folder
from dbrx_jax.errors import MeshError
from dbrx_jax.sharding.partition import make_mesh, parse_axes


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Axes of a mesh for a number of devices of one kind."""

    kind: str  # as in dbrx_jax.planning.targets, or "cpu"
    axes: dict[str, int]


def recipe_names() -> list[str]:
    """Returns the names of the recipes that come with the package."""
    return sorted(file.stem for file in (configs_folder() / "meshes").glob("*.json"))


def find_recipe(name: str) -> Recipe:
    """Reads the recipe of this name.

    Raises:
      MeshError: there is none.
    """
    names = recipe_names()
    if name not in names:
        raise MeshError(
            f'mesh: expected axes such as "expert=16,tensor=4" or one of {", ".join(names)}, got {name!r:.40}'
        )
    return Recipe(**json.loads((configs_folder() / "meshes" / f"{name}.json").read_text()))


def find_axes(text: str) -> dict[str, int]:
    """Returns the sizes of mesh axes, from the name of a recipe or from a text such as "expert=16,tensor=4".

    Raises:
      MeshError: it is neither.
    """
    return parse_axes(text) if "=" in text else find_recipe(text).axes


def find_mesh(text: str) -> Mesh:
    """Makes a mesh of all devices, from a text as :func:`find_axes` reads it.

    Raises:
      MeshError: as :func:`find_axes`, or the number of devices differs.
    """
    return make_mesh(find_axes(text))
