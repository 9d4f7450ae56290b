"""The one training loop: steps, schedule, clipping, checkpoints and exact resume, log.

A step is a pure function of its number: the batch comes from (seed, n), and so do the draws of layers such as
dropout. That is what makes a resumed run equal to an uninterrupted one, bit for bit on a CPU.
"""

import copy
import csv
import io
import logging
import math
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import DTypeLike
from torch import Tensor, nn
from tqdm import tqdm

from pipeline.core.devices import is_out_of_memory, loading
from pipeline.core.runtime import reserve, write_atomic, writing
from pipeline.training.scaled_adam import ScaledAdam

log = logging.getLogger(__name__)

T = TypeVar("T")

Optimizer = Literal["adam", "adamw", "scaled_adam"]


def build_optimizer(name: Optimizer, parameters: Iterable[Any], learning_rate: float) -> torch.optim.Optimizer:
    """Adam as Zhao et al. say, AdamW with amsgrad and no weight decay as Kong et al.'s code has it, or ScaledAdam.

    `parameters` may be groups with a learning rate, weight decay and `start_step` of their own. Weight decay is AdamW's
    (it does not pass through the gradient's moments) also under "adam", where a group asks for it.
    """
    if name == "scaled_adam":
        return ScaledAdam(parameters, learning_rate)
    # Fused: one pass over each tensor in place of ten; a third of the time of a small transformer's update on a CPU.
    if name == "adam":
        return torch.optim.Adam(parameters, lr=learning_rate, decoupled_weight_decay=True, fused=True)
    return torch.optim.AdamW(parameters, lr=learning_rate, amsgrad=True, weight_decay=0.0, fused=True)


def learning_rate_factor(
    step: int, *, warmup: Sequence[Sequence[float]], decay: Literal["none", "cosine"], steps: int
) -> float:
    """Multiple of the learning rate at `step`: piecewise constant [[from step, factor], ...], then constant or cosine.

    Kong et al. train with x0.001, x0.01 and x0.1 for 10,000 steps each and x1 ever after. The cosine falls from the
    start of the last piece to zero at `steps`.
    """
    start, factor = 0.0, 1.0
    for first, value in warmup:
        if step >= first:
            start, factor = first, value
    if decay == "cosine" and start == warmup[-1][0]:
        progress = (step - start) / max(steps - start, 1)
        factor *= 0.5 * (1 + float(torch.cos(torch.tensor(progress * torch.pi, dtype=torch.float64))))
    return factor


def prefetch(load: Callable[[int], T], steps: range, depth: int = 4) -> Generator[T]:
    """`load(n)` for each n in order, read ahead by one thread. An error in `load` is raised here."""
    ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def put(item: tuple[T | None, BaseException | None]) -> None:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def work() -> None:
        for n in steps:
            try:
                item: tuple[T | None, BaseException | None] = (load(n), None)
            except BaseException as error:  # handed over to the consumer, which raises it
                item = (None, error)
            put(item)
            if item[1] is not None or stop.is_set():
                return

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        for _ in steps:
            value, error = ready.get()
            if error is not None:
                raise error
            yield value  # type: ignore[misc]  # None only beside an error
    finally:
        stop.set()
        thread.join()


@dataclass(frozen=True)
class Validation:
    """Early stopping: `loss()` is asked every so many steps and after the last; the weights of the lowest are kept.

    After `patience` times without a new lowest, training ends; 0 never ends it.
    """

    loss: Callable[[], float]
    every_steps: int
    patience: int


@dataclass(frozen=True)
class Fitted:
    """How a training went."""

    steps: int
    best_step: int  # the step whose weights the model has; the last one where nothing validates
    best_validation: float | None
    seconds_per_step: float | None  # of the steps taken by this process, validation apart; None: it took none


