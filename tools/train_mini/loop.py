"""One loop for every stage: until the clock stops it, on a processor or as a captured graph on a card; it resumes."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor, nn

CHECK = 50  # steps between two looks at the loss for NaN
AHEAD = 8  # steps that a card may be asked for before the loop waits: the clock must not run away from it
HOLD = 0.4  # share of the time after which the rate falls
DECAY = 0.999  # of the average, at the end of its warm-up


class DivergedError(ArithmeticError):
    """A loss or a weight is not finite."""


@dataclass(frozen=True)
class Machine:
    """Where and how to compute.

    Arguments:
        device: "cpu" or "cuda".
        precision: Autocast to this half precision, or None.
        graph: Capture the step as a CUDA graph.
    """

    device: torch.device
    precision: torch.dtype | None = None
    graph: bool = False

    @classmethod
    def choose(cls, device: str = "auto", precision: str = "auto") -> "Machine":
        """Take a card where there is one, and bfloat16 where it is computed in, not emulated."""
        cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
        capabilities = {} if cuda else torch.cpu.get_capabilities()
        half = cuda or bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
        wanted = half if precision == "auto" else precision == "bfloat16"
        return cls(torch.device("cuda" if cuda else "cpu"), torch.bfloat16 if wanted else None, cuda)

    def generator(self, seed: int) -> Generator:
        """Return the source of all randomness of a stage: on a card the default one, which captured steps know."""
        if self.device.type == "cpu":
            return Generator().manual_seed(seed)
        torch.cuda.init()
        return torch.cuda.default_generators[torch.cuda.current_device()].manual_seed(seed)

    def autocast(self) -> torch.autocast:
        # A cache of converted weights would outlive a captured step.
        return torch.autocast(
            self.device.type, self.precision or torch.bfloat16, enabled=self.precision is not None, cache_enabled=False
        )


@dataclass(frozen=True)
class Budget:
    """When a stage ends: after seconds of the clock, after steps, or after what comes first."""

    seconds: float = math.inf
    steps: float = math.inf

    def progress(self, seconds: float, steps: int) -> float:
        """Return the share that is done, 1 at the end."""
        shares = [1.0 if whole <= 0 else done / whole for done, whole in ((seconds, self.seconds), (steps, self.steps))]
        return min(1.0, max(shares))


def falling(progress: float, steps: int, warmup: int) -> float:
    """Return the factor of the learning rate: it warms up by steps, holds, and falls by the clock to 0.3 % (cosine)."""
    rise = min(1.0, (steps + 1) / warmup)
    fall = max(0.0, (progress - HOLD) / (1 - HOLD))
    return rise * (0.003 + 0.997 * 0.5 * (1 + math.cos(math.pi * fall)))


class Average:
    """Exponential average of a module's weights: decay min(0.999, (1 + n) / (10 + n)) after n updates, capturable."""

    def __init__(self, module: nn.Module) -> None:
        self.names = [name for name, _ in module.named_parameters()]
        self.source = [p.detach() for p in module.parameters()]
        self.value = [p.clone() for p in self.source]
        self.updates = torch.zeros((), device=self.source[0].device)

    def update(self) -> None:
        decay = ((1 + self.updates) / (10 + self.updates)).clamp(max=DECAY)
        change = torch._foreach_sub(self.source, self.value)
        torch._foreach_mul_(change, 1 - decay)
        torch._foreach_add_(self.value, change)
        self.updates.add_(1)

    def state_dict(self) -> dict[str, Tensor]:
        return {**dict(zip(self.names, self.value, strict=True)), "updates": self.updates}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, value in zip(self.names, self.value, strict=True):
            value.copy_(state[name])
        self.updates.copy_(state["updates"])

    def restart(self) -> None:
        """Forget the past: the average is the weights themselves."""
        torch._foreach_copy_(self.value, self.source)
        self.updates.zero_()


