"""Suites: their files, and the pictures they come to."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from esd_lora.built_in import domain
from esd_lora.erasers.header import ErasedConcept
from esd_lora.errors import EsdLoraError
from esd_lora.evaluation.cases import Case
from esd_lora.evaluation.planning import plan_cases
from esd_lora.evaluation.suites.suite_files import Suite, load_suite, suite_names

CAT = ErasedConcept(name="a cat", synonyms=("kitten",), pairs=(("a cat in ink style", ""),), eta=1.0)
STYLE = ErasedConcept(name="twemoji", pairs=(), eta=1.0)


def suite(tmp_path: Path, text: str) -> Suite:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    return load_suite(file)


@pytest.mark.parametrize("name", suite_names())
def test_shipped_suites_are_whole(name: str) -> None:
    found = load_suite(name)
    assert found.description.endswith(".")
    for key, prompts in found.prompts.items():
        assert prompts.source or prompts.templates or prompts.domain, key


def test_unknown_suite_gets_a_suggestion() -> None:
    with pytest.raises(EsdLoraError, match=r"no suite 'emoji-objects'.*did you mean 'emoji-object'\?"):
        load_suite("emoji-objects")


def test_every_fault_is_told_with_its_line(tmp_path: Path) -> None:
    text = """description: mine
prompts:
  ours: {role: targets, templates: ["a {thing}"]}
  both: {role: general, templates: [a], domain: pairs}
detector: {}
detectors: {jugde: {}}
"""
    with pytest.raises(EsdLoraError) as fault:
        suite(tmp_path, text)
    message = str(fault.value)
    assert "mine.yaml:3: prompts.ours.role" in message
    assert "mine.yaml:4: prompts.both: expected one of templates, domain, and file" in message
    assert "mine.yaml:5: detector: unknown key (did you mean 'detectors'?)" in message
    assert "mine.yaml:6: detectors: unknown detector 'jugde' (did you mean 'judge'?)" in message


def test_braces_that_nothing_fills(tmp_path: Path) -> None:
    text = 'description: x\nprompts: {a: {role: general, templates: ["a {clas}"], fill: {class: [tench]}}}\ndetectors: {}\n'
    with pytest.raises(EsdLoraError, match=r"nothing fills \{clas\} \(did you mean 'class'\?\)"):
        suite(tmp_path, text)


def test_names_become_files(tmp_path: Path) -> None:
    text = "description: x\nprompts: {../up: {role: general, templates: [a]}}\ndetectors: {}\n"
    with pytest.raises(EsdLoraError, match=r"mine\.yaml:2: prompts: '\.\./up' is no name"):
        suite(tmp_path, text)


def test_settings_lie_over_the_file() -> None:
    found = load_suite("emoji-object", {"prompts.asked.count": 7, "detectors.judge.roles": ["target"]})
    assert found.prompts["asked"].count == 7
    assert found.detectors["judge"].roles == ("target",)
    assert found.name == "emoji-object"
    with pytest.raises(EsdLoraError, match=r"--set: prompts\.asked\.count: .*found 0"):
        load_suite("emoji-object", {"prompts.asked.count": 0})


def test_imagenette_s_prompts_are_those_of_esd() -> None:
    """data/small_imagenet_prompts.csv of rohitgandikota/erasing: no article."""
    cases = plan_cases(load_suite("objects"), [ErasedConcept(name="tench", pairs=(), eta=None)]).cases
    assert len(cases) == 10 * 500
    assert {case.prompt for case in cases if case.role == "target"} == {"Image of tench"}
    assert "Image of English springer" in {case.prompt for case in cases}


def test_published_templates_are_quoted() -> None:
    """UnlearnCanvas' sampling script says "A" whatever follows."""
    cases = plan_cases(load_suite("unlearncanvas"), [ErasedConcept(name="Van Gogh", pairs=(), eta=None)]).cases
    assert len(cases) == 50 * 20 * 5
    assert "A Architectures image in Van Gogh style." in {case.prompt for case in cases if case.role == "target"}


FILLED = """description: x
prompts:
  all:
    role: general
    templates: ["a photo of a {class}", "the {class}"]
    fill: {class: [tench, owl, cat]}
    label: "{class}"
    count: 3
    seed: 10
  told: {role: paraphrase, templates: ["my {concept}"], label: "{concept}"}
neighbours: {animals: [owl, cat], fish: [tench]}
detectors: {}
"""