class Average:
    """An exponential moving average of a model's weights and of the running statistics of its norms, in float32.

    After step n each tensor moves by max(1 - decay, 9 / (10 + n)) of its way to the model's: at first the mean of few
    steps, not of the random start. Counters are copied. `tensors` is a state dict of the model.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"the decay of an average of weights is {decay}, not between 0 and 1")
        self.decay = decay
        self.tensors = {
            name: tensor.detach().to(torch.float32 if tensor.is_floating_point() else tensor.dtype, copy=True)
            for name, tensor in model.state_dict().items()
        }

    @torch.no_grad()
    def update(self, model: nn.Module, n: int) -> None:
        """Take in the weights after step n, counted from 0."""
        share = max(1 - self.decay, 9 / (10 + n))
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                self.tensors[name].lerp_(tensor.float(), share)
            else:
                self.tensors[name].copy_(tensor)

    @contextmanager
    def inside(self, model: nn.Module) -> Generator[None]:
        """The model with the averaged weights, and with its own again afterwards."""
        own = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        model.load_state_dict(self.tensors)
        try:
            yield
        finally:
            model.load_state_dict(own)


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    load: Callable[[int], T],
    loss: Callable[[T], Tensor | Mapping[str, Tensor]],
    *,
    loss_weights: Mapping[str, float] | None = None,
    steps: int,
    learning_rate: Callable[[int], float],
    gradient_clip: float,
    seed: int,
    describe: Callable[[int], str],
    scratch: Path,
    curve: Path,
    log_every_steps: int,
    checkpoint_every_seconds: float,
    validation: Validation | None = None,
    before_step: Callable[[int], None] = lambda n: None,
    ema: float = 0.0,
) -> Fitted:
    """Train `model` in place from its last checkpoint in `scratch`, or from step 0; write the curve as CSV.

    `load(n)` makes batch n (in a thread, ahead of time). `loss(batch)` is a scalar, or scalars by name: then each is a
    column of the curve, and their sum weighted by `loss_weights` is minimised. `learning_rate(n)` is the multiple of
    each parameter group's own rate; a group with `start_step`, of parameters that all learn, has no gradient before
    that step. `before_step(n)` may change the model as a function of n, at every step. With `validation` the curve has
    one more column, and the model ends with its best weights. With `ema` above 0 an `Average` of that decay is what
    validates, and what the model ends with. FloatingPointError when loss or gradient is not finite, naming the step
    and `describe(n)`; ValueError where the memory does not hold a batch. `scratch` must belong to this run
    alone (see `runtime.fingerprint`): its checkpoint is trusted.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    checkpoint = scratch / "checkpoint.pt"
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    step, rows = 0, list[dict[str, float]]()
    best: dict[str, Any] = {"step": 0, "loss": None, "model": None, "worse": 0}
    window: list[dict[str, float]] = []  # loss, its terms and the gradient's norm, of the steps since the last row
    spent = 0.0  # seconds, on validation
    average = Average(model, ema) if ema > 0 else None
    if (state := _resume(checkpoint, model, optimizer)) is not None:
        step, rows, window, best = state["step"], state["rows"], state["window"], state["best"]
        if average is not None:
            average.tensors = state["average"]
        log.info("resumed at step %d of %d", step, steps)

    def save(step: int) -> None:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        if average is not None:
            state["average"] = average.tensors
        buffer = io.BytesIO()
        torch.save({**state, "step": step, "rows": rows, "window": window, "best": best}, buffer)
        write_atomic(checkpoint, buffer.getvalue())

    def validate(step: int) -> float:
        nonlocal best, spent
        assert validation is not None
        began = time.monotonic()
        model.eval()
        with nullcontext() if average is None else average.inside(model):
            found = validation.loss()
            if best["loss"] is None or found < best["loss"]:
                weights = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
                best = {"step": step, "loss": found, "model": weights, "worse": 0}
            else:
                best = {**best, "worse": best["worse"] + 1}
        model.train()
        spent += time.monotonic() - began
        return found

    def exhausted() -> bool:
        return validation is not None and 0 < validation.patience <= best["worse"]

    model.train()
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    first, started, saved, said = step, time.monotonic(), time.monotonic(), time.monotonic()
    bar = tqdm(total=steps, initial=step, disable=not sys.stderr.isatty(), unit="step", leave=False)

    def load_or_name(n: int) -> T:
        with loading(f"batch {n}"):
            return load(n)

    with closing(prefetch(load_or_name, range(step, steps))) as batches:
        for n, batch in enumerate(batches, start=step):
            if exhausted():
                break
            before_step(n)
            torch.manual_seed((seed << 32) + n)
            factor = learning_rate(n)
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
            _let_learn(optimizer, n)
            optimizer.zero_grad(set_to_none=True)
            terms = loss(batch)
            value, terms = (terms, {}) if isinstance(terms, Tensor) else (weigh(terms, loss_weights or {}), terms)
            value.backward()  # type: ignore[no-untyped-call]
            norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
            # All looked at together: each look waits until a GPU has caught up.
            scalars = {"loss": value, "gradient_norm": norm, **terms}
            numbers = torch.stack([scalar.detach().double() for scalar in scalars.values()]).tolist()
            window.append(dict(zip(scalars, numbers, strict=True)))
            for name, number in window[-1].items():
                if not math.isfinite(number):
                    raise FloatingPointError(f"the {name} is {number} at step {n}, batch: {describe(n)}")
            if gradient_clip > 0:
                torch.nn.utils.clip_grads_with_norm_(trained, gradient_clip, norm)
            optimizer.step()
            if average is not None:
                average.update(model, n)
            bar.update()
            validated = validate(n + 1) if validation and _due(n + 1, validation.every_steps, steps) else None
            if validated is not None or _due(n + 1, log_every_steps, steps):
                means = {name: sum(numbers[name] for numbers in window) / len(window) for name in window[0]}
                row = {"step": n + 1, **means, "learning_rate": optimizer.param_groups[0]["lr"]}
                if validated is not None:
                    row["validation"] = validated
                rows.append(row)
                window.clear()
                bar.set_postfix(loss=f"{row['loss']:.4g}")
                if bar.disable and (time.monotonic() - said > 30 or n + 1 == steps):
                    said = time.monotonic()
                    rate = (n + 1 - first) / (said - started)
                    log.info("step %d of %d: loss %.4g, %.2f steps/s", n + 1, steps, row["loss"], rate)
            step = n + 1
            if time.monotonic() - saved > checkpoint_every_seconds and n + 1 < steps:
                save(n + 1)
                saved = time.monotonic()
    bar.close()
    _let_learn(optimizer, math.inf)
    taken = time.monotonic() - started - spent
    if average is not None:
        model.load_state_dict(average.tensors)
    if best["model"] is not None:
        model.load_state_dict(best["model"])
        log.info("step %d has the lowest validation loss, %.4g, of %d steps", best["step"], best["loss"], step)
    model.eval()
    write_curve(curve, rows, validation=validation is not None)
    return Fitted(
        steps=step,
        best_step=step if best["loss"] is None else best["step"],
        best_validation=best["loss"],
        seconds_per_step=taken / (step - first) if step > first else None,
    )


