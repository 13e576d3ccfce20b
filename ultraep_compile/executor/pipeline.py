"""`ultraep_compile.pipeline`: a multimodal model trained as a nested pipeline, one process per rank."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ultraep_compile.backend import ultraep
from ultraep_compile.decorator import take_options
from ultraep_compile.errors import ArgumentError, OptionError, PipelineError, need_model
from ultraep_compile.exchange import at, failing, line_of
from ultraep_compile.executor import gradients
from ultraep_compile.executor.agreement import Facts, Shared, batch_facts, digest_of, disagreements, listed
from ultraep_compile.executor.channels import communicators
from ultraep_compile.executor.costs import (
    Rates,
    estimated_rates,
    follow_trained,
    make_problem,
    measured_rates,
    measured_work,
    step_sizes,
)
from ultraep_compile.executor.follow import Structure, check_names, modes, sharded_stay, ties_of
from ultraep_compile.executor.holdings import Holdings, gather_state, holdings, let_go, names_of, part_names
from ultraep_compile.executor.memory import Meter
from ultraep_compile.executor.planning import Planner
from ultraep_compile.executor.program import Program, forward_of
from ultraep_compile.executor.run import Clock, StepRun, Units
from ultraep_compile.executor.settings import Settings
from ultraep_compile.executor.story import describe
from ultraep_compile.executor.timeline import foretold, machine, rates_of, timeline_of, trace
from ultraep_compile.executor.units import EncoderUnit, GeneratorUnit, StageUnit
from ultraep_compile.multimodal.modules import StageModule
from ultraep_compile.multimodal.parts import Microbatch, Parts, find_parts
from ultraep_compile.preparation import prepare
from ultraep_compile.schedules import Problem, Schedule
from ultraep_compile.schedules.simulate import Timeline

_MEASURED_STEP = 2  # whose times become the rates; the first warms up
MOST_METRICS = 32  # that a last stage may return


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step computed, the same on every rank of the pipeline."""

    loss: Tensor  # 0-d, detached, not scaled: token-weighted mean over microbatches, mean over data-parallel pipelines
    metrics: tuple[Tensor, ...]  # 0-d: floats averaged as the loss, integers added up
    peak_bytes: dict[str, int]  # this rank's activations of encoders, LLM and generators; zeros unless measured

    def __float__(self) -> float:
        return float(self.loss)

    def item(self) -> float:
        return float(self.loss)


