"""Fact W11: what a training step of a quantized Winograd layer costs beside nn.Conv2d's, in memory and in time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tersenet.nn.winograd import WinogradConv2d
from tersenet.nn.winograd_settings import Quantization, WinogradSettings


def steps(images: int, tile: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """A step of the convolution, and of the layer in its place: 8 bits, trained transforms, observed ranges."""
    torch.manual_seed(0)
    conv = nn.Conv2d(64, 64, 3, padding=1, bias=False)
    x = torch.randn(images, 64, 32, 32).relu().requires_grad_()
    gradient = torch.randn(images, 64, 32, 32)
    settings = WinogradSettings(tile=tile, flex="full", quantization=Quantization.tapwise(8))
    layer = WinogradConv2d.from_conv(conv, settings).train()

    def step(module: nn.Module) -> None:
        x.grad = None
        module.zero_grad(set_to_none=True)
        module(x).backward(gradient)

    return lambda: step(conv), lambda: step(layer)


def peak(step: Callable[[], None]) -> int:
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    now = most = 0
    results: Any = profile.profiler
    for event in results.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


@pytest.mark.parametrize(("tile", "limit"), [(4, 1.8), (6, 2.3), (2, 2.1)])
def test_transient_memory(tile: int, limit: float) -> None:
    conv, layer = steps(16, tile)
    assert peak(layer) <= limit * peak(conv)


@pytest.mark.slow
def test_time() -> None:
    """At most two and a half times the convolution's on a busy machine; benchmarks/winograd_layer.py has the figure."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        both = steps(32, 4)
        times: tuple[list[int], list[int]] = [], []
        for _ in range(7):
            for step, found in zip(both, times, strict=True):
                began = time.thread_time_ns()
                step()
                found.append(time.thread_time_ns() - began)
    finally:
        torch.set_num_threads(threads)
    conv, layer = (statistics.median(found[2:]) for found in times)
    assert layer <= 2.5 * conv
