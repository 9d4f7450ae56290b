"""Write params.yaml as a profile has it: the default with what profiles/<name>.yaml has differently.

    python -m pipeline profile              # list them
    python -m pipeline profile esc10        # write params.yaml
    python -m pipeline profile default      # as it came

A params.yaml that holds settings of your own, so that it is no profile's, is written over with --force only.
"""

import argparse
from pathlib import Path

from pipeline.core.config import read_document
from pipeline.core.profiles import document, names, purpose, text
from pipeline.core.runtime import run_command, write_atomic

PARAMS = Path("params.yaml")


def apply(name: str, root: Path, force: bool) -> None:
    """Write root/params.yaml; ValueError where that would lose settings that no profile has."""
    path = root / PARAMS
    written = text(name, root)
    if path.is_file() and not force:
        current = read_document(path)
        if all(current != document(other, root) for other in names(root)):
            raise ValueError(
                f"{PARAMS} has settings that no profile has (`git diff {PARAMS}`): --force writes over them"
            )
    write_atomic(path, written)


def main() -> None:
    """List the profiles, or write the one named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?")
    parser.add_argument("--force", action="store_true", help="write over settings of your own")
    args = parser.parse_args()
    root = Path()
    if args.name is None:
        for name in names(root):
            print(f"{name:12} {purpose(name, root)}")
        return
    apply(args.name, root, args.force)
    print(f"{PARAMS} is profiles/{args.name}.yaml now; `make repro` runs it")


if __name__ == "__main__":
    run_command(main)
