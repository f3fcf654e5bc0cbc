"""The API reference, one page per part of the package, made from `__all__` and the docstrings, which are Markdown."""

import importlib
import inspect
import pkgutil
import re
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jaxsoftmax
from jaxsoftmax._core.classes import ClassAxis

# Parts in reading order, with the title of their page.
ROOMS = {
    "autodiff": "Rules for both modes",
    "maps": "Maps",
    "operators": "Operators",
    "losses": "Losses",
    "linear_head": "The linear head",
    "attention": "Attention",
    "matrix_calculus": "Matrix calculus",
    "network": "Networks by hand",
    "curvature": "Curvature",
    "training": "Training",
    "verify": "Reports",
    "plotting": "Pictures",
}
SECTION = re.compile(r"(Args|Attributes|Returns|Raises|Example|Reference):(.*)")
SIGN = re.compile(r"[=≤←~]")
WORD = re.compile(r"(?<![\w(])(?!log|exp|max|min|vec|expm1|log1p|diag|tanh)[a-z]{3,}(?![\w(])")
ITEM = re.compile(r"  (\S[^:]*): ?(.*)")


def public_objects() -> dict[str, Any]:
    """Shortest dotted name -> object, for every name in the `__all__` of a module without underscore."""
    found: dict[tuple[int, str], tuple[str, Any]] = {}
    modules = ["jaxsoftmax", *(m.name for m in pkgutil.walk_packages(jaxsoftmax.__path__, "jaxsoftmax."))]
    for name in modules:
        if not re.search(r"\._", name):
            module = importlib.import_module(name)
            for attribute in getattr(module, "__all__", ()):
                thing, path = getattr(module, attribute), f"{name}.{attribute}"
                before, _ = found.get((id(thing), attribute), (None, None))
                if not inspect.ismodule(thing) and (before is None or len(path) < len(before)):
                    found[id(thing), attribute] = path, thing
    return dict(sorted(found.values()))


def room(path: str, thing: Any) -> str:
    home = getattr(thing, "__module__", None) or path
    return (home if home.startswith("jaxsoftmax.") else path).split(".")[1]


def signature(thing: Any) -> str:
    """Names and defaults; the types are in the text."""
    try:
        parameters = inspect.signature(thing).parameters.values()
    except (TypeError, ValueError):
        return ""
    bare = [
        p.replace(annotation=p.empty, default=p.empty if p.default is p.empty else Shown(p.default))
        for p in parameters
        if p.name not in ("self", "cls")
    ]
    return str(inspect.Signature(bare))


class Shown:
    """A default as one would write it: functions and types by their name, the last axis as -1."""

    def __init__(self, value: Any):
        self.value = value

    def __repr__(self) -> str:
        if isinstance(self.value, ClassAxis):
            return repr(self.value.positions[0])
        return getattr(self.value, "__name__", None) or repr(self.value)


def markdown(docstring: str, known: Mapping[str, Any] | None = None) -> str:
    """Google's sections as paragraphs and lists; everything else is Markdown already. Known names are links."""
    out: list[str] = []
    section = ""

    def close_example() -> None:
        if section == "Example":
            while not out[-1]:
                out.pop()
            out.append("```")

    for line in displayed(inspect.cleandoc(docstring)).splitlines():
        if header := SECTION.fullmatch(line):
            close_example()
            section = header[1]
            out += ["", f"**{section}**{header[2]}"] + [""] * (not header[2])
            if section == "Example":
                out.append("```pycon")
        elif section in ("Args", "Attributes", "Raises") and (item := ITEM.fullmatch(line)):
            out += [
                f"- **{name.replace('*', chr(92) + '*')}**: {text}" for name, text in spelled_out(*item.groups(), known)
            ]
        elif section == "Example":
            if line or not out[-1].startswith("```"):
                out.append(line[2:])
        elif section:
            out.append(line[2:] if line.startswith("  ") else line)
        else:
            out.append(line)
    close_example()
    text = re.sub(r"(?<![(<`])https?://[^\s;,)]*[^\s;,).]", r"<\g<0>>", "\n".join(out))
    text = re.sub(r"docs/mathematics\.md(,\s+sections?\s+[\d., and to]*\d)?", sections, text)
    return linked(text, known) if known else text


def displayed(text: str) -> str:
    """What stands before the sections, with indented paragraphs and lines that are a formula set as blocks."""
    start = re.search(rf"^{SECTION.pattern}$", text, re.MULTILINE)
    end = start.start() if start else len(text)
    block = lambda found: f"```text\n{textwrap.dedent(found)}\n```"
    head = (block(part) if part.startswith("    ") or is_formula(part) else part for part in text[:end].split("\n\n"))
    return "\n\n".join(head) + text[end:]


def is_formula(paragraph: str) -> bool:
    """A line with a sign of relation and no words, or with the gaps that stand between two formulas."""
    alone = "\n" not in paragraph and SIGN.search(paragraph) is not None
    return alone and ("   " in paragraph or not WORD.search(paragraph))


def spelled_out(names: str, text: str, known: Mapping[str, Any] | None) -> Iterator[tuple[str, str]]:
    """The items of one that says "as in `hvp`": those of hvp, and then what is said here besides."""
    found = re.search(r"as in `(\w+)`[.;]?", text)
    of = arguments(known.get(found[1])) if known and found else {}
    if not {*names.split(", ")} <= {*of} or not found:
        yield names, text
        return
    *first, last = names.split(", ")
    yield from ((name, of[name]) for name in first)
    yield last, f"{of[last]} {text.replace(found[0], '').strip()}".strip()


