#!/usr/bin/env python3
"""`make check`: what a reviewer should not have to look for.

Import arrows, sizes of functions and files, unused names, docstrings of public names: read from the syntax tree. Types
(mypy --strict) and style (ruff) where those programs are installed. Prints what is wrong; exit status 0 or 1.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import statistics
import subprocess
import sys
from typing import Dict, Iterator, List, Set

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ARROWS: Dict[str, Set[str]] = {"seqfile": set(), "importer": {"seqfile"}, "plot_ascii": {"importer"},
                               "co2d": {"seqfile", "importer", "plot_ascii"}}
TOP_LEVEL = {"co2d.py", "seqfile.py", "importer.py", "plot_ascii.py", "co2d.conf.example", "tests", "Makefile", "README.md"}
LONGEST, MOST_UNDER, MEDIAN = 50, 25, 8                         # lines of a function, docstring aside
# Lines. What each file has today, and more than the design wished for: they may become shorter, not longer.
MAX_FILE = {"seqfile": 715, "co2d": 2044, "importer": 2355, "plot_ascii": 1655}
WIDEST = 120                            # columns
STANDARD_LIBRARY = getattr(sys, "stdlib_module_names", None)    # since 3.10


def tree_of(module: str) -> ast.Module:
    with open(os.path.join(PROJECT, module + ".py"), encoding="utf-8") as file:
        return ast.parse(file.read())


def imports(tree: ast.AST) -> Set[str]:
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


def size_of(function: ast.FunctionDef) -> int:
    """Lines, docstring aside."""
    body = function.body[1:] if ast.get_docstring(function) and len(function.body) > 1 else function.body
    return (function.end_lineno or 0) - body[0].lineno + 1


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


def check_sizes() -> Iterator[str]:
    """Functions and lines fit a screen, files an hour."""
    for module in ARROWS:
        sizes = [(size_of(function), function) for function in functions(tree_of(module))]
        for size, function in sizes:
            if size > LONGEST:
                yield "%s.py:%d: %s has %d lines" % (module, function.lineno, function.name, size)
        over = [size for size, _ in sizes if size > MOST_UNDER]
        if len(over) > len(sizes) * 0.05:
            yield "%s.py: %d of %d functions have over %d lines" % (module, len(over), len(sizes), MOST_UNDER)
        if statistics.median(size for size, _ in sizes) > MEDIAN:
            yield "%s.py: the median function has over %d lines" % (module, MEDIAN)
        with open(os.path.join(PROJECT, module + ".py"), encoding="utf-8") as file:
            lines = file.read().splitlines()
        if len(lines) > MAX_FILE[module]:
            yield "%s.py has %d lines" % (module, len(lines))
        for number, line in enumerate(lines, 1):
            if len(line) > WIDEST:
                yield "%s.py:%d: %d columns" % (module, number, len(line))


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
    everything = "\n".join(texts.values())
    for module in ARROWS:
        own = texts[os.path.join(PROJECT, module + ".py")]
        tree = tree_of(module)
        imported = {(alias.asname or alias.name).split(".")[0] for node in tree.body
                    if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names} - {"annotations"}
        defined = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        for name in sorted(imported):
            if len(re.findall(r"\b%s\b" % name, own)) < 2:
                yield "%s.py imports %s and does not use it" % (module, name)
        for name in sorted(defined):
            if len(re.findall(r"\b%s\b" % name, everything)) < 2:
                yield "%s.py: %s is used nowhere" % (module, name)


def check_with(program: str, *arguments: str) -> Iterator[str]:
    """The complaints of a program, where it is installed."""
    if shutil.which(program):
        done = subprocess.run([program, *arguments], cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              universal_newlines=True)
        if done.returncode:
            yield from done.stdout.splitlines()
    else:
        print("make check: %s is not installed, skipped" % program)


def main() -> int:
    """Run all checks; the exit status."""
    modules = [module + ".py" for module in ARROWS]
    complaints: List[str] = [*check_arrows(), *check_top_level(), *check_sizes(), *check_docstrings(), *check_unused(),
                             *check_with("mypy", "--strict", "--no-error-summary", *modules),
                             *check_with("ruff", "check", "--quiet", "--no-cache", "--select", "E,F,W", "--ignore", "E501", *modules)]
    for line in complaints:
        print(line)
    print("make check: %s" % ("%d complaints" % len(complaints) if complaints else "all well"))
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
