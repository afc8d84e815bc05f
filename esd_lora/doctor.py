"""The doctor: whether this machine has what the toolkit needs, each finding with what to do about it.

Nothing is changed and nothing is fetched; the Hub is asked for its front page alone, and whether there is a token is said, not
what it is.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution, requires, version
from pathlib import Path
from typing import Any, NamedTuple

from packaging.requirements import Requirement

from esd_lora.errors import EsdLoraError, how_to_install
from esd_lora.settings import FILE_VARIABLE, SETTINGS, config_file, read_config, variable

_GIB = 2**30
_BASE = 8 * _GIB
"""Disk that the files of a base take: 4 (SD 1.5) to 24 (Flux) GiB."""
_RUN = _GIB
"""Disk that a run directory with its checkpoints and pictures takes at most."""
_MEMORY = 4 * _GIB
"""Memory that a training on SD 1.5 takes at least."""
_MULTIPLIED = 768
"""Side of the matrices that tell how fast a device is."""
_PATIENCE = 5.0  # seconds that the Hub has to answer


class Finding(NamedTuple):
    """One thing that was looked at."""

    name: str
    """What was looked at."""
    state: str
    """What is there, in words."""
    remedy: str = ""
    """What to do; nothing where all is well."""

    @property
    def ok(self) -> bool:
        """Whether nothing has to be done."""
        return not self.remedy

    def line(self) -> str:
        """Return the finding as a line of text."""
        return f"{'ok' if self.ok else 'PROBLEM':<9}{self.name}: {self.state}{f'. {self.remedy}' if self.remedy else ''}"


def examine(card: int | None = None) -> Iterator[Finding]:
    """Yield one finding after the other, quick ones first.

    Args:
        card: Bytes of a card to plan trainings for, beside those that are there.

    The rest of the examination does not depend on how one of its parts ends, but for torch, without which there is nothing to
    compute with.
    """
    yield Finding("python", f"{sys.version.split()[0]} on {sys.platform}")
    yield from _packages()
    yield _torchvision()
    yield _configuration()
    yield from _disk()
    yield _memory()
    yield from _hub()
    yield from _devices()
    yield from _trainings(card)


def _packages() -> Iterator[Finding]:
    """Compare what is installed with what the package asks for."""
    wanted = [Requirement(text) for text in requires("esd-lora") or ()]
    needed = [each for each in wanted if each.marker is None or each.marker.evaluate({"extra": ""})]
    there: list[str] = []
    for each in needed:
        try:
            installed = version(each.name)
        except PackageNotFoundError:
            yield Finding(each.name, "not installed", f"Run: pip install '{each.name}{each.specifier}'.")
            continue
        if each.specifier.contains(installed, prereleases=True):
            there.append(f"{each.name} {installed}")
        else:
            yield Finding(
                each.name, f"{installed}, and {each.specifier} is needed", f"Run: pip install '{each.name}{each.specifier}'."
            )
    yield Finding("packages", f"esd-lora {version('esd-lora')}; {', '.join(there)}")
    extras = sorted(set(distribution("esd-lora").metadata.get_all("Provides-Extra") or ()) - {"dev", "docs", "playground"})
    of_extra = {extra: [r for r in wanted if r.marker and r.marker.evaluate({"extra": extra})] for extra in extras}
    complete = {extra: all(_installed(each.name) for each in of_extra[extra] if each not in needed) for extra in extras}
    here, absent = ([extra for extra in extras if complete[extra] == there] for there in (True, False))
    lacking = f"; not installed: {', '.join(absent)} ({how_to_install(absent[0])})" if absent else ""
    yield Finding("extras", f"installed: {', '.join(here) or 'none'}{lacking}")


def _installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def _torchvision() -> Finding:
    """Try torchvision in a process of its own: one that does not fit the build of torch breaks diffusers when imported."""
    if not _installed("torchvision"):
        return Finding("torchvision", "not installed, and not needed")
    tried = subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True, text=True, check=False)
    if not tried.returncode:
        return Finding("torchvision", f"{version('torchvision')} fits torch {version('torch')}")
    reason = (tried.stderr.strip().splitlines() or ["it cannot be imported"])[-1]
    remedy = "Run: pip uninstall torchvision; nothing here needs it, and diffusers fails beside one that does not fit."
    return Finding("torchvision", f"{version('torchvision')} does not fit torch {version('torch')} ({reason})", remedy)


def _configuration() -> Finding:
    """Say which configuration file is read, and which settings there are."""
    file = config_file()
    try:
        settings = {name: f"{value} ({file})" for name, value in read_config().items()}
    except EsdLoraError as error:
        return Finding("configuration", str(error).rstrip("."), "Until then every command that reads it ends so.")
    settings |= {name: f"{value} ({variable(name)})" for name in SETTINGS if (value := os.environ.get(variable(name)))}
    shown = ", ".join(f"{name} {value}" for name, value in settings.items())
    where = f"{file}{'' if file.exists() else ' (not there)'}" if file else f"no file, by {FILE_VARIABLE}"
    return Finding("configuration", f"{where}; {shown or 'nothing is set'}")


def _disk() -> Iterator[Finding]:
    """Look at the free space where files are written, and at what the Hub's cache takes."""
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    cache = Path(constants.HF_HUB_CACHE)
    places = (
        ("working directory", Path.cwd(), _RUN),
        ("temporary files", Path(tempfile.gettempdir()), _RUN),
        ("Hub cache", cache, _BASE),
    )
    for name, place, enough in places:
        existing = next(folder for folder in (place, *place.parents) if folder.exists())
        free = shutil.disk_usage(existing).free
        state = f"{free / _GIB:.1f} GiB free"
        if name == "Hub cache":
            try:
                state = f"{scan_cache_dir(cache).size_on_disk / _GIB:.1f} GiB in {place}, {state}"
            except CacheNotFound:
                state = f"nothing yet in {place}, {state}"
        writable = os.access(existing, os.W_OK)
        remedy = "" if free >= enough else f"Make room, {enough / _GIB:.0f} GiB or more."
        remedy = remedy if writable else "Choose a place that may be written to (HF_HUB_CACHE, TMPDIR, another directory)."
        yield Finding(name, state if writable else f"{state}, not writable", remedy)


