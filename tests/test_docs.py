"""Pages that say what the code says."""

import importlib.util
import os
import re
import shlex
from pathlib import Path

import pytest

from finetune_jax import cli
from finetune_jax.limits import validate

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_table_of_knobs_is_config_py():
    spec = importlib.util.spec_from_file_location("configuration_doc", ROOT / "scripts/configuration_doc.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = module.PAGE.read_text(encoding="utf-8")
    assert page.endswith(module.tables()), "run python scripts/configuration_doc.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist(page):
    for name in re.findall(
        r"(?:configs|scripts|benchmarks)/[\w./]+\.(?:py|sh)", page.read_text(encoding="utf-8")
    ):
        assert (ROOT / name).is_file() or name == "configs/NAME.py", name


# ---------------------------------------------------------------------------------------------------------------------
# Commands are taken by the command line
# ---------------------------------------------------------------------------------------------------------------------

COMMAND = re.compile(r"(?:finetune-jax|-m finetune_jax) ([^`]*)")
STANDS_FOR = {
    "configs/NAME.py": "configs/sst2_local.py",
    "list|verify|inspect": "list",
    "$seed": "0",
    " ...": "",
    "[": "",
    "]": "",
}
"""What a page writes for what a user puts there; what may be left out is tried."""


def commands(page):
    """The words of each command on a page: between backquotes, or on a line that is indented as code."""
    for line in page.read_text(encoding="utf-8").replace("\\\n", " ").replace("\\|", "|").split("\n"):
        for part in re.findall(r"`([^`]*)`", line) or [line] * line.startswith("    "):
            if not (found := COMMAND.search(part)):
                continue
            said = re.split(r"\s+#|\s{3,}| > | \| ", found[1])[0]
            for written, meant in STANDS_FOR.items():
                said = said.replace(written, meant)
            words = shlex.split(said)
            if words and words[0] in cli.COMMANDS and words[1:]:
                yield words if words[0] != "train" or "--workdir" in words else [*words, "--workdir", "run"]


def check(words, monkeypatch):
    """Parsed, and where it takes a recipe found to be sound."""
    monkeypatch.chdir(ROOT)
    made = cli.parse([os.path.expandvars(word) for word in words])
    if hasattr(made, "overrides"):
        validate(made.overrides)


@pytest.mark.parametrize(
    "words", [pytest.param(words, id=" ".join(words)[:60]) for page in PAGES for words in commands(page)]
)
def test_commands_are_taken(words, monkeypatch):
    check(words, monkeypatch)


def cells(line):
    return [cell.strip().strip("`") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


@pytest.mark.long
def test_the_commands_of_the_table_of_methods_are_taken(monkeypatch):
    """A column's command with each of its rows' words: the whole recipe is checked, no data are read."""
    lines = [cells(line) for line in (ROOT / "docs/methods.md").read_text(encoding="utf-8").split("\n")]
    columns = {
        line[0]: line[1] for line in lines if len(line) == 2 and line[1].startswith("finetune-jax train")
    }
    head = next(line for line in lines if line and line[0] == "way" and line[-1] == "words")
    rows = [line for line in lines if len(line) == len(head) and line[0] not in ("way", "---")]
    assert len(rows) > 40
    tried = 0
    for row in rows:
        for name, value in zip(head, row, strict=True):
            if name in columns and value != "-":
                data = "" if name == "digits" else "--data.path data"
                said = f"{columns[name]} --workdir run --seed 0 {data} {row[-1]}".replace("\\|", "|")
                check(shlex.split(said)[1:], monkeypatch)
                tried += 1
    assert tried > 170
