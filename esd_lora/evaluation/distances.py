"""How far each model's pictures as a whole are from the base's, or from photos: Frechet distances."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from esd_lora.errors import EsdLoraError
from esd_lora.evaluation.detectors import FEATURES, NotRun, made
from esd_lora.evaluation.detectors.frechet import frechet
from esd_lora.evaluation.picture_files import open_picture, picture_paths
from esd_lora.evaluation.planning import Asked
from esd_lora.evaluation.suite_files import DistanceSpec, Suite
from esd_lora.files import hash_file, reporting_write_errors, write_atomically


def distances(
    folder: Path, suite: Suite, asked: Sequence[Asked], pictures: Mapping[str, Mapping[str, Path]], *, progress: bool = True
) -> tuple[dict[str, Any], dict[str, Any], dict[str, str]]:
    """Measures every distance of a suite.

    Args:
        folder: For features, which are not made twice.
        suite: Says which features, of which roles, and beside what.
        asked: All prompts.
        pictures: Variant to case to file.
        progress: Whether to show progress bars.

    Returns:
        Distance to variant to `{"value": ..., "of": pictures}`; distance to its record; and distance to why it did not run.
        A distance says how far two clouds of points are apart and has no error bar; compare it between variants alone.
    """
    found: dict[str, Any] = {}
    records: dict[str, Any] = {}
    not_run: dict[str, str] = {}
    for name, spec in suite.distances.items():
        wanted = [one.case for one in asked if one.role in spec.roles]
        files = {v: some for v, of in pictures.items() if (some := [of[case] for case in wanted if case in of])}
        try:
            features = made(FEATURES, spec.kind or name, spec.model_extra or {})
            if spec.reference is None and ("base" not in files or len(files) == 1):
                raise NotRun("there is nothing to measure from: neither erasers beside the base nor a folder of photos")
            if len(wanted) < 2:
                raise NotRun("fewer than two pictures")
        except NotRun as reason:
            not_run[name] = str(reason)
            continue
        reference = files["base"] if spec.reference is None else _photos(spec)
        beside = "base" if spec.reference is None else f"{len(reference)} photos"
        records[name] = {**features.record(), "beside": beside}
        with tqdm(total=len(files) + 1, desc=f"features ({name})", unit="set", disable=not progress) as bar:

            def known(some: Sequence[Path], features: Any = features, bar: Any = bar) -> np.ndarray:
                bar.update()
                return _features(folder / "features", features, some)

            origin = known(reference)
            others = {variant: some for variant, some in files.items() if some is not reference}
            found[name] = {v: {"value": round(frechet(origin, known(some)), 4), "of": len(some)} for v, some in others.items()}
    return found, records, not_run


def _photos(spec: DistanceSpec) -> list[Path]:
    folder = Path(str(spec.reference))
    files = picture_paths(folder)
    if len(files) < 2:
        raise EsdLoraError(f"{folder} has {len(files)} pictures. Expected the photos to measure from, two or more.")
    return files


def _features(folder: Path, features: Any, files: Sequence[Path]) -> np.ndarray:
    """Features of pictures, from the disk if the same ones were looked at by the same network."""
    said = json.dumps([features.record(), [hash_file(file) for file in files]])
    file = folder / f"{hashlib.sha256(said.encode()).hexdigest()[:16]}.npy"
    if file.exists():
        return np.load(file, allow_pickle=False)
    found = np.concatenate([features([open_picture(path) for path in files[i : i + 32]]) for i in range(0, len(files), 32)])
    with reporting_write_errors(file):
        folder.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    np.save(content, found, allow_pickle=False)
    write_atomically(file, content.getvalue())
    return found
