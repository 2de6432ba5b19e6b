"""Code that is the user's: a function out of a file, and what goes wrong in it. [ours]

A file is imported once, and may import its neighbours. Whatever its code raises, then or when it is called, the run
ends with one line that names the objective, the error, and the line that raised it.
"""

import ast
import hashlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType


class ObjectiveFailed(Exception):  # noqa: N818
    """A user's function raised; the message names the objective, the error and the line, the cause has it all.

    It is no RuntimeError, since contextlib would take one that a StopIteration caused for Python's own.
    """


@contextmanager
def user_errors(name: str, spec: str) -> Iterator[None]:
    """Within, a user's code runs: what it raises, be it anything, becomes the cause of an ObjectiveFailed."""
    try:
        yield
    except (Exception, SystemExit) as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ObjectiveFailed(
            f"objective {name!r} ({spec}) failed: {reason} (at {frame.filename}:{frame.lineno})"
        ) from error


def import_file(path: Path) -> ModuleType:
    """The module of a Python file, imported once; it may import its neighbours."""
    for module in list(sys.modules.values()):
        if getattr(module, "__file__", None) == str(path):
            return module
    spec = importlib.util.spec_from_file_location(f"objective_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    sys.modules[spec.name] = module  # dataclasses look for their module there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        raise
    return module


def load_function(name: str, spec: str) -> tuple[Callable[..., list[float]], str]:
    """The function that `FILE.py:FUNCTION` names, and a hash of its code; `name` is the objective's.

    Raises ValueError without such a file or function, or if it does not take what objectives are given;
    ObjectiveFailed if the file cannot be imported.
    """
    file, _, attribute = spec.rpartition(":")
    root = Path(__file__).parents[1]
    path = next((p.resolve() for p in (Path(file), root / file, root / "worlds" / file) if p.is_file()), None)
    if path is None or path.suffix != ".py":
        raise ValueError(f"there is no Python file {file}; write py:FILE.py:FUNCTION")
    with user_errors(name, f"py:{spec}"):
        module = import_file(path)
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ValueError(f"{file} has no function {attribute!r}")
    try:
        given = dict.fromkeys(("prompts", "completions", "completion_ids", "messages", "subset"))
        inspect.signature(function).bind_partial(**given)  # partial: it may ask for columns of the data
    except TypeError as error:
        raise ValueError(f"{attribute} must take (prompts, completions, **columns) by keyword: {error}") from error
    return function, fingerprint_of_code(path)


def fingerprint_of_code(file: Path) -> str:
    """A hash of a Python file, and of the neighbours that it imports, and those that they import."""
    found, waiting = {}, [file]
    while waiting:
        path = waiting.pop()
        if path in found or not path.is_file():
            continue
        found[path] = path.read_bytes()
        for node in ast.walk(ast.parse(found[path])):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            waiting += [file.parent / f"{name.split('.')[0]}.py" for name in names]
    return hashlib.sha256(b"".join(found[path] for path in sorted(found))).hexdigest()
