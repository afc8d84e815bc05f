"""What the command line makes of words before anything is loaded: options under other names, concepts, places, settings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from esd_lora.cli import main
from esd_lora.cli.commands import Commands, Verb
from esd_lora.cli.hints import HINTS, unknown_option
from esd_lora.cli.options import base_option, choose_out, device_options, names_of
from esd_lora.errors import EsdLoraError
from esd_lora.files import fresh_output, last_output, lock_output
from esd_lora.settings import SETTINGS, config_file, read_config, setting


def invoke(*args: object, **environment: str) -> Result:
    return CliRunner(env=environment).invoke(main, [str(arg) for arg in args])


def sentence(*args: object, **environment: str) -> str:
    """The error of a command that fails as a user's mistake should, without anything else."""
    result = invoke(*args, **environment)
    assert isinstance(result.exception, SystemExit), result.exception
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert result.stderr.endswith(".\n")
    return result.stderr


def verbs(group: click.Group = main) -> dict[str, click.Command]:
    """Every command by its name, but the page's, which runs until it is ended and has no result."""
    commands: dict[str, click.Command] = {}
    for name, command in group.commands.items():
        inner = verbs(command) if isinstance(command, click.Group) else {"": command}
        commands |= {f"{name} {below}".strip(): verb for below, verb in inner.items() if name != "ui"}
    return commands


@pytest.mark.parametrize("name", verbs())
def test_every_command_takes_what_all_take(name: str) -> None:
    command = verbs()[name]
    assert isinstance(command, Verb)
    assert {"quiet", "verbose", "as_json"} <= {param.name for param in command.params}
    shown = invoke(*name.split(), "--help")
    assert shown.exit_code == 0, shown.output
    for option in (param for param in command.params if isinstance(param, click.Option)):
        assert shown.stdout.count(f" {max(option.opts, key=len)} ") >= 1, option.opts
        assert option.help, "every option says what it does"


@pytest.mark.parametrize("name", [name for name, command in verbs().items() if getattr(command, "sections", None)])
def test_sections_of_the_help_name_options_once(name: str) -> None:
    command = verbs()[name]
    assert isinstance(command, Verb)
    names = [option for section in command.sections.values() for option in section]
    assert sorted(names) == sorted({*names})
    assert {*names} <= {param.name for param in command.params}


TYPED = {
    "generate --lora no-cat": "no such option --lora: here it is --eraser.",
    "train --lora x": "here it is -s lora.KEY=VALUE.",
    "train --num-inference-steps 20": "here it is -s train.trajectory_steps=N.",
    "merge --lora no-cat": "here it is an argument, ERASERS.",
    "inspect --eraser no-cat": "here it is an argument, FILE.",
    "export --lora no-cat": "here it is an argument, ERASER.",
    "generate --num-images 4": "here it is -n.",
    "evaluate --num-images 4": "here it is --limit.",
    "generate --num-inference-steps 30": "here it is --steps.",
    "generate --cfg 7": "here it is --guidance.",
    "generate --prompt cat": "here it is an argument, PROMPT.",
    "train --prompt cat": "here it is --concept.",
    "generate --output x": "here it is -o or --out.",
    "train --output x": "here it is -o or --out.",
    "train --model sd15": "here it is --base.",
    "merge --model sd15": "here it is --base.",
    "push --model sd15": "here it is --base-model.",
    "generate --weight 0.8": "here it is written behind the eraser, as in no-cat:0.8.",
    "stack --alpha 0.8": "here it is written behind the eraser, as in no-cat:0.8.",
    "train --alpha 4": "here it is -s lora.alpha=NUMBER.",
    "fleet --rank 4": "here it is -s lora.rank=N.",
    "train --network-dim 4": "here it is --rank.",
    "train --max-train-steps 4": "here it is --steps.",
    "train --learning_rate 4": "no such option --learning_rate: here it is --lr.",
    "generate --negative_prompt x": "no such option --negative_prompt: here it is --negative-prompt.",
    "generate --sampler x": "here it is --scheduler.",
    "train --recipe x": "here it is an argument, RECIPE.",
    "fleet --preset x": "here it is --recipe.",
    "export --format kohya": "here it is --layout.",
    "train --overwrite": "here it is --force.",
    "train --debug": "here it is -v or --verbose.",
    "train --sede 4": "no such option --sede (did you mean '--seed'?). See esd-lora train --help.",
    "generate --xyzzy": "no such option --xyzzy. See esd-lora generate --help.",
    "recipes list --xyzzy": "See esd-lora recipes list --help.",
    "--xyzzy": "no such option '--xyzzy'. See esd-lora --help.",
}
"""What people type, and the end of the sentence."""


