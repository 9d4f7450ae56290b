"""Stage train_separator: train one entry of `separators:` or `mae_separators:` to give back the queried one of two
mixed anchors.

The query is the embedding of the clean target (Kong et al., arXiv:2305.07447, section III), or a mean of its class, as
in use. The loss is a weighted sum (`train.loss_weights`) of objectives that compare the waveforms, such as L1, and of
the separator's own terms. Anchors were mined once, so a step reads 2 x batch segments, and queries. Batch n is a pure
function of (seed, n): a killed run goes on from its checkpoint to the weights it would have had.

All entries that change nothing of `train` meet the same mixtures in the same order, and their U-Nets begin with the
same weights. An entry of `separators:` may replace keys of `train` by its own: its steps, its objectives.

An entry of `separators:` with `weights` is not trained: a published checkpoint is checked, converted and written in the
same form. An entry of `mae_separators:` names the entry of `separators:` whose sizes and training it has, and where in
params.yaml its settings are.
"""

import argparse
import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from jaxtyping import Float32
from pydantic import Field, field_validator
from safetensors.torch import save
from torch import Tensor

from pipeline import upstreams
from pipeline.core.config import Params, Sha256, load_params
from pipeline.core.devices import Precision, autocast, choose_device, go_on_alike, use_available_cores, use_precision
from pipeline.core.ontology import kin
from pipeline.core.runtime import (
    fingerprint,
    keep_freed_memory,
    publish,
    read_json,
    run_command,
    running,
    scratch_dir,
    write_atomic,
    write_json,
)
from pipeline.evaluation.cost import cost
from pipeline.mixtures.anchors import AnchorIndex, AnchorReader
from pipeline.mixtures.mixing import PairsParams, energy, energy_gain, mix
from pipeline.mixtures.pairs import PairStream
from pipeline.nn.losses import SEPARATION
from pipeline.separators import Batch, QuerySeparator, body_of, build, model_params, read_published
from pipeline.training.loop import Optimizer, build_optimizer, fit, learning_rate_factor, write_curve
from pipeline.training.portable import DETECTOR, check_networks, equip

log = logging.getLogger(__name__)

ANCHOR_FILES = ("index.parquet", "index.json", "shards.json")  # the last has the shards' hashes, of the queries too


Query = Literal["own", "class"]
GIVEN = 1  # last word of the generator of which rows are given the interferer's query: all other draws stay
QUERIES_IN_A_MEAN = 16  # at most, of a class' anchors, where each is read from the disk


class TrainParams(Params):
    """Section `train:` of params.yaml."""

    seed: int = Field(ge=0, lt=2**31)
    steps: int = Field(gt=0, le=10**9)
    batch_size: int = Field(gt=0, le=65_536)
    segment_seconds: float = Field(gt=0, le=3600)
    query: Query
    interferer_query: float = Field(ge=0, le=1)
    optimizer: Optimizer
    learning_rate: float = Field(gt=0, le=1)
    warmup: list[list[float]] = Field(min_length=1)
    decay: Literal["none", "cosine"]
    loss_weights: dict[str, Annotated[float, Field(ge=0)]]
    gradient_clip: float = Field(ge=0)
    ema: float = Field(ge=0, lt=1)
    precision: Precision
    device: Literal["auto", "cpu", "cuda"]
    log_every_steps: int = Field(gt=0)
    checkpoint_every_seconds: float = Field(gt=0)

    @field_validator("warmup")
    @classmethod
    def _pieces(cls, warmup: list[list[float]]) -> list[list[float]]:
        if any(len(piece) != 2 for piece in warmup) or [p[0] for p in warmup] != sorted(p[0] for p in warmup):
            raise ValueError("warmup is a list of [from this step, x learning rate], in the order of the steps")
        if wrong := [piece for piece in warmup if piece[0] < 0 or not 0 < piece[1] <= 10]:
            raise ValueError(f"{wrong[0]} of warmup is not [a step, 0 or more; a factor above 0 and at most 10]")
        return warmup

    @field_validator("loss_weights")
    @classmethod
    def _has_an_objective(cls, weights: dict[str, float]) -> dict[str, float]:
        if not any(weights.get(name) for name in SEPARATION):
            raise ValueError(f"loss_weights must give one of {', '.join(SEPARATION)} a weight above 0")
        return weights

    @property
    def objectives(self) -> list[str]:
        """Names of the objectives that compare estimate and target, as far as they have a weight."""
        return [name for name in SEPARATION if self.loss_weights.get(name)]


