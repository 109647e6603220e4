"""Who may import whom: a file imports only from lower floors."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "finetune_jax"
FLOORS = [
    {"errors", "signals", "storage", "environment", "__init__"},
    {
        "models",
        "metrics",
        "writers",
        "config",
        "limits",
        "tree",
        "doctor",
        "seal",
        "runtime",
        "hlo",
        "targets",
        "compiling",
        "initialise",
    },
    {"data", "hf", "optim", "peft", "sharding"},
    {"tasks", "state", "kernels", "methods"},
    {"step", "checkpoint", "job", "updates", "opening", "synonyms"},
    {
        "runfolder",
        "evaluate",
        "robustness",
        "predict",
        "export",
        "audit",
        "meter",
        "programs",
        "ensemble",
        "soup",
        "prepare",
        "announce",
    },
    {"train", "plan", "plan_report"},
    {"seeds", "sweep", "range_test"},
    {"cli", "__main__"},
]
# Within one floor: files of a wing may import each other, and these pairs, in this direction only.
SIDEWAYS = {
    ("storage", "errors"), ("storage", "signals"), ("models", "tree"), ("runtime", "config"), ("data", "sharding"), ("data", "hf"), ("optim", "peft"), ("peft", "hf"), ("methods", "tasks"), ("tasks", "state"), ("step", "state"), ("job", "checkpoint"), ("updates", "job"), ("updates", "step"),
    ("opening", "checkpoint"), ("opening", "job"), ("evaluate", "ensemble"), ("soup", "ensemble"), ("soup", "evaluate"), ("soup", "export"), ("predict", "ensemble"), ("export", "runfolder"), ("predict", "evaluate"), ("programs", "evaluate"), ("__main__", "cli"), ("robustness", "evaluate"), ("robustness", "predict"), ("targets", "config"), ("limits", "config"), ("plan_report", "plan"), ("announce", "prepare"),
}  # fmt: skip


def room(name: str) -> str:
    return name.split(".")[1] if name.count(".") else "__init__"


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def floor(name: str) -> int:
    return next(index for index, rooms in enumerate(FLOORS) if name in rooms)


def test_every_file_has_a_floor():
    rooms = {file.relative_to(PACKAGE).with_suffix("").parts[0] for file in PACKAGE.rglob("*.py")}
    assert rooms == {name for floor in FLOORS for name in floor}


def test_imports_go_down():
    wrong = []
    for file in PACKAGE.rglob("*.py"):
        mine = file.relative_to(PACKAGE).with_suffix("").parts[0]
        for name in imports(file):
            if not name.startswith("finetune_jax"):
                continue
            other = room(name)
            known = {entry for rooms in FLOORS for entry in rooms}
            other = other if other in known else "__init__"
            lower = floor(other) < floor(mine)
            if not (lower or other == mine or (mine, other) in SIDEWAYS):
                wrong.append(f"{file.relative_to(PACKAGE)} imports {name}")
    assert not wrong


def test_heavy_libraries_stay_in_their_rooms():
    for file in PACKAGE.rglob("*.py"):
        names = {name.split(".")[0] for name in imports(file)}
        assert not names & {"torch", "transformers"}, file
        assert "tensorflow" not in names or file.name == "writers.py", file
        if file.parent.name == "models":
            assert not names & {"numpy", "optax", "orbax", "grain", "safetensors"}, file


def test_models_know_no_config_mesh_or_data():
    for file in (PACKAGE / "models").glob("*.py"):
        assert {room(n) for n in imports(file) if n.startswith("finetune_jax")} <= {
            "models",
            "errors",
            "tree",
        }, file