def arguments(thing: Any) -> dict[str, str]:
    """What the docstring says of each argument."""
    found: dict[str, str] = {}
    block = re.search(r"^Args:\n((?:  .*\n|\n)*)", (inspect.getdoc(thing) or "") + "\n", re.MULTILINE)
    for item in re.split(r"\n(?=  \S)", block[1].rstrip()) if block else ():
        names, _, text = item.strip().partition(": ")
        found |= dict.fromkeys(names.split(", "), " ".join(text.split()))
    return found


def sections(mention: re.Match) -> str:
    """A link to the page, and one from each number of a section to its heading."""
    headings = re.findall(r"^##+ (\d+(?:\.\d+)?)\.? (.*)", MATHEMATICS.read_text(encoding="utf-8"), re.MULTILINE)
    slug = lambda text: re.sub(r"[^\w\- ]", "", text.lower()).strip().replace(" ", "-")
    anchors = {number: slug(f"{number} {title}") for number, title in headings}
    numbers = re.sub(
        r"\d+(?:\.\d+)?",
        lambda n: f"[{n[0]}](../mathematics.md#{anchors[n[0]]})" if n[0] in anchors else n[0],
        mention[1] or "",
    )
    return f"[mathematics](../mathematics.md){numbers}"


def linked(text: str, known: Mapping[str, Any]) -> str:
    """`name` as a link to its entry, outside of code blocks."""
    paths = {name: path for name, path in PATHS.items() if name in known}
    parts = re.split(r"(```.*?```)", text, flags=re.DOTALL)
    return "".join(
        part if part.startswith("```") else re.sub(r"(?<![`}])`(\w+)`(?!`)", lambda m: reference(m, paths), part)
        for part in parts
    )


def reference(name: re.Match, paths: Mapping[str, str]) -> str:
    return f"{{py:obj}}`{name[1]} <{paths[name[1]]}>`" if name[1] in paths else name[0]


def docstring(thing: Any, owner: type | None = None, name: str = "") -> str:
    """Its own, or for a member that overrides another, that one's."""
    found = inspect.getdoc(thing)
    if owner is not None and (not found or found == inspect.getdoc(type(thing))):
        overridden = [vars(base)[name] for base in owner.__mro__ if name in vars(base)]
        found = next((inspect.getdoc(member) for member in overridden if getattr(member, "__doc__", None)), None)
    return found or ""


def members(thing: type) -> Iterator[tuple[str, Any]]:
    """What a reader may call or read on the objects of a class."""
    for name, member in inspect.getmembers(thing):
        public = not name.startswith("_") or name == "__matmul__"
        if public and getattr(tuple, name, None) is None and (callable(member) or isinstance(member, property)):
            yield name, member


def entry(kind: str, path: str, thing: Any, known: Mapping[str, Any], depth: int = 4, text: str = "") -> Iterator[str]:
    fence = ":" * depth
    yield f"{fence}{{py:{kind}}} {path}{'' if kind in ('data', 'property') else signature(thing)}"
    yield ""
    alias = kind == "function" and thing.__name__ != path.rpartition(".")[2]
    if kind == "data":
        text = f"A {type(thing).__name__} of {len(thing)} entries: {', '.join(thing)}."
    text = f"Another name of `{thing.__name__}`." if alias else text or docstring(thing)
    if not text:
        raise ValueError(f"{path} is public and has no docstring")
    yield markdown(text, known)
    yield ""
    if kind == "class":
        for name, member in members(thing):
            of = "property" if isinstance(member, property) else "method"
            said = docstring(member, thing, name)
            if not said:
                raise ValueError(f"{path}.{name} is public and has no docstring")
            yield from entry(of, name, member, known, depth - 1, said)
    yield fence
    yield ""


def write(folder: Path) -> None:
    """One page per part, its introduction the docstring of the module, functions first; and a list of all names."""
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.md"):
        if old.stem not in (*ROOMS, "index"):
            old.unlink()
    objects = public_objects()
    PATHS.update({path.rpartition(".")[2]: path for path in objects})
    known = {path.rpartition(".")[2]: thing for path, thing in objects.items()}
    pages: dict[str, list[tuple[str, str, Any]]] = {name: [] for name in ROOMS}
    for path, thing in objects.items():
        kind = "class" if inspect.isclass(thing) else "function" if callable(thing) else "data"
        pages.setdefault(room(path, thing), []).append((kind, path, thing))
    listed = []
    for name, entries in pages.items():
        entries.sort(key=lambda found: ("function", "class", "data").index(found[0]))
        intro = inspect.getdoc(importlib.import_module(f"jaxsoftmax.{name}")) or ""
        lines = [line for found in entries for line in entry(*found, known)]
        save(folder / f"{name}.md", f"# {ROOMS.get(name, name)}\n\n{markdown(intro, known)}\n\n" + "\n".join(lines))
        listed += ["", f"## {ROOMS.get(name, name)}", ""]
        listed += [f"- {{py:obj}}`{path}`: {first_line(kind, thing)}" for kind, path, thing in entries]
    tree = "```{toctree}\n:hidden:\n" + "\n".join(pages) + "\n```\n"
    save(folder / "index.md", f"# API\n\n{tree}" + "\n".join(listed) + "\n")


def first_line(kind: str, thing: Any) -> str:
    return "" if kind == "data" else docstring(thing).partition("\n")[0]


MATHEMATICS = Path(__file__).parent / "mathematics.md"
PATHS: dict[str, str] = {}  # last part of a name -> the whole, where entries are


def save(path: Path, text: str) -> None:
    """Only if it is new, so that Sphinx does not read the page again."""
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")
