"""The import rule of the three floors: root modules, worlds, app; and what stands above them."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

HOUSE = Path(__file__).parent.parent
FILES = [file for folder in (".", "worlds", "app", "experiments") for file in HOUSE.glob(f"{folder}/*.py")]
MODULES = {".".join(file.relative_to(HOUSE).with_suffix("").parts): file for file in FILES}
ROOT = {name for name in MODULES if "." not in name} - {"run"}
FLOORS = {"root": 1, "worlds": 2, "app": 3, "run": 4, "app.nodes": 4, "experiments": 5}
KNOW_MODELS = {"lora", "rollout", "sampler", "rewards", "data"}  # the root modules that may import transformers
OUTSIDE = {"io", "multiprocessing", "os", "shutil", "subprocess", "tempfile", "threading", "time"}  # files, clocks, …


def imports_of(name: str) -> set[tuple[str, bool]]:
    """What a module imports, and whether inside a function. What only its command line imports is left out."""
    tree, imports = ast.parse(MODULES[name].read_text("utf-8")), set()
    tree.body = [node for node in tree.body if not (isinstance(node, ast.If) and "__name__" in ast.unparse(node.test))]
    late = {node for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for node in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imports |= {(alias.name, node in late) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names] if node.module in FLOORS else [node.module]
            imports |= {(module, node in late) for module in names}
    return imports


def floor(module: str) -> str:
    return "root" if module in ROOT else module if module in FLOORS else module.partition(".")[0]


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_from_its_own_floor_and_those_below(name):
    imported = {floor(module) for module, _ in imports_of(name)}
    assert all(FLOORS.get(each, 0) <= FLOORS[floor(name)] for each in imported)
    if name in ROOT:
        libraries = {"torch", "numpy", "transformers"} if name in KNOW_MODELS else {"torch", "numpy"}
        assert imported <= {"root"} | libraries | (sys.stdlib_module_names - OUTSIDE)


def test_no_imports_go_in_a_circle():
    imports = {name: {module for module, _ in imports_of(name)} for name in MODULES}
    order = [*TopologicalSorter(imports).static_order()]  # raises CycleError
    assert order.index("mgda") < order.index("firm") < order.index("run")


@pytest.mark.parametrize("name", MODULES)
def test_late_imports_are_of_pictures_and_libraries(name):
    assert not {module for module, late in imports_of(name) if late and floor(module) in FLOORS} - {"app.plots"}


def test_importing_firm_loads_at_most_ten_modules_of_the_project():
    code = "import sys, firm; print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-c", code], cwd=HOUSE, text=True).split()
    assert "mgda" in loaded and len(MODULES.keys() & set(loaded)) <= 10
