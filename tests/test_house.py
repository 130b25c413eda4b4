"""The structure of the project: the direction of imports, no circle, no re-export, what loads without torch, limits.

    python tests/test_house.py [FOLDER]      # rooms, floors, arrows and circles of this project, or of another folder

A room is a script, common.py or a module of classifier/. An arrow is an import of one by another, inside functions too.
A room stands one floor above the highest room that it imports.
"""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"train", "evaluate", "predict", "export", "sweep"}
# A module imports from its own group and from lower levels. Two groups on one level do not see each other.
GROUPS = [
    [{"classifier.messages", "classifier.files"}],
    [{"classifier.processes"}, {"classifier.data"}],
    [{"classifier.model"}],
    [{"classifier.training"}, {"classifier.evaluation"}],
    [{"classifier.predictor", "classifier.chunks"}],
    [{"common"}],
    [SCRIPTS],
]
TORCH_FREE = [
    *("classifier.messages", "classifier.files", "classifier.processes", "classifier.predictor", "common"),
    *(f"classifier.data.{name}" for name in ("reader", "writer", "tasks", "splits", "labels", "cache", "facts")),
    *("classifier.model.tokenization", "classifier.evaluation.metrics", "train", "evaluate", "predict", "export"),
]
FOLDERS = {"accelerate_configs", "benchmarks", "classifier", "data", "docs", "examples", "slurm", "tests"}
FILES = {f"{name}.py" for name in (*SCRIPTS, "common")} | {
    *("README.md", "README.zh.md", "LICENSE", "pyproject.toml"),
    *("requirements.txt", "requirements-extra.txt", "requirements-dev.txt"),
}
LINES = {"train.py": 350, "common.py": 250}  # of a file; of others in classifier/:
LINES_OF_A_ROOM = 450
LINES_OF_A_FUNCTION = 70
LINES_OF_MAIN, LINES_OF_THE_LOOP = 150, 60  # of train.py
ROOMS_AT_FIRST_SIGHT = 15  # scripts and folders at the top


def rooms_of(root):
    """Return {module name: syntax tree} of the scripts and the package."""
    files = [*root.glob("*.py"), *(root / "classifier").rglob("*.py")]
    names = {path: ".".join(path.relative_to(root).with_suffix("").parts) for path in files if path.stem != "__init__"}
    return {names[path]: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(names)}


