"""Faces: whether a picture shows one, and whether it is that of a given person, by dlib."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import Image

from esd_lora.errors import EsdLoraError
from esd_lora.evaluation.detectors.detector import Picture, Score, package_record
from esd_lora.evaluation.picture_files import hash_by_name, open_pictures

_MODELS = ("shape_predictor_5_face_landmarks.dat", "dlib_face_recognition_resnet_model_v1.dat")


class Faces:
    """Finds faces, and compares them with photos of a person.

    Faces are found by dlib's frontal detector, from about 80 pixels wide, and described by 128 numbers of its ResNet. Two faces
    less than 0.6 apart are one person's, as dlib has it (`dnn_face_recognition_ex.cpp`, which gives 99.38 % on Labeled Faces in
    the Wild for that). Of several faces in a picture, and several photos, the nearest two count.

    Args:
        references: A folder with photos of the person, one face in each.
        threshold: Distance up to which two faces are the same person's.

    Raises:
        NotRun: If dlib or its models are not installed.
        EsdLoraError: If the threshold is no distance, or a reference does not show exactly one face.
    """

    def __init__(self, references: str | Path | None = None, threshold: float = 0.6):
        self._threshold = threshold
        if not isinstance(self._threshold, int | float) or not self._threshold > 0:
            raise EsdLoraError(f"faces: threshold is {self._threshold!r}. Expected a distance over 0, such as 0.6.")
        self._package = package_record("dlib-bin", "faces")
        self._models = package_record("face_recognition_models", "faces")
        # Not imported: the package asks for pkg_resources, which setuptools no longer brings.
        folder = distribution("face_recognition_models").locate_file("face_recognition_models/models")
        self._weights = [Path(str(folder)) / name for name in _MODELS]
        dlib: Any = import_module("dlib")  # compiled, and has no types
        landmarks, descriptor = map(str, self._weights)
        self._find = dlib.get_frontal_face_detector()
        self._landmarks = dlib.shape_predictor(landmarks)
        self._descriptor = dlib.face_recognition_model_v1(descriptor)
        self._references: dict[Path, np.ndarray] = {}
        if references:
            self._references = {path: self._describe(path, image) for path, image in open_pictures(Path(references)).items()}

    def record(self) -> dict[str, Any]:
        return {
            **self._package,
            "models": self._models,
            "weights_sha256": hash_by_name(self._weights),
            "threshold": self._threshold,
            "references_sha256": hash_by_name(self._references),
        }

    def __call__(self, pictures: Sequence[Picture]) -> list[Score]:
        return [self._score(picture) for picture in pictures]

    def _score(self, picture: Picture) -> Score:
        faces = self._faces(picture.image)
        values: dict[str, bool | float] = {"face": bool(faces)}
        details: dict[str, Any] = {"boxes": [list(box) for box, _ in faces]}
        if not self._references:
            return Score(values, details)
        if not faces:
            return Score(values | {"same": False}, details)
        distances = {
            path.name: min(float(np.linalg.norm(face - reference)) for _, face in faces)
            for path, reference in self._references.items()
        }
        nearest = min(distances, key=distances.__getitem__)
        same = distances[nearest] <= self._threshold
        return Score(values | {"same": same, "distance": distances[nearest]}, details | {"reference": nearest})

    def _faces(self, image: Image) -> list[tuple[tuple[int, int, int, int], np.ndarray]]:
        """Return box (left, top, width, height) and descriptor of every face."""
        pixels = np.array(image.convert("RGB"))
        return [
            (
                (box.left(), box.top(), box.width(), box.height()),
                np.array(self._descriptor.compute_face_descriptor(pixels, self._landmarks(pixels, box))),
            )
            for box in self._find(pixels, 0)
        ]

    def _describe(self, path: Path, image: Image) -> np.ndarray:
        """Return the descriptor of the one face on a reference."""
        faces = self._faces(image)
        if len(faces) != 1:
            raise EsdLoraError(
                f"faces: {len(faces)} faces were found in the reference {path}. Give photos with one face, not too small."
            )
        return faces[0][1]
