"""Made-up reports for the tests of the table and the page; no figure in here was measured."""

from __future__ import annotations

import math
from typing import Any

from tersenet.results import Accuracy, Equality, Latency, LayerRow, Measures, Report, StepResult


def wilson(correct: int, n: int) -> tuple[float, float]:
    z, p = 1.96, correct / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)


def measures(params: int, macs: int, correct: int | None = None, n: int = 10_000, ms: float | None = None) -> Measures:
    low, high = (None, None) if correct is None else wilson(correct, n)
    top1 = None if correct is None else correct / n
    return Measures(
        params=params,
        macs=macs,
        bytes=4 * params + 17_000,
        top1=top1,
        n_eval=None if correct is None else n,
        latency_ms=ms,
        peak_memory_bytes=4 * params + 393_216,
        accuracy=None
        if correct is None
        else Accuracy(n=n, loss=0.31, top1=top1, top1_low=low, top1_high=high, correct=correct),
        latency=None
        if ms is None
        else Latency(median_ms=ms, low_ms=0.97 * ms, high_ms=1.06 * ms, runs=30, batch=1, threads=2),
    )


def conv(name: str, size: int, before: tuple[int, int], after: tuple[int, int]) -> LayerRow:
    macs, params = (tuple(i * o * 9 * area for i, o in (before, after)) for area in (size * size, 1))
    return LayerRow(
        name=name,
        kind="conv 3x3",
        in_before=before[0],
        in_after=after[0],
        out_before=before[1],
        out_after=after[1],
        macs_before=macs[0],
        macs_after=macs[1],
        params_before=params[0],
        params_after=params[1],
    )


def resnet56_layers() -> list[LayerRow]:
    rows = [conv("conv1", 32, (3, 16), (3, 16))]
    for stage, (width, size) in enumerate(((16, 32), (32, 16), (64, 8)), start=1):
        for block in range(9):
            before = width if block or stage == 1 else width // 2
            kept = width - int(0.4 * width) if block % 5 else width - int(0.3 * width)
            rows.append(conv(f"layer{stage}.{block}.conv1", size, (before, width), (before, kept)))
            rows.append(conv(f"layer{stage}.{block}.conv2", size, (width, width), (kept, kept)))
    linear = {"macs_before": 640, "macs_after": 640, "params_before": 650, "params_after": 650}
    channels = {"in_before": 64, "in_after": 64, "out_before": 10, "out_after": 10}
    return [*rows, LayerRow(name="linear", kind="linear", **channels, **linear)]


def resnet56_curves(epochs: int = 60) -> list[dict[str, Any]]:
    def row(epoch: int) -> dict[str, Any]:
        lr = 0.01 * (1 if epoch < 30 else 0.1 if epoch < 45 else 0.01)
        noise = 0.004 * math.sin(7.3 * epoch) * math.cos(3.1 * epoch)
        settled = 1 - math.exp(-epoch / 9)
        step = 0.006 * (epoch >= 30) + 0.003 * (epoch >= 45)
        calm = 0.3 if epoch >= 30 else 1.0
        return {
            "epoch": epoch,
            "lr": lr,
            "train_loss": 0.30 - 0.2 * settled - 4 * step + 2 * noise * calm,
            "train_top1": 0.90 + 0.06 * settled + 2 * step + noise * calm,
            "val_loss": 0.36 - 0.05 * settled - 3 * step - 3 * noise * calm,
            "val_top1": 0.885 + 0.033 * settled + step + 1.5 * noise * calm,
            "rate": 0.4 * min(1.0, settled * 1.05),
            "churn": 0.35 * math.exp(-epoch / 6) + 0.02 * calm * abs(math.sin(epoch)),
            "seconds": 31.5,
        }

    return [row(epoch) for epoch in range(epochs)]


def resnet56_report() -> Report:
    layers = resnet56_layers()
    before = measures(853_018, sum(row.macs_before for row in layers), 9339, ms=21.4)
    after = measures(431_522, sum(row.macs_after for row in layers), 9287, ms=12.6)
    sfp = {
        "rate": 0.4,
        "schedule": "asymptotic",
        "interval": 1,
        "layers": ["layer1.*", "layer2.*", "layer3.*"],
        "fit": {"epochs": 60, "lr": 0.01, "optimizer": "sgd", "momentum": 0.9, "milestones": [30, 45], "amp": False},
    }
    polish = {"fit": {"epochs": 10, "lr": 0.001, "optimizer": "sgd", "schedule": "cosine", "distill": None}}
    pruned = after.model_copy(update={"top1": 0.9241, "accuracy": None})
    return Report(
        tersenet="0.1.0",
        model="resnet56",
        recipe={"name": "asfp-resnet56", "description": "Asymptotic soft filter pruning", "seed": 0, "source": "TCYB"},
        data="cifar10",
        target="macs=50%",
        steps=[
            StepResult(
                index=1,
                method="soft_filter_pruning",
                settings=sfp,
                seconds=1912.4,
                after=pruned,
                equality=Equality(max_abs=3.1e-6, relative=2.4e-7, tolerance=1e-5, samples=256),
                masked=Accuracy(n=10_000, top1=0.9242, correct=9242),
                curves=resnet56_curves(),
                notes=["112 of 1008 filters came back at least once after they had been zeroed."],
            ),
            StepResult(index=2, method="train", settings=polish, seconds=338, after=after, curves=resnet56_curves(10)),
        ],
        before=before,
        after=after,
        layers=layers,
        notes=["linear: 10 outputs are the network's own, kept."],
        environment={"python": "3.11.9", "torch": "2.13.0", "device": "cpu", "cores": 2, "deterministic": True},
        command="tersenet compress resnet56 --recipe asfp-resnet56 --weights resnet56-4bfd9763.th "
        "--data cifar10:data --target macs=50% --out runs/r56",
    )


def small_report(**changes: Any) -> Report:
    """Three layers, one step without curves, accuracy or time."""
    layers = [
        conv("features.0", 8, (1, 16), (1, 9)),
        conv("features.3", 8, (16, 32), (9, 18)),
        LayerRow(
            name="classifier",
            kind="linear",
            in_before=32,
            in_after=18,
            out_before=10,
            out_after=10,
            macs_before=320,
            macs_after=180,
            params_before=330,
            params_after=190,
        ),
    ]
    before = measures(5_082, sum(row.macs_before for row in layers))
    after = measures(1_729, sum(row.macs_after for row in layers))
    report = Report(
        tersenet="0.1.0",
        model="package.nets:small",
        recipe={"name": ""},
        data="digits",
        steps=[StepResult(index=1, method="soft_filter_pruning", settings={"rate": 0.45}, seconds=0.62, after=after)],
        before=before,
        after=after,
        layers=layers,
        environment={},
    )
    return report.model_copy(update=changes)
