"""Rules for the source tree: which package may import which, and how large things may be.

The source is only read: nothing of it is imported. A failure is a list of
`file:line: what is wrong`.
"""

import ast
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HOUSE = ROOT / "seal_jax"

# Packages and top files: each imports only what stands on a line before its own. Those of one line
# do not import each other. Tasks import only tasks, extensions and hosts.json_text, see
# tasks_know_no_jax.
LAYERS = """
types keys extensions
hosts
sharding
tasks
optim
models
sampling
inner
objectives
outer
runs
continual
sources
config
planning
train
bench
commands
""".strip().splitlines()
LEVELS = {room: level for level, line in enumerate(LAYERS) for room in line.split()}

FRAMEWORKS = {"jax", "jaxlib", "flax", "optax", "orbax", "torch", "tensorflow"}
DOOR = ("config", "train", "bench", "commands")  # they may know a config as it is written
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)


@functools.cache
def trees() -> dict[str, ast.Module]:
    """Return every file's tree, by its path in the package."""
    return {
        path.relative_to(HOUSE).as_posix(): ast.parse(path.read_text("utf-8"))
        for path in sorted(HOUSE.rglob("*.py"))
    }


def module_of(path: str) -> str:
    parts = ["seal_jax", *path.removesuffix(".py").split("/")]
    return ".".join(parts).removesuffix(".__init__")


@functools.cache
def modules() -> dict[str, str]:
    """Return every module's path."""
    return {module_of(path): path for path in trees()}


@functools.cache
def imports(path: str) -> list[tuple[int, str]]:
    """Return what a file imports, in functions too: lines, and modules as far as they are known."""
    found = []
    for node in ast.walk(trees()[path]):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module_of(path).split(".")[: None if "__init__" in path else -1]
                base = ".".join([*package[: len(package) - node.level + 1], *base.split(".")])
            for alias in node.names:
                name = f"{base}.{alias.name}"
                found.append((node.lineno, name if name in modules() else base))
    return found


def room_of(path: str) -> str:
    return path.split("/")[0].removesuffix(".py")


def functions(path: str) -> Iterator[tuple[ast.FunctionDef, int]]:
    """Yield every function, and in how many others it stands."""

    def visit(node: ast.AST, depth: int) -> Iterator[tuple[ast.FunctionDef, int]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, FUNCTION):
                yield child, depth
            yield from visit(child, depth + isinstance(child, FUNCTION))

    return visit(trees()[path], 0)


def last_name(node: ast.AST | None) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):  # an annotation in quotes
        return node.value
    return getattr(node, "id", "") or getattr(node, "attr", "")


def one_way(path: str) -> Iterator[tuple[int, str]]:
    here = room_of(path)
    if here == "__init__":
        return
    if here not in LEVELS:
        yield 1, f"{here} is not in LAYERS"
        return
    for line, name in imports(path):
        parts = name.split(".")
        if parts[0] != "seal_jax" or parts[1:2] in ([], [here]):
            continue
        if parts[1] not in LEVELS:
            yield line, f"{name} is not in LAYERS"
        elif LEVELS[parts[1]] >= LEVELS[here]:
            yield line, f"{here} imports {name}, which stands above it"


def no_circle(path: str) -> Iterator[tuple[int, str]]:
    start = module_of(path)
    seen, todo = set(), [(line, name, name) for line, name in imports(path)]
    while todo:
        line, first, name = todo.pop()
        if name == start:
            yield line, f"{first} imports {start} again"
        elif name in modules() and name not in seen:
            seen.add(name)
            todo += [(line, first, other) for _, other in imports(modules()[name])]


def tasks_know_no_jax(path: str) -> Iterator[tuple[int, str]]:
    for line, name in imports(path) if room_of(path) == "tasks" else ():
        parts = name.split(".")
        own = parts[0] != "seal_jax" or parts[1:2] in (["tasks"], ["extensions"])
        own |= name.startswith("seal_jax.hosts.json_text")
        if parts[0] in FRAMEWORKS or not own:
            yield line, f"a task imports {name}"


def short_files(path: str) -> Iterator[tuple[int, str]]:
    count = len((HOUSE / path).read_text("utf-8").splitlines())
    most = 450 if path == "models/transformer.py" else 400
    if count > most:
        yield count, f"{count} lines, at most {most}"


def short_functions(path: str) -> Iterator[tuple[int, str]]:
    for function, _ in functions(path):
        count = function.end_lineno - function.lineno + 1
        if count > 90:
            yield function.lineno, f"{function.name} has {count} lines, at most 90"


