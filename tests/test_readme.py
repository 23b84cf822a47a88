"""README.md is true: its commands parse, its options and settings exist, and none is missing."""

import re
import shlex
from pathlib import Path

import pytest

import config
import generate_embeddings
import prepare_finetuning_data
import run_finetuning
import semantic_search

ROOT = Path(config.__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = {
    module.__name__: module
    for module in (prepare_finetuning_data, run_finetuning, generate_embeddings, semantic_search)
}
SETTINGS = [name for name in vars(config) if name.isupper()]


def code_blocks(heading: str) -> list[str]:
    section = re.search(rf"^## {heading}$(.*?)(?=^## |\Z)", README, re.S | re.M)[1]
    return re.findall(r"^```\n(.*?)^```$", section, re.S | re.M)


def commands() -> list[list[str]]:
    lines = re.findall(r"(?:^|&& )python3? (\w+\.py[^&\n]*)", README, re.M)
    return [shlex.split(line.split("#")[0].split(" < ")[0]) for line in lines]


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_every_command_parses(command):
    SCRIPTS[command[0].removesuffix(".py")].build_parser().parse_args(command[1:])


@pytest.mark.parametrize("heading", ["Quick start", "Tests"])
def test_quick_start_and_tests_are_one_command_line_each(heading):
    (block,) = code_blocks(heading)
    assert block.count("\n") == 1
    assert "pip install" in block
    assert "-r requirements.txt" in block


def test_quick_start_runs_the_four_scripts_in_order():
    (block,) = code_blocks("Quick start")
    assert re.findall(r"(\w+)\.py", block) == list(SCRIPTS)


def test_every_option_is_mentioned_and_every_option_mentioned_exists():
    options = {
        option
        for module in SCRIPTS.values()
        for action in module.build_parser()._actions
        for option in action.option_strings
        if option.startswith("--") and option != "--help"
    }
    assert set(re.findall(r"`(--[a-z-]+)", README)) - {"--help"} == options


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_is_mentioned(name):
    assert re.search(rf"`[^`\n]*\b{name}\b", README) or re.search(rf"^{name} = ", README, re.M)


def test_every_setting_mentioned_exists():
    mentioned = set(re.findall(r"`(?:config\.)?([A-Z][A-Z_]{4,})`", README))
    assert mentioned <= set(SETTINGS)


def test_pictures_are_there_small_and_described():
    pictures = re.findall(r"!\[(.*?)\]\((.*?)\)", README)
    assert len(pictures) == 2
    for description, path in pictures:
        assert len(description) > 40
        assert 0 < (ROOT / path).stat().st_size < 150_000


def test_every_file_of_the_tests_and_every_section_that_is_pointed_to_exists():
    assert all((ROOT / path).exists() for path in re.findall(r"\btests/[\w/]+(?:\.\w+)?", README))
    anchors = {
        re.sub(r"[^\w-]", "", title.lower().replace(" ", "-")) for title in re.findall(r"^## (.*)$", README, re.M)
    }
    assert set(re.findall(r"\]\(#(.*?)\)", README)) <= anchors


def test_the_turkish_guide_leads_from_installation_to_a_search():
    blocks = "".join(code_blocks("Türkçe kısa kılavuz"))
    assert blocks.index("pip install -r requirements.txt") < blocks.index("prepare_finetuning_data.py")
    assert list(dict.fromkeys(re.findall(r"(\w+)\.py", blocks))) == list(SCRIPTS)


def test_the_help_of_each_script_shows_two_examples_that_parse():
    for name, module in SCRIPTS.items():
        examples = re.findall(rf"^  python {name}\.py(.*)$", module.build_parser().epilog, re.M)
        assert len(examples) == 2
        for example in examples:
            module.build_parser().parse_args(shlex.split(example))
