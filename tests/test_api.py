"""The public functions, as a user's script calls them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tersenet as tn
from data_support import code_pickle
from run_support import Net, arguments, files, loaders, make, same
from tersenet import api
from tersenet.cli.main import main
from tersenet.data.load import load_data
from tersenet.errors import ArtifactError, TersenetError
from tersenet.graph.record import record_of

RECIPE: dict[str, Any] = {
    "name": "own",
    "steps": [{"method": "soft_filter_pruning", "rate": 0.5, "fit": {"epochs": 2, "lr": 0.01}}],
}


def recipe(**changes: Any) -> dict[str, Any]:
    return {**RECIPE, "steps": [RECIPE["steps"][0] | changes]}


@pytest.mark.parametrize("residual", ["independent", "coupled"])
def test_a_users_own_module_and_data(tmp_path: Path, residual: str) -> None:
    result = tn.compress(make(), recipe(residual=residual), data=loaders(), out=tmp_path / "run", device="cpu")
    assert result.report.after.macs < 0.75 * result.report.before.macs
    assert result.report.steps[0].equality is not None
    x = torch.randn(3, 1, 8, 8)
    for folder in (result.save(tmp_path / "saved"), tmp_path / "run" / "model"):
        loaded = tn.load(folder, base=Net())
        assert same(loaded, result.model)
        assert torch.equal(loaded(x), result.model(x))
    # The second call finds everything done.
    again = tn.compress(make(), recipe(residual=residual), data=loaders(), out=tmp_path / "run", device="cpu")
    assert same(again.model, result.model)
    assert again.report.steps == result.report.steps


def test_a_compressed_module_can_be_compressed_again(tmp_path: Path) -> None:
    """With a folder, so that each step's network is also loaded again."""
    first = tn.compress(make(), recipe(residual="coupled", constants="zero"), data=loaders(), device="cpu")
    second = tn.compress(
        first.model, recipe(residual="coupled", constants="zero"), data=loaders(), out=tmp_path / "run", device="cpu"
    )
    assert second.report.before.macs == first.report.after.macs
    assert second.report.after.macs < first.report.after.macs
    assert same(tn.load(tmp_path / "run" / "model", base=Net()), second.model)


def test_training_alone_is_compared_with_what_came_in(tmp_path: Path) -> None:
    steps = [{"method": "train", "fit": {"epochs": 1, "lr": 0.01}}] * 2
    start = make()
    result = tn.compress(make(), {"steps": steps}, data=loaders(), out=tmp_path / "run", device="cpu")
    assert not same(result.model, start)
    assert same(tn.load(tmp_path / "run" / "before", base=Net()), start)


def test_other_calls_into_the_same_folder_are_refused(tmp_path: Path) -> None:
    def call(model: Any, settings: dict[str, Any], **more: Any) -> tn.Result:
        return tn.compress(model, settings, data=loaders(), out=tmp_path / "run", device="cpu", **more)

    call(make(), recipe())
    before = files(tmp_path)
    with pytest.raises(TersenetError, match=r"recipe\.steps\.0\.rate is 0\.5 there and 0\.25 here"):
        call(make(), recipe(rate=0.25))
    with pytest.raises(TersenetError, match=r"recipe\.seed is 0 there and 3 here"):
        call(make(), recipe(), seed=3)
    wider = make()
    wider.head = nn.Linear(8, 11)
    with pytest.raises(TersenetError, match="weights is"):
        call(wider, recipe())
    assert files(tmp_path) == before
    (tmp_path / "run" / "notes.txt").write_text("mine")
    call(make(), recipe(rate=0.25), fresh=True)
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_other_weights_of_the_same_name_are_another_run(tmp_path: Path) -> None:
    weights = tmp_path / "w.pt"
    more: dict[str, Any] = {"data": loaders(), "weights": weights, "out": tmp_path / "run", "device": "cpu"}
    torch.save(make().state_dict(), weights)
    tn.compress(make(), recipe(), **more)
    torch.save(Net().state_dict(), weights)
    with pytest.raises(TersenetError, match="weights is"):
        tn.compress(make(), recipe(), **more)


def test_a_folder_named_like_a_network_is_not_that_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "resnet8").mkdir()
    model, shape = api.open_model("resnet8")
    assert shape == (3, 32, 32)
    tn.save(model, "resnet8")
    assert record_of(api.open_model("./resnet8")[0]) == record_of(model)


