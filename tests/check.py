#!/usr/bin/env python3
"""`make check`: what a reviewer should not have to look for.

Import arrows, plain code (`measure`), unused names, docstrings of public names: read from the syntax tree and from the
tokens. Types (mypy, as far as it infers them from the fields of the classes) and style (ruff) where those programs are
installed. Prints what is wrong; exit status 0 or 1.
"""

from __future__ import annotations

import ast
import io
import os
import re
import shutil
import subprocess
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ARROWS: dict[str, set[str]] = {"seqfile": set(), "importer": {"seqfile"}, "plot_ascii": {"importer"},
                               "co2d": {"seqfile", "importer", "plot_ascii"}}
TOP_LEVEL = {"co2d.py", "seqfile.py", "importer.py", "plot_ascii.py", "co2d.conf.example", "tests", "Makefile", "README.md"}
LONGEST = 45                            # lines of a function, docstring included
DENSEST = 9.5                           # tokens in a line of code; the goal is 8, good Python code has 5 to 7.4
MOST_PARAMETERS = 5                     # positional ones, self aside
BUDGET = 70000                          # tokens of the four files together: delete before you add
WIDEST = 120                            # columns
STANDARD_LIBRARY = getattr(sys, "stdlib_module_names", None)    # since 3.10


def text_of(module: str) -> str:
    """The source of one of the four files."""
    with open(os.path.join(PROJECT, module + ".py"), encoding="utf-8") as file:
        return file.read()


def tree_of(module: str) -> ast.Module:
    """Its syntax tree."""
    return ast.parse(text_of(module))


def imports(tree: ast.AST) -> set[str]:
    """Top-level names of all modules that are imported anywhere in a tree."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    return found


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def docstring_lines(tree: ast.AST) -> set[int]:
    """Numbers of the lines that docstrings take."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node, clean=False) is not None:
            docstring = node.body[0]
            lines.update(range(docstring.lineno, (docstring.end_lineno or 0) + 1))
    return lines


class Measure(NamedTuple):
    """How plain a file is: tokens and lines of code without comments and docstrings; the lines of what falls short."""

    tokens: int
    lines: int
    nested: list[int]                   # comprehensions that hold another
    crowded: list[str]                  # functions with more than MOST_PARAMETERS
    long: list[str]                     # functions with more than LONGEST lines


_LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING,
           tokenize.ENDMARKER}
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def measure(source: str) -> Measure:
    """Count what the rules of plain code limit."""
    tree = ast.parse(source)
    documented = docstring_lines(tree)
    tokens = [token for token in _whole_strings(source) if token.type not in _LAYOUT and token.start[0] not in documented]
    lines: set[int] = set()
    for token in tokens:
        lines.update(range(token.start[0], token.end[0] + 1))
    crowded = [function.name for function in functions(tree) if len(_positional(function)) > MOST_PARAMETERS]
    long = [function.name for function in functions(tree) if _height(function) > LONGEST]
    return Measure(len(tokens), len(lines), list(_nested(tree)), crowded, long)


def _whole_strings(source: str) -> Iterator[tokenize.TokenInfo]:
    """All tokens, an f-string as one, as it is one before Python 3.12."""
    begin, end = getattr(tokenize, "FSTRING_START", -1), getattr(tokenize, "FSTRING_END", -1)
    depth = 0
    for token in tokenize.tokenize(io.BytesIO(source.encode()).readline):
        if depth == 0:
            yield token
        depth += (token.type == begin) - (token.type == end)


def _nested(tree: ast.AST) -> Iterator[int]:
    for outer in ast.walk(tree):
        if isinstance(outer, _COMPREHENSIONS):
            for inner in ast.walk(outer):
                if inner is not outer and isinstance(inner, _COMPREHENSIONS):
                    yield inner.lineno


def _positional(function: ast.FunctionDef) -> list[str]:
    arguments = function.args.posonlyargs + function.args.args
    return [argument.arg for argument in arguments if argument.arg not in ("self", "cls")]


def _height(function: ast.FunctionDef) -> int:
    return (function.end_lineno or 0) - function.lineno + 1


def check_arrows() -> Iterator[str]:
    """Who may import whom; nothing beyond the standard library."""
    for module, allowed in ARROWS.items():
        names = imports(tree_of(module))
        for name in sorted(names & set(ARROWS) - allowed):
            yield "%s.py imports %s" % (module, name)
        if STANDARD_LIBRARY:
            for name in sorted(names - set(ARROWS) - set(STANDARD_LIBRARY)):
                yield "%s.py imports %s, which is not in the standard library" % (module, name)