def pipeline(
    model: nn.Module | Parts,
    mesh: DeviceMesh,
    microbatches: int,
    inputs: Mapping[str, Any] | None = None,
    *,
    pipeline_dim: str | None = None,
    loss_tokens: Callable[[Mapping[str, Any]], Any] | str | None = None,
    backend: Any = None,
    options: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Pipeline:
    """Run an unmodified multimodal model as a nested pipeline over the ranks of a mesh. Collective; every rank calls it.

    The language model is cut into stages, one (or `virtual`) for each rank along the mesh's pipeline dimension; encoders
    and generators, which every rank holds, run nested in its schedule. Parameters of other ranks' stages are let go, in
    place. Make the optimizer afterwards, from `parameters()` of the result.

        pipe = ultraep_compile.pipeline(model, mesh, microbatches=8, inputs=batch)
        optimizer = torch.optim.AdamW(pipe.parameters())
        loss = pipe.step(batch).loss

    Args:
        model: whole, with equal weights on every rank, on the mesh's device; or `Parts` already found.
        mesh: with a dimension named "pp" (any name if it is the only one). Other dimensions are data parallel: every
            pipeline steps on a batch of its own, and gradients are averaged.
        microbatches: into how many the samples of a batch are divided.
        inputs: an example batch (keyword arguments of one forward, with labels and every modality); finds the parts.
        pipeline_dim: the mesh dimension of the stages, if not "pp".
        loss_tokens: how many tokens the loss of a microbatch is the mean of: a function of its inputs that gives a number (or a tensor
            whose sum is it), or the name of an input that says so, a mask [samples, positions] or counts [samples]. By default
            found from losses of the example batch.
        backend: what to compile the layers of this rank's stages with; "ultraep" (with its `options`) balances
            their experts; shard those over another mesh dimension by `shard_experts` first. An instance of a class that
            `@balance` decorates brings backend and options along.
        settings: see `Settings`.
    Raises: OptionError, PartsError, ScheduleError.
    """
    if not isinstance(model, Parts):
        need_model(model, "pipeline")
    chosen = Settings.of(microbatches, settings)
    dim = find_dim(mesh, pipeline_dim)
    ranks = mesh.size() if dim is None else mesh[dim].size()
    if options and backend is None:
        raise OptionError("options= are those of a backend, and none is given. Give backend='ultraep', too.")
    compiler = functools.partial(ultraep, options=dict(options or {})) if backend == "ultraep" else backend
    if isinstance(model, Parts):
        made = Pipeline(None, model, mesh, chosen, dim)
    else:
        if inputs is None:
            raise OptionError("pipeline() needs an example batch to find the parts of the model. Give inputs=batch.")
        decorated = take_options(model)
        if decorated is not None and compiler is None:
            compiler = functools.partial(ultraep, options=decorated)
        prepare(model, dict(inputs))
        made = Pipeline(model, find_parts(model, inputs, ranks * chosen.virtual, loss_tokens=loss_tokens), mesh, chosen, dim)
    if compiler is not None:
        for layer in made.layers():
            layer.compile(backend=compiler)
    return made


class Pipeline:
    """One rank's side of a pipeline. Made by `ultraep_compile.pipeline`; every rank makes its own and calls the same."""

    def __init__(
        self,
        model: nn.Module | None,
        parts: Parts,
        mesh: DeviceMesh,
        settings: Settings,
        pipeline_dim: str | None = None,
    ) -> None:
        self.model, self.parts, self.mesh, self.settings = model, parts, mesh, settings
        self.dim = find_dim(mesh, pipeline_dim)
        flat = mesh if self.dim is None else mesh[self.dim]
        self.group = flat.get_group()
        self.rank, self.ranks = flat.get_local_rank(), flat.size()
        self.device = _device_of(mesh)
        self.stage_rank = _place(len(parts.stages), self.ranks, settings)
        self.rates: Rates = estimated_rates(parts, model)
        self.held: Holdings = holdings(names_of(model, parts), parts, self.stage_rank, self.rank)
        self.meter = Meter(settings.measure_memory)
        self.units = self._units()
        self._common = _common_modules(model, parts)
        self._bound: dict[str, nn.Parameter] = {}
        self._reductions: list[gradients.Reduction] = []
        self._ties = ties_of(names_of(model, parts))
        self._trained: list[bool] = []  # of the parameters bound
        self._alike_beside = True  # do pipelines beside this one train the same?
        self.bind()
        if model is not None:
            let_go(model, self._bound.values())
        self._connect()
        self.clock = Clock(self.device, settings.trace or settings.costs == "measured")
        self.steps = 0
        self.program: Program | None = None
        self.timeline: Timeline | None = None  # of the last step, in seconds, of all ranks, if traced
        self.predicted: Timeline | None = None  # the same schedule, played at the mean rates of that step
        self.planner = Planner(settings, self.rank)

    def _units(self) -> Units:
        device, meter, parts = self.device, self.meter, self.parts
        return Units(
            [EncoderUnit(e.name, e.module, device, meter) for e in parts.encoders],
            {
                s.index: StageUnit(s.index, s.module, device, meter)
                for s, r in zip(parts.stages, self.stage_rank, strict=True)
                if r == self.rank
            },
            [GeneratorUnit(g.name, g.module, device, meter) for g in parts.generators],
            parts.states,
        )

    def bind(self) -> dict[str, nn.Parameter]:
        """Look up this rank's parameters as they are now: they may be replaced (`fully_shard`), frozen, and unfrozen."""
        names = sharded_stay(self._bound, names_of(self.model, self.parts))
        check_names(self._ties, ties_of(names))
        bound = {name: names[name] for name in self.held.named}
        for name, p in bound.items():  # for clip_grad_norm_
            p._ultraep_pipeline = (self.group, name in self.held.counted)  # pyright: ignore[reportAttributeAccessIssue]
        self.meter.parameters = {gradients.local(p).untyped_storage().data_ptr() for p in bound.values()}
        for unit in self.units.stages.values():
            unit.bind(self.model)
        for unit in self.units.encoders:
            unit.bind()

        def trained(several: Iterable[str]) -> list[nn.Parameter]:
            return [names[n] for n in several if names[n].requires_grad]

        jobs = [gradients.Reduction(self.group, trained(self.held.replicated))]
        for ranks, tied in self.held.tied:
            if self.rank in ranks:
                jobs.append(gradients.Reduction(self.group, trained(tied), among=ranks))
        if self.dim is not None:
            jobs += gradients.outer_reductions(trained(bound), self.mesh, self.dim)
        self._bound, self._reductions = bound, jobs
        self._trained = [p.requires_grad for p in bound.values()]
        self.rates = follow_trained(self.rates, self.parts)
        self._structure = Structure([self.model] if self.model else [m for _, m in part_names(self.parts)])
        return bound

    def _follow(self) -> None:
        """Bind anew if the user has changed what is trained, or replaced parameters."""
        if self._structure.changed() or self._trained != [p.requires_grad for p in self._bound.values()]:
            self.bind()

    def layers(self) -> list[nn.Module]:
        """What of this rank's stages is worth compiling: the model's layers, or stages that are modules of their own."""
        found: list[nn.Module] = []
        for unit in self.units.stages.values():
            stage = unit.module
            whole = isinstance(stage, StageModule)
            found += stage.anatomy.layers[stage.first : stage.last] if whole else [stage]
        return found

    @property
    def outer_groups(self) -> list[dist.ProcessGroup]:
        """The groups of pipelines that stand side by side, one for each other mesh dimension."""
        names = [n for n in self.mesh.mesh_dim_names or () if n != self.dim] if self.dim is not None else []
        return [self.mesh[n].get_group() for n in names if self.mesh[n].size() > 1]

    def step(self, batch: Mapping[str, Any], scale: float = 1.0) -> StepResult:
        """Forward and backward of a whole batch; gradients are added to those that parameters have.

        Args:
            batch: the same on every rank of the pipeline (each data-parallel pipeline has its own).
            scale: factor on the gradients, as a gradient scaler wants; the returned loss has none.
        Raises: PipelineError if the ranks were given different things; PeerTimeoutError if one does not answer in time;
            PartsError if the batch does not divide.
        """
        with failing(), self._undone():
            microbatches, program = self._begin(batch, "trained on")
            before = {p: p.grad for p in self._bound.values() if p.grad is not None}
            for p in before:
                p.grad = None
            self.meter.start()
            outcome = StepRun(
                program, self.units, self.channels, microbatches, self.steps, scale, self.clock
            ).run()
            with at(phase="reduction"):
                gradients.reduce(self._reductions)
                if self.clock.on:
                    self._after(program, microbatches)
                loss, metrics = self._share(outcome.loss, outcome.metrics)
            for p, old in before.items():
                p.grad = old if p.grad is None else old.add_(p.grad)
        self.steps += 1
        self.program = program
        return StepResult(loss, metrics, dict(self.meter.peak))

    def evaluate(self, batch: Mapping[str, Any]) -> StepResult:
        """Forward of a whole batch: the loss and metrics of a step, without gradients. Collective, as a step is.

        Modes stay as the user has set them (`model.eval()` on every rank); gradients that parameters have are not touched, and no
        activations are kept. It does not count as a step.

        Args:
            batch: as for `step`, with labels.
        Raises: as `step`.
        """
        with failing(), self._undone(), torch.no_grad():
            microbatches, program = self._begin(batch, "evaluated")
            self.meter.start()
            clock = Clock(self.device, on=False)
            outcome = StepRun(
                forward_of(program), self.units, self.channels, microbatches, self.steps, 1.0, clock
            ).run()
            with at(phase="reduction"):
                loss, metrics = self._share(outcome.loss, outcome.metrics)
        return StepResult(loss, metrics, dict(self.meter.peak))

    def _begin(self, batch: Mapping[str, Any], use: str) -> tuple[list[Microbatch], Program]:
        """What all ranks do first, on what they agreed to be the same batch for the same use."""
        self._connect()
        self._follow()
        microbatches = self.parts.microbatches(batch, self.settings.microbatches)
        return microbatches, self._program_for(microbatches, batch, use)

    def _connect(self) -> None:
        """Have connections to the other ranks: at first, and again after a failure."""
        self.channels = communicators(self.group, self.device, self.settings.deadline).channels
        for group in self.outer_groups:
            line_of(group).deadline = self.settings.deadline

    @contextlib.contextmanager
    def _undone(self) -> Iterator[None]:
        """Of a step that fails nothing stays: gradients are as they were before it, activations are let go."""
        before = [(p, p.grad) for p in self._bound.values()]
        try:
            yield
        except BaseException:
            for p, old in before:
                p.grad = old
            for unit in (*self.units.stages.values(), *self.units.encoders):
                unit.let_go()
            self.meter.held.clear()
            self.meter.now = dict.fromkeys(self.meter.now, 0)
            raise

    def prepare(self, batch: Mapping[str, Any]) -> None:
        """Plan the step of a batch in the background, beside the step that runs; `step` then finds the plan made.

        Every rank prepares the same batches in the same order, or none. Collective where pipelines stand side by side.
        A plan made so is searched for longer than one that a step must wait for. Raises: PartsError, PipelineError.
        """
        self.planner.prepare(self.problem(batch))

    def ahead(self, batches: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
        """The batches of a loader, each prepared while the one before it is trained on.

            for batch in pipe.ahead(loader):
                pipe.step(batch)
        """
        current: Mapping[str, Any] | None = None
        for batch in batches:
            self.prepare(batch)
            if current is not None:
                yield current
            current = batch
        if current is not None:
            yield current

    def _program_for(self, microbatches: Sequence[Microbatch], batch: Mapping[str, Any], use: str) -> Program:
        """The plan of this batch, made here and equal everywhere; made anew only if the batch's costs are."""
        program = self.planner.program(self._problem(microbatches, use))
        self._agree(program, batch, use)
        return program

    def _problem(self, microbatches: Sequence[Microbatch], use: str = "trained on") -> Problem:
        if len(microbatches) != self.settings.microbatches:
            raise PipelineError(
                f"The batch was cut into {len(microbatches)} microbatches, not {self.settings.microbatches}."
            )
        means: list[float] | None = None
        if self.outer_groups:
            self._check_sharded_items(microbatches)
            told = digest_of(self._trained, use) % 2**20  # small, so that sums of squares over all pipelines are exact
            *table, mean, square = self._mean_over_pipelines([*step_sizes(self.parts, microbatches), told, told**2])
            means = [float(f"{x:.3g}") for x in table]
            self._alike_beside = mean == told and square == told**2
        split = self.settings.generator == "split"
        return make_problem(self.parts, microbatches, self.rates, self.stage_rank, split, means)

    def _check_sharded_items(self, microbatches: Sequence[Microbatch]) -> None:
        """Raise on every rank unless the ranks that share an encoder's (or a generator's) weights run it equally often.

        Each of its calls gathers weights from all of them: one that has fewer items would leave the others waiting.
        """
        for unit in (*self.units.encoders, *self.units.generators):
            sharded = any(isinstance(m, FSDPModule) for m in unit.module.modules())  # its parameters may be gathered just now
            if not sharded and not any(isinstance(p, DTensor) for p in unit.module.parameters()):
                continue
            mine = [len(mb.items.get(unit.name, ())) for mb in microbatches]
            for group in self.outer_groups:
                every = line_of(group).gather_objects(mine, f"the numbers of items of {unit.name!r}")
                if any(counts != mine for counts in every):
                    kind = "encoder" if isinstance(unit, EncoderUnit) else "generator"
                    raise PipelineError(
                        f"The {kind} {unit.name!r} is sharded (fully_shard) over data-parallel pipelines that have different numbers of "
                        f"items for it, by microbatch {'; '.join(map(str, every[:4]))}. Every call gathers its weights from all of "
                        f"them: give each pipeline equally many items in every microbatch, or leave the {kind} unsharded."
                    )

    def _mean_over_pipelines(self, numbers: Sequence[float]) -> list[float]:
        table = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        for group in self.outer_groups:
            line_of(group).all_reduce(table, "mean sizes over the pipelines")
            table /= group.size()
        return table.tolist()

    def _agree(self, program: Program, batch: Mapping[str, Any], use: str) -> None:
        """Raise on every rank unless all have alike what they must. Also where every step begins at the same time."""
        odd = disagreements(self._alike(program, batch, use), self.group)
        if not self._alike_beside and not odd:  # a pipeline of one rank
            odd = [("what is trained, beside other pipelines,", [self.rank])]
        by_ranks: dict[tuple[int, ...], list[str]] = {}
        for what, ranks in odd:
            by_ranks.setdefault(tuple(ranks), []).append(what)
        if by_ranks:
            told = "; ".join(f"{listed(what)} on ranks {list(ranks)}" for ranks, what in by_ranks.items())
            raise PipelineError(
                f"The ranks of a pipeline differ in step {self.steps}: {told}, against the others. Give every rank the same batch"
                " (loaders with the same seed), options and number of steps, and freeze, unfreeze, train() and eval() alike."
            )

    def _alike(self, program: Program, batch: Mapping[str, Any], use: str) -> list[Shared]:
        """What all ranks must have alike, and what those that share weights must."""
        facts: Facts = {"the schedule": program.digest, "the number of steps": self.steps}
        facts["whether the batch is trained on or evaluated"] = digest_of(use)
        if not self._alike_beside:
            facts["what is trained, beside other pipelines,"] = 1 + self.rank  # unlike everyone's
        if self.settings.compare_batches:
            facts |= {f"the batch's {path}": number for path, number in batch_facts(batch).items()}
        facts["modes (train or eval)"] = modes(self._common)
        facts |= self._trained_facts(self.held.replicated)
        among = [(ranks, self._trained_facts(names) if self.rank in ranks else {}) for ranks, names in self.held.tied]
        return [(tuple(range(self.ranks)), facts), *among]

    def _trained_facts(self, names: Iterable[str]) -> Facts:
        return {f"whether {name} is frozen": int(self._bound[name].requires_grad) for name in names}

    def _share(self, loss: Tensor, metrics: list[tuple[bool, Tensor]]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Loss and metrics of all ranks on every rank."""
        row = torch.zeros(1 + 2 * MOST_METRICS, dtype=torch.float64, device=self.device)
        row[0] = loss
        for n, (averaged, value) in enumerate(metrics):
            row[1 + n], row[1 + MOST_METRICS + n] = (1 if averaged else 2), value
        line_of(self.group).all_reduce(row, "the loss of all ranks")
        kinds = row[1 : 1 + MOST_METRICS].tolist()
        for group in self.outer_groups:
            line_of(group).all_reduce(row, "the mean loss of all pipelines")
            row[0] /= group.size()
            for n, kind in enumerate(kinds):
                if kind == 1:
                    row[1 + MOST_METRICS + n] /= group.size()
        values = row[1 + MOST_METRICS :]
        found = [values[n].float() if kind == 1 else values[n].long() for n, kind in enumerate(kinds) if kind]
        return row[0].float(), tuple(found)

    def _after(self, program: Program, microbatches: Sequence[Microbatch]) -> None:
        """Gather what was measured, foretell it, and once take the rates from it. Equal on every rank."""
        seconds = self.clock.seconds()
        mine = torch.zeros(1 + max(len(ops) for ops in program.schedule.ranks), 2, dtype=torch.float64)
        mine[0] = torch.tensor([self.clock.host, machine()])
        mine[1 : 1 + len(seconds)] = torch.tensor([[a, b] for _, a, b in seconds], dtype=torch.float64)
        measured = timeline_of(program.schedule, _rows(mine, self.group).tolist())
        split = self.settings.generator == "split"
        self.timeline = measured
        self.predicted = foretold(measured, self.parts, microbatches, self.rates, split)
        if self.settings.costs == "measured" and self.steps + 1 == _MEASURED_STEP:
            if not self.outer_groups:
                self.rates = rates_of(measured, self.parts, microbatches, self.rates)
                return
            mine = torch.tensor(measured_work(self.parts, microbatches, seconds), dtype=torch.float64)
            summed = _rows(mine, self.group).sum(0).tolist()
            self.rates = measured_rates(self.rates, self._mean_over_pipelines(summed))

    def write_trace(self, path: str | Path) -> None:
        """The last step, measured beside predicted, as one file for ui.perfetto.dev; rank 0 writes. Needs `trace=True`."""
        if self.timeline is None or self.predicted is None:
            raise PipelineError("No step was measured. Make the pipeline with trace=True and run a step first.")
        if dist.get_rank() == 0:
            Path(path).write_text(json.dumps(trace(self.timeline, self.predicted)))

    def explain(self) -> str:
        """Who holds and runs what, and how the last step's schedule fares."""
        return describe(self)

    @property
    def schedule(self) -> Schedule | None:
        """That of the last step."""
        return self.program.schedule if self.program else self.settings.schedule

    def problem(self, batch: Mapping[str, Any]) -> Problem:
        """The problem that a batch poses, for `schedules.plan`. Collective where pipelines stand side by side."""
        self._follow()
        return self._problem(self.parts.microbatches(batch, self.settings.microbatches))

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What this rank holds, each parameter once, under the unmodified model's names."""
        self._follow()
        yield from self._bound.items()

    def parameters(self) -> Iterator[nn.Parameter]:
        """What this rank holds, for its optimizer. What several ranks hold gets equal gradients, so it stays equal."""
        yield from (p for _, p in self.named_parameters())

    def zero_grad(self, set_to_none: bool = True) -> None:
        for p in self.parameters():
            if set_to_none:
                p.grad = None
            elif p.grad is not None:
                p.grad.zero_()

    def state_dict(self) -> dict[str, Tensor]:
        """This rank's part of the unmodified model's state, under its names."""
        return {name: t for name, t in self._whole().items() if not t.is_meta}

    def full_state_dict(self) -> dict[str, Tensor]:
        """The unmodified model's whole state on the pipeline's rank 0, on the CPU; empty elsewhere. Collective."""
        with failing(), at(phase="save"):
            return gather_state(self._whole(), self.held.owners, self.group)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take this rank's part out of the unmodified model's state (or of a part of it that has all this rank holds)."""
        own = self.state_dict()
        if missing := sorted(own.keys() - state.keys()):
            raise PipelineError(f"The state lacks {missing[:5]} ({len(missing)} in all), which this rank holds.")
        with torch.no_grad():
            for name, tensor in own.items():
                if tensor.shape != state[name].shape:
                    raise PipelineError(
                        f"{name} has the shape {list(state[name].shape)} in the state, {list(tensor.shape)} here."
                    )
                tensor.copy_(state[name])

    def _whole(self) -> dict[str, Tensor]:
        """Every entry of the unmodified model's state; what other ranks hold has no memory here."""
        if self.model is not None:
            return self.model.state_dict()
        held = {id(p) for p in self.parameters()}
        names = names_of(None, self.parts)
        return {n: p.detach() if id(p) in held else p.detach().to("meta") for n, p in names.items()}


def _rows(mine: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Every rank's tensor, [R, ...]."""
    line = line_of(group)
    return torch.tensor(line.gather_objects(mine.tolist(), "what every rank measured"), dtype=mine.dtype)


def _common_modules(model: nn.Module | None, parts: Parts) -> list[nn.Module]:
    """Modules that every rank runs: all but the layers of the language model. Users may switch those of one rank alone."""
    if model is None:
        return [m for part in (*parts.encoders, *parts.generators) for m in part.module.modules()]
    layers = {m for layer in parts.anatomy.layers for m in layer.modules()}
    return [m for m in model.modules() if m not in layers]


def find_dim(mesh: DeviceMesh, name: str | None) -> str | None:
    """The mesh dimension along which stages lie; None if the mesh has one dimension without a name."""
    if not isinstance(mesh, DeviceMesh):
        raise ArgumentError(
            f"pipeline() was given {type(mesh).__name__} for a mesh. Give it the device mesh of the stages' ranks: "
            "init_device_mesh('cuda', (4,))."
        )
    names = mesh.mesh_dim_names
    if names is None:
        if mesh.ndim == 1:
            return None
        raise OptionError(
            f"The mesh has {mesh.ndim} dimensions without names. Make it with mesh_dim_names=('pp', 'dp')."
        )
    if name is None:
        name = names[0] if len(names) == 1 else "pp"
    if name not in names:
        raise OptionError(f"The mesh has dimensions {names}, none of them {name!r}. Name one with pipeline_dim=.")
    return name


def _device_of(mesh: DeviceMesh) -> torch.device:
    if mesh.device_type == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(mesh.device_type)


def _place(stages: int, ranks: int, settings: Settings) -> tuple[int, ...]:
    """The rank of each stage."""
    if stages != ranks * settings.virtual:
        raise OptionError(
            f"The model has {stages} stages, the mesh {ranks} ranks with {settings.virtual} virtual stages each. Cut it into"
            f" {ranks * settings.virtual} stages."
        )
    if settings.base == "dualpipev":
        return (*range(ranks), *reversed(range(ranks)))
    return tuple(s % ranks for s in range(stages))
