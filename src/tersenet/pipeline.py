"""A recipe carried out: open, apply each step, measure, save, report. Each step is done once, whoever interrupts."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tersenet.data.bundle import Data
from tersenet.environment import environment
from tersenet.exporting import artifact
from tersenet.graph.copies import copied
from tersenet.graph.model import ModelGraph
from tersenet.measuring.latency import compare
from tersenet.measuring.macs import LayerCost, layer_table
from tersenet.measuring.measure import layer_rows, measure
from tersenet.methods.base import Context, Method, TrainingMethod
from tersenet.models.open import Source, example_of
from tersenet.models.usable import check_usable
from tersenet.nn.adapter import ChannelAdapter
from tersenet.progress import Progress
from tersenet.recipe import Recipe, dump
from tersenet.recipe_target import Target
from tersenet.results import Accuracy, Measures, Report, StepResult
from tersenet.run import Run, on_first_rank
from tersenet.train import distributed
from tersenet.train.evaluate import evaluate
from tersenet.train.loop import fit

OnEvent = Callable[[dict[str, Any]], None]


@dataclass
class Pipeline:
    """One run of one recipe. `base` is a pristine copy of a user's own module, for loading what was saved."""

    recipe: Recipe
    source: Source
    data: Data | None
    run: Run
    device: torch.device
    on_event: OnEvent
    base: nn.Module | None = None
    steps: list[StepResult] = field(default_factory=list[StepResult])
    before: Measures | None = None

    def execute(self, command: str | None = None) -> tuple[nn.Module, Report]:
        """Carry out what is not done yet; returns the final network and the report."""
        self.run.write("recipe.yaml", dump(self.recipe))
        self.run.write("environment.json", _json(environment(str(self.device))))
        torch.manual_seed(self.recipe.seed)
        data = self.data
        opened = self.source.open(data.shape, data.classes, data.normalise) if data is not None else self.source.open()
        check_usable(opened, inputs=len(example_of(opened)))
        model = opened.to(self.device)
        methods = [step.method for step in self.recipe.steps]
        # A recipe of nothing but training compares with what came in.
        first = next((index for index, method in enumerate(methods) if method != "train"), 0)
        if self.run.finished(0, methods[0]) is None:
            self._rehearse(model)
        for index, step in enumerate(self.recipe.steps):
            if index == first:
                self._keep_before(model)
            done = self.run.finished(index, step.method)
            if done is not None:
                self.emit("note", text=f"step {index + 1} ({step.method}) was done before; going on")
                model = self._load(self.run.step(index, step.method) / "model")
            else:
                done = self._step(index, step, model)
            self.steps.append(done)
        self._save(model, self.run.folder / "model")
        report = self._report(model, command)
        if distributed.is_main():
            self.run.report(report)
        self.emit("done", folder=str(self.run.folder))
        return model, report

    def _rehearse(self, model: nn.Module) -> None:
        """Every step's structural change on a copy: what can't be done is said now, not after hours of training."""
        trial = copied(model)
        before = self._measure(model, None)
        for step in self.recipe.steps:
            context = self._context(trial, before)
            context.evaluate = lambda: None
            step.preview(ModelGraph(trial, example_of(trial, batch=2)), context)

    def emit(self, event: str, **values: Any) -> None:
        record = {"event": event, **values}
        if distributed.is_main():
            if event != "progress":
                self.run.event(record)
            self.on_event(record)

    def _step(self, index: int, step: Method, model: nn.Module) -> StepResult:
        self.emit("step_start", index=index, method=step.method, steps=len(self.recipe.steps))
        began = time.monotonic()
        folder = self.run.step(index, step.method)
        graph = ModelGraph(model, example_of(model, batch=2))
        context = self._context(model, self.before or self._measure(model, None))
        context.progress = Progress(folder / "progress")
        context.original = lambda: self._uncompressed(index)
        step.apply(graph, context)
        rows: list[dict[str, Any]] = []
        if isinstance(step, TrainingMethod) and self.data is not None:
            hooks = step.hooks(graph, context)
            rows = fit(
                model,
                self.data,
                step.fit,
                seed=self.recipe.seed * 1000 + index,
                device=self.device,
                hooks=hooks,
                checkpoint=folder / "checkpoint.pt",
                log=self._log,
                teacher=self._teacher(model) if step.fit.distill is not None else None,
            )
            step.finish(graph, context, hooks)
        self._save(model, folder / "model")
        result = StepResult(
            index=index,
            method=step.method,
            settings=step.model_dump(mode="json"),
            seconds=time.monotonic() - began,
            after=self._measure(model, context.evaluate()),
            equality=context.equality,
            masked=context.masked,
            curves=rows,
            fits=context.fits,
            maps=context.maps,
            notes=context.notes,
        )
        self.run.finish(result)
        for note in context.notes:
            self.emit("note", text=note)
        self.emit("step_done", index=index, method=step.method, seconds=result.seconds, top1=result.after.top1)
        return result

    def _context(self, model: nn.Module, before: Measures) -> Context:
        return Context(
            device=self.device,
            seed=self.recipe.seed,
            target=Target.parse(self.recipe.target) if self.recipe.target else None,
            original_macs=before.macs,
            original_params=before.params,
            data=self.data,
            evaluate=lambda: self._accuracy(model),
        )

    def _accuracy(self, model: nn.Module) -> Accuracy | None:
        if self.data is None or self.data.test is None:
            return None
        return evaluate(model, self.data.test, device=self.device, loss=self.data.loss, metric=self.data.metric)

    def _measure(self, model: nn.Module, accuracy: Accuracy | None) -> Measures:
        return measure(model, example_of(model), accuracy=accuracy, latency=False)

    def _keep_before(self, model: nn.Module) -> None:
        """The network that everything is compared with, measured and saved once."""
        self.before = self.run.before()
        if self.before is None:
            model.to(self.device)
            self.before = self._measure(model, self._accuracy(model))
            self._save(model, self.run.folder / "before")
            self.run.write("before/measures.json", self.before.model_dump_json(indent=1))

    def _teacher(self, model: nn.Module) -> nn.Module:
        """The uncompressed network; before the first compressing step, the one that is there."""
        if self.before is None:
            return copied(model)
        return self._load(self.run.folder / "before")

    def _uncompressed(self, index: int) -> nn.Module | None:
        """The network that came to the first compressing step, for a later one; None where a step has trained since."""
        steps = self.recipe.steps[:index]
        first = next((place for place, step in enumerate(steps) if step.method != "train"), None)
        if first is None or any(isinstance(step, TrainingMethod) for step in steps[first:]):
            return None
        return self._load(self.run.folder / "before")

    def _save(self, model: nn.Module, folder: Path) -> None:
        on_first_rank(lambda: artifact.save(model, folder))

    def _load(self, folder: Path) -> nn.Module:
        return artifact.load(folder, base=None if self.base is None else copied(self.base)).to(self.device)

    def _log(self, row: dict[str, Any]) -> None:
        values = dict(row)
        self.emit(values.pop("kind"), **values)

    def _report(self, model: nn.Module, command: str | None) -> Report:
        before_model = self._load(self.run.folder / "before")
        example = example_of(model)
        times = compare({"before": before_model, "after": model}, example)
        before = self.before or self._measure(before_model, None)
        return Report(
            tersenet=environment(str(self.device))["tersenet"],
            model=self.source.name,
            recipe=self.recipe.model_dump(mode="json"),
            data=self.data.name if self.data is not None else "none",
            target=self.recipe.target,
            steps=self.steps,
            before=before.model_copy(update={"latency": times["before"], "latency_ms": times["before"].median_ms}),
            after=self.steps[-1].after.model_copy(
                update={"latency": times["after"], "latency_ms": times["after"].median_ms}
            ),
            layers=layer_rows(_layers(before_model, example), _layers(model, example)),
            environment=environment(str(self.device)),
            command=command,
        )


