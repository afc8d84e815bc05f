"""What is at work says so, and every stage that is counted comes to its total."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from esd_lora.bases.loading import load_base
from esd_lora.erasers.eraser import Eraser
from esd_lora.files import hash_folder
from esd_lora.fusing.harmonising import harmonise
from esd_lora.pictures import paint
from esd_lora.progress import Advance, shown_by
from esd_lora.training import train
from esd_lora.weights.merging import merge
from esd_lora.weights.verifying import verify
from tiny import tiny_recipe


class Heard:
    """A display that remembers what it heard: description to total and units done, of every time."""

    def __init__(self) -> None:
        self.stages: dict[str, list[list[float | None]]] = {}

    @contextmanager
    def __call__(self, desc: str, total: float | None, unit: str) -> Generator[Advance]:  # noqa: ARG002
        entry: list[float | None] = [total, 0]
        self.stages.setdefault(desc, []).append(entry)

        def further(units: float) -> None:
            entry[1] = (entry[1] or 0) + units

        yield further

    def whole(self, desc: str) -> bool:
        """Return whether a stage was heard of, and came to its total each time."""
        return desc in self.stages and all(total == done for total, done in self.stages[desc])


def test_training_and_pictures(tiny_dir: Path, tmp_path: Path) -> None:
    heard = Heard()
    keep = [f"a {word}" for word in ("dog", "hat", "bus", "key")]
    with shown_by(heard):
        base = load_base(tiny_dir, device="cpu")
        for preset, more in (("fast", {"preserve": keep, "refresh_every": 2}), ("paper", {"steps": 2})):
            train(tiny_recipe(tiny_dir, preset, **more), base=base, out=tmp_path / preset, force=True)
        paint(base, ["a cat", "a dog", "a hat"], range(3), steps=2, batch=2)
    assert f"loading base {tiny_dir}" in heard.stages
    whole, early = heard.stages["walking trajectories"][:2], heard.stages["walking trajectories"][2:]
    assert whole == [[16, 16], [16, 16]], "before the first step and the third"
    assert len(early) == 2
    assert all(0 <= (done or 0) < (total or 0) for total, done in early), "the paper's stop at random"
    assert heard.whole("encoding text")
    assert heard.whole("painting 3 pictures")
    assert heard.stages["painting 3 pictures"] == [[6, 6]]


def test_stacks_merges_and_proofs(tiny_dir: Path, tmp_path: Path, cat: Eraser, cat_dir: Path) -> None:
    heard = Heard()
    few = {"steps": 1, "trajectories": 2, "keep_trajectories": 3, "trajectory_steps": 2, "progress": False}
    with shown_by(heard):
        harmonise([cat], load_base(tiny_dir, device="cpu"), keep=["a dog", "a hat", "a bus"], **few)
        merge([cat_dir], tiny_dir, tmp_path / "merged", progress=False)
        verify(tmp_path / "merged", tiny_dir, [cat_dir])
        hash_folder(tmp_path / "merged")
    for desc in ("walking trajectories", "comparing the base with what it was trained on", "verifying", "hashing"):
        assert heard.whole(desc), (desc, heard.stages.get(desc))
    assert {"finding the members' prompts", "putting it on the disk"} <= heard.stages.keys()


def test_nobody_hears_of_a_training_that_shows_nothing(tiny_dir: Path) -> None:
    heard = Heard()
    with shown_by(heard):
        train(tiny_recipe(tiny_dir, steps=1), progress=False)
    assert heard.stages == {}
