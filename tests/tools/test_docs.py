"""README and docs/ agree with the repository: their links, configs, commands, modules and files exist."""

import functools
import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from hybridgen import cli
from hybridgen.core import config
from hybridgen.data import sources
from hybridgen.data.sources.reading import read

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = sorted([README, ROOT / "launch" / "README.md", *(ROOT / "docs").glob("*.md")])
LINES = 130  # of the README
STAGES = ("tokenizer", "prior", "decoder", "cascade")

FENCED = re.compile(r"^ *```\w*\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`]+)`")
LINK = re.compile(r'\]\(([^)\s]+)\)|src="([^"]+)"')
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
CONFIG = re.compile(r"configs/[\w/]+\.py(:.*)?")
FILE = re.compile(r"(?<![\w./-])(?:hybridgen|configs|launch|tests|docs|examples|\.ci)/[\w./-]*\w")


@functools.cache
def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


@functools.cache
def code_of(page: Path) -> list[str]:
    """Lines of code: those of blocks, continued ones joined, and code within sentences."""
    text = text_of(page)
    blocks = "\n".join(FENCED.findall(text)).replace("\\\n", " ")
    return blocks.splitlines() + [" ".join(span.split()) for span in INLINE.findall(FENCED.sub("", text))]


def prose_of(page: Path) -> str:
    return INLINE.sub("", FENCED.sub("", text_of(page)))


def anchors(page: Path) -> set[str]:
    """The names by which a page's headings are linked, on GitHub as on the site."""
    headings = HEADING.findall(FENCED.sub("", text_of(page)))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def words(line: str) -> list[str]:
    try:
        return shlex.split(line, comments=True)
    except ValueError:  # an apostrophe: no command
        return line.split()


def names(path: Path) -> str:
    return str(path.relative_to(ROOT))


pages = pytest.mark.parametrize("page", PAGES, ids=names)


def test_the_readme_is_short():
    assert len(text_of(README).splitlines()) <= LINES


@pages
def test_links_resolve(page):
    broken = []
    for link in (first or second for first, second in LINK.findall(prose_of(page))):
        if re.match(r"\w+:", link):
            continue
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        if not target.exists() or anchor and anchor not in anchors(target):
            broken.append(link)
    assert not broken


@pages
def test_configs_load(page):
    """With the overrides on their line."""
    for line in code_of(page):
        given = words(line)
        for before, word in zip(["", *given], given, strict=False):
            if CONFIG.fullmatch(word) and (":" in word or before == "--config"):
                overrides = [other.removeprefix("--config.") for other in given if other.startswith("--config.")]
                config.load(str(ROOT / word), overrides)


def test_configs_in_the_text_load(tmp_path):
    """The config files that a reader is asked to write, outside of configs/, with what they name."""
    blocks = [block for page in PAGES for block in FENCED.findall(text_of(page)) if "def get_config(" in block]
    assert len(blocks) == 2
    for number, block in enumerate(blocks):
        (tmp_path / f"mine{number}.py").write_text(block, encoding="utf-8")
    text, source = (config.load(f"{tmp_path}/mine{number}.py") for number in (1, 0))
    assert {text.stages[name].data.text.kind for name in STAGES} == {"bpe"}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "examples" / "own_package"))
        for name in STAGES:
            built = sources.build(source.stages[name].data, "train")
            assert len(built) == 500 and read(built, 3)[0]["text"] == "vertical stripes"


@pages
def test_commands_and_modules_exist(page):
    lines = "\n".join(code_of(page))
    commands = set(re.findall(r"(?<![\w.-])hybridgen +([a-z]\w*)", lines))
    assert not commands - set(cli.COMMANDS)
    modules = set(re.findall(r"-m (hybridgen[\w.]*)", lines))
    assert not [module for module in modules if importlib.util.find_spec(module) is None]


@pages
def test_files_exist(page):
    named = {path for line in code_of(page) for path in FILE.findall(line)}
    assert not [path for path in named if not (ROOT / path).exists()]


def test_nothing_is_left_out():
    """The README has every command, the page of official weights every source."""
    assert not [name for name in cli.COMMANDS if f"hybridgen {name} " not in text_of(README)]
    sources = [path.stem for path in ROOT.glob("hybridgen/*/tables/[a-z]*.py")]
    weights = text_of(ROOT / "docs" / "weights.md")
    assert sources and not [name for name in sources if f"`{name}`" not in weights]
