"""Keep dvc.yaml's lists of code and params as the code is: DVC does not follow imports (treeverse/dvc#9195).

    python -m pipeline graph            # exit 1 and say what differs
    python -m pipeline graph --write    # put it right

Of each stage's `deps`, the lines of Python files are the tool's: what its module imports, directly or not. Lines that
the imports cannot show are written by hand and stay: folders, files that are chosen by a name of params.yaml (a
separator, an upstream, a dataset), and the layers of nn/ that some of these need. Of `params`, every section that the
module reads whatever its arguments are must be there; sections that depend on the entry are written by hand.
"""

import argparse
import ast
import difflib
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from pipeline.core.runtime import run_command, write_atomic

BY_NAME = ("pipeline/datasets/", "pipeline/separators/", "pipeline/upstreams/", "pipeline/nn/")


def source(module: str, root: Path) -> Path:
    """The file of a dotted module name."""
    path = root / Path(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def imports(module: str, root: Path) -> set[str]:
    """The pipeline modules that `module` imports anywhere in it, and the packages that these lie in."""
    names = set()
    for node in ast.walk(ast.parse(source(module, root).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            dotted = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if source(name, root).exists() else node.module for name in dotted}
    names |= {name.rpartition(".")[0] for name in names | {module} if name.count(".") > 1}
    return {name for name in names if name.startswith("pipeline.")} - {module}


def closure(modules: set[str], root: Path) -> set[str]:
    """The modules that `modules` import, directly or not, and themselves."""
    todo, seen = set(modules), set()
    while todo:
        seen.add(module := todo.pop())
        todo |= imports(module, root) - seen
    return seen


def _runs_something(path: Path) -> bool:
    """Whether a module is more than its docstring."""
    return len(ast.parse(path.read_text()).body) > 1


def code(listed: list[str], entry: str, root: Path) -> list[str]:
    """The code dependencies of a stage whose module is `entry` and whose `deps` are `listed` now, in order."""
    folders = [line for line in listed if (root / line).is_dir()]
    chosen = [line for line in listed if line.startswith(BY_NAME) and not line.endswith("__init__.py")]
    loaded = [root / line for line in chosen if (root / line).is_file()]
    loaded += [path for folder in folders for path in (root / folder).rglob("*.py")]  # a folder stands for its files
    plugins = {".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__") for path in loaded}
    needed = {source(module, root) for module in closure({entry} | plugins, root)}
    files = {path.relative_to(root).as_posix() for path in needed if _runs_something(path)}
    files = {file for file in files if not any(file.startswith(f"{folder}/") for folder in folders)}
    return sorted(files | set(folders) | set(chosen))


def sections(entry: str, root: Path) -> list[str]:
    """The sections of params.yaml that the module reads whatever its arguments are, in order."""

    def calls(node: ast.AST) -> Iterator[ast.Call]:
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, ast.If | ast.IfExp | ast.For):
                if isinstance(child, ast.Call) and getattr(child.func, "id", "") == "load_params":
                    yield child
                yield from calls(child)

    first = [call.args[0] for call in calls(ast.parse(source(entry, root).read_text()))]
    return [arg.value for arg in first if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]


def corrected(text: str, root: Path) -> str:
    """dvc.yaml with the lists of every stage as its code is."""
    yaml = YAML()
    yaml.preserve_quotes, yaml.width = True, 4096
    yaml.indent(mapping=2, sequence=4, offset=2)
    document: Any = yaml.load(text)
    for stage in document["stages"].values():
        stage = stage.get("do", stage)
        entry = next((word for word in stage["cmd"].split() if word.startswith("pipeline.stages.")), None)
        if entry is None:
            continue
        listed = [str(line) for line in stage["deps"]]
        new = [line for line in listed if not line.startswith("pipeline/")]
        new += code([line for line in listed if line.startswith("pipeline/")], entry, root)
        if new != listed:
            stage["deps"][:] = new
        for section in sections(entry, root):
            names = [str(name) for name in stage.get("params", [])]
            if not any(f"{section}.".startswith(f"{name}.") or name.startswith(f"{section}.") for name in names):
                stage.setdefault("params", []).append(section)
    out = io.StringIO()
    yaml.dump(document, out)
    return out.getvalue()


def main() -> None:
    """Compare, or write with --write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    path = Path("dvc.yaml")
    old = path.read_text()
    new = corrected(old, Path.cwd())
    if args.write and new != old:
        write_atomic(path, new)
    elif new != old:
        lines = difflib.unified_diff(old.splitlines(True), new.splitlines(True), "dvc.yaml", "corrected")
        sys.stdout.writelines(lines)
        raise ValueError("dvc.yaml lists other code or params than its stages use: `python -m pipeline graph --write`")


if __name__ == "__main__":
    run_command(main)
