"""The differentiable search of `winas`: weights and logits trained in turns."""

from __future__ import annotations

import itertools
import math
from collections.abc import Generator, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tersenet.data.order import derived_seed
from tersenet.graph.trace import evaluating
from tersenet.train import distributed
from tersenet.train.batch import forward, move, to_float32
from tersenet.train.hooks import Hooks, TrainState
from tersenet.winograd_search.layers import Chosen, Layers

if TYPE_CHECKING:
    from tersenet.graph.model import ModelGraph
    from tersenet.methods.base import Context
    from tersenet.methods.winas import Winas


class WinasSearch(Hooks):
    """Logits of each layer's ways, moved after the training steps; see `Winas`. `close` ends it.

    Logits learn from the validation split; without one from training images, in another order.
    """

    def __init__(self, settings: Winas, layers: Layers, graph: ModelGraph, context: Context) -> None:
        self.settings, self.layers, self.context = settings, layers, context
        self.model = graph.model
        self._opened = ExitStack()
        self.made = self._opened.enter_context(layers.installed(graph.model))
        layers.observe(graph.model, context, settings.calibration_batches, self.made)
        self.logits = {name: torch.zeros(len(layers.allowed(name)), requires_grad=True) for name in self.made}
        # The paper's: no memory of the gradients of other paths.
        self.optimizer = torch.optim.Adam(self.logits.values(), lr=settings.logits_lr, betas=(0.0, 0.999))
        self.steps = 0
        self._images = self._stream(0)
        self._settle()
        self._draw()

    def close(self) -> Chosen:
        """The layers are convolutions again; the way of the largest logit for each."""
        self._opened.close()
        return self._largest()

    def probabilities(self) -> dict[str, list[float]]:
        """Of every way, in the places of `Layers.ways`; one that may not be chosen has 0."""
        return {
            name: [0.0] * self.layers.allowed(name).start + logits.detach().softmax(0).tolist()
            for name, logits in self.logits.items()
        }

    def after_step(self, state: TrainState) -> None:
        self.steps += 1
        if self.steps % self.settings.every == 0:
            self._move_logits(state)
        self._draw()

    def after_epoch(self, state: TrainState) -> dict[str, Any]:
        self._settle()
        shares = [logits.detach().softmax(0) for logits in self.logits.values()]
        entropy = sum(float(-(p * p.clamp(min=1e-12).log()).sum() / math.log(max(2, len(p)))) for p in shares)
        return {
            "expected_latency": float(self._expected().detach()),
            "chosen_latency": self.layers.latency(self._largest()) / self.layers.before,
            "undecided": entropy / len(shares),
        }

    def state_dict(self) -> dict[str, Any]:
        moments = [self.optimizer.state.get(logits, {}) for logits in self.logits.values()]
        return {
            "names": list(self.logits),
            "logits": [logits.detach().clone() for logits in self.logits.values()],
            "squares": [one["exp_avg_sq"].clone() if one else torch.empty(0) for one in moments],
            "moved": [float(one["step"]) if one else 0.0 for one in moments],
            "steps": self.steps,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        for place, logits in enumerate(self.logits.values()):
            with torch.no_grad():
                logits.copy_(saved["logits"][place])
            if saved["moved"][place]:
                self.optimizer.state[logits] = {
                    "step": torch.tensor(saved["moved"][place]),
                    "exp_avg": torch.zeros_like(logits),
                    "exp_avg_sq": saved["squares"][place].clone(),
                }
        self.steps = int(saved["steps"])
        self._images = self._stream(self.steps // self.settings.every)
        self._settle()
        self._draw()

    def _move_logits(self, state: TrainState) -> None:
        """One step on the loss of two sampled ways of each layer, weighted by the softmax of their logits."""
        generator = self._generator("logits")
        for name, layer in self.made.items():
            logits, first = self.logits[name], self.layers.allowed(name).start
            both = torch.multinomial(logits.detach().softmax(0), min(2, len(logits)), generator=generator)
            weights = logits[both].softmax(0).to(state.device)
            layer.best = tuple((first + int(place), weight) for place, weight in zip(both, weights, strict=True))
        inputs, targets = next(self._images)
        trained = [parameter for parameter in state.model.parameters() if parameter.requires_grad]
        with evaluating(state.model), torch.enable_grad():
            # Their gradients are not wanted here, and cost much.
            for parameter in trained:
                parameter.requires_grad_(False)
            outputs = to_float32(forward(state.model, move(inputs, state.device)))
            loss = self.layers.task(self.context)(outputs, move(targets, state.device)).cpu()
            for parameter in trained:
                parameter.requires_grad_(True)
        loss = loss + self.settings.l2 * sum(logits.square().sum() for logits in self.logits.values())
        loss = loss + self.settings.latency_weight * self._expected()
        every = list(self.logits.values())
        for logits, gradient in zip(every, torch.autograd.grad(loss, every), strict=True):
            # All ranks drew the same ways, for other images.
            logits.grad = distributed.all_reduce_sum(gradient, state.device) / distributed.world()
        self.optimizer.step()
        self._settle()

    def _expected(self) -> Tensor:
        """Latency by the probabilities, as a share of what the layers cost as they are."""
        total = torch.zeros(())
        for name, logits in self.logits.items():
            times = torch.tensor([self.layers.ms[name][place] for place in self.layers.allowed(name)])
            total = total + (logits.softmax(0) * times).sum()
        return total / self.layers.before

    def _largest(self) -> Chosen:
        return {name: self.layers.allowed(name).start + int(a.argmax()) for name, a in self.logits.items()}

    def _settle(self) -> None:
        """Evaluation runs the ways that would be chosen now."""
        for name, place in self._largest().items():
            self.made[name].best = ((place, None),)

    def _draw(self) -> None:
        """One way of each layer for the next training step, a function of the seed and the step."""
        generator = self._generator("weights")
        for name, layer in self.made.items():
            place = torch.multinomial(self.logits[name].detach().softmax(0), 1, generator=generator)
            layer.chosen = ((self.layers.allowed(name).start + int(place), None),)

    def _generator(self, what: str) -> torch.Generator:
        return torch.Generator().manual_seed(derived_seed("winas", what, self.context.seed, self.steps) % 2**63)

    def _stream(self, done: int) -> Iterator[tuple[Any, Any]]:
        """Batches for the logits, behind the first `done`."""
        data = self.context.data
        assert data is not None
        loader = data.validation or data.train
        assert loader is not None

        def endless() -> Generator[tuple[Any, Any]]:
            # Far from the epochs that the weights see.
            for epoch in itertools.count(done // len(loader)):
                yield from loader.batches(10**6 + epoch)

        return itertools.islice(endless(), done % len(loader), None)