@pytest.mark.parametrize(("typed", "end"), TYPED.items(), ids=TYPED)
def test_option_of_another_program(typed: str, end: str) -> None:
    assert sentence(*typed.split()).endswith(f"{end}\n")


def test_every_hint_is_of_use_and_names_what_there_is() -> None:
    """Whatever a command is asked for by another name, it names something that it has; and every hint helps somewhere."""
    helped: set[str] = set()
    for name, command in verbs().items():
        options = {option for param in command.params for option in param.opts}
        with click.Context(command, info_name=f"esd-lora {name}") as ctx:
            for word in HINTS.keys() - options:
                text = unknown_option(command, word, ctx)
                if ": here it is " not in text:
                    continue
                helped.add(word)
                place = text.partition(": here it is ")[2].removesuffix(".")
                if place.startswith("-s "):
                    assert "-s" in options
                elif place.startswith("-"):
                    assert {*place.split(" or ")} <= options
    own = {option for command in verbs().values() for param in command.params for option in param.opts}
    assert HINTS.keys() - own <= helped


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("evaluate no-cat", "missing option '--suite'. See esd-lora evaluate --help."),
        ("inspect", "missing argument 'FILE'. See esd-lora inspect --help."),
        ("inspect a b", "got unexpected extra argument (b). See esd-lora inspect --help."),
        ("generate a -n x", "invalid value for '-n': 'x' is not a valid integer range. See esd-lora generate --help."),
        ("train --quiet --verbose --concept a", "leave either out."),
    ],
)
def test_what_click_finds_is_a_sentence_too(words: str, message: str) -> None:
    assert sentence(*words.split()).endswith(f"{message}\n")


def test_errors_as_json_are_one_object() -> None:
    for words in ("train --json --xyzzy", "evaluate x --json", "inspect --json no-such-eraser", "recipes show --json fsat"):
        result = invoke(*words.split())
        assert (result.exit_code, result.stderr) == (1, ""), result.output
        (error,) = json.loads(result.stdout).values()
        assert json.loads(result.stdout) == {"error": error}
        assert error.endswith(".")
    result = invoke("train", "--json=1")
    assert result.exit_code == 1


def test_what_is_quiet_says_nothing_but_errors() -> None:
    result = invoke("recipes", "list", "--quiet")
    assert (result.exit_code, result.output) == (0, "")
    assert sentence("recipes", "show", "fsat", "-q").startswith("error: no recipe 'fsat'")


def test_what_is_verbose_says_more() -> None:
    shown = invoke("recipes", "check", "fast", "--verbose")
    assert shown.exit_code == 0
    assert "debug: recipe " in shown.stderr
    assert "took 0." in shown.stderr
    assert shown.stdout == invoke("recipes", "check", "fast").stdout
    failed = invoke("recipes", "check", "fsat", "-v")
    assert "Traceback" in failed.stderr, "what led to an error"
    assert failed.stderr.splitlines()[-1].startswith("error: no recipe 'fsat'")


@pytest.mark.parametrize(
    "command", ["train", "import x.safetensors", "extract --base a --tuned b --rank 4", "evaluate x --suite y"]
)
def test_concept_with_a_comma_is_asked_about(command: str) -> None:
    message = sentence(*command.split(), "--concept", "a cat, a dog", "-o", "out")
    assert '--concept "a cat, a dog" has a comma: give --concept "a cat" --concept "a dog", or add --literal' in message


