"""The README, the pages of docs/ and the docstrings name modules, flags, config fields and files that are there."""

from __future__ import annotations

import ast
import functools
import importlib
import re
from pathlib import Path

import pytest
from conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = ("openpi_port", "configs", "convert", "experiments", "tests", "docs")
SOURCES = [path for folder in FOLDERS[:4] for path in sorted((ROOT / folder).rglob("*.py"))]
PROGRAMS = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__") for path in SOURCES]
COMMAND = re.compile(r"python3? -m (?P<module>[a-z][\w.]*)(?P<arguments>[^`\n]*)")
FILE = re.compile(rf"(?<![\w/.-])(?:{'|'.join(FOLDERS)}|\.)/[\w./-]*\w\.(?:py|md|txt|npz|json)\b")
INVENTED = {
    "config.field",
    "openpi_port/robots/my_arm.py",
    "configs/pi0_my_arm.py",
}  # in examples of what a user writes
EDGES = [
    importlib.import_module(f"configs.{path.stem}").get_config("debug")
    for path in sorted((ROOT / "configs").glob("pi0*.py"))
]


def prose(path: Path) -> str:
    """A page, or a file's docstring; continued lines of commands as one."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        text = ast.get_docstring(ast.parse(text)) or ""
    return re.sub(r"\\\n\s*", " ", text)


@functools.cache
def flags_of(module: str) -> frozenset[str]:
    """The flags that a module defines, or a module of this project's programs that it imports."""
    file = ROOT.joinpath(*module.split("."))
    file = file / "__main__.py" if file.is_dir() else file.with_suffix(".py")
    if not file.exists():
        return frozenset()
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "experiments":
            found.update(*(flags_of(f"experiments.{alias.name}") for alias in node.names))
        elif isinstance(node, ast.ImportFrom) and node.module.startswith(("experiments.", "convert.arguments")):
            found |= flags_of(node.module)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr.startswith("DEFINE_"):
                found.add(node.args[0].value)
            elif node.func.attr == "add_argument":
                found |= {arg.value.lstrip("-") for arg in node.args if isinstance(arg, ast.Constant)}
    return frozenset(found)


def is_field(name: str) -> bool:
    """Whether some config has the field, written "config.data.augment"."""

    def has(node, keys):
        return not keys or (hasattr(node, "keys") and keys[0] in node and has(node[keys[0]], keys[1:]))

    return any(has(edge, name.split(".")[1:]) for edge in EDGES)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_pages(path):
    text = prose(path)
    assert not wrong_commands(text)
    fields = set(re.findall(r"(?<![\w/])config\.[a-z]\w*(?:\.\w+)*(?![\w(])", text)) - {"config.json", "config.py"}
    assert {name for name in fields - INVENTED if not is_field(name)} == set()
    links = {link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link}
    assert {link for link in links if not leads_somewhere(path, link)} == set()
    shown = set(re.findall(r"`--([a-zA-Z]\w*)[`=]", text))
    assert shown - {"config", "signal", *(flag for name in PROGRAMS for flag in flags_of(name))} == set()  # SLURM's
    assert {name for name in set(FILE.findall(text)) - INVENTED if not (ROOT / name).exists()} == set()
    for dotted in set(re.findall(r"\bopenpi_port(?:\.\w+)+", text)):
        module, *names = longest_module(dotted)
        for name in names:
            module = getattr(module, name)  # AttributeError: the page names what is not there


def leads_somewhere(page: Path, link: str) -> bool:
    """Whether a link's file is there, and in it the heading that it names."""
    name, _, heading = link.partition("#")
    target = page.parent / name if name else page
    if not target.exists() or not heading:
        return target.exists()
    headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
    return heading in {re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in headings}


def test_docstrings():
    assert {str(path.relative_to(ROOT)): wrong for path in SOURCES if (wrong := wrong_commands(prose(path)))} == {}


def wrong_commands(text: str) -> list[str]:
    """Commands of modules that are not there, and flags and config fields that these don't have."""
    wrong = []
    for command in COMMAND.finditer(text):
        module = command["module"]
        if module == "pytest":
            continue
        given = re.findall(r"(?<![\w-])--([a-zA-Z][\w.-]*)", command["arguments"].partition(" # ")[0])
        known = flags_of(module)
        wrong += [module] if not known and given else []
        for flag in given:
            right = is_field(flag) if flag.startswith("config.") else flag.startswith("model.") or flag in known
            wrong += [] if right or flag in INVENTED else [f"{module} --{flag}"]
    return wrong


def longest_module(dotted: str) -> list:
    """The module at the beginning of a dotted name, and the names that follow."""
    parts = dotted.split(".")
    for count in range(len(parts), 0, -1):
        name = ".".join(parts[:count])
        try:
            return [importlib.import_module(name), *parts[count:]]
        except ModuleNotFoundError as error:
            if error.name != name and not name.startswith(f"{error.name}."):  # a package that it needs
                raise
    raise AssertionError(dotted)
