"""The plan of the house, held by a test: imports flow one way, files stay short, nothing unpickles."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = (
    "utils", "networks", "data", "workers", "training", "visualization", "federated", "homogeneous", "valuation",
    "ledger", "benchmarks",
)  # fmt: skip
ENTRIES = ("main", "main_pruned", "commands")

# room -> the rooms it may see besides itself
SEES = {
    "utils": set(),
    "networks": {"utils"},
    "data": {"utils"},
    "workers": {"utils", "networks", "data"},
    "training": {"utils", "networks", "data", "workers"},
    "visualization": {"utils"},
    "federated": {"utils", "networks", "data", "workers", "training", "visualization"},
    "homogeneous": {"utils", "networks", "data", "workers", "training", "visualization"},
    "valuation": {"utils", "networks", "data", "workers", "training", "visualization"},
    "ledger": {"utils", "networks", "data", "workers", "training", "visualization"},
    "benchmarks": {*ROOMS, *ENTRIES},
    "main": set(ROOMS) - {"benchmarks"},
    "main_pruned": set(ROOMS) - {"benchmarks"},
    "commands": {*ROOMS, *ENTRIES} - {"benchmarks"},
}  # fmt: skip

FILES = sorted(p for room in ROOMS for p in (ROOT / room).rglob("*.py")) + [ROOT / f"{name}.py" for name in ENTRIES]
TREES = {path: ast.parse(path.read_text(), str(path)) for path in FILES}


def module_of(path: Path) -> str:
    """The dotted name of a file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


REGISTRY = ROOT / "utils" / "registry.py"
MODULES = {module_of(path) for path in FILES}


def for_types_only(tree: ast.AST) -> set[ast.AST]:
    """The nodes under ``if TYPE_CHECKING``: they never run."""
    blocks = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
    return {inner for block in blocks for statement in block.body for inner in ast.walk(statement)}


