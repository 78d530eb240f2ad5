"""What README and docs/ say of the package: links lead somewhere, code is Python, commands are those of the program."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.core import TyperGroup

from sparsevlm_jax import cli

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
WRAPPED = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
README_LINES, PROSE_WIDTH = 130, 120

every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


@pytest.fixture(scope="module")
def program() -> TyperGroup:
    group = typer.main.get_command(getattr(cli, "app", None) or importlib.import_module("sparsevlm_jax.cli.main").app)
    assert isinstance(group, TyperGroup)
    return group


def blocks(document: Path) -> list[tuple[str, str]]:
    """Language and content of every fenced block."""
    return FENCE.findall(document.read_text(encoding="utf-8"))


def prose(document: Path) -> str:
    """The document without its fenced blocks."""
    return FENCE.sub("", document.read_text(encoding="utf-8"))


def commands(document: Path) -> Iterator[list[str]]:
    """Every line of a fenced block that is a command, in words, its comment left off."""
    for language, content in blocks(document):
        if not language:
            for line in content.splitlines():
                yield shlex.split(line, comments=True)


def anchors(document: Path) -> set[str]:
    """What headings can be linked to by, as GitHub names them."""
    headings = re.findall(r"^#+ (.*)$", prose(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_fits_one_screen_and_a_half() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= README_LINES


@pytest.mark.parametrize("document", WRAPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_prose_is_not_wider_than_the_code(document: Path) -> None:
    text = re.sub(r"^<!-- (\w+) -->.*?<!-- /\1 -->$", "", prose(document), flags=re.MULTILINE | re.DOTALL)
    wide = [line for line in text.splitlines() if len(line) > PROSE_WIDTH and not line.startswith("|")]
    assert not wide


@every_document
def test_relative_links_lead_somewhere(document: Path) -> None:
    for target in LINK.findall(prose(document)):
        if target.startswith(("https://", "http://")):
            continue
        name, _, anchor = target.partition("#")
        file = (document.parent / name).resolve() if name else document
        assert file.exists(), target
        assert file.is_relative_to(ROOT), target
        assert not anchor or anchor in anchors(file), target


@every_document
def test_python_blocks_are_python(document: Path) -> None:
    for language, content in blocks(document):
        if language == "python":
            compile(content, str(document), "exec")


@every_document
def test_commands_take_the_options_they_are_shown_with(document: Path, program: TyperGroup) -> None:
    for name, *arguments in filter(None, commands(document)):
        if name == "sparsevlm":
            # It raises for an unknown command, option or argument, and for one that is missing.
            command = program.commands[arguments[0]]
            command.make_context(arguments[0], list(arguments[1:]))


@every_document
def test_options_in_running_text_are_those_of_a_command(document: Path, program: TyperGroup) -> None:
    options = [option for command in program.commands.values() for option in command.params]
    known = {name for option in options for name in [*option.opts, *option.secondary_opts]}
    others = {"--golden", "--scenes", "--version", "--help"}
    others |= {"--model_args", "--use_cache", "--log_samples", "--force_simple", "--batch_size"}  # of lmms-eval
    for code in re.findall(r"`([^`\n]+)`", prose(document)):
        if code.startswith(("--", "sparsevlm ")):
            found = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", code))
            assert found <= known | others, code


@every_document
def test_modules_make_targets_and_tests_are_there(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for module in re.findall(r"python3? -m ([\w.]+)", text):
        assert module in {"pytest", "pip", "venv", "lmms_eval"} or importlib.util.find_spec(module) is not None, module
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for target in re.findall(r"(?:^|`)make ([a-z][\w-]*)", text, re.MULTILINE):
        assert target in targets, target
    for file in re.findall(r"pytest (?:-m \w+ )?(tests/[\w/.]+)", text):
        assert (ROOT / file).exists(), file


@every_document
def test_files_named_in_documents_are_there(document: Path) -> None:
    for name in re.findall(
        r"`((?:sparsevlm_jax|benchmarks|tests|training|examples|convert)/[\w/.]*)`", prose(document)
    ):
        assert (ROOT / name).exists(), name


@every_document
def test_functions_named_behind_a_file_are_in_it(document: Path) -> None:
    for file, names in re.findall(r"`(sparsevlm_jax/[\w/]+\.py)`: ((?:`\w+`(?:, )?)+)", prose(document)):
        source = (ROOT / file).read_text(encoding="utf-8")
        for name in re.findall(r"`(\w+)`", names):
            assert re.search(rf"^(?:def|class) {name}\b", source, re.MULTILINE), f"{file}: {name}"


@pytest.mark.parametrize("name", ["bench", "retention", "easy_vqa"])
def test_tables_that_commands_write_have_their_place(name: str) -> None:
    text = (ROOT / "docs" / f"{'benchmarks' if name == 'bench' else name}.md").read_text(encoding="utf-8")
    assert 0 <= text.find(f"\n<!-- {name} -->\n") < text.find(f"\n<!-- /{name} -->\n")


def test_the_retention_table_is_the_committed_one() -> None:
    table = (ROOT / "benchmarks" / "results" / "retention.md").read_text(encoding="utf-8")
    text = (ROOT / "docs" / "retention.md").read_text(encoding="utf-8")
    assert f"<!-- retention -->\n{table}<!-- /retention -->" in text
