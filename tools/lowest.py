"""Prints the lowest versions that pyproject.toml allows, one a line, as constraints for pip: `make test-lowest`.

Direct dependencies alone, and not the tools of development: what these depend on is the resolver's choice.
"""

import re
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
_RANGE = re.compile(r"(?P<name>[A-Za-z0-9._-]+)(?:\[[^]]*\])?>=(?P<lowest>[0-9.]+),<")


def lowest(pyproject: str, *extras: str) -> list[str]:
    """Return ``name==version`` for each dependency of the package and of the extras.

    Raises:
        ValueError: a dependency has no lower bound.
    """
    project = tomllib.loads(pyproject)["project"]
    wanted = list(project["dependencies"])
    for extra in extras:
        wanted += project["optional-dependencies"][extra]
    constraints = []
    for requirement in wanted:
        if requirement.startswith(f"{project['name']}["):
            continue
        match = _RANGE.match(requirement)
        if match is None:
            raise ValueError(f"{requirement!r} is not NAME>=LOWEST,<ABOVE")
        constraints.append(f"{match['name']}=={match['lowest']}")
    return constraints


if __name__ == "__main__":
    print("\n".join(lowest(PYPROJECT.read_text(encoding="utf-8"), "eval", "serve", "measure")))
