"""Writes base.txt and test.txt: the versions installed here that setup.py's lists lead to.

Run by `make lock` in an environment made from setup.py's ranges: `pip install -e '.[test]'`.
"""

import pathlib
import re
from importlib import metadata

from packaging.requirements import Requirement

HERE = pathlib.Path(__file__).parent


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def closure(requirements: list[Requirement]) -> dict[str, str]:
    """Name -> version of everything that the requirements lead to, markers evaluated here."""
    found: dict[str, str] = {}
    queue = list(requirements)
    expanded = set()
    while queue:
        requirement = queue.pop()
        name = canonical(requirement.name)
        key = (name, frozenset(requirement.extras))
        if key in expanded:
            continue
        expanded.add(key)
        distribution = metadata.distribution(name)
        found[name] = distribution.version
        for text in distribution.requires or ():
            dependency = Requirement(text)
            extras = requirement.extras or {""}
            if dependency.marker is None or any(
                dependency.marker.evaluate({"extra": extra}) for extra in {"", *extras}
            ):
                queue.append(dependency)
    return found


def main() -> None:
    own = [Requirement(text) for text in metadata.requires("t5like") or ()]
    # The editable install builds without isolation, so its tools are pinned too.
    tools = [Requirement("setuptools"), Requirement("wheel")]
    base = closure([r for r in own if r.marker is None] + tools)
    test = closure([r for r in own if r.marker is None or r.marker.evaluate({"extra": "test"})])
    write("base.txt", "What training needs", base)
    write("test.txt", "What the tests need beyond base.txt", {
        name: version for name, version in test.items() if name not in base
    })


def write(file: str, title: str, versions: dict[str, str]) -> None:
    lines = [f"# {title}, pinned for Python 3.11 on Linux; made by `make lock`."]
    lines += [f"{name}=={version}" for name, version in sorted(versions.items())]
    (HERE / file).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
