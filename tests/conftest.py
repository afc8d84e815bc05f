"""What every test stands on: a toy base on disk, erasers trained on it, and the warnings that are not ours."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported
# torchrun meets its ranks at one port of the machine: each process of tests has one of its own, beside accelerate's 29500.
os.environ["PET_MASTER_PORT"] = str(29510 + int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]))

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from esd_lora.bases.base import Base
from esd_lora.bases.loading import load_base
from esd_lora.erasers.eraser import Eraser
from esd_lora.training import train
from tiny import save_tiny, tiny_recipe

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)  # a process for each core, or one for both

# The same examples on every machine and every run, and no verdict that depends on how busy the machine is.
settings.register_profile("repeatable", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("repeatable")

# Warnings that others raise about themselves: message start, category, module that is warned about.
NOT_OURS = (
    # diffusers' Euler and DPM schedulers call np.array on a tensor, which torch lets numpy 2 warn about.
    "__array__ implementation doesn't accept a copy:DeprecationWarning:diffusers.schedulers.scheduling_euler_discrete",
    "__array__ implementation doesn't accept a copy:DeprecationWarning:diffusers.schedulers.scheduling_dpmsolver_multistep",
)


def pytest_configure(config: pytest.Config) -> None:
    for name in [name for name in os.environ if name.startswith("ESD_LORA_")]:
        del os.environ[name]  # what whoever runs the tests has set for work of their own
    os.environ["ESD_LORA_CONFIG"] = ""  # and no file of theirs is read
    for warning in NOT_OURS:
        config.addinivalue_line("filterwarnings", f"ignore:{warning}")
    # CLIP of the toys reads 14 tokens, a letter each, fewer than most prompts have; test_text_side looks at what is said of it.
    config.addinivalue_line("filterwarnings", r"ignore:\d+ of \d+ prompts ha(s|ve) more than the \d+ tokens:UserWarning")
    config.addinivalue_line("markers", "gpu: needs a CUDA device, and is skipped where there is none")
    config.addinivalue_line("markers", "slow: takes minutes; `make test-slow` runs these alone, `make test` the others")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved toy pipeline. Tests only read it."""
    return save_tiny(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture
def base(tiny_dir: Path) -> Base:
    """The toy pipeline, loaded for one test alone."""
    return load_base(tiny_dir, device="cpu")


@pytest.fixture(scope="session")
def cat_dir(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An eraser of cross-attention, trained hard enough to change pictures. Tests only read it."""
    out = tmp_path_factory.mktemp("erasers") / "cat"
    train(tiny_recipe(tiny_dir, lr=0.05), out=out, progress=False)
    return out


@pytest.fixture(scope="session")
def car_dir(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An eraser of every other layer, convolutions among them, of another rank. Tests only read it."""
    out = tmp_path_factory.mktemp("erasers") / "car"
    recipe = tiny_recipe(tiny_dir, concepts=["a car"], scope="noxattn", lora={"rank": 2, "alpha": 1}, lr=0.05, steps=2)
    train(recipe, out=out, progress=False)
    return out


@pytest.fixture(scope="session")
def cat(cat_dir: Path) -> Eraser:
    return Eraser.load(cat_dir)


@pytest.fixture(scope="session")
def car(car_dir: Path) -> Eraser:
    return Eraser.load(car_dir)
