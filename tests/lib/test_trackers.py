"""--log: a mirror of metrics.jsonl, which never decides anything."""

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from lib.args import UserError
from lib.dist import Ranks
from lib.run_folder import RunFolder
from lib.trackers import check_tracker

ROWS = [{"step": 0, "eval/dfew/war": 61.5}, {"step": 1, "reward": 1.25, "kl": None, "note": "text"}]


def fake(monkeypatch, kind: str, broken_at: int | None = None) -> list:
    """A package of that name, by the documented signatures. -> what it was given"""
    got = []

    def log(row, step=None):
        if step == broken_at:
            raise ConnectionError("no network")
        got.append((step, row))

    module = ModuleType(kind)
    if kind == "tensorboard":
        writer = SimpleNamespace(
            add_scalar=lambda name, value, step: log({name: value}, step), flush=lambda: None
        )
        module.SummaryWriter = lambda log_dir: got.append(("init", log_dir)) or writer
    else:
        module.init = lambda **words: got.append(("init", words)) or SimpleNamespace(log=log)
    monkeypatch.setitem(
        sys.modules, "torch.utils.tensorboard" if kind == "tensorboard" else kind, module
    )
    return got


def folder(path, kind: str, monkeypatch, rank: int = 0) -> RunFolder:
    data = path / "data.json"
    data.write_text("[]")
    config = {
        "out": str(path / "my run"),
        "log": kind,
        "model": "m",
        "data": str(data),
        "feature_cache": None,
        "resume": False,
        "overwrite": True,
        "keep": 0,
        "on_save_error": "stop",
        "rewards": [],
    }
    monkeypatch.setattr("lib.run_folder.dataclasses.asdict", dict)
    args = type("A", (dict,), {"__getattr__": dict.__getitem__})(config)
    ranks = Ranks(rank, 1, torch.device("cpu"))
    monkeypatch.setattr(Ranks, "barrier", lambda self: None)
    return RunFolder(args, ranks)


@pytest.mark.parametrize("kind", ["tensorboard", "wandb", "trackio"])
def test_a_tracker_gets_the_numbers_of_every_row(kind, tmp_path, monkeypatch):
    """Stops a step that is off by one, None or text sent as a number,
    and two runs of one name that become one."""
    got = fake(monkeypatch, kind)
    run = folder(tmp_path, kind, monkeypatch)
    for row in ROWS:
        run.append("metrics.jsonl", [row])
    run.append("rollouts.jsonl", [{"step": 1, "advantage": 2.0}])  # texts are no curve
    assert got[1:] == [(0, {"eval/dfew/war": 61.5}), (1, {"reward": 1.25})]
    assert [
        json.loads(line)
        for line in (tmp_path / "my run" / "metrics.jsonl").read_text().splitlines()
    ] == ROWS
    if kind == "tensorboard":
        assert got[0] == ("init", str(tmp_path / "my run" / "tensorboard"))
    else:
        words = got[0][1]
        assert (
            words["project"] == "r1-omni"
            and words["resume"] == "allow"
            and words["config"]["model"] == "m"
        )
        assert words["name"].startswith("my_run-") and not set(words["name"]) & set("/\\#?%: ")
        other = tmp_path / "other"
        other.mkdir()
        again = fake(monkeypatch, kind)
        folder(tmp_path, kind, monkeypatch), folder(other, kind, monkeypatch)
        assert again[0][1]["name"] == words["name"] != again[1][1]["name"]


def test_a_tracker_that_fails_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    """Stops eight GPUs waiting for a website."""
    got = fake(monkeypatch, "wandb", broken_at=1)
    run = folder(tmp_path, "wandb", monkeypatch)
    for step in range(4):
        run.append("metrics.jsonl", [{"step": step, "reward": 1.0}])
    assert [step for step, _ in got] == ["init", 0]
    assert len((tmp_path / "my run" / "metrics.jsonl").read_text().splitlines()) == 4
    assert capsys.readouterr().out.count("--log wandb failed (ConnectionError: no network)") == 1


def test_a_missing_package_is_told_before_anything_is_loaded(monkeypatch):
    """Stops a run that ends after the model is on the GPU, or that logs nowhere."""
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(UserError, match="--log trackio: not installed; pip install trackio"):
        check_tracker("trackio")
    check_tracker("none")


def test_only_the_first_rank_has_a_tracker(tmp_path, monkeypatch):
    """Stops eight copies of each curve."""
    got = fake(monkeypatch, "wandb")
    folder(tmp_path, "wandb", monkeypatch, rank=1).append("metrics.jsonl", ROWS)
    assert got == []
