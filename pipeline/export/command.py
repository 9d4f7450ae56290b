"""Export a trained separator for programs without this repository: ONNX or TorchScript, in a folder with its parity."""

import argparse
import copy
import math
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from pipeline.core.runtime import write_atomic, write_json
from pipeline.export import graphs
from pipeline.export.formats import FILES, OPSET, OUTPUT, Format, of_torch, reader, write
from pipeline.export.parity import Parity, compare, megabytes, real_time_factor
from pipeline.export.prune import prune
from pipeline.separate import Separator, Unusable, hub
from pipeline.separate.command import chosen_model, interruptible
from pipeline.separators import QuerySeparator
from pipeline.training.portable import QUERIES

EXPORTS = hub.ROOT / "data/exports"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0: done, 2: not, and why is one line on stderr."""
    args = parser().parse_args(arguments)
    try:
        with interruptible():
            parity, out = export(args)
    except (ValueError, OSError) as error:  # Unusable, and a params.yaml that does not fit
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    print(parity.markdown() + f"\nwritten to {out}")
    return 0


def parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(prog="python -m pipeline export", description=__doc__)
    parser.add_argument("model", help="a model of data/separators or data/mixit, or a folder")
    parser.add_argument("--to", choices=list(FILES), default="onnx", help="default: %(default)s")
    parser.add_argument("--int8", action="store_true", help="weights as int8, the front end apart (onnx)")
    parser.add_argument("--prune", type=float, default=0.0, metavar="SHARE", help="take out hidden channels first")
    parser.add_argument("-o", "--out", type=Path, help="folder; by default data/exports/<model>_<what>")
    parser.add_argument("--pairs", type=int, default=200, help="evaluation pairs compared (default %(default)s)")
    parser.add_argument("--data", type=Path, default=hub.ROOT / "data", help="where pairs/ and anchors/ lie")
    return parser


def export(args: argparse.Namespace) -> tuple[Parity, Path]:
    """Write the folder of an export, whole or not at all; return its parity and where it is."""
    if not 0 <= args.prune < 1 or not math.isfinite(args.prune) or args.pairs < 0:
        raise Unusable("--prune is a share from 0 to below 1, and --pairs 0 or more")
    to: Format = args.to
    separator = Separator.from_pretrained(chosen_model(args.model), device="cpu")
    kind = to + ("_int8" if args.int8 else "") + (f"_prune{round(100 * args.prune)}" if args.prune else "")
    name = separator.folder.stem
    out = args.out or EXPORTS / f"{name}_{kind}"
    if out.exists() and not out.is_dir():
        raise Unusable(f"{out}: it is a file, not a folder for files")
    network = copy.deepcopy(separator.network)
    if args.prune:
        prune(network, args.prune)
    graph = graphs.build(separator.config["architecture"], network)  # type: ignore[arg-type]
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".export-") as scratch:
        made = Path(scratch)
        path = made / FILES[to]
        write(graph, separator.sample_rate, to, path, int8=args.int8)
        parity = measured(separator, graph, path, args, name)
        write_json(made / "parity.json", parity.as_dict())
        write_atomic(made / "parity.md", parity.markdown())
        write_json(made / "config.json", {**separator.config, "export": contract(graph, path)})
        write_queries(separator, made / QUERIES)
        write_atomic(made / hub.CARD, hub.card(name, separator.config, hub.scores_of(separator.folder)))
        hub.move_into(made, out)
    return parity, out


def measured(separator: Separator, graph: graphs.Graph, path: Path, args: argparse.Namespace, name: str) -> Parity:
    """Compare a written file with the network as it was trained."""
    network, exported = of_torch(whole(separator)), reader(path, graph)
    found = compare(separator, graph, network, exported, args.data, args.pairs)
    means = [sum(values) / len(found.sdri) for values in zip(*found.sdri, strict=True)] if found.sdri else [None, None]
    return Parity(
        model=name,
        format=args.to,
        int8=args.int8,
        prune=args.prune,
        pairs=len(found.sdri),
        sdri_network=means[0] if means[0] is None else round(means[0], 4),
        sdri_export=means[1] if means[1] is None else round(means[1], 4),
        max_difference=float(f"{found.largest:.3g}"),
        difference_db=round(10 * math.log10((found.error + 1e-20) / (found.level + 1e-20)), 1),
        rtf_network=round(real_time_factor(network, graph, separator.sample_rate), 4),
        rtf_export=round(real_time_factor(exported, graph, separator.sample_rate), 4),
        mb_network=round(megabytes(separator.network), 2),
        mb_export=round(path.stat().st_size / 1e6, 2),
    )


def whole(separator: Separator) -> Any:
    """Make a function of the network as it was trained, that takes a graph's inputs."""
    network = separator.network

    def run(mixture: Tensor, *queries: Tensor) -> Any:
        if isinstance(network, QuerySeparator):
            return network(mixture, network.joint_query(*queries))
        return network(mixture)

    return run


def contract(graph: graphs.Graph, path: Path) -> dict[str, Any]:
    """Say in config.json what another program gives the file, and gets."""
    return {
        "file": path.name,
        "inputs": list(graph.inputs),
        "output": OUTPUT,
        "samples": graph.samples,
        "least_samples": graph.samples or graph.least_samples,
        "opset": OPSET if path.suffix == ".onnx" else None,
    }


def write_queries(separator: Separator, path: Path) -> None:
    """Write the classes' queries, and the vector that stands for an interferer's query that is not given."""
    if separator.not_given is not None:
        write_atomic(path, save({"query": separator.averages, "not_given": separator.not_given.contiguous()}))
    elif separator.takes_queries and (separator.folder / QUERIES).is_file():
        shutil.copyfile(separator.folder / QUERIES, path)


if __name__ == "__main__":
    sys.exit(main())