def _memory() -> Finding:
    """Look at the memory that programs can have now."""
    try:
        pages = {name: os.sysconf(f"SC_{name}") for name in ("PAGE_SIZE", "PHYS_PAGES", "AVPHYS_PAGES")}
    except (ValueError, OSError, AttributeError):  # systems differ in what they tell
        return Finding("memory", "this system does not say how much there is")
    whole, free = (pages[name] * pages["PAGE_SIZE"] for name in ("PHYS_PAGES", "AVPHYS_PAGES"))
    try:
        lines = Path("/proc/meminfo").read_text("utf-8").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        pass
    state = f"{free / _GIB:.1f} of {whole / _GIB:.1f} GiB free"
    return Finding("memory", state, "" if free >= _MEMORY else "Close other programs: SD 1.5 takes 4 GiB, SDXL 12.")


def _hub() -> Iterator[Finding]:
    """Ask whether the Hub answers, and whether there is a token for it."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.utils import get_session

    from esd_lora.erasers.hub_errors import reporting_hub_errors

    if constants.HF_HUB_OFFLINE:
        yield Finding("Hub", "not asked, for HF_HUB_OFFLINE is set: bases and erasers come from the cache alone")
    else:
        started = time.monotonic()
        try:
            with reporting_hub_errors(constants.ENDPOINT, again=""):
                get_session().head(constants.ENDPOINT, timeout=_PATIENCE)
            yield Finding("Hub", f"{constants.ENDPOINT} answers in {time.monotonic() - started:.1f} s")
        except EsdLoraError as error:
            remedy = "Look at the network or HF_ENDPOINT; what is in the cache works with HF_HUB_OFFLINE=1."
            yield Finding("Hub", str(error).rstrip(". "), remedy)
    needs = "gated bases, private erasers and push need one: hf auth login"
    yield Finding("Hub token", "there is one" if get_token() else f"none; {needs}")


def _devices() -> Iterator[Finding]:
    """Try every device in every dtype."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    crowded = f"Set OMP_NUM_THREADS={cores}: more threads than cores wait for each other." if threads > cores else ""
    yield Finding("cpu", f"{cores} cores, {threads} threads", crowded)
    yield _speed(torch.device("cpu"))
    for number in range(torch.cuda.device_count()):
        device = torch.device("cuda", number)
        free, whole = torch.cuda.mem_get_info(device)
        card = torch.cuda.get_device_properties(device)
        state = f"{card.name}, compute capability {card.major}.{card.minor}, {free / _GIB:.1f} of {whole / _GIB:.1f} GiB free"
        yield Finding(f"cuda:{number}", state)
        yield _speed(device)
    if not torch.cuda.is_available() and shutil.which("nvidia-smi"):
        built = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is a build without CUDA"
        remedy = "Install the build of torch that fits the driver: https://pytorch.org/get-started/locally."
        yield Finding("cuda", f"there is a driver, but torch {torch.__version__} {built} and sees no card", remedy)
    if torch.backends.mps.is_available():
        yield Finding("mps", "there is one")
        yield _speed(torch.device("mps"))


def _trainings(card: int | None) -> Iterator[Finding]:
    """Plan how published models train on every card, by their presets; see `memory_plans`."""
    import torch

    from esd_lora.bases.outlines import PUBLISHED, outline_published
    from esd_lora.memory_plans import fit
    from esd_lora.recipe_files import load_recipe

    rooms = {f"cuda:{number}": torch.cuda.mem_get_info(number)[0] for number in range(torch.cuda.device_count())}
    rooms |= {f"a card of {card / _GIB:g} GB": card} if card else {}
    for model in PUBLISHED if rooms else ():
        base = outline_published(model)
        recipe = load_recipe(base.family.preset, concepts=["what is to go"])
        for name, room in rooms.items():
            try:
                yield Finding(f"{model} on {name}", fit(base, recipe, room).describe())
            except EsdLoraError as error:
                yield Finding(f"{model} on {name}", str(error))


def _speed(device: Any) -> Finding:
    """Multiply matrices in each dtype and say how fast that is, in floating-point operations a second."""
    import torch

    speeds: list[str] = []
    remedy = ""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        try:
            matrix = torch.ones(_MULTIPLIED, _MULTIPLIED, device=device, dtype=dtype)
            (matrix @ matrix).sum().item()
            started = time.monotonic()
            (matrix @ matrix).sum().item()
            speeds.append(f"{name} {2 * _MULTIPLIED**3 / (time.monotonic() - started) / 1e9:,.0f} GFLOP/s")
        except RuntimeError as error:
            speeds.append(f"{name} fails ({str(error).splitlines()[0]})")
            if dtype == torch.float32:
                remedy = "Take another device (--device cpu)."
    return Finding(f"{device} dtypes", ", ".join(speeds), remedy)