def test_a_runs_folder_stands_for_its_final_network(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "steps").mkdir(parents=True)
    (run / "run.json").write_text("{}")
    with pytest.raises(TersenetError, match="a run that has not finished"):
        api.open_model(str(run))
    model = tn.save(api.open_model("resnet8")[0], run / "model")
    assert same(api.open_model(str(run))[0], tn.load(model))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "resnet9"}, r"unknown model 'resnet9'; did you mean 'resnet"),
        ({"recipe": "sfp_digit"}, "unknown recipe 'sfp_digit'; did you mean 'sfp_digits'"),
        ({"data": "digit"}, "unknown data set 'digit'; did you mean 'digits'"),
        ({"model": "nowhere.nets:make"}, "no module 'nowhere'"),
        ({"model": "run_support:mak"}, "'mak'.*did you mean 'make'"),
        ({"overrides": ["steps.1.rate=1.0"]}, r"steps\[1\]\.rate = 1\.0: must be less than 1|below 1"),
        ({"overrides": ["steps.1.rate=-0.1"]}, r"steps\[1\]\.rate = -0\.1: must be at least 0"),
        ({"overrides": ['steps.1.include=["layer9.*"]']}, r"unknown layer 'layer9\.\*'; did you mean"),
        ({"weights": "nowhere.pt"}, "nowhere.pt"),
        ({"device": "gpu"}, "device 'gpu'"),
        ({"device": "meta"}, "device 'meta'"),
        ({"device": "cuda:99"}, "device 'cuda:99'"),
    ],
)
def test_what_can_not_be_used_is_refused_before_anything_is_written(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    usual: dict[str, Any] = {"model": "resnet8", "recipe": "sfp_digits", "data": "digits", "device": "cpu"}
    with pytest.raises(TersenetError, match=message):
        tn.compress(**(usual | settings), out=tmp_path / "run")
    # What only the network's graph can tell is known when the folder has been made.
    names = {name.removeprefix("run/") for name in files(tmp_path)}
    assert names <= {"run.json", "recipe.yaml", "environment.json"}


def test_a_command_that_was_refused_can_be_corrected(tmp_path: Path) -> None:
    more: dict[str, Any] = {"data": loaders(), "out": tmp_path / "run", "device": "cpu"}
    with pytest.raises(TersenetError, match=r"unknown layer 'c\.\*'"):
        tn.compress(make(), recipe(include=["c.*"]), **more)
    assert tn.compress(make(), recipe(include=["a.*"]), **more).folder == tmp_path / "run"


def test_weights_of_another_architecture(tmp_path: Path) -> None:
    weights = tmp_path / "w.pt"
    torch.save(api.open_model("resnet14")[0].state_dict(), weights)
    with pytest.raises(TersenetError, match=r"not those of this .* unknown to the model: layer1\.1\.conv1\.weight"):
        tn.evaluate("resnet8", "digits", weights=weights, device="cpu")


@pytest.mark.parametrize("place", ["weights", "folder", "checkpoint", "batch"])
def test_a_pickle_that_would_run_code(tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str]) -> None:
    """In place of everything that is read: one message with exit code 1, and no code."""
    bomb = tmp_path / "bomb"
    command = ["eval", "resnet8", "--data", "digits"]
    if place == "weights":
        bomb = tmp_path / "w.pt"
        command += ["--weights", str(bomb)]
    elif place == "folder":
        (tmp_path / "m").mkdir()
        bomb = tmp_path / "m" / "model.pt"
        command[1] = str(tmp_path / "m")
    elif place == "checkpoint":
        command = arguments(tmp_path / "run")
        stop = [*command, "--set", "steps.0.fit.lr=1e30"]
        with pytest.raises(SystemExit):
            main(stop)
        command = stop
        bomb = tmp_path / "run" / "steps" / "00-train" / "checkpoint.pt"
    else:
        folder = tmp_path / "cifar" / "cifar-10-batches-py"
        folder.mkdir(parents=True)
        for name in ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"):
            (folder / name).write_bytes(code_pickle())
        command[3] = f"cifar10:{tmp_path / 'cifar'}"
    if place != "batch":
        bomb.parent.mkdir(parents=True, exist_ok=True)
        bomb.write_bytes(code_pickle())
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(command)
    out, err = capsys.readouterr()
    assert ended.value.code == 1
    assert out == ""
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, err
    assert "stranger" not in err


def test_own_models_and_data_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("steps: [{method: soft_filter_pruning, rate: 0.5, fit: {epochs: 1, lr: 0.01}}]")
    monkeypatch.chdir(tmp_path)
    command = ["compress", "run_support:make", "--recipe", "own.yaml", "--data", "run_support:loaders"]
    for _ in range(2):
        with pytest.raises(SystemExit) as ended:
            main([*command, "--device", "cpu"])
        assert ended.value.code == 0, capsys.readouterr().err
    folder = tmp_path / "runs" / "own-run_support_make"
    assert isinstance(tn.load(folder / "model", base=Net()), Net)
    with pytest.raises(ArtifactError, match="own module"):
        tn.load(folder / "model")


def test_functions_keep_their_names_beside_packages(tmp_path: Path) -> None:
    """Importing parts of the package must not put a module in these functions' place."""
    import tersenet.exporting.program
    import tersenet.measuring.macs

    assert tersenet.measuring.macs.count_macs is not None
    net = nn.Linear(3, 2)
    assert tn.measure(net, torch.zeros(1, 3)).macs == 6
    assert tn.export(net, tmp_path / "net.pt2", torch.zeros(1, 3)) == tmp_path / "net.pt2"


