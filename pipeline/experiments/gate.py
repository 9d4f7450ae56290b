"""Compare metrics.json with the bounds of params.yaml: `python -m pipeline gate [reports/metrics.json]`.

Prints every gate with its value, its bound and the reason. Exit status: 0 all pass, 1 some do not,
2 the metrics or the bounds cannot be read.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ruamel.yaml.error import YAMLError

from pipeline.core.config import load_params
from pipeline.reporting.gates import Gate, GateParams, evaluate_gates, read_metrics


def lines(gates: Sequence[Gate]) -> list[str]:
    """One line per gate, in columns, then the verdict."""
    width = max((len(gate.key) for gate in gates), default=0)
    rows = [
        f"{'pass' if gate.passed else 'FAIL'}  {gate.key:<{width}}  "
        f"{'missing' if gate.value is None else f'{gate.value:.6g}':>9}  {gate.bound!s:<12}  {gate.why}"
        for gate in gates
    ]
    failed = sum(not gate.passed for gate in gates)
    verdict = f"{failed} of {len(gates)} gates failed" if failed else f"all {len(gates)} gates passed"
    return [*rows, verdict if gates else "no gates in params.yaml: nothing is held"]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the gates; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "metrics",
        type=Path,
        nargs="?",
        default=Path("reports/metrics.json"),
        help="a metrics.json written by the report stage (default: %(default)s)",
    )
    parser.add_argument(
        "--params", type=Path, default=Path("params.yaml"), help="whose `gate:` section holds the bounds"
    )
    args = parser.parse_args(argv)
    try:
        if not args.params.is_file():
            raise ValueError(f"cannot read {args.params}: no such file")
        bounds = load_params("gate", GateParams, args.params).bounds
        gates = evaluate_gates(read_metrics(args.metrics), bounds)
    except (ValueError, YAMLError) as error:
        print(f"gate: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines(gates)))
    return int(any(not gate.passed for gate in gates))


if __name__ == "__main__":
    sys.exit(main())