def test_templates_take_turns_in_every_combination(tmp_path: Path) -> None:
    cases = plan_cases(suite(tmp_path, FILLED), [CAT]).cases
    assert [case.prompt for case in cases if case.label == "tench"] == ["a photo of a tench", "the tench", "a photo of a tench"]
    assert cases[3] == Case("all-00003", "neighbour", "a photo of an owl", 13, "owl")
    assert cases[-1] == Case("told-00000", "paraphrase", "my cat", 0, "cat")
    assert len({case.id for case in cases}) == len({case.seed for case in cases}) == 10
    assert Counter(case.role for case in cases) == {"target": 3, "neighbour": 3, "general": 3, "paraphrase": 1}


def test_what_was_erased_decides_the_roles(tmp_path: Path) -> None:
    tench = ErasedConcept(name="tench", pairs=(), eta=1)
    roles = {case.label: case.role for case in plan_cases(suite(tmp_path, FILLED), [tench]).cases}
    assert roles == {"tench": "paraphrase", "owl": "general", "cat": "general"} | {"tench": "paraphrase"}
    named = ErasedConcept(name="felines", synonyms=("cat",), pairs=(), eta=1)
    assert {case.role for case in plan_cases(suite(tmp_path, FILLED), [named]).cases if case.label == "cat"} == {"target"}
    with pytest.raises(EsdLoraError, match="no prompt of this suite is about what was erased"):
        plan_cases(load_suite("emoji-object"), [ErasedConcept(name="a zebra", pairs=(), eta=1)])


def test_base_alone_has_no_targets_of_its_own(tmp_path: Path) -> None:
    assert {case.role for case in plan_cases(suite(tmp_path, FILLED), []).cases} == {"general"}


def test_limit_is_spread_evenly(tmp_path: Path) -> None:
    cases = plan_cases(suite(tmp_path, FILLED), [CAT], limit=3).cases
    assert [case.id for case in cases] == ["all-00000", "all-00003", "all-00006", "told-00000"]


def test_domain_of_a_built_in_base() -> None:
    cases = plan_cases(load_suite("emoji-object"), [CAT], likeness=lambda texts: [float(len(text)) for text in texts]).cases
    target = [case for case in cases if case.role == "target"]
    assert len(target) == 60
    assert {case.label for case in target} == {"cat"}
    assert "a cat in ink style" not in {case.prompt for case in target}, "no prompt that was trained on"
    rest = [case for case in cases if case.id.startswith("rest")]
    known = domain("emoji")
    pairs = len(known["objects"]) * len(known["styles"]) - len(known["held_out"])
    assert len(rest) == pairs - 5, "every pair but those of the cat"
    assert {case.label.split(" + ")[0] for case in rest if case.role == "neighbour"} >= {"dog", "tiger"}
    assert "pizza" not in {case.label.split(" + ")[0] for case in rest if case.role == "neighbour"}


def test_neighbours_are_asked_for_with_nothing_around_them_and_the_nearest_most() -> None:
    planned = plan_cases(load_suite("emoji-object"), [CAT], likeness=lambda texts: [float(len(text)) for text in texts])
    bare, near = ([case for case in planned.cases if case.id.startswith(name)] for name in ("bare", "nearest"))
    others = [name for name in domain("emoji")["objects"] if name != "cat"]
    assert Counter(case.label for case in bare) == dict.fromkeys(others, 3)
    assert {case.prompt for case in bare if case.label == "owl"} == {"an owl", "owl"}
    assert len({case.seed for case in (*bare, *near)}) == len(bare) + len(near)
    assert {case.role for case in near} == {"neighbour"}
    assert Counter(case.label for case in near) == dict.fromkeys(sorted(others, key=len)[-4:], 6)


def test_the_nearest_are_not_run_where_nothing_says_which_they_are() -> None:
    alone = plan_cases(load_suite("emoji-object"), [CAT])
    assert alone.not_run == {"nearest": "its prompts are chosen by a base, and none is given"}
    nothing = plan_cases(load_suite("emoji-demo"), [], likeness=lambda texts: [0.0] * len(texts))
    assert nothing.not_run == {"nearest": "its prompts are chosen by what was erased, and none is given"}


