"""Stage 1: fetch the emoji sets by name and version from the npm registry, and check what arrived."""

import hashlib
import subprocess
import tarfile
from pathlib import Path

from domain import STYLES

SHA256 = {
    "@iconify-json/noto": "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
    "@iconify-json/noto-v1": "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37",
    "@iconify-json/fluent-emoji-flat": "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
    "@iconify-json/fluent-emoji-high-contrast": "0b92d48c90d2200bd499e3cdd09a127ca6a8c8ddefd34c35eb5a1e4994012ae0",
    "@iconify-json/twemoji": "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
}


def fetch(work: Path) -> None:
    """Downloads and unpacks every package of `STYLES` into `work/packages/<style>`."""
    for style, (package, version) in STYLES.items():
        folder = work / "packages" / style
        if (folder / "icons.json").exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        name = subprocess.run(
            ["npm", "pack", "--silent", f"{package}@{version}"], cwd=folder, check=True, capture_output=True, text=True
        ).stdout.split()[-1]
        digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        if digest != SHA256[package]:
            raise SystemExit(f"{package}@{version}: SHA-256 is {digest}, expected {SHA256[package]}")
        with tarfile.open(folder / name) as archive:
            for member in ("icons.json", "info.json"):
                (folder / member).write_bytes(archive.extractfile(f"package/{member}").read())