@dataclass
class Training:
    """A stage.

    Arguments:
        name: Of its files: NAME.pt to resume from, NAME.safetensors with the averaged weights, NAME.jsonl.
        model: What is trained and averaged.
        step: Takes one step and returns what to log, scalars.
        rates: The largest learning rate of each optimizer.
        optimizers: By name; each has one group whose rate is a tensor.
        generator: Source of all randomness of a step.
        warmup: Steps until the rate is whole.
        others: What else is trained, such as a discriminator.
        refresh: Called every minute, to take in new pictures.
        progress: Tensor that steps read to know the share of the time that is over, `()`.
        samples: Pictures a step, for the log.
    """

    name: str
    model: nn.Module
    step: Callable[[], dict[str, Tensor]]
    optimizers: dict[str, torch.optim.Optimizer]
    rates: dict[str, float]
    average: Average
    generator: Generator
    progress: Tensor
    warmup: int
    samples: int
    others: dict[str, nn.Module] = field(default_factory=dict)
    refresh: Callable[[], object] = lambda: None

    def parts(self) -> dict[str, nn.Module | torch.optim.Optimizer | Average]:
        return {"model": self.model, "average": self.average, **self.others, **self.optimizers}


def adam(module: nn.Module, betas: tuple[float, float], decay: float = 0.0) -> torch.optim.AdamW:
    """Return AdamW whose learning rate is a tensor on the device, so that a captured step sees it change."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    device = parameters[0].device
    cuda = device.type == "cuda"
    for p in parameters:
        p.grad = torch.zeros_like(p)  # at one address for good
    rate = torch.zeros((), device=device)
    return torch.optim.AdamW(parameters, lr=rate, betas=betas, weight_decay=decay, capturable=cuda, foreach=cuda)


def run(
    training: Training,
    folder: Path,
    machine: Machine,
    budget: Budget,
    *,
    every: float = 60.0,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Train until the budget is spent, going on where an earlier run stopped, and return the steps in all.

    A loss or weight that is not finite sends the run back to its last checkpoint, at half the rate, three times.

    Arguments:
        training: The stage.
        folder: For its files.
        machine: Where to compute.
        budget: Of all runs of this stage together.
        every: Seconds between two checkpoints and lines of the log.
        clock: Seconds that go on.

    Raises:
        DivergedError: If it does so for the fourth time.
    """
    steps, seconds = _resume(training, folder)
    if budget.progress(seconds, steps) >= 1 and (folder / f"{training.name}.safetensors").exists():
        return steps
    _save(training, folder, steps, seconds)
    for factor in (1.0, 0.5, 0.25, 0.125):
        try:
            return _advance(training, folder, machine, budget, steps, seconds, factor, every, clock)
        except DivergedError as error:
            steps, seconds = _resume(training, folder)
            _log(training, folder, {"event": f"{error}; back to step {steps}, at {factor / 2} of the rate"})
    raise DivergedError(f"expected finite losses of stage {training.name}, got none in four tries; lower its rate")


def _advance(
    training: Training,
    folder: Path,
    machine: Machine,
    budget: Budget,
    steps: int,
    seconds: float,
    factor: float,
    every: float,
    clock: Callable[[], float],
) -> int:
    begun, first, losses = clock() - seconds, steps, {}
    saved = begun + seconds
    take, now = None, saved
    while (progress := budget.progress(now - begun, steps)) < 1:
        training.progress.fill_(progress)
        for name, optimizer in training.optimizers.items():
            rate = factor * training.rates[name] * falling(progress, steps, training.warmup)
            optimizer.param_groups[0]["lr"].fill_(rate)
        if take is None:
            take, warmed = _captured(training, folder, machine)
            steps += warmed
        losses = take()
        steps += 1
        if machine.device.type == "cuda" and steps % AHEAD == 0:
            torch.cuda.synchronize()
        if steps % CHECK == 0:
            _check(losses, steps)
        now = clock()
        if now - saved >= every:
            _check(losses, steps, training.average.value)
            _report(training, folder, losses, steps, now - begun, (steps - first) / (now - begun - seconds))
            _save(training, folder, steps, now - begun)
            training.refresh()
            saved = now
    if losses:
        _check(losses, steps, training.average.value)
        _report(training, folder, losses, steps, now - begun, (steps - first) / max(1e-9, now - begun - seconds))
    _save(training, folder, steps, now - begun)
    return steps


