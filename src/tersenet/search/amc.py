"""AMC: the share of channels that each layer keeps within a budget, found by an agent that learns from trials.

An episode prunes the whole network layer by layer, evaluates it without any training, and rewards all its decisions
alike. The best one's rates are what is found.

Source: He et al., AMC: AutoML for Model Compression and Acceleration on Mobile Devices, ECCV 2018, arXiv 1802.03494.
Differs: see `amc_environment`; channel groups in place of single layers, so that residual sums, concatenations and
depthwise layers are searched too; channels by the LASSO, and least squares with an intercept. The first two episodes
are no draws: the shares that `channel_pruning` measures, around which the agent then looks, and even ones. So the
search starts from what there is without it, and is never worse on its own images.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from tersenet.calibration.allocation import uniform_within
from tersenet.calibration.items import Costs, Counts, Item, find_items
from tersenet.data.bundle import Data
from tersenet.environment import environment
from tersenet.errors import NotFiniteError
from tersenet.graph.budget import Rounding
from tersenet.graph.model import ModelGraph
from tersenet.graph.select import left_whole, select_groups
from tersenet.models.open import Source, example_of
from tersenet.results import Accuracy
from tersenet.search.amc_agent import Agent
from tersenet.search.amc_environment import STATES, States, Wall, features
from tersenet.search.amc_pruning import Pruning, pruning
from tersenet.search.amc_rewards import below, rank, reward_of, shown
from tersenet.search.amc_settings import AmcResult, AmcSettings, Episode, Kind, LayerChoice, Reward
from tersenet.search.images import Images, choose
from tersenet.search.latency_costs import LatencyCosts
from tersenet.search.lines import Lines, Names
from tersenet.train.evaluate import evaluate

MARK, EPISODES = "amc_request.json", "amc_episodes.jsonl"
RESULT, RECIPE = "amc.json", "recipe.yaml"
_NAMES = Names("search of AMC", MARK, EPISODES, (RESULT, RECIPE))
OnEvent = Callable[[dict[str, Any]], None]
UNITS = {"macs": "MACs", "params": "parameters", "latency": "microseconds"}


def search(
    source: Source,
    data: Data,
    settings: AmcSettings,
    *,
    device: torch.device,
    out: Path | None,
    fresh: bool,
    on_event: OnEvent,
    command: str | None,
) -> AmcResult:
    """Open the network, carry out every episode that is not known yet, and write the result. A module is not changed.

    Raises:
        TersenetError: settings that fit neither network nor data, a budget out of reach, or another search in `out`.
            Nothing was evaluated or written then.
        NotFiniteError: the network's own loss or metric is not finite, or that of every episode.
    """
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        network = source.open(data.shape, data.classes, data.normalise).to(device)
    graph = ModelGraph(network, example_of(network, batch=2))
    if settings.prune == "magnitude":
        graph = graph.with_residual(settings.residual)
    items = _items(graph, settings)
    images = choose(data, settings.split, settings.samples, settings.seed, device)
    request = {"model": source.name, "data": data.name, **settings.plain, "split": images.split}
    request |= {"weights": (Source(network).fingerprint or "")[:16], "images": images.checksum[:16]}
    trials = Trials(graph, items, settings, images, data, device, on_event)
    folder = Lines(out, _NAMES, Episode, request, fresh=fresh)
    best = trials.run(folder)
    choices = [
        LayerChoice(name=item.name, channels=item.size, kept=count, rate=1 - count / item.size)
        for item, count in zip(items, folder.rows[best].counts, strict=True)
    ]
    result = AmcResult(
        tersenet=environment(str(device))["tersenet"],
        model=source.name,
        data=data.name,
        split=images.split,
        settings=settings.plain,
        macs=graph.macs(),
        params=graph.params(),
        limit=trials.limit,
        baseline=trials.baseline,
        best=best,
        layers=choices,
        rates=_rates(graph, choices),
        episodes=folder.rows,
        skipped=left_whole(graph, [item.group for item in items if item.group is not None]),
        environment=environment(str(device)),
        command=command,
    )
    folder.write(RESULT, result.model_dump_json(indent=1) + "\n")
    folder.write(RECIPE, yaml.safe_dump(result.recipe(), sort_keys=False, allow_unicode=True, width=110))
    return result


class Trials:
    """The episodes of one search."""

    def __init__(
        self,
        graph: ModelGraph,
        items: Sequence[Item],
        settings: AmcSettings,
        images: Images,
        data: Data,
        device: torch.device,
        on_event: OnEvent,
    ) -> None:
        self.graph, self.items, self.settings = graph, items, settings
        self.images, self.data, self.device, self.on_event = images, data, device, on_event
        self.costs = {kind: Costs(graph, items, kind) for kind in ("macs", "params")}
        target = settings.budget
        self._kind = target.kind if target is not None else _weighed(settings.reward)
        self._budgeted = LatencyCosts(graph, items) if self._kind == "latency" else self.costs[self._kind]
        self._original = self._budgeted(np.array([item.size for item in items]))
        self._rounding = Rounding(settings.multiple)
        self.limit = target.limit(self._original) if target is not None else None
        self.wall = Wall(self._budgeted, self.limit, self._rounding, settings.lowest, UNITS[self._kind])
        self.states = States(features(graph, items), self.wall)
        self._seconds: list[float] = []

    @cached_property
    def pruning(self) -> Pruning:
        """Made when it is first needed: that takes a pass over the calibration images."""
        return pruning(self.graph, self.items, self.data, self.settings, self.device)

    def run(self, folder: Lines[Episode]) -> int:
        """Go on behind the episodes that `folder` knows; the number of the best one."""
        agent = Agent(STATES, self.settings.warmup, self.settings.seed)
        best, of = 0, self.settings.episodes
        # Before all episodes: if this is not finite, none of them is worth its time.
        whole = reward_of(self.settings.reward, self.baseline, self.graph.macs(), self.graph.params())
        self._tell("start", folder.rows, best)
        for number in range(of):
            if number >= len(folder.rows):
                began = time.monotonic()
                folder.add(self._episode(agent, number, folder.rows, whole))
                self._seconds.append(time.monotonic() - began)
            row = folder.rows[number]
            if row.kind == "measured" and row.accuracy is not None:
                self.wall.centre_on(row.counts)
                agent.near = True
            best = max(best, number, key=lambda place: (*rank(folder.rows[place]), -place))
            states = [self.states.before(row.counts[:step]) for step in range(len(self.items))]
            actions = [self.wall.action(row.counts[: step + 1]) for step in range(len(self.items))]
            agent.learn(torch.stack(states), actions, row.reward, number)
            if number == len(folder.rows) - 1:
                self._tell("episode", folder.rows, best)
        if folder.rows[best].accuracy is None:
            raise NotFiniteError(
                f"none of {of} episodes says how good its network is. The first: {folder.rows[best].problem}. "
                "Choose a larger target or lowest"
            )
        return best

    @cached_property
    def baseline(self) -> Accuracy:
        """Of the network as it was given."""
        return self.evaluate()

    def evaluate(self) -> Accuracy:
        """The network as it is."""
        model = self.graph.model
        return evaluate(model, self.images, device=self.device, loss=self.data.loss, metric=self.data.metric)

    def _episode(self, agent: Agent, number: int, known: Sequence[Episode], whole: float) -> Episode:
        kind, start = self._start(number)
        shares = [start[item.name] / item.size for item in self.items] if start is not None else None

        def decide(decided: list[int]) -> float:
            step = len(decided)
            if shares is not None:
                return shares[step]
            return self.wall.share(agent.act(self.states.before(decided), number, step), step)

        counts = self.wall.walk(decide)
        left = np.array(counts)
        cost, macs, params = self._budgeted(left), self.costs["macs"](left), self.costs["params"](left)
        # Towards the end the noise is gone, and the actor does the same again and again.
        same = next((row for row in known if row.counts == counts), None)
        accuracy, problem = self._pruned(counts) if same is None else (same.accuracy, same.problem)
        if accuracy is None:
            reward = below([whole, *(row.reward for row in known if row.accuracy is not None)])
        else:
            reward = reward_of(self.settings.reward, accuracy, macs, params)
        return Episode(
            kind=kind, counts=counts, cost=cost, macs=macs, params=params, accuracy=accuracy, reward=reward,
            problem=problem,
        )  # fmt: skip

    def _pruned(self, counts: Sequence[int]) -> tuple[Accuracy | None, str | None]:
        """The accuracy with so many units left of every item; where it is not finite none, and why."""
        with self.pruning.pruned({item.name: count for item, count in zip(self.items, counts, strict=True)}):
            try:
                return self.evaluate(), None
            except NotFiniteError as error:
                return None, str(error)

    def _start(self, number: int) -> tuple[Kind, Counts | None]:
        """What an episode is, and its shares where the agent does not decide them."""
        target, first = self.settings.budget, 0
        if target is not None and self.settings.prune == "channel_pruning":
            if number == 0:
                return "measured", self.pruning.measured(self._budgeted, target, self._original, self._rounding)
            first = 1
        if target is not None and number == first:
            return "even", uniform_within(self._budgeted, target, self._original, self._rounding, {})
        return "searched", None

    def _tell(self, event: str, rows: Sequence[Episode], best: int) -> None:
        done, of = len(rows), self.settings.episodes
        told: dict[str, Any] = {"event": event, "done": done, "of": of, "layers": len(self.items)}
        told["eta_seconds"] = (of - done) * sum(self._seconds) / len(self._seconds) if self._seconds else None
        if rows:
            last, top = rows[-1], rows[best]
            told |= {"kind": last.kind, "value": shown(last), "macs": last.macs, "problem": last.problem}
            told |= {"best": shown(top), "best_macs": top.macs, "images": self.images.n}
        self.on_event(told)


def _weighed(reward: Reward) -> str:
    return "params" if reward == "params" else "macs"


def _items(graph: ModelGraph, settings: AmcSettings) -> tuple[Item, ...]:
    if settings.prune == "magnitude":
        groups = select_groups(graph, settings.include, settings.exclude)
        return tuple(Item(group.name, group.units, (), group) for group in groups)
    sample = settings.residual == "independent"
    return find_items(graph, settings.include, settings.exclude, sample=sample).all


def _rates(graph: ModelGraph, choices: Sequence[LayerChoice]) -> dict[str, float]:
    """Rates by the names of the groups, in an order in which each group's own name is the first to match it.

    A name also stands for groups whose channels that layer makes beside another, which come earlier in the network;
    `NAME#2` stands for one group only.
    """
    place = {group.name: number for number, group in enumerate(graph.groups)}
    ordered = sorted(choices, key=lambda c: ("#" not in c.name, place.get(c.name, len(place))))
    return {choice.name: choice.rate for choice in ordered}
