"""Nothing points nowhere: every mention of a page, of a section, of a file of the repository resolves."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in ROOT.glob("docs/**/*.md")}
FOLDERS = "jaxsoftmax", "tests", "examples", "benchmarks", "docs"  # and no environment that lies beside them
TEXTS = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for pattern in ("*.md", "docs/**/*.md", "*.py", *(f"{folder}/**/*.py" for folder in FOLDERS), ".ci/run")
    for path in ROOT.glob(pattern)
    if path != Path(__file__)
}
SECTION = re.compile(r"docs/mathematics\.md,\s+sections?\s+((?:\d+(?:\.\d+)?(?:,\s+|\s+and\s+|\s+to\s+)?)+)")


def slug(heading: str) -> str:
    """The anchor that GitHub and MyST give to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def anchors(text: str) -> set[str]:
    return {slug(line.lstrip("#")) for line in text.splitlines() if line.startswith("#")}


def referred_sections(text: str) -> list[str]:
    return [number for found in SECTION.findall(text) for number in re.findall(r"\d+(?:\.\d+)?", found)]


def test_references_to_sections_are_found():
    text = "docs/mathematics.md, section 5. With docs/mathematics.md,\n    sections 1, 2.3 and 4; "
    text += "docs/mathematics.md, sections 1 to 3."
    assert referred_sections(text) == ["5", "1", "2.3", "4", "1", "3"]
    assert slug("3.3 The Lipschitz constant") == "33-the-lipschitz-constant"


def test_sections_exist():
    there = set(re.findall(r"^#+ (\d+(?:\.\d+)?)\.? ", PAGES["docs/mathematics.md"], re.MULTILINE))
    asked = {(name, number) for name, text in TEXTS.items() for number in referred_sections(text)}
    assert len(asked) > 25
    assert not [(name, number) for name, number in sorted(asked) if number not in there]


@pytest.mark.parametrize("name", TEXTS)
def test_mentions_resolve(name):
    """Each `docs/…`, `examples/….py`, `tests/….py` in text or code; mathematics only with its section in docstrings."""
    for mention in re.findall(r"(?<![\w/.])(?:docs|examples|tests)/[\w/]*\w\.(?:md|py)", TEXTS[name]):
        assert (ROOT / mention).is_file(), mention
    assert not re.search(r"MATHEMATICS\.md|DESIGN\.md|\bseeds? (?:text )?00\d", TEXTS[name])
    if name.startswith("jaxsoftmax/"):
        assert TEXTS[name].count("docs/mathematics.md") == len(SECTION.findall(TEXTS[name]))


@pytest.mark.parametrize("name", [name for name in TEXTS if name.endswith(".md")])
def test_links_resolve(name):
    """Relative links between pages: the file exists, and so does the heading."""
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", TEXTS[name]):
        path, _, anchor = target.partition("#")
        if path.startswith("api/"):  # made from the docstrings when the site is built
            assert importlib.import_module(f"jaxsoftmax.{Path(path).stem}"), target
            continue
        file = ROOT / Path(name).parent / path if path else ROOT / name
        assert file.resolve().exists(), target
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("name", [name for name in TEXTS if name.startswith("jaxsoftmax/")])
def test_every_paper_has_a_year_or_an_address(name):
    """A reference names a section, a paper (with its year or address), or a function of another library."""
    for entry in re.findall(r"Reference:((?:.|\n(?!\n))*)", TEXTS[name]):
        assert re.search(r"\b(?:18|19|20)\d\d\b|https?://|arXiv|docs/mathematics\.md|`", entry), entry
