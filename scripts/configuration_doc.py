"""Writes the tables of docs/configuration.md from the dataclasses of finetune_jax/config.py.

python scripts/configuration_doc.py
"""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/configuration.md"
FIRST = "## task"


def tables() -> str:
    """A section a dataclass, a row a field."""
    tree = ast.parse((ROOT / "finetune_jax/config.py").read_text(encoding="utf-8"))
    kinds = {n.targets[0].id: ast.unparse(n.value) for n in tree.body if isinstance(n, ast.Assign)}
    return "\n".join(section(node, kinds) for node in tree.body if isinstance(node, ast.ClassDef))


def section(part: ast.ClassDef, kinds: dict[str, str]) -> str:
    """The table of one dataclass."""
    name = part.name.removesuffix("Config").lower()
    prefix = {"": "", "image": "data.image.", "text": "data.text."}.get(name, name + ".")
    lines = [f"## {prefix.rstrip('.') or 'the run'}\n\n{ast.get_docstring(part)}\n"]
    lines += ["| field | values | default | meaning |", "|---|---|---|---|"]
    for field, doc in zip(part.body, part.body[1:], strict=False):
        if not (isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr)):
            continue
        kind = ast.unparse(field.annotation)
        kind = "JSON object" if kind == "Json" else kinds.get(kind, kind)
        for old, new in (("Literal[", ""), ("'", ""), ("|", "or")):
            kind = kind.replace(old, new)
        kind = kind.replace("auto]", "auto") if "[" in kind else kind.rstrip("]")
        if kind.endswith("Config"):
            continue  # has a table of its own
        default = (
            ast.unparse(field.value)
            .replace("field(default_factory=dict)", "{}")
            .replace("''", '""')
            .strip("'")
        )
        option = f"{prefix}{field.target.id}".replace("_", "-")
        lines.append(f"| `--{option}` | {kind} | `{default}` | {doc.value.value} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    head = PAGE.read_text(encoding="utf-8").split(FIRST)[0]
    PAGE.write_text(head + tables(), encoding="utf-8")