def _captured(training: Training, folder: Path, machine: Machine) -> tuple[Callable[[], dict[str, Tensor]], int]:
    """Return the step, as one CUDA graph if the machine has them, and the number of steps taken to warm up."""
    if not machine.graph:
        return training.step, 0
    begun, warm = time.monotonic(), 3
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm):
            training.step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            losses = training.step()
    except Exception as error:  # of whatever version of torch
        _log(training, folder, {"event": f"plain steps, the capture failed: {error!r}"[:300]})
        torch.cuda.synchronize()
        return training.step, warm

    def replay() -> dict[str, Tensor]:
        graph.replay()
        return losses

    _log(training, folder, {"event": f"step captured as a CUDA graph after {time.monotonic() - begun:.1f} s"})
    return replay, warm


def _check(losses: dict[str, Tensor], steps: int, weights: list[Tensor] | None = None) -> None:
    if bad := [name for name, value in losses.items() if not value.isfinite()]:
        raise DivergedError(f"{bad[0]} is not finite at step {steps}")
    if weights and not torch.stack(torch._foreach_norm(weights)).isfinite().all():
        raise DivergedError(f"a weight is not finite at step {steps}")


def _log(training: Training, folder: Path, row: dict[str, object]) -> None:
    row = {"stage": training.name, **row}
    print(json.dumps(row), flush=True)
    with (folder / f"{training.name}.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def _report(
    training: Training, folder: Path, losses: dict[str, Tensor], steps: int, seconds: float, pace: float
) -> None:
    row: dict[str, object] = {"seconds": round(seconds, 1), "steps": steps, "samples": steps * training.samples}
    row |= {"steps_per_second": round(pace, 2), "rate": next(iter(training.optimizers.values())).param_groups[0]["lr"]}
    row |= losses
    _log(training, folder, {k: float(f"{v.item():.5g}") if isinstance(v, Tensor) else v for k, v in row.items()})


def _save(training: Training, folder: Path, steps: int, seconds: float) -> None:
    """Write the checkpoint and the averaged weights, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    state: dict[str, object] = {name: part.state_dict() for name, part in training.parts().items()}
    state |= {"generator": training.generator.get_state(), "steps": steps, "seconds": seconds}
    path = folder / f"{training.name}.pt"
    torch.save(state, path.with_suffix(".partial"))
    path.with_suffix(".partial").replace(path)
    average = dict(zip(training.average.names, training.average.value, strict=True))
    half = {name: value.to("cpu", torch.float16).contiguous() for name, value in average.items()}
    path = folder / f"{training.name}.safetensors"
    save_file(half, path.with_suffix(".part"), {"steps": str(steps), "seconds": f"{seconds:.1f}", "format": "pt"})
    path.with_suffix(".part").replace(path)


def _resume(training: Training, folder: Path) -> tuple[int, float]:
    """Load the checkpoint if there is one, or start from averaged weights alone; returns steps and seconds so far."""
    path = folder / f"{training.name}.pt"
    if not path.exists():
        if path.with_suffix(".safetensors").exists():
            load_weights(path.with_suffix(".safetensors"), training.model)
            training.average.restart()
        return 0, 0.0
    state = torch.load(path, map_location=training.average.updates.device, weights_only=True)
    for name, part in training.parts().items():
        part.load_state_dict(state[name])
    training.generator.set_state(state["generator"].cpu())
    return state["steps"], state["seconds"]


def load_weights(path: Path, module: nn.Module) -> None:
    """Put the averaged weights that a stage wrote into a module, in the module's own precision.

    Raises:
        FileNotFoundError: If the stage has not run.
    """
    if not path.exists():
        raise FileNotFoundError(f"expected {path}, found nothing; run stage {path.stem} first")
    state = load_file(path)
    own = dict(module.named_parameters())
    if own.keys() != state.keys():
        raise ValueError(
            f"expected {len(own)} tensors of this shape in {path}, got {len(state)}; use one setting for all"
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(state[name])