def check_top_level() -> Iterator[str]:
    """Exactly the files that there are to be."""
    done = subprocess.run(["git", "ls-files"], cwd=PROJECT, stdout=subprocess.PIPE, universal_newlines=True)
    names = {line.split("/")[0] for line in done.stdout.splitlines()}
    for name in sorted(names ^ TOP_LEVEL if names else []):
        if not name.startswith("."):
            yield "top level: %s is %s" % (name, "missing" if name in TOP_LEVEL else "not wanted")


def check_plainness() -> Iterator[str]:
    """One idea in a line, and all lines within the budget."""
    total = 0
    for module in ARROWS:
        source = text_of(module)
        found = measure(source)
        total += found.tokens
        density = found.tokens / found.lines
        if density > DENSEST:
            yield "%s.py has %.1f tokens in a line, at most %.1f are plain" % (module, density, DENSEST)
        for number in found.nested:
            yield "%s.py:%d: a comprehension inside a comprehension" % (module, number)
        for name in found.crowded:
            yield "%s.py: %s has more than %d positional parameters" % (module, name, MOST_PARAMETERS)
        for name in found.long:
            yield "%s.py: %s has more than %d lines" % (module, name, LONGEST)
        for number, line in enumerate(source.splitlines(), 1):
            if len(line) > WIDEST:
                yield "%s.py:%d: %d columns" % (module, number, len(line))
    print("make check: %d tokens in the four files, of at most %d" % (total, BUDGET))
    if total > BUDGET:
        yield "the four files have %d tokens, more than %d: delete before you add" % (total, BUDGET)


def check_docstrings() -> Iterator[str]:
    """Every public name says what it is."""
    for module in ARROWS:
        for node in ast.walk(tree_of(module)):
            if isinstance(node, ast.ClassDef):
                members = [m for m in node.body if isinstance(m, ast.FunctionDef) and m.name != "__init__"]
                inherits = bool(node.bases) and not any(getattr(base, "id", "") in ("NamedTuple", "Exception") for base in node.bases)
                checked = [node] + ([] if inherits or node.name.startswith("_") else members)
            elif isinstance(node, ast.Module):
                checked = [m for m in node.body if isinstance(m, ast.FunctionDef)]
            else:
                continue
            for one in checked:
                if not one.name.startswith("_") and not ast.get_docstring(one) and one.name not in ("main", "run"):
                    yield "%s.py:%d: %s has no docstring" % (module, one.lineno, one.name)


def check_unused() -> Iterator[str]:
    """Names that are defined at the top of a module, or imported, and used nowhere."""
    texts = {}
    for folder in (PROJECT, os.path.join(PROJECT, "tests")):
        for name in os.listdir(folder):
            if name.endswith(".py") or name in ("Makefile", "README.md"):
                with open(os.path.join(folder, name), encoding="utf-8") as file:
                    texts[os.path.join(folder, name)] = file.read()
    everywhere = Counter(re.findall(r"\w+", "\n".join(texts.values())))
    for module in ARROWS:
        own = Counter(re.findall(r"\w+", texts[os.path.join(PROJECT, module + ".py")]))
        tree = tree_of(module)
        imported = {(alias.asname or alias.name).split(".")[0] for node in tree.body
                    if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names} - {"annotations"}
        defined = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        for name in sorted(imported):
            if own[name] < 2:
                yield "%s.py imports %s and does not use it" % (module, name)
        for name in sorted(defined):
            if everywhere[name] < 2:
                yield "%s.py: %s is used nowhere" % (module, name)


def check_with(program: str, *arguments: str, known: str = r"(?!)") -> Iterator[str]:
    """The complaints of a program, where it is installed; not those that match `known` (by default none)."""
    if shutil.which(program):
        done = subprocess.run([program, *arguments], cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              universal_newlines=True)
        yield from (line for line in done.stdout.splitlines() if not re.search(known, line))
    else:
        print("make check: %s is not installed, skipped" % program)


def main() -> int:
    """Run all checks; the exit status."""
    modules = [module + ".py" for module in ARROWS]
    complaints: list[str] = [*check_arrows(), *check_top_level(), *check_plainness(), *check_docstrings(), *check_unused(),
                             *check_with("mypy", "--check-untyped-defs", "--no-strict-optional", "--disable-error-code=var-annotated",
                                         "--disable-error-code=assignment", "--no-error-summary", *modules,
                                         known=r'"Settings|namedtuple\(\)'),          # its fields are made from a table
                             *check_with("ruff", "check", "--quiet", "--no-cache", "--select", "E,F,W", "--ignore", "E501", *modules)]
    for line in complaints:
        print(line)
    print("make check: %s" % ("%d complaints" % len(complaints) if complaints else "all well"))
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