def test_the_callers_module_is_never_changed(tmp_path: Path) -> None:
    net = make().train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    for dry_run in (True, False):
        result = tn.compress(net, recipe(), data=loaders(), device="cpu", dry_run=dry_run)
        assert result.report.after.macs < result.report.before.macs
    tn.evaluate(net, loaders())
    assert net.training
    assert record_of(net) is None
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_a_finished_run_does_not_answer_for_other_weights(tmp_path: Path) -> None:
    tn.compress(make(), recipe(), data=loaders(), out=tmp_path / "run", device="cpu")
    torch.manual_seed(99)
    with pytest.raises(TersenetError, match="holds another run: weights is"):
        tn.compress(Net(), recipe(), data=loaders(), out=tmp_path / "run", device="cpu")


def test_unknown_normalisation_stays_unknown(tmp_path: Path) -> None:
    """What a user's loaders normalise with is not ours to know, so the data set's own is used later."""
    digits = load_data("digits")
    assert digits.test is not None
    own = {"train": list(digits.test.batches(0)), "test": list(digits.test.batches(0))}
    steps = [{"method": "train", "fit": {"epochs": 12, "lr": 0.05, "schedule": "cosine"}}]
    tn.compress("resnet8", {"steps": steps}, data=own, out=tmp_path / "run", device="cpu")
    record = record_of(tn.load(tmp_path / "run"))
    assert record is not None
    assert record.input.mean is None
    top1 = tn.evaluate(str(tmp_path / "run"), "digits").top1
    assert top1 is not None
    assert top1 > 0.8


def test_a_dry_run_sees_the_data_sets_images() -> None:
    plan = {"name": "plan", "data": {"source": "digits"}, "steps": [{"method": "train", "fit": {"epochs": 1}}]}
    assert tn.compress("resnet8", plan, dry_run=True).report.before.macs < 1_000_000
    assert tn.compress("resnet8", {**plan, "data": None}, dry_run=True).report.before.macs > 10_000_000


def test_arguments_of_the_recipes_model_are_not_those_of_another() -> None:
    any_count = {"steps.1.multiple": 1}
    usual = tn.compress("resnet14", "sfp_digits", overrides=any_count, dry_run=True)
    assert usual.report.recipe["model_arguments"] == {}
    wide = tn.compress("resnet14", "sfp_digits", overrides=any_count | {"model_arguments.width": 8}, dry_run=True)
    assert wide.report.recipe["model_arguments"] == {"width": 8}


def test_arguments_for_a_saved_network_are_refused(tmp_path: Path) -> None:
    steps = [{"method": "train", "fit": {"epochs": 1}}]
    tn.compress("resnet8", {"steps": steps}, data="digits", out=tmp_path / "run", device="cpu")
    with pytest.raises(TersenetError, match=r"model_arguments \(width\) are for models built by name"):
        tn.compress(str(tmp_path / "run"), {"steps": steps, "model_arguments": {"width": 4}}, data="digits")


def test_a_class_is_not_a_network() -> None:
    with pytest.raises(TersenetError, match=r"an nn\.Module instance, not <class"):
        tn.compress(Net, recipe(), data=loaders())  # type: ignore[arg-type]


def test_a_target_goes_before_the_recipes_rate() -> None:
    report = tn.compress("resnet20", "sfp_resnet20_cifar10", target="macs=30%", dry_run=True).report
    assert 0.25 * report.before.macs < report.after.macs <= 0.3 * report.before.macs


@pytest.mark.parametrize("residual", ["coupled", "independent"])
def test_pruning_steps_can_be_chained(tmp_path: Path, residual: str) -> None:
    step = {"method": "soft_filter_pruning", "rate": 0.25, "residual": residual, "fit": {"epochs": 1, "lr": 0.01}}
    recipe = {"steps": [step, {"method": "train", "fit": {"epochs": 1, "lr": 0.01}}, step]}
    result = tn.compress("resnet8", recipe, data="digits", out=tmp_path / "run")
    macs = [done.after.macs for done in result.report.steps]
    assert result.report.before.macs > macs[0] == macs[1] > macs[2]
    assert same(tn.load(tmp_path / "run"), result.model)


def test_a_later_step_that_can_not_be_done_is_refused_before_training(tmp_path: Path) -> None:
    fit = {"epochs": 1, "lr": 0.01}
    steps = [{"method": "train", "fit": fit}, {"method": "soft_filter_pruning", "rate": 0.5, "fit": fit}]
    steps.append({"method": "soft_filter_pruning", "rate": 0.5, "include": ["layer9.*"], "fit": fit})
    events: list[str] = []
    with pytest.raises(TersenetError, match=r"unknown layer 'layer9\.\*'"):
        tn.compress("resnet8", {"steps": steps}, data="digits", on_event=lambda event: events.append(event["event"]))
    assert not events