@functools.cache
def named_tuples() -> set[str]:
    return {
        node.name
        for tree in trees().values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and "NamedTuple" in map(last_name, node.bases)
    }


def few_parameters(path: str) -> Iterator[tuple[int, str]]:
    """At most eight, and a NamedTuple of settings beside them."""
    for function, _ in functions(path):
        arguments = function.args
        given = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        given = [one for one in given if one.arg not in ("self", "cls")]
        settings = any(last_name(one.annotation) in named_tuples() for one in given)
        if len(given) - settings > 8:
            yield function.lineno, f"{function.name} has {len(given)} parameters"


def no_closure_in_a_closure(path: str) -> Iterator[tuple[int, str]]:
    for function, depth in functions(path):
        if depth > 1:
            yield function.lineno, f"{function.name} stands in a function in a function"


def shardings_are_made_in_one_place(path: str) -> Iterator[tuple[int, str]]:
    kinds = {"PartitionSpec", "NamedSharding"}
    tree = trees()[path]
    known = kinds | {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.name in kinds
    }
    for node in ast.walk(tree) if path != "sharding.py" else ():
        if isinstance(node, ast.Call) and last_name(node.func) in known:
            yield node.lineno, f"makes a {last_name(node.func)}; sharding.py should"


def a_config_stops_at_the_door(path: str) -> Iterator[tuple[int, str]]:
    for line, name in imports(path) if room_of(path) not in DOOR else ():
        if name.split(".")[0] == "ml_collections":
            yield line, "knows ConfigDict; it should take its values"


RULES = [
    one_way,
    no_circle,
    tasks_know_no_jax,
    short_files,
    short_functions,
    few_parameters,
    no_closure_in_a_closure,
    shardings_are_made_in_one_place,
    a_config_stops_at_the_door,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_every_file_keeps_the_rule(rule: Callable[[str], Iterator[tuple[int, str]]]):
    broken = sorted({(path, line, what) for path in trees() for line, what in rule(path)})
    assert not broken, "\n" + "\n".join(f"seal_jax/{p}:{line}: {what}" for p, line, what in broken)


def test_few_functions_are_long():
    long = [
        f"seal_jax/{path}:{function.lineno}: {function.name}, {count} lines"
        for path in trees()
        for function, _ in functions(path)
        if (count := function.end_lineno - function.lineno + 1) > 60
    ]
    assert len(long) <= 5, "at most 5 functions over 60 lines:\n" + "\n".join(long)


def test_the_top_is_seen_at_a_glance():
    entries = sorted(path.name for path in HOUSE.iterdir() if path.name != "__pycache__")
    assert len(entries) <= 21, entries


def test_the_rules_can_be_broken(tmp_path, monkeypatch):
    """What each rule is for, in a package that breaks them all."""
    (tmp_path / "tasks").mkdir()
    parameters = ", ".join("abcdefghi")
    (tmp_path / "types.py").write_text(
        "from typing import NamedTuple\n"
        "from seal_jax import sources\n"
        "from jax.sharding import PartitionSpec as P\n"
        "class Settings(NamedTuple):\n    a: int\n"
        f"def few({parameters[:-1]}i: Settings): ...\n"
        f"def many({parameters}):\n"
        "    def inner():\n        def innermost(): ...\n"
        "    return P()\n"
        "def long():\n" + "    pass\n" * 400
    )
    (tmp_path / "sources.py").write_text(
        "from ml_collections import ConfigDict\n"
        "def load():\n    from seal_jax.types import Settings\n"
    )
    (tmp_path / "tasks/toy.py").write_text("import jax.numpy\nfrom seal_jax.hosts import files\n")
    monkeypatch.setitem(globals(), "HOUSE", tmp_path)
    cached = (trees, modules, imports, named_tuples)
    for function in cached:
        function.cache_clear()
    try:
        broken = {rule: [(p, n) for p in trees() for n, _ in rule(p)] for rule in RULES}
    finally:
        for function in cached:
            function.cache_clear()
    assert broken == {
        one_way: [("types.py", 2)],
        no_circle: [("sources.py", 3), ("types.py", 2)],
        tasks_know_no_jax: [("tasks/toy.py", 1), ("tasks/toy.py", 2)],
        short_files: [("types.py", 411)],
        short_functions: [("types.py", 11)],
        few_parameters: [("types.py", 7)],
        no_closure_in_a_closure: [("types.py", 9)],
        shardings_are_made_in_one_place: [("types.py", 10)],
        a_config_stops_at_the_door: [("sources.py", 1)],
    }
