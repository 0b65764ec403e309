"""The agent of AMC: deep deterministic policy gradients (DDPG) over one number in [0, 1] for each layer.

Every draw is a function of the seed, the episode and the step, so that an agent that is shown the episodes of an
earlier one again is that agent.

Source: He et al., AMC: AutoML for Model Compression and Acceleration on Mobile Devices, ECCV 2018, arXiv 1802.03494;
Lillicrap et al., Continuous Control with Deep Reinforcement Learning, ICLR 2016, arXiv 1509.02971.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersenet.data.order import derived_seed, generator

_HIDDEN = 300
_RATES = (1e-4, 1e-3)  # of the actor and the critic
_BATCH = 64
_REMEMBERED = 100  # episodes
_LAST = 3e-3  # the last layers' weights begin below this: the first actions are a half, whatever the state
_SOFT = 0.01  # how far the target networks follow in one update
_NOISE, _NEAR, _DECAY = 0.5, 0.05, 0.95  # deviation of the first noise; near an action that is known to be good
_AVERAGE = 0.5  # of the rewards' moving average, which is taken off


class Critic(nn.Module):
    """What an action in a state is worth: (N, S), (N, 1) -> (N, 1)."""

    def __init__(self, states: int) -> None:
        super().__init__()
        self.state, self.action = nn.Linear(states, _HIDDEN), nn.Linear(1, _HIDDEN)
        self.hidden, self.out = nn.Linear(_HIDDEN, _HIDDEN), nn.Linear(_HIDDEN, 1)

    def forward(self, states: Tensor, actions: Tensor) -> Tensor:
        return self.out(F.relu(self.hidden(F.relu(self.state(states) + self.action(actions)))))


class Agent:
    """Actor, critic, their slow copies, and the last episodes.

    `near`: look near actions of a half, which are known to be good, and not everywhere.

    Args:
        states: numbers in a state.
        warmup: episodes whose actions are drawn at random, and that nothing is learnt in.
    """

    def __init__(self, states: int, warmup: int, seed: int) -> None:
        self.warmup, self.seed, self.near = warmup, seed, False
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derived_seed("amc", seed))
            self.actor = nn.Sequential(
                nn.Linear(states, _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, 1),
                nn.Sigmoid(),
            )  # fmt: skip
            self.critic = Critic(states)
            for last in (self.actor[4], self.critic.out):
                for parameter in last.parameters():
                    nn.init.uniform_(parameter, -_LAST, _LAST)
        self._slow_actor, self._slow_critic = copy.deepcopy(self.actor), copy.deepcopy(self.critic)
        self._optimizers = [
            torch.optim.Adam(network.parameters(), lr=rate)
            for network, rate in zip((self.actor, self.critic), _RATES, strict=True)
        ]
        self._episodes: deque[tuple[Tensor, ...]] = deque(maxlen=_REMEMBERED)
        self._average: float | None = None

    @torch.no_grad()
    def act(self, state: Tensor, episode: int, step: int) -> float:
        """An action for a state (S,): the actor's with noise that dies away, or anything while it warms up."""
        drawn = float(torch.rand((), generator=generator("amc action", self.seed, episode, step), dtype=torch.float64))
        noise = _NEAR if self.near else _NOISE
        if episode < self.warmup:
            return truncated_normal(0.5, noise, drawn) if self.near else drawn
        mean = float(self.actor(state[None]))
        return truncated_normal(mean, noise * _DECAY ** (episode - self.warmup), drawn)

    def learn(self, states: Tensor, actions: Sequence[float], reward: float, episode: int) -> None:
        """Remember an episode of states (T, S) and actions (T,), each rewarded alike; then one update for each."""
        taken = torch.tensor(actions, dtype=torch.float32)[:, None]
        last = torch.zeros_like(taken)
        last[-1] = 1
        following = torch.cat([states[1:], states[-1:]])
        self._episodes.append((states, taken, torch.full_like(taken, reward), following, last))
        if episode >= self.warmup:
            memory = [torch.cat(parts) for parts in zip(*self._episodes, strict=True)]
            for step in range(len(actions)):
                self._update(memory, generator("amc batch", self.seed, episode, step))

    def _update(self, memory: Sequence[Tensor], drawn: torch.Generator) -> None:
        places = torch.randperm(len(memory[0]), generator=drawn)[:_BATCH]
        states, actions, rewards, following, last = (part[places] for part in memory)
        mean = float(rewards.mean())
        self._average = mean if self._average is None else (1 - _AVERAGE) * self._average + _AVERAGE * mean
        with torch.no_grad():
            later = self._slow_critic(following, self._slow_actor(following))
            wanted = rewards - self._average + (1 - last) * later
        actor, critic = self._optimizers
        _step(critic, F.mse_loss(self.critic(states, actions), wanted))
        _step(actor, -self.critic(states, self.actor(states)).mean())
        for slow, fast in ((self._slow_actor, self.actor), (self._slow_critic, self.critic)):
            with torch.no_grad():
                for old, new in zip(slow.parameters(), fast.parameters(), strict=True):
                    old.lerp_(new, _SOFT)


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def truncated_normal(mean: float, deviation: float, drawn: float) -> float:
    """A number in [0, 1] of the normal distribution that is cut off there, from one drawn evenly from [0, 1)."""
    ends = (torch.tensor([0.0, 1.0], dtype=torch.float64) - mean) / deviation
    low, high = torch.special.ndtr(ends)
    found = mean + deviation * torch.special.ndtri(low + drawn * (high - low))
    return min(max(float(found), 0.0), 1.0)