def preview(
    recipe: Recipe, source: Source, device: torch.device, shape: tuple[int, ...] | None, classes: int | None
) -> tuple[nn.Module, Report]:
    """What a run would remove: every step's structural change without its training, on whatever weights are there."""
    model = source.open(shape, classes)
    check_usable(model, inputs=len(example_of(model)))
    model.to(device)
    before_model = copied(model)
    example = example_of(model)
    before = measure(model, example, latency=False)
    steps: list[StepResult] = []
    for index, step in enumerate(recipe.steps):
        graph = ModelGraph(model, example_of(model, batch=2))
        context = Context(
            device=device,
            seed=recipe.seed,
            target=Target.parse(recipe.target) if recipe.target else None,
            original_macs=before.macs,
            original_params=before.params,
        )
        step.preview(graph, context)
        after = measure(model, example, latency=False)
        settings = step.model_dump(mode="json")
        steps.append(
            StepResult(
                index=index, method=step.method, settings=settings, seconds=0.0, after=after, notes=context.notes
            )
        )
    report = Report(
        tersenet=environment(str(device))["tersenet"],
        model=source.name,
        recipe=recipe.model_dump(mode="json"),
        data="none (dry run)",
        target=recipe.target,
        steps=steps,
        before=before,
        after=steps[-1].after,
        layers=layer_rows(_layers(before_model, example), _layers(model, example)),
        notes=["dry run: nothing was trained, no accuracy was measured"],
        environment=environment(str(device)),
    )
    return model, report


def request_of(recipe: Recipe, source: Source, data: Data | None) -> dict[str, Any]:
    """Everything that decides a run's result, for comparing with what a folder holds."""
    request: dict[str, Any] = {"model": source.name, "recipe": recipe.model_dump(mode="json")}
    request["data"] = data.name if data is not None else None
    if source.inputs is not None:
        request["inputs"] = source.inputs.model_dump(mode="json", include={"shape", "kind", "more"})
    request["weights"] = (source.fingerprint or "")[:16]
    return request


def _layers(model: nn.Module, example: Any) -> dict[str, LayerCost]:
    """The layers' costs under the names that they had before adapters were put around them."""
    adapters = {name for name, module in model.named_modules() if isinstance(module, ChannelAdapter)}
    return {
        ".".join(part for i, part in enumerate(parts) if not (part == "inner" and ".".join(parts[:i]) in adapters)): row
        for row, parts in ((row, name.split(".")) for name, row in layer_table(model, example).items())
    }


def _json(value: Any) -> str:
    return json.dumps(value, indent=1) + "\n"


def quiet(event: dict[str, Any]) -> None:
    """An event listener that does nothing."""