NEAREST = """description: x
targets: false
prompts:
  near: {role: neighbour, templates: ["{who}", "a photo of {who}"], fill: {who: [Ann, Jo, Elizabeth]}, nearest: 1}
detectors: {}
"""


def test_nearest_of_what_fills_templates(tmp_path: Path) -> None:
    long = ErasedConcept(name="Elizabeth", pairs=(), eta=1)
    planned = plan_cases(suite(tmp_path, NEAREST), [long], likeness=lambda texts: [float(len(text)) for text in texts])
    assert [(case.prompt, case.role) for case in planned.cases] == [("Ann", "neighbour"), ("a photo of Ann", "neighbour")]
    for wrong in ("nearest: 0", "nearest: 2, domain: pairs, templates: []"):
        with pytest.raises(EsdLoraError, match="nearest"):
            suite(tmp_path, NEAREST.replace("nearest: 1", wrong))


def test_style_of_a_built_in_base() -> None:
    cases = plan_cases(load_suite("emoji-style"), [STYLE]).cases
    target = [case for case in cases if case.role == "target"]
    assert {case.label for case in target} == {"twemoji"}
    assert all(case.rest in case.prompt for case in target), "the object should be there still"
    assert not any("twemoji" in case.prompt for case in cases if case.role == "general")


FILE = """description: x
prompts:
  ours: {role: target, source: ask around, release: I2P}
  more: {role: general, source: ask again, optional: true}
detectors: {}
"""


def test_file_that_is_not_given(tmp_path: Path) -> None:
    with pytest.raises(
        EsdLoraError, match=r"'ours' of this suite have no file; give it as -s prompts\.ours\.file=PATH \(ask ar"
    ):
        plan_cases(suite(tmp_path, FILE), [])


def test_prompt_file_goes_to_the_first_set_that_takes_one(tmp_path: Path) -> None:
    suite(tmp_path, FILE)
    given = {"prompts.more.file": "b.csv"}
    found = load_suite(tmp_path / "mine.yaml", given, "a.csv")
    assert (found.prompts["ours"].file, found.prompts["more"].file) == ("a.csv", "b.csv")
    over = load_suite(tmp_path / "mine.yaml", {"prompts.ours.file": "b.csv"}, "a.csv")
    assert over.prompts["ours"].file == "b.csv", "settings go before it"
    with pytest.raises(EsdLoraError, match="takes no prompt file; leave --prompts out"):
        load_suite("emoji-object", prompt_file="a.csv")


def test_rows_of_a_file(tmp_path: Path) -> None:
    prompts = tmp_path / "p.csv"
    prompts.write_text(
        "case_number,prompt,evaluation_seed,evaluation_guidance,artist\n7,a cat,4294967299,9,Monet\n8,,2,7.5,Manet\n"
    )
    suite(tmp_path, FILE)
    found = load_suite(tmp_path / "mine.yaml", {"prompts.ours.file": str(prompts)})
    with (
        pytest.warns(UserWarning, match="no release that is known, not I2P"),
        pytest.warns(UserWarning, match="1 of 2 prompts are empty"),
    ):
        planned = plan_cases(found, [])
    assert planned.cases == [
        Case("ours-7", "target", "a cat", 4294967299, "Monet"),
        Case("ours-8", "target", "", 2, "Manet"),
    ]
    assert planned.files["ours"]["rows"] == 2
    assert planned.cases[1].to_dict() == {
        **{"case": "ours-8", "role": "target", "prompt": "", "seed": 2},
        **{"label": "Manet", "rest": None, "guidance": None},
    }
    assert planned.files["ours"]["name"] == "p.csv"
    assert list(planned.not_run) == ["more"]
    over = {"prompts.ours.file": str(prompts), "prompts.ours.own_guidance": True, "prompts.ours.release": None}
    own = load_suite(tmp_path / "mine.yaml", over)
    with pytest.warns(UserWarning, match="empty"):
        assert [case.guidance for case in plan_cases(own, []).cases] == [9.0, 7.5]