def _resume(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
    """Load the last checkpoint into model and optimizer; None where there is none, or a damaged one: it is set aside.

    Whatever a file that is cut or spoilt makes the reader stumble over, and in whatever way, the training begins anew.
    """
    if not checkpoint.exists():
        return None
    content = io.BytesIO(checkpoint.read_bytes())  # of a file that is cut torch says "invalid argument", as of a disk
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    try:
        state = torch.load(content, weights_only=True, map_location=next(model.parameters()).device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        return {key: state[key] for key in ("step", "rows", "window", "best", *state)}
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reason = f"{type(error).__name__}: {str(error)[:100]}".rstrip(": ")
    model.load_state_dict(before[0])
    optimizer.load_state_dict(before[1])
    aside = checkpoint.with_name("damaged_checkpoint.pt")
    os.replace(checkpoint, aside)
    log.warning("%s is damaged (%s); it is set aside as %s, and training begins anew", checkpoint, reason, aside.name)
    return None


def rows_on_disk(file: Path, shape: tuple[int, ...], dtype: DTypeLike) -> np.memmap[Any, Any]:
    """An array in a new .npy file, all zeros, as large as the disk allows: DiskFull at once where it has no room."""
    file.parent.mkdir(parents=True, exist_ok=True)
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    with writing(file), open(file, "wb") as opened:
        np.lib.format.write_array_header_1_0(opened, header)
        size = opened.tell() + math.prod(shape) * np.dtype(dtype).itemsize
    reserve(file, size)
    return np.lib.format.open_memmap(file, mode="r+")


def weigh(terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Sum the terms of a loss times their weights; ValueError for a term without one."""
    if missing := sorted(terms.keys() - weights.keys()):
        raise ValueError(f"loss_weights has no weight for {', '.join(missing)}; it has {', '.join(weights)}")
    return torch.stack([weights[name] * value for name, value in terms.items()]).sum()


def write_curve(path: Path, rows: Sequence[Mapping[str, int | float]], *, validation: bool = False) -> None:
    """The curve of a training as CSV; of one that took no step, `rows` is empty and the header is all there is."""
    fixed = ["step", "loss", "gradient_norm", "learning_rate"]
    terms = [name for name in (rows[0] if rows else ()) if name not in (*fixed, "validation")]
    columns = [*fixed, *(["validation"] if validation else []), *terms]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: f"{value:.6g}" for key, value in row.items()} for row in rows)
    write_atomic(path, text.getvalue())


def _let_learn(optimizer: torch.optim.Optimizer, step: int | float) -> None:
    """Gradients for the groups whose `start_step` has come, and none for the others, whose would be thrown away."""
    for group in optimizer.param_groups:
        if "start_step" in group:
            for parameter in group["params"]:
                parameter.requires_grad_(step >= group["start_step"])


def _due(step: int, every: int, steps: int) -> bool:
    return step % every == 0 or step == steps