def test_concept_with_a_comma_may_be_one(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    message = sentence("train", "--concept", "Robert Downey, Jr.", "--literal", "-o", out)
    assert "already exists" in message, "the concept was taken, and the next thing is wrong"


@pytest.mark.parametrize("option", ["steps", "rank", "lr", "seed"])
def test_short_options_of_train_are_settings(option: str, tmp_path: Path) -> None:
    field = {"steps": "train.steps", "rank": "lora.rank", "lr": "train.lr", "seed": "train.seed"}[option]
    train = ["train", "--concept", "a cat", "-o", tmp_path / "out"]
    short, long = invoke(*train, f"--{option}", "-1"), invoke(*train, "-s", f"{field}=-1")
    assert short.exit_code == 1
    assert short.stderr == long.stderr
    assert field in short.stderr
    assert f"--{option} and -s {field} say the same thing twice" in sentence(*train, f"--{option}", "3", "-s", f"{field}=3")


def test_fresh_outputs_never_meet(tmp_path: Path) -> None:
    place = tmp_path / "no-cat"
    assert fresh_output(place) == last_output(place) == place
    place.mkdir()
    assert fresh_output(place) == tmp_path / "no-cat-2"
    (tmp_path / "no-cat-2").write_text("")
    assert fresh_output(place) == tmp_path / "no-cat-3"
    with lock_output(tmp_path / "no-cat-3"):
        assert fresh_output(place) == tmp_path / "no-cat-4", "another run is about to write the third"
    assert last_output(place) == tmp_path / "no-cat-2"
    assert fresh_output(tmp_path / "x.safetensors") == tmp_path / "x.safetensors"
    (tmp_path / "x.safetensors").write_text("")
    assert fresh_output(tmp_path / "x.safetensors") == tmp_path / "x-2.safetensors"


def test_outputs_are_named_after_what_they_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert choose_out(Path("given"), "erasers", "a cat") == Path("given")
    assert choose_out(None, "erasers", "Vincent van Gogh / 1889") == Path("erasers/Vincent-van-Gogh-1889")
    monkeypatch.setenv("ESD_LORA_OUTPUT", "/data")
    assert choose_out(None, "models", names_of("sd1.5.safetensors", "me/no-cat"), suffix=".safetensors") == Path(
        "/data/models/sd1-5-no-cat.safetensors"
    )
    assert choose_out(None, "pictures", "../../etc/passwd").parent == Path("/data/pictures")


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration file that counts, not there yet."""
    monkeypatch.delenv("ESD_LORA_CONFIG")
    monkeypatch.setattr(click, "get_app_dir", lambda name: str(tmp_path / name))
    (tmp_path / "esd-lora").mkdir()
    return tmp_path / "esd-lora" / "config.toml"


def test_configuration_is_where_the_system_keeps_such_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert config_file() is None, "tests read no file of whoever runs them"
    monkeypatch.delenv("ESD_LORA_CONFIG")
    if sys.platform == "linux":
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
        assert config_file() == tmp_path / "esd-lora" / "config.toml"
        monkeypatch.delenv("XDG_CONFIG_HOME")
        assert config_file() == Path.home() / ".config" / "esd-lora" / "config.toml"
    monkeypatch.setenv("ESD_LORA_CONFIG", str(tmp_path / "mine.toml"))
    assert config_file() == tmp_path / "mine.toml"


def shown_by(*args: str, **environment: str) -> list[str]:
    """Base, device and dtype that a command with these options gets."""

    @click.command("show", cls=Verb)
    @base_option("emoji")
    @device_options
    def show(base: str, base_config: str | None, device: str, dtype: str | None) -> None:  # noqa: ARG001
        click.echo(f"{base} {device} {dtype}")

    result = CliRunner(env=environment).invoke(Commands("esd-lora", commands={"show": show}), ["show", *args])
    assert result.exit_code == 0, result.output
    return result.stdout.split()


def test_option_before_environment_before_file_before_default(config: Path) -> None:
    assert shown_by() == ["emoji", "auto", "None"]
    config.write_text('base = "sd15"\ndevice = "mps"\ndtype = "float16"\noutput = "/data"\n')
    assert shown_by() == ["sd15", "mps", "float16"]
    assert shown_by(ESD_LORA_BASE="sdxl", ESD_LORA_DEVICE="cuda") == ["sdxl", "cuda", "float16"]
    assert shown_by("--base", "flux", ESD_LORA_BASE="sdxl") == ["flux", "mps", "float16"]
    assert shown_by(ESD_LORA_BASE="") == ["sd15", "mps", "float16"], "an empty variable is none"
    assert setting("output") == "/data"


def test_where_a_default_came_from_is_told_on_request(config: Path) -> None:
    config.write_text('device = "cpu"\n')
    shown = invoke("generate", "a cat", "--verbose", "--eraser", "none", ESD_LORA_BASE="no-base")
    assert "debug: base no-base, by ESD_LORA_BASE" in shown.stderr
    assert f"debug: device cpu, by {config}" in shown.stderr


BROKEN = {
    "no TOML": ("base = ", "cannot be read (Invalid value"),
    "unknown key": ('bsae = "emoji"', "has 'bsae' (did you mean 'base'?), expected base, device, dtype, output."),
    "key of a verb": ("[train]\nlr = 1", "has 'train', expected base"),
    "no text": ("device = 3", 'has device = 3, expected a text: device = "..."'),
    "empty": ('base = ""', "has base = '', expected a text"),
    "binary": ("\x00", "cannot be read"),
}


@pytest.mark.parametrize(("text", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_configuration_is_told_in_a_sentence(config: Path, text: str, message: str) -> None:
    config.write_text(text)
    for command in ("generate a", "train --concept a"):
        error = sentence(*command.split(), "-o", config.parent / "out")
        assert str(config) in error
        assert message in error
    assert invoke("train", "--help").exit_code == 0, "help is there all the same"
    assert invoke("recipes", "list").exit_code == 0, "and so is what no setting concerns"


def test_configuration_that_is_named_and_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ESD_LORA_CONFIG", str(tmp_path / "none.toml"))
    with pytest.raises(EsdLoraError, match=r"ESD_LORA_CONFIG names .*none.toml, and there is no such file"):
        read_config()


def test_every_setting_is_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text("utf-8")
    for name in SETTINGS:
        assert f"`{name}`" in page
        assert f"`ESD_LORA_{name.upper()}`" in page


def complete(words: str, folder: Path) -> list[str]:
    """What bash gets to choose from, from a process of its own, and which libraries that has loaded."""
    script = "import sys, atexit\natexit.register(lambda: print(*sorted(sys.modules), file=sys.stderr))\n"
    script += "from esd_lora.cli import main\nmain(prog_name='esd-lora')\n"
    variables = {"_ESD_LORA_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    environment = {**os.environ, **variables}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, env=environment, cwd=folder
    )
    assert not {"torch", "diffusers", "transformers", "safetensors", "huggingface_hub"} & {*done.stderr.split()}, done.stderr
    return [line.partition(",")[2] for line in done.stdout.splitlines() if line.startswith("plain,")]


def test_shell_completes_names_without_torch(tmp_path: Path) -> None:
    for folder, name in (("erasers/no-cat", "pytorch_lora_weights.safetensors"), ("my-model", "model_index.json")):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / name).write_text("")
    (tmp_path / "model.safetensors").write_text("")
    (tmp_path / "mine.yaml").write_text("")
    assert complete("esd-lora inspect eras", tmp_path) == ["erasers/no-cat"]
    assert complete("esd-lora generate --base m", tmp_path) == ["my-model", "model.safetensors"]
    assert complete("esd-lora generate --scheduler unip", tmp_path) == ["UniPCMultistep"]
    assert {"sd/van-gogh", "sd/fast"} <= {*complete("esd-lora train sd/", tmp_path)}


@pytest.mark.parametrize(("shell", "word"), [("bash", "complete -o"), ("zsh", "compdef"), ("fish", "complete --no-files")])
def test_completion_script(shell: str, word: str) -> None:
    script = invoke("completion", shell).stdout
    assert word in script
    assert "_ESD_LORA_COMPLETE" in script
    assert script.startswith("# ")
    assert f"esd-lora completion {shell}" in script.splitlines()[0], "how to use it"


def test_completion_of_no_shell() -> None:
    assert "no completion for 'bahs' (did you mean 'bash'?)" in sentence("completion", "bahs")