HOSTILE = {
    "width": ('{role: general, templates: ["{concept:>900000000}"]}', "more than a plain name in braces"),
    "attribute": ('{role: general, templates: ["{concept.__class__}"]}', "more than a plain name in braces"),
    "item": ('{role: general, templates: ["{concept[0]}"]}', "more than a plain name in braces"),
    "conversion": ('{role: general, templates: ["{concept!r}"]}', "more than a plain name in braces"),
    "number": ('{role: general, templates: ["{0}"]}', r"nothing fills \{0\}"),
    "label": ('{role: general, file: p.csv, label: "{x.y}"}', "more than a plain name in braces"),
    "open brace": ('{role: general, templates: ["{concept"]}', "expected '}'"),
    "count": ("{role: general, templates: [a], count: 2000000000}", "expected 100000 or less"),
}


@pytest.mark.parametrize(("prompts", "words"), HOSTILE.values(), ids=HOSTILE)
def test_template_is_no_format_string(tmp_path: Path, prompts: str, words: str) -> None:
    with pytest.raises(EsdLoraError, match=rf"mine\.yaml:2: prompts\.a.*{words}"):
        suite(tmp_path, f"description: x\nprompts: {{a: {prompts}}}\ndetectors: {{}}\n")


def test_fills_that_multiply(tmp_path: Path) -> None:
    words = ", ".join(f"w{i}" for i in range(5000))
    text = f"""description: x
prompts:
  a: {{role: general, templates: ["{{b}} {{c}} {{d}}"], fill: {{b: [{words}], c: [{words}], d: [{words}]}}}}
detectors: {{}}
"""
    with pytest.raises(
        EsdLoraError, match=r"the prompts .a. of this suite come to 125,000,000,000 pictures, more than 100,000"
    ):
        plan_cases(suite(tmp_path, text), [])


def test_word_that_is_long_and_often_there(tmp_path: Path) -> None:
    text = f"""description: x
prompts: {{a: {{role: general, templates: ["{"{b}" * 10_000}"], fill: {{b: [{"w" * 500_000}]}}}}}}
detectors: {{}}
"""
    with pytest.raises(EsdLoraError, match="a text of more than 10,000 characters"):
        plan_cases(suite(tmp_path, text), [])


def test_domain_prompts_of_many_concepts(tmp_path: Path) -> None:
    text = "description: x\nprompts: {a: {role: general, domain: object, count: 100000}}\ndetectors: {}\n"
    concepts = [ErasedConcept(name=name, pairs=(), eta=None) for name in domain("emoji")["objects"][:3]]
    with pytest.raises(EsdLoraError, match="come to 300,000 pictures"):
        plan_cases(suite(tmp_path, text), concepts)


def test_nothing_is_left_to_measure_on(tmp_path: Path) -> None:
    text = "description: x\nprompts: {a: {role: general, domain: object, count: 1000}}\ndetectors: {}\n"
    prompts = {case.prompt for case in plan_cases(suite(tmp_path, text), [CAT]).cases} | {pair[0] for pair in CAT.pairs}
    trained = CAT.model_copy(update={"pairs": tuple((prompt, "") for prompt in prompts)})
    with pytest.raises(EsdLoraError, match=r"trained on every prompt of 'cat.*so none is left to measure on"):
        plan_cases(suite(tmp_path, text), [trained])


def test_label_that_no_column_fills(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("prompt,class name\na cat,cat\n")
    text = "description: x\nprompts: {{a: {{role: general, file: {file}, label: '{{{label}}}'}}}}\ndetectors: {{}}\n"
    filled = suite(tmp_path, text.format(file=tmp_path / "p.csv", label="class name"))
    assert [case.label for case in plan_cases(filled, []).cases] == ["cat"]
    with pytest.raises(EsdLoraError, match=r"nothing fills \{nope\}. Known: prompt, class name"):
        plan_cases(suite(tmp_path, text.format(file=tmp_path / "p.csv", label="nope")), [])


def test_base_that_does_not_ship(tmp_path: Path) -> None:
    with pytest.raises(EsdLoraError, match=r"mine\.yaml:1: base: no built-in base \(did you mean 'emoji'\?\)"):
        suite(tmp_path, "base: emojy\ndescription: x\nprompts: {a: {role: general, domain: pairs}}\ndetectors: {}\n")
