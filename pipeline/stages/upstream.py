"""Stage upstream: what params.yaml says of the encoder that one separator takes its features from, and no other's.

The training depends on this file in place of the section `upstreams:`: its bytes stay where another encoder's folder,
hash or sizes change, and so does the trained model.
"""

import argparse
import logging
from pathlib import Path
from typing import Any

from pydantic import ConfigDict

from pipeline.core.config import Params, load_params
from pipeline.core.runtime import run_command, running, write_json

log = logging.getLogger(__name__)


class EntryParams(Params):
    """Place of the settings of an entry of `mae_separators:`; the rest is checked by the training."""

    model_config = ConfigDict(extra="ignore")

    settings: str


class SettingsParams(Params):
    """Name of the encoder in an entry's settings; the rest is checked by the training."""

    model_config = ConfigDict(extra="ignore")

    upstream: str


class UpstreamsParams(Params):
    """`upstreams:` in params.yaml: encoders by name, each checked by the training that uses it."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Any]


def describe(name: str, params: Path) -> dict[str, Any]:
    """{"upstream": its name, "options": its entry of `upstreams:`, None where it has none} of one separator."""
    entry = load_params(f"mae_separators.{name}", EntryParams, params)
    upstream = load_params(entry.settings, SettingsParams, params).upstream
    options = load_params("upstreams", UpstreamsParams, params).__pydantic_extra__.get(upstream)
    return {"upstream": upstream, "options": options}


def main() -> None:
    """Paths come from dvc.yaml, names from params.yaml."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="an entry of `mae_separators:` in params.yaml")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    with running(f"upstream@{args.name}", args.out):
        found = describe(args.name, Path("params.yaml"))
        write_json(args.out, found)
        log.info("%s takes its features from %s", args.name, found["upstream"])


if __name__ == "__main__":
    run_command(main)
