"""Checks that a script and utils/ belong together: of another version, some names that the script uses are missing."""

import ast
import sys
from pathlib import Path
from types import ModuleType

ROOM = "utils."


def check_names_used(script: str) -> None:
    """Check that each `module.name` of a script exists, for the modules that it imports from utils/.

    Args:
        script: Its path. The modules must be imported already.

    Raises:
        ImportError: A name is missing, so utils/ is of another version.
    """
    tree = ast.parse(Path(script).read_bytes())
    imported = {
        alias.asname or alias.name: sys.modules.get(f"{node.module}.{alias.name}")
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(ROOM)
        for alias in node.names
    }
    for definition in tree.body:
        nodes = list(ast.walk(definition))
        # A variable or parameter of the same name is not the module.
        bound = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        bound |= {node.arg for node in nodes if isinstance(node, ast.arg)}
        for node in nodes:
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id not in bound:
                check_name(imported.get(node.value.id), node.attr)


def check_name(module: ModuleType | None, name: str) -> None:
    """Check that a module has a name.

    Raises:
        ImportError: It lacks the name.
    """
    if module and not hasattr(module, name):
        raise ImportError(f"{module.__name__} has no {name}")