def imports_of(tree, rooms):
    """Yield (room, name or None, local name) of each import of another room; None where the room itself is imported."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name in rooms:
                    yield alias.name, None, alias.asname or alias.name
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                if full in rooms:
                    yield full, None, alias.asname or alias.name
                elif node.module in rooms:
                    yield node.module, alias.name, alias.asname or alias.name


def arrows_of(rooms):
    """Return {room: the rooms that it imports}."""
    return {room: {other for other, _, _ in imports_of(tree, rooms)} for room, tree in rooms.items()}


def floors_of(arrows):
    """Return ({room: floor}, the rooms that are on a circle, or above one)."""
    floors, left = {}, set(arrows)
    while ready := {room for room in left if arrows[room] <= floors.keys()}:
        floors |= {room: 1 + max((floors[other] for other in arrows[room]), default=0) for room in ready}
        left -= ready
    return floors, left


def place_of(room):
    """Return (level, group) of a room in GROUPS."""
    for level, groups in enumerate(GROUPS):
        for number, group in enumerate(groups):
            if room in group or room.rpartition(".")[0] in group:
                return level, number
    raise ValueError(f"{room} has no place in GROUPS")


def wrong_directions(rooms):
    for room, others in arrows_of(rooms).items():
        level, group = place_of(room)
        for other in sorted(others):
            other_level, other_group = place_of(other)
            if room in SCRIPTS and other in SCRIPTS:
                yield f"{room} imports {other}: a script imports no script"
            elif other_level > level or (other_level == level and other_group != group):
                yield f"{room} imports {other}"


def defined_names(tree):
    """Return the names that a module defines itself, at module level."""
    names = set()
    for statement in tree.body:
        if isinstance(statement, ast.FunctionDef | ast.ClassDef):
            names.add(statement.name)
        elif isinstance(statement, ast.Assign | ast.AnnAssign):
            names |= {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}
    return names


def untrue_imports(rooms, trees):
    """Yield imports, and uses of an imported room, that name what is not defined there. trees: {where: tree}."""
    defined = {room: defined_names(tree) for room, tree in rooms.items()}
    for where, tree in trees.items():
        aliases = {}
        for room, name, local in imports_of(tree, rooms):
            if name is None:
                aliases[local] = room
            elif name not in defined[room]:
                yield f"{where}: {name} is not defined in {room}"
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
                room = aliases[node.value.id]
                if node.attr not in defined[room] and not node.attr.startswith("__"):
                    yield f"{where}: {room} does not define {node.attr}"


def length(node):
    return node.end_lineno - node.lineno + 1


def beyond_limits(root, rooms):
    for room, tree in rooms.items():
        path = root / f"{room.replace('.', '/')}.py"
        lines, limit = len(path.read_text(encoding="utf-8").splitlines()), LINES.get(path.name, LINES_OF_A_ROOM)
        if lines > limit:
            yield f"{room}: {lines} lines, more than {limit}"
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                limit = LINES_OF_MAIN if (room, node.name) == ("train", "main") else LINES_OF_A_FUNCTION
                if length(node) > limit:
                    yield f"{room}.{node.name}: {length(node)} lines, more than {limit}"
            if room == "train" and isinstance(node, ast.While) and length(node) > LINES_OF_THE_LOOP:
                yield f"the training loop: {length(node)} lines, more than {LINES_OF_THE_LOOP}"


def code_lines(tree):
    """Return the number of lines that hold code: no docstring, comment or blank line."""
    docstrings = {
        line
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node)
        for line in range(node.body[0].lineno, node.body[0].end_lineno + 1)
    }
    # The lines on which any node begins or ends, as the code is formatted.
    lines = {line for node in ast.walk(tree) if hasattr(node, "lineno") for line in (node.lineno, node.end_lineno)}
    return len(lines - docstrings)


def top_level(root):
    """Return the names at the top that a user sees: no hidden ones, and none that git ignores."""
    ignored = {"runs", "__pycache__"}
    ignored |= {path.name for pattern in ("*.egg-info", "slurm-*.log", "build") for path in root.glob(pattern)}
    return {path.name for path in root.iterdir() if not path.name.startswith(".")} - ignored


@pytest.fixture(scope="module")
def rooms():
    return rooms_of(ROOT)


def test_imports_go_one_way_and_no_script_imports_a_script(rooms):
    assert list(wrong_directions(rooms)) == []


def test_there_is_no_circle_not_even_through_an_import_inside_a_function(rooms):
    assert floors_of(arrows_of(rooms))[1] == set()


def test_every_import_line_is_true(rooms):
    clients = [path for folder in ("tests", "benchmarks", "examples") for path in (ROOT / folder).rglob("*.py")]
    trees = {path.relative_to(ROOT): ast.parse(path.read_text(encoding="utf-8")) for path in clients}
    assert list(untrue_imports(rooms, {**rooms, **trees})) == []
    for room in rooms:
        assert "F401" not in (ROOT / f"{room.replace('.', '/')}.py").read_text(encoding="utf-8"), room


def test_what_must_answer_at_once_loads_without_torch():
    code = "import sys\nfrom importlib import import_module\n"
    code += f"for name in {TORCH_FREE!r}:\n    import_module(name)\n    assert 'torch' not in sys.modules, name\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_limits_that_a_reader_feels(rooms):
    assert list(beyond_limits(ROOT, rooms)) == []


def test_the_top_level_holds_what_its_users_know():
    names = top_level(ROOT)
    assert names <= FOLDERS | FILES
    assert len([name for name in names if name in FOLDERS or name.endswith(".py")]) <= ROOMS_AT_FIRST_SIGHT


BREACHES = {  # of a rule: a line that is appended to a file, and what is said of it
    "upward": ("classifier/data/labels.py", "import common", "classifier.data.labels imports common"),
    "across": (
        "classifier/training/lock.py",
        "from classifier.evaluation.page import write",
        "classifier.training.lock imports classifier.evaluation.page",
    ),
    "inside a function": ("classifier/files.py", "def f():\n    import train", "classifier.files imports train"),
    "a script": ("predict.py", "from evaluate import main as other", "predict imports evaluate: a script imports no"),
    "a re-export": ("train.py", "from common import BadInput as again", "train: BadInput is not defined in common"),
    "a name of a name": ("train.py", "common.np.zeros(1)", "train: common does not define np"),
    "a long function": ("common.py", "def f():\n" + "    pass\n" * 70, "common.f: 71 lines, more than 70"),
    "a long file": ("classifier/chunks.py", "x = 1\n" * 450, "classifier.chunks: "),
}


@pytest.mark.parametrize("breach", BREACHES)
def test_a_breach_is_found(tmp_path, breach):
    file, line, problem = BREACHES[breach]
    for path in (*ROOT.glob("*.py"), ROOT / "classifier"):
        (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / path.name)
    with open(tmp_path / file, "a", encoding="utf-8") as stream:
        stream.write(f"\n{line}\n")
    rooms = rooms_of(tmp_path)
    found = [*wrong_directions(rooms), *untrue_imports(rooms, rooms), *beyond_limits(tmp_path, rooms)]
    assert any(problem in each for each in found), found


def test_a_circle_is_found():
    arrows = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set(), "e": {"d"}}
    assert floors_of(arrows) == ({"d": 1, "e": 2}, {"a", "b", "c"})


def main(root=ROOT):
    rooms = rooms_of(root)
    arrows = arrows_of(rooms)
    floors, circles = floors_of(arrows)
    for floor in sorted(set(floors.values()), reverse=True):
        print(f"{floor:2}  {', '.join(room for room in rooms if floors.get(room) == floor)}")
    at_the_top = [name for name in top_level(root) if (root / name).is_dir() or name.endswith(".py")]
    print(f"{len(at_the_top)} scripts, modules and folders at the top")
    print(f"{len(rooms)} rooms on {len(set(floors.values()))} floors")
    print(f"{sum(map(len, arrows.values()))} arrows; on or above a circle: {', '.join(sorted(circles)) or 'none'}")
    print(f"{sum(map(code_lines, rooms.values())):,} lines of code")


if __name__ == "__main__":
    main(*(Path(folder).resolve() for folder in sys.argv[1:2]))