def imports(path: Path, at_start: bool = False, types: bool = False) -> set[str]:
    """The project's modules that a file imports; ``at_start``: when it is loaded, not in its functions.
    Lazy registries, which name modules in strings, count as imports in functions.
    ``types``: what is imported for types alone counts too."""
    if path == REGISTRY:  # names modules of all rooms for the command line, and imports none
        return {"utils.errors"}
    tree, found = TREES[path], set()
    skipped = set() if types else for_types_only(tree)
    if at_start:
        functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)]
        skipped |= {inner for function in functions for inner in ast.walk(function)}
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and not at_start:
            module = node.value.partition(":")[0]  # registries say 'module:name'
            if module in MODULES and "." in module:
                found.add(module)
    return {name for name in found if name.split(".")[0] in SEES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_flow_one_way(path):
    room = module_of(path).split(".")[0]
    for name in imports(path):
        other = name.split(".")[0]
        assert other == room or other in SEES[room], f"{path} imports {name}"
        if room == "visualization" and other == "utils":
            seen = ("utils.records", "utils.scores", "utils.errors", "utils.command", "utils.intervals",
                    "utils.registry", "utils.influence.statistics", "utils.effects")  # fmt: skip
            assert name.startswith(seen), f"{path} imports {name}"


def test_no_cycles():
    """In the lower rooms not for types either: a reader follows those too. (A protocol's job knows the protocol.)"""
    graph = {}
    for path in FILES:
        name = module_of(path)
        types = name.startswith(("networks", "data", "workers"))
        graph[name] = {n for n in imports(path, at_start=True, types=types) if n in MODULES} - {name}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail[trail.index(name) :], name))
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_nothing_imports_the_entry_points_or_the_tests():
    for path in FILES:
        if module_of(path).split(".")[0] not in ("benchmarks", *ENTRIES):
            assert not imports(path) & set(ENTRIES), path
        assert not any(name.split(".")[0] in ("tests", "command", "runs", "helpers") for name in imports(path)), path


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short_and_have_a_docstring(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    assert not text.strip() or ast.get_docstring(TREES[path]), "say what the file is for"


def test_no_drawer():
    names = {p.relative_to(ROOT).as_posix() for p in FILES}
    assert not [
        n for n in names if Path(n).stem in ("utils", "misc", "helpers", "common") and not n.startswith("benchmarks/")
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_unpickles(path):
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] + [getattr(node, "module", None) or ""]
            assert not {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal"} & set(names), path
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        given = {k.arg: ast.unparse(k.value) for k in node.keywords}
        if called in ("torch.load", "torch.hub.load_state_dict_from_url", "load_state_dict_from_url"):
            assert given.get("weights_only") == "True", f"{path}:{node.lineno}"
        if called.split(".")[-1] in ("load", "read_array") and called.split(".")[0] in ("np", "numpy"):
            assert given.get("allow_pickle") == "False", f"{path}:{node.lineno}"
        if called in ("joblib.load", "pandas.read_pickle", "torch.hub.load", "eval", "exec", "os.system"):
            raise AssertionError(f"{path}:{node.lineno} calls {called}")
        if called.startswith("subprocess."):
            assert given.get("shell", "False") == "False", f"{path}:{node.lineno}"


KNOW_ENGINES = {"workers/engine.py", "workers/tuning.py", "utils/effects.py", "utils/recorded.py"}


def engine_names(tree: ast.AST) -> list[int]:
    """Lines that compare something with the name of an engine, or look one up by it."""
    names = {"threads", "loop", "vmap", "graph"}

    def named(node: ast.AST) -> bool:
        parts = node.elts if isinstance(node, ast.Tuple | ast.List | ast.Set) else [node]
        return any(isinstance(part, ast.Constant) and part.value in names for part in parts) or (
            isinstance(node, ast.Attribute) and ast.unparse(node).endswith("engine.name")
        )

    compared = [n for n in ast.walk(tree) if isinstance(n, ast.Compare) and any(map(named, [n.left, *n.comparators]))]
    looked_up = [n for n in ast.walk(tree) if isinstance(n, ast.Subscript) and named(n.slice)]
    return [node.lineno for node in compared + looked_up]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_one_file_knows_how_engines_work(path):
    name = path.relative_to(ROOT).as_posix()
    if name not in KNOW_ENGINES and not name.startswith("benchmarks/"):  # those: the rule, and the command line
        assert not engine_names(TREES[path]), f"{path}: ask the engine for what is needed (batched, recorded, ...)"


def test_the_rooms_of_the_plan_are_there():
    for name in """
        main.py main_pruned.py requirements.txt workers/worker_vision.py networks/__init__.py training/trainer.py
        training/build.py data/dataset_loader.py visualization/plot_utils.py utils/args.py utils/scheduler.py
        utils/random.py utils/dirichlet.py utils/early_stopping.py utils/topology.py utils/records.py
        utils/influence/__init__.py
    """.split():
        assert (ROOT / name).is_file(), name
    assert max(len((ROOT / f"{name}.py").read_text().splitlines()) for name in ENTRIES) < 160


# ---- the test itself can fail -----------------------------------------------------------------------------


def test_comparisons_of_engines_are_found():
    lines = ["engine.name == 'vmap'", "name in ('loop', 'x')", "CHUNKS[self.engine.name]", "'a' != job.engine.name"]
    for line in lines:
        assert engine_names(ast.parse(line)) == [1], line
    assert not engine_names(ast.parse('Engine(model, engine.name)\nengine.batched\nmode == "ring"'))


def test_imports_are_found(tmp_path):
    path = tmp_path / "x.py"
    TREES[path] = ast.parse(
        "import utils.args\nfrom training import build\nif TYPE_CHECKING:\n    import data\n"
        "def f():\n    from workers.engine import Engine\nLAZY = {'a': 'training.protocols.gossip:Gossip'}\n"
    )
    try:
        assert imports(path) >= {
            "utils.args",
            "training.build",
            "workers.engine",
            "training.protocols.gossip",
        }
        assert imports(path, at_start=True) == {"utils.args", "training", "training.build"}
        assert "data" in imports(path, at_start=True, types=True)
    finally:
        del TREES[path]
