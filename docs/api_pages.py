"""The API reference, one page per room of the package, made from `__all__` and the docstrings, which are Markdown."""

import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jaxsoftmax

# Rooms in reading order, with the title of their page.
ROOMS = {
    "autodiff": "Rules for both modes",
    "maps": "Maps",
    "operators": "Operators",
    "losses": "Losses",
    "linear_head": "The linear head",
    "matrix_calculus": "Matrix calculus",
    "network": "Networks by hand",
    "curvature": "Curvature",
    "training": "Training",
    "verify": "Reports",
    "plotting": "Pictures",
}
SECTION = re.compile(r"(Args|Attributes|Returns|Raises|Example|Reference):(.*)")
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
    bare = [p.replace(annotation=p.empty) for p in parameters if p.name not in ("self", "cls")]
    return str(inspect.Signature(bare))


def markdown(docstring: str) -> str:
    """Google's sections as paragraphs and lists; everything else is Markdown already."""
    out: list[str] = []
    section = ""

    def close_example() -> None:
        if section == "Example":
            while not out[-1]:
                out.pop()
            out.append("```")

    for line in inspect.cleandoc(docstring).splitlines():
        if header := SECTION.fullmatch(line):
            close_example()
            section = header[1]
            out += ["", f"**{section}**{header[2]}"] + [""] * (not header[2])
            if section == "Example":
                out.append("```pycon")
        elif section in ("Args", "Attributes", "Raises") and (item := ITEM.fullmatch(line)):
            out.append(f"- **{item[1].replace('*', chr(92) + '*')}**: {item[2]}")
        elif section == "Example":
            if line or not out[-1].startswith("```"):
                out.append(line[2:])
        elif section:
            out.append(line[2:] if line.startswith("  ") else line)
        else:
            out.append(line)
    close_example()
    text = re.sub(r"(?<![(<`])https?://[^\s;,)]*[^\s;,).]", r"<\g<0>>", "\n".join(out))
    section_of = r"docs/mathematics\.md(,\s+sections?\s+[\d., and to]*\d)?"
    return re.sub(section_of, r"[mathematics\1](../mathematics.md)", text)


def entry(kind: str, path: str, thing: Any, depth: int = 4) -> Iterator[str]:
    fence = ":" * depth
    yield f"{fence}{{py:{kind}}} {path}{'' if kind in ('data', 'property') else signature(thing)}"
    yield ""
    alias = kind == "function" and thing.__name__ != path.rpartition(".")[2]
    yield f"Another name of `{thing.__name__}`." if alias else markdown(inspect.getdoc(thing) or "")
    yield ""
    if kind == "class":
        for name, member in inspect.getmembers(thing):
            own = name.startswith("_") or not inspect.getdoc(member) or getattr(tuple, name, None) is not None
            if not own and (callable(member) or isinstance(member, property)):
                of = "property" if isinstance(member, property) else "method"
                yield from entry(of, name, member, depth - 1)
    yield fence
    yield ""


def write(folder: Path) -> None:
    """One page per room, and the list of them."""
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.md"):
        if old.stem not in (*ROOMS, "index"):
            old.unlink()
    pages: dict[str, list[str]] = {name: [] for name in ROOMS}
    for path, thing in public_objects().items():
        kind = "class" if inspect.isclass(thing) else "function" if callable(thing) else "data"
        pages.setdefault(room(path, thing), []).extend(entry(kind, path, thing))
    for name, lines in pages.items():
        text = f"# {ROOMS.get(name, name)}\n\n" + "\n".join(lines)
        if name == "losses":
            text = f"# {ROOMS[name]}\n\n{markdown(inspect.getdoc(jaxsoftmax.losses) or '')}\n\n" + "\n".join(lines)
        save(folder / f"{name}.md", text)
    save(folder / "index.md", "# API\n\n```{toctree}\n" + "\n".join(pages) + "\n```\n")


def save(path: Path, text: str) -> None:
    """Only if it is new, so that Sphinx does not read the page again."""
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")