class SeparatorParams(Params):
    """One entry of `separators:` in params.yaml."""

    architecture: str
    weights: str | None
    weights_sha256: Sha256 | None
    train: dict[str, Any]  # what replaces keys of the section `train`
    model: dict[str, Any]


class MaeSeparatorParams(Params):
    """One entry of `mae_separators:` in params.yaml; `body` and `settings` are places in it, as "variants.updated"."""

    architecture: str
    body: str  # an entry of `separators:`, whose `model` and `train` are this one's too
    train: dict[str, Any]  # what replaces keys of the section `train` and of the body's own
    settings: str


@dataclass(frozen=True)
class Plan:
    """A separator to be built and trained, or only converted."""

    architecture: str
    model: dict[str, Any]  # arguments of the separator but query_dim and interferer_query
    weights: Path | None = None  # a published checkpoint
    weights_sha256: Sha256 | None = None
    upstream: dict[str, Tensor] | None = None  # pretrained weights of its upstream; None: it has none


class Batches:
    """Batch n of training, a pure function of (seed, n), float32."""

    def __init__(
        self,
        anchors: Path,
        pairs: PairsParams,
        *,
        seed: int,
        batch_size: int,
        segment_seconds: float,
        query: Query = "own",
        interferer_query: float = 0.0,
    ) -> None:
        self.index = AnchorIndex.load(anchors)
        self.reader = AnchorReader(anchors, self.index)
        self.stream = PairStream(**self.index.pair_columns(), seed=seed, exclude=pairs.exclude, kin=kin)
        self.pairs, self.seed, self.batch_size, self.query = pairs, seed, batch_size, query
        self.interferer_query = interferer_query
        self.segment_samples = round(segment_seconds * self.index.sample_rate)
        if self.segment_samples > self.index.segment_samples:
            raise ValueError(
                f"train.segment_seconds {segment_seconds} is {self.segment_samples} samples; "
                f"the anchors of {anchors} have {self.index.segment_samples}"
            )

    def load(self, n: int) -> Batch:
        """Batch n, mixed from whole anchors, as in evaluation; the part is `segment_seconds` from anywhere in them.

        In NumPy: torch would start threads here too, and those of the step would wait for them (a fifth of its time).
        """
        targets, interferers = self.stream.batch(n, self.batch_size)
        target, interferer = (self.reader.waveforms(rows.tolist()) for rows in (targets, interferers))
        gain = energy_gain(
            energy(target),
            energy(interferer),
            match_energy=self.pairs.match_energy,
            min_gain=self.pairs.min_gain,
            max_gain=self.pairs.max_gain,
        )
        mixture, target, _ = mix(target, interferer, gain, self.pairs.normalize)
        rng = np.random.default_rng([self.seed, n])
        start = int(rng.integers(mixture.shape[1] - self.segment_samples, endpoint=True))
        query, interferer_query = (
            torch.from_numpy(np.stack([self._query(row, rng) for row in rows.tolist()]))
            for rows in (targets, interferers)
        )
        part = slice(start, start + self.segment_samples)
        given = np.random.default_rng([self.seed, n, GIVEN]).random(self.batch_size) < self.interferer_query
        return Batch(
            torch.from_numpy(mixture),
            part,
            torch.from_numpy(target[:, part]),
            query,
            interferer_query,
            torch.from_numpy(given),
        )

    def _query(self, row: int, rng: np.random.Generator) -> Float32[np.ndarray, " query_dim"]:
        """The anchor's own embedding, or the mean of those of any few anchors of its class."""
        if self.query == "own":
            return self.reader.query(row)
        rows = self.index.rows(int(self.index.class_index[row]))
        count = rng.integers(min(len(rows), QUERIES_IN_A_MEAN), endpoint=False) + 1
        mean: Float32[np.ndarray, " query_dim"] = self.reader.queries(rng.choice(rows, count, replace=False)).mean(
            axis=0
        )
        return mean

    def describe(self, n: int) -> str:
        """The anchors of batch n, for an error message."""
        targets, interferers = self.stream.batch(n, self.batch_size)
        return ", ".join(
            f"{self.index.table['anchor'][t]} + {self.index.table['anchor'][i]}"
            for t, i in zip(targets.tolist(), interferers.tolist(), strict=True)
        )


