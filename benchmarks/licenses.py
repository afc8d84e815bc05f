"""Write docs/dependencies.md: what is installed for whom, and under which licence, as the packages say themselves.

    python benchmarks/licenses.py

Names come from pyproject.toml, licences from what is installed here; what is not installed is listed without one.
"""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import PackageNotFoundError, distribution, metadata, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = Path(__file__).parents[1]
PAGE = PROJECT / "docs" / "dependencies.md"
APPROVED = "License :: OSI Approved :: "
HEAD = """# Dependencies and their licences

`python benchmarks/licenses.py` (`make licenses`) writes this page from pyproject.toml and from what installed packages say of
themselves. Weights may have a licence of their own: NudeNet's are AGPL-3.0, and come with the extra `nudity` alone. torchvision
is nobody's dependency here (`tests/unit/test_packaging.py`).
"""


def declared() -> dict[str, list[str]]:
    """Return extra to names of packages, as pyproject.toml lists them; under `""` what everyone gets."""
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text("utf-8"))["project"]
    lists = {"": project["dependencies"], **project["optional-dependencies"]}
    names = {extra: [canonicalize_name(Requirement(line).name) for line in lines] for extra, lines in lists.items()}
    return {extra: sorted(set(listed) - {"esd-lora"}) for extra, listed in names.items()}


def brought_by(names: list[str]) -> list[str]:
    """Return what these packages bring along in turn, as far as it is installed."""
    seen, waiting = set(names), list(names)
    while waiting:
        try:
            lines = requires(waiting.pop()) or []
        except PackageNotFoundError:
            continue
        needs = [Requirement(line) for line in lines]
        new = {canonicalize_name(need.name) for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})}
        waiting += new - seen
        seen |= new
    return sorted(seen - set(names))


def licence(name: str) -> str:
    """Return what a package says of its licence, in a few words."""
    try:
        fields = metadata(name)
    except PackageNotFoundError:
        return "not installed here"
    stated = fields.get("License-Expression")
    classified = [line.removeprefix(APPROVED) for line in fields.get_all("Classifier") or () if line.startswith(APPROVED)]
    stated = stated or ", ".join(classified) or (fields.get("License") or "").strip().partition("\n")[0]
    texts = (distribution(name).read_text(f"licenses/{file}") or "" for file in fields.get_all("License-File") or ())
    stated = stated or next((text.strip().partition("\n")[0] for text in texts), "")  # the title of its licence
    return re.sub(r"\s+", " ", stated).replace("|", "/")[:80] or "not stated"


def table(names: list[str]) -> str:
    """Return a Markdown table of packages and their licences."""
    rows = [f"| {name} | {licence(name)} |" for name in names]
    return "\n".join(["| package | licence |", "|---|---|", *rows])


def page() -> str:
    """Return the whole page."""
    extras = declared()
    everyone = extras.pop("")
    parts = [HEAD, "## Everyone gets", table(everyone), "## and with it", table(brought_by(everyone))]
    for extra, names in extras.items():
        parts += [f"## Extra `{extra}`", table(names)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
    print(PAGE)
