"""Print pip constraints: each direct dependency of pyproject.toml at its lower bound, those of `dev` too.

torch and triton, which comes with it, stay as constraints.txt has them: older torch is to be had as a build
for CUDA alone, gigabytes of it.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

PROJECT = Path(__file__).parent.parent
AS_TESTED = ("torch", "triton")


def main() -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    for requirement in project["dependencies"] + project["optional-dependencies"]["dev"]:
        bounded = re.match(r"([\w.-]+)>=([\d.]+)", requirement)
        assert bounded is not None, f"{requirement} states no lower bound"
        name, bound = bounded.groups()
        if name not in AS_TESTED:
            print(f"{name}=={bound}")
    tested = (PROJECT / "constraints.txt").read_text().splitlines()
    print(*(line for line in tested if line.partition("==")[0] in AS_TESTED), sep="\n")


if __name__ == "__main__":
    main()