def train(
    name: str, model: QuerySeparator, batches: Batches, params: TrainParams, *, scratch: Path, curve: Path
) -> QuerySeparator:
    """Fit `model` to the batches; the result is on the CPU."""
    device = choose_device(params.device)
    model.to(device)

    def losses(batch: Batch) -> dict[str, Tensor]:
        with autocast(device, params.precision):
            return model.losses(batch.to(device), params.objectives)

    fit(
        model,
        build_optimizer(params.optimizer, model.parameter_groups(params.learning_rate), params.learning_rate),
        batches.load,
        losses,
        loss_weights=params.loss_weights,
        steps=params.steps,
        learning_rate=lambda n: learning_rate_factor(n, warmup=params.warmup, decay=params.decay, steps=params.steps),
        gradient_clip=params.gradient_clip,
        ema=params.ema,
        seed=params.seed,
        describe=batches.describe,
        scratch=scratch,
        curve=curve,
        log_every_steps=params.log_every_steps,
        checkpoint_every_seconds=params.checkpoint_every_seconds,
    )
    return model.cpu()


def read_mae_entry(
    name: str, path: Path = Path("params.yaml")
) -> tuple[MaeSeparatorParams, dict[str, Any], dict[str, Any]]:
    """Read an entry of `mae_separators:`, its body's sizes and its settings; ValueError names what does not fit."""
    entry = load_params(f"mae_separators.{name}", MaeSeparatorParams, path)
    body = load_params(entry.body, SeparatorParams, path)
    if (wanted := body_of(entry.architecture)) != body.architecture:
        raise ValueError(
            f"mae_separators.{name}: {entry.architecture} is made of a {wanted}; {entry.body} is a {body.architecture}"
        )
    sizes = load_params(f"{entry.body}.model", model_params(wanted), path).model_dump()
    settings = load_params(entry.settings, model_params(entry.architecture), path).model_dump()
    return entry, sizes, settings


def read_train(name: str, section: str, path: Path = Path("params.yaml")) -> TrainParams:
    """Read the section `train` with what an entry of `separators:` or `mae_separators:` replaces in it."""
    over = [f"{section}.{name}.train"]
    if section == "mae_separators":
        over.insert(0, f"{load_params(f'{section}.{name}', MaeSeparatorParams, path).body}.train")
    return load_params("train", TrainParams, path, over=over)


def plan(name: str, section: str, pretrained: Path | None) -> Plan:
    """Read an entry of params.yaml; ValueError names what does not fit."""
    if section == "separators":
        entry = load_params(f"separators.{name}", SeparatorParams)
        load_params(f"separators.{name}.model", model_params(entry.architecture))
        return Plan(
            entry.architecture,
            entry.model,
            None if entry.weights is None else Path(entry.weights),
            entry.weights_sha256,
        )
    if pretrained is None:
        raise ValueError(f"{name} is an entry of {section}: --pretrained must say where stage pretrain_mae wrote")
    mae_entry, body, settings = read_mae_entry(name)
    upstream, options_type = settings["upstream"], upstreams.options(settings["upstream"])
    options = {} if options_type is None else load_params(f"upstreams.{upstream}", options_type).model_dump()
    config, state = upstreams.read(upstream, {**settings, **options}, pretrained)
    return Plan(mae_entry.architecture, {"body": body, **settings, "upstream_config": config}, upstream=state)


def _check_sizes(name: str, sizes: Mapping[str, Any], plan: Plan, query_dim: int) -> None:
    """ValueError names where a published network is of other sizes than params.yaml and the queries have."""
    here = {**plan.model, "query_dim": query_dim}
    places = {key: f"separators.{name}.model.{key}" for key in plan.model} | {"query_dim": "the anchors' queries"}
    wrong = [f"{key} {there}, {places[key]} {here[key]}" for key, there in sizes.items() if here[key] != there]
    if wrong:
        raise ValueError(
            f"{plan.weights} does not fit: it has {'; '.join(wrong)}. Queries of 2048 are those of Cnn14, "
            "sed.query_weights"
        )


