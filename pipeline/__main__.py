"""One door: `python -m pipeline <command> ...` runs a tool or a stage; without a command it lists them."""

import ast
import runpy
import sys
from pathlib import Path

HERE = Path(__file__).parent


def commands() -> dict[str, str]:
    """Map each command to its module: `separate` and its like, and one per file of experiments/ and stages/."""
    found = {name: f"pipeline.{name}" for name in ("separate", "export", "demo")}
    found["unpack"] = "pipeline.datasets._unpack"
    for package in ("experiments", "stages"):
        names = sorted(path.stem for path in (HERE / package).glob("[a-z]*.py"))
        found |= {name: f"pipeline.{package}.{name}" for name in names}
    return found


def summary(module: str) -> str:
    """Read the first line of a module's docstring without importing it."""
    path = HERE.parent.joinpath(*module.split("."))
    path = path / "command.py" if (path / "command.py").is_file() else path.with_suffix(".py")
    return (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n")[0]


def main() -> None:
    """Run the command named first, with the arguments behind it; exit with 2 for one that is not there."""
    known = commands()
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print("python -m pipeline <command> [arguments]; --help behind a command says more\n")
        print("\n".join(f"  {name:20} {summary(module)}" for name, module in known.items()))
        return
    name = sys.argv.pop(1)
    if name not in known:
        print(f"error: no command {name!r}; there are {', '.join(known)}", file=sys.stderr)
        raise SystemExit(2)
    sys.argv[0] = f"python -m pipeline {name}"
    runpy.run_module(known[name], run_name="__main__", alter_sys=False)


if __name__ == "__main__":
    main()
