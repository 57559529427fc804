"""Finding a function of vLLM in its source, without importing it."""

from __future__ import annotations

import ast
from functools import lru_cache
from pathlib import Path


def source_of(folder: Path, module: str, qualname: str) -> str | None:
    """Text of `module.qualname` under `folder`; follows what a module imports by name.

    None when it is gone. `qualname` is a function, a class, or a method of the class or of its
    bases in vLLM.
    """
    path = _file(folder, module)
    if path is None:
        return None
    text, tree = _parsed(path)
    name, _, method = qualname.partition(".")
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    origin = "." * node.level + node.module
                    return source_of(
                        folder, _absolute(origin, module, path), f"{alias.name}.{method}".strip(".")
                    )
        if isinstance(node, ast.ClassDef) and node.name == name and method:
            return _method(folder, module, text, node, method)
        if (
            isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and node.name == name
        ):
            return ast.get_source_segment(text, node)
    return None


@lru_cache(maxsize=64)
def _parsed(path: Path) -> tuple[str, ast.Module]:
    """Many functions are looked for in few files."""
    text = path.read_text(encoding="utf-8")
    return text, ast.parse(text)


def _method(folder: Path, module: str, text: str, owner: ast.ClassDef, method: str) -> str | None:
    for node in owner.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == method:
            return ast.get_source_segment(text, node)
    for base in owner.bases:
        plain = base.value if isinstance(base, ast.Subscript) else base
        if isinstance(plain, ast.Name) and plain.id != owner.name:
            found = source_of(folder, module, f"{plain.id}.{method}")
            if found is not None:
                return found
    return None


def _file(folder: Path, module: str) -> Path | None:
    path = folder / module.replace(".", "/")
    found = [one for one in (path.with_suffix(".py"), path / "__init__.py") if one.exists()]
    return found[0] if found else None


def _absolute(origin: str, module: str, path: Path) -> str:
    """The module that `from origin import …` names, seen from `module`."""
    level = len(origin) - len(origin.lstrip("."))
    if not level:
        return origin
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    package = package[: len(package) - level + 1]
    return ".".join([*package, origin.lstrip(".")])