def train_separator(
    name: str, anchors: Path, sed: Path, out: Path, curve: Path, *, plan: Plan, params: TrainParams, pairs: PairsParams
) -> dict[str, Any]:
    """Train (or convert) one separator into `out`: weights.safetensors and config.json. Returns the config."""
    keep_freed_memory()
    use_available_cores()
    use_precision(params.precision)
    index = read_json(anchors / "index.json")
    query_dim = index["query_dim"]
    torch.manual_seed(params.seed)
    takes_interferer = params.interferer_query > 0 and plan.weights is None
    arguments = {**plan.model, "query_dim": query_dim, "interferer_query": takes_interferer}
    model = build(plan.architecture, **arguments)
    if plan.upstream is not None:
        model.load_pretrained(plan.upstream)
    identity = json.dumps([plan.architecture, plan.model, str(plan.weights), plan.weights_sha256], sort_keys=True)
    digest = hashlib.sha256(save(plan.upstream or {})).hexdigest()
    scratch = scratch_dir(
        f"train_separator-{name}",
        fingerprint(identity, digest, params, pairs, *(anchors / file for file in ANCHOR_FILES)),
    )
    go_on_alike(scratch, choose_device(params.device), params.precision)
    if plan.weights is None:
        batches = Batches(
            anchors,
            pairs,
            seed=params.seed,
            batch_size=params.batch_size,
            segment_seconds=params.segment_seconds,
            query=params.query,
            interferer_query=params.interferer_query,
        )
        log.info("%s: %d steps over %d classes", name, params.steps, len(batches.stream.classes))
        train(name, model, batches, params, scratch=scratch, curve=curve)
    else:
        published, sizes = read_published(plan.architecture, plan.weights, sha256=plan.weights_sha256)
        _check_sizes(name, sizes, plan, query_dim)
        model.load_state_dict(published)
        write_curve(curve, [])
    config = {
        "architecture": plan.architecture,
        "model": arguments,
        "sample_rate": index["sample_rate"],
        "segment_samples": index["segment_samples"],
        **asdict(cost(model, query_dim=model.joint_dim, samples=index["segment_samples"])),
        "steps": params.steps if plan.weights is None else 0,
        "weights": plan.weights_sha256,
    }
    finished = scratch / "finished"
    finished.mkdir(parents=True, exist_ok=True)
    write_atomic(finished / "weights.safetensors", save({k: v.contiguous() for k, v in model.state_dict().items()}))
    config |= equip(finished, model, anchors, sed)
    write_json(finished / "config.json", config)
    publish(finished, out)
    shutil.rmtree(scratch)  # `dvc repro --force` must train again
    return config


def main() -> None:
    """Paths come from dvc.yaml, numbers from params.yaml."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="an entry of the section")
    parser.add_argument("--section", choices=["separators", "mae_separators"], default="separators")
    parser.add_argument("--pretrained", type=Path, help="for mae_separators: where stage pretrain_mae wrote")
    parser.add_argument("--anchors", type=Path, required=True)
    parser.add_argument("--sed", type=Path, required=True, help="detector and query encoder, for use elsewhere")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--curve", type=Path, required=True)
    args = parser.parse_args()
    params = read_train(args.name, args.section)
    pairs = load_params("pairs", PairsParams)
    check_networks(args.sed, "query", DETECTOR)
    found = plan(args.name, args.section, args.pretrained)
    with running(f"train_separator@{args.name}", args.out) as told:
        config = train_separator(
            args.name, args.anchors, args.sed, args.out, args.curve, plan=found, params=params, pairs=pairs
        )
        if torch.cuda.is_available():
            told["cuda_allocated_bytes"] = float(torch.cuda.max_memory_allocated())
            told["cuda_reserved_bytes"] = float(torch.cuda.max_memory_reserved())
        log.info("%s: %s", args.name, config)


if __name__ == "__main__":
    run_command(main)
