"""What real runs meet: signals, kills at any moment, full disks, damaged checkpoints, NaN,
ranks that die.

The measure is always the same: the run that was interrupted ends bit for bit
as the one that was not.
"""

import contextlib
import dataclasses
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import forkserver
import pytest
import torch
import torch.distributed as dist
from conftest import GOLDEN
from safetensors.torch import load_file
from test_runs import LABELS, MEDIA, MOVING, ROOT, call, metrics, under_torchrun, write_rows

import grpo
from lib.args import OUT_OF_MEMORY
from lib.dist import fresh_store
from lib.run_folder import find_damage

STEPS = 6


@pytest.fixture(scope="module")
def labels(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "labels.json", list(LABELS.items()))


def flags(script: str, out: Path, labels: Path, *more) -> list[str]:
    """Six steps of two prompts over four clips: three epochs; a schedule that falls."""
    own = ("--max_new_tokens", 5, "--num_generations", 3, "--prompts_per_step", 2)
    if script == "sft.py":
        own = ("--batch_size", 2, "--micro_batch", 1)
    return [
        str(word)
        for word in (
            "--model",
            GOLDEN / "humanomni",
            "--data",
            labels,
            "--media_root",
            MEDIA,
            "--out",
            out,
            "--max_steps",
            STEPS,
            "--lr",
            1e-3,
            "--schedule",
            "linear",
            "--workers",
            0,
            "--save_every",
            1,
            *own,
            *more,
        )
    ]


def run(
    script: str, out: Path, labels: Path, *more, hook: str = "", **how
) -> subprocess.CompletedProcess:
    """`how`: see `call`."""
    return call(script, *flags(script, out, labels, *more), hook=MOVING + hook, **how)


def end_of(out: Path) -> dict:
    """Everything that a run left, without times."""
    timed = ("time/", "tokens_per", "memory")
    rows = metrics(out)
    state = torch.load(out / "latest" / "trainer.pt", weights_only=True)
    return {
        "weights": load_file(out / "latest" / "model.safetensors"),
        "adam": state["optimizer"]["adam"]["state"],
        "step": state["step"],
        "metrics": [{k: v for k, v in r.items() if not k.startswith(timed)} for r in rows],
        "rollouts": (out / "rollouts.jsonl").read_text()
        if (out / "rollouts.jsonl").exists()
        else "",
    }


def assert_same(a: dict, b: dict) -> None:
    """Bit for bit."""
    assert a["step"] == b["step"] == STEPS and [r["step"] for r in a["metrics"]] == list(
        range(1, STEPS + 1)
    )
    assert a["metrics"] == b["metrics"] and a["rollouts"] == b["rollouts"]
    assert a["weights"].keys() == b["weights"].keys()
    assert all(torch.equal(a["weights"][k], b["weights"][k]) for k in a["weights"])
    for i in a["adam"]:
        for name in a["adam"][i]:
            assert torch.equal(a["adam"][i][name], b["adam"][i][name]), (i, name)


@pytest.fixture(scope="module")
def whole(labels, tmp_path_factory) -> dict:
    """The run that nothing happens to, by script."""
    folder, ends = tmp_path_factory.mktemp("whole"), {}
    for script in ("grpo.py", "sft.py"):
        run(script, folder / script, labels)
        ends[script] = end_of(folder / script)
    start = load_file(GOLDEN / "humanomni" / "model.safetensors")
    for end in ends.values():
        # there is something to lose
        assert max(float((end["weights"][k] - start[k]).abs().max()) for k in start) > 1e-4
    return ends


# ---- stopping and going on -----------------------------------------------------------------------


def at_step(step: int, action: str) -> str:
    """A hook: `action` is executed while the process books that step."""
    return f"""
import os, pathlib, signal, training
book = training.Run.finish_step
def count(self, *args, **more):
    if self.state.step + 1 == {step}:
        {action}
    return book(self, *args, **more)
training.Run.finish_step = count
"""


def signal_at(step: int, *kinds: str) -> str:
    """A hook: the process gets a signal, or one after the other."""
    return at_step(step, "; ".join(f"os.kill(os.getpid(), signal.{kind})" for kind in kinds))


@pytest.mark.parametrize(
    "script, kind", [("grpo.py", "SIGTERM"), ("grpo.py", "SIGINT"), ("sft.py", "SIGTERM")]
)
def test_a_signal_ends_the_step_saves_and_tells_how_to_go_on(script, kind, whole, labels, tmp_path):
    """Stops: work lost to a scheduler's SIGTERM or to Ctrl-C; replayed data;
    Adam, schedule or reference reset on resume."""
    out = tmp_path / "run"
    # `whole` has no worker
    done = run(script, out, labels, "--save_every", 0, "--workers", 1, hook=signal_at(3, kind))
    rows = [r["step"] for r in metrics(out)]
    # the flag is seen next step
    assert len(rows) in (3, 4) and (out / "latest").resolve().name == f"step_{len(rows)}"
    command = shlex.split(done.stdout.strip().splitlines()[-1])
    assert command[0] == "python" and command[1].endswith(script) and command[-1] == "--resume"
    assert "resuming after step" in call(script, *command[2:], hook=MOVING).stdout
    assert_same(end_of(out), whole[script])


def test_a_second_ctrl_c_ends_at_once(labels, tmp_path):
    """Stops: a second Ctrl-C that does nothing; and torchrun's SIGTERM, which follows its own,
    tearing the save."""
    done = run(
        "grpo.py", tmp_path / "twice", labels, hook=signal_at(3, "SIGTERM", "SIGINT"), check=False
    )
    assert done.returncode == -signal.SIGINT and done.stderr.strip().endswith(
        "Ctrl-C again ends at once, unsaved"
    )
    assert [r["step"] for r in metrics(tmp_path / "twice")] == [1, 2]  # nor was the step ended
    run(
        "grpo.py",
        tmp_path / "term",
        labels,
        "--save_every",
        0,
        hook=signal_at(3, "SIGINT", "SIGTERM", "SIGTERM"),
    )
    steps = [r["step"] for r in metrics(tmp_path / "term")]
    assert (
        steps[-1] in (3, 4) and (tmp_path / "term" / "latest").resolve().name == f"step_{steps[-1]}"
    )


def test_killed_at_twenty_random_moments(whole, labels, tmp_path):
    """Stops: half a checkpoint taken for a whole one, rows twice or missing,
    a run that cannot be resumed."""
    server, out, random_ = forkserver.shared(), tmp_path / "run", random.Random(0)
    more, kills, lived = ["--keep", 2], 0, 0.6
    while kills < 20:
        job = server.start("grpo.py", *flags("grpo.py", out, labels, *more), hook=MOVING)
        deadline = time.monotonic() + random_.uniform(0, lived)
        while time.monotonic() < deadline:
            time.sleep(0.005)
        with contextlib.suppress(ProcessLookupError):
            os.kill(job.pid, signal.SIGKILL)
        done = server.wait(job)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr[-2000:]
        kills += done.returncode != 0
        lived = min(1.8, lived * 1.25)  # about a whole run
        # it came to its end: that must be right too, and then from the start
        if done.returncode == 0:
            assert_same(end_of(out), whole["grpo.py"])
            shutil.rmtree(out)
            more = ["--keep", 2]
        elif (out / "config.json").exists():
            more = ["--keep", 2, "--resume"]
    run("grpo.py", out, labels, *more)
    assert_same(end_of(out), whole["grpo.py"])
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step_5", "step_6"]


KILL_IN_SAVE = """
import os, signal
from lib import run_folder
left = {n}
def dying(f):
    def g(*args, **kwargs):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return f(*args, **kwargs)
    return g
class Os:
    def __getattr__(self, name):
        return getattr(os, name)
    rename = staticmethod(dying(os.rename))
    replace = staticmethod(dying(os.replace))
    truncate = staticmethod(dying(os.truncate))
run_folder.os = Os()
for name in ("write_json", "sync", "digest"):
    setattr(run_folder, name, dying(getattr(run_folder, name)))
"""


def test_killed_at_every_kind_of_operation_of_a_save(whole, labels, tmp_path):
    """Stops: a moment between two file operations in which neither the old checkpoint
    nor the new one is there."""
    out, n, kills = tmp_path / "run", 3, 0
    more: list[str] = []
    while kills < 25:
        done = run(
            "grpo.py", out, labels, "--keep", 1, *more, hook=KILL_IN_SAVE.format(n=n), check=False
        )
        if done.returncode == 0:
            assert_same(end_of(out), whole["grpo.py"])
            break
        assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
        kills, n = kills + 1, n + 7  # another operation, and in time some progress
        latest = out / "latest"
        assert (
            not latest.is_symlink() or find_damage(latest.resolve()) is None or not latest.exists()
        )
        more = ["--resume"] if (out / "config.json").exists() else []
    assert kills >= 5
    run("grpo.py", out, labels, "--keep", 1, "--resume")
    assert_same(end_of(out), whole["grpo.py"])
    assert [p.name for p in (out / "checkpoints").iterdir()] == [f"step_{STEPS}"]


@pytest.mark.parametrize("harm", ["truncated", "flipped", "no manifest", "file lost"])
def test_a_damaged_newest_checkpoint_is_passed_over(harm, whole, labels, tmp_path):
    """Stops: a run that trusts a torn file, or that gives up although the
    checkpoint before is sound."""
    out = tmp_path / "run"
    run("grpo.py", out, labels, "--max_steps", 4, "--allow_changes")
    newest = out / "checkpoints" / "step_4"
    if harm == "truncated":
        os.truncate(newest / "trainer.pt", 1000)
    elif harm == "flipped":
        data = bytearray((newest / "model.safetensors").read_bytes())
        data[len(data) // 2] ^= 1
        (newest / "model.safetensors").write_bytes(data)
    elif harm == "no manifest":
        (newest / "manifest.json").unlink()
    else:
        (newest / "tokenizer_config.json").unlink()
    assert find_damage(newest) and find_damage(out / "checkpoints" / "step_3") is None
    done = run("grpo.py", out, labels, "--max_steps", 4, "--resume")
    assert "step_4 is damaged" in done.stdout and "resuming after step 3" in done.stdout
    rows = [r["step"] for r in metrics(out)]
    assert rows == [1, 2, 3, 4] and find_damage(newest) is None
    for checkpoint in (out / "checkpoints").iterdir():
        os.truncate(checkpoint / "trainer.pt", 1000)
    done = run("grpo.py", out, labels, "--max_steps", 4, "--resume", check=False)
    assert (
        done.returncode == 1
        and "every checkpoint is damaged" in done.stderr
        and "Traceback" not in done.stderr
    )


def test_a_run_is_not_continued_as_another_run(labels, tmp_path):
    """Stops: a resumed run under other flags or other data,
    with nothing in the folder that tells."""
    data = write_rows(tmp_path / "data.json", list(LABELS.items()))
    out = tmp_path / "run"
    run("grpo.py", out, data, "--max_steps", 2)
    done = run("grpo.py", out, data, "--max_steps", 2, "--resume", "--lr", 1e-2, check=False)
    assert done.returncode == 1 and "--lr was 0.001 and is 0.01" in done.stderr
    # nor was it noted as the run's
    assert json.loads((out / "config.json").read_text())["lr"] == 1e-3
    write_rows(data, list((LABELS | {"wide.mp4": "sad"}).items()))
    done = run("grpo.py", out, data, "--max_steps", 3, "--resume", check=False)
    assert (
        done.returncode == 1
        and "has other contents" in done.stderr
        and "--allow_changes" in done.stderr
    )
    done = run("grpo.py", out, data, "--max_steps", 3, "--resume", "--allow_changes")
    assert "schedule is stretched" in done.stdout and (out / "latest").resolve().name == "step_3"


# ---- several ranks -------------------------------------------------------------------------------


def test_other_numbers_of_ranks_go_on_with_the_same_data(whole, labels, tmp_path):
    """Stops: clips skipped or repeated because the number of GPUs changed
    between two parts of a run."""
    out = tmp_path / "run"
    # torchrun ends well, too
    done = run("grpo.py", out, labels, "--save_every", 0, ranks=2, hook=signal_at(3, "SIGTERM"))
    assert "torchrun --nproc_per_node=2" in done.stdout
    done = run("grpo.py", out, labels, "--save_every", 0, "--resume")
    assert "2 rank(s) before, 1 now" in done.stdout
    end = end_of(out)
    assert [r["step"] for r in end["metrics"]] == list(range(1, STEPS + 1))
    key = lambda r: (r["step"], r["clip"], r["completion"])
    rows = [
        sorted(map(json.loads, e["rollouts"].splitlines()), key=key)
        for e in (end, whole["grpo.py"])
    ]
    assert [(key(r), r["text"]) for r in rows[0]] == [(key(r), r["text"]) for r in rows[1]]
    # of a step on two ranks, and on one
    for name in ("reward", "loss", "kl", "entropy", "grad_norm"):
        assert end["metrics"][0][name] == pytest.approx(
            whole["grpo.py"]["metrics"][0][name], rel=1e-6, abs=1e-7
        ), name
    for k, v in whole["grpo.py"]["weights"].items():
        # sums in another order, six steps of 1e-3
        torch.testing.assert_close(end["weights"][k], v, atol=5e-4, rtol=0)


def die_once(out: Path, step: int) -> str:
    """A hook: rank 1 is killed in the first attempt. A file tells the attempts apart:
    torchrun counts an agent's own failures only."""
    died = f"pathlib.Path({str(out.with_suffix('.died'))!r})"
    return at_step(
        step,
        f"if os.environ['RANK'] == '1' and not {died}.exists(): "
        f"{died}.touch(); os.kill(os.getpid(), signal.SIGKILL)",
    )


def test_a_dead_rank_ends_the_run_by_name(labels, tmp_path):
    """Stops: seven ranks that wait for ever for the eighth (`call` waits five minutes)."""
    done = run(
        "grpo.py",
        tmp_path / "dead",
        labels,
        ranks=2,
        hook=die_once(tmp_path / "dead", 4),
        check=False,
    )
    assert done.returncode != 0 and "rank      : 1" in done.stderr and "-9" in done.stderr


def test_a_restarted_rank_finds_the_living(monkeypatch):
    """Stops: ranks that torchrun restarts taking a dead rank's address from the store that it keeps
    for all attempts."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    stores = [dist.TCPStore("127.0.0.1", server.port, wait_for_workers=False) for _ in range(3)]
    mine = threading.local()
    monkeypatch.setattr(dist, "rendezvous", lambda url: iter([(stores[mine.rank], mine.rank, 3)]))

    def start(rank: int, found: dict) -> None:
        mine.rank = rank
        found[rank] = fresh_store()

    # rank 0 may come first or last
    for attempt, order in enumerate([(0, 1, 2), (2, 1, 0), (1, 0, 2)]):
        found: dict = {}
        threads = [
            threading.Thread(target=start, args=(rank, found), daemon=True) for rank in order
        ]
        for thread in threads:
            thread.start()
            time.sleep(0.2)
        for thread in threads:
            thread.join(timeout=20)
        assert len(found) == 3  # else one waits for a dead rank
        assert not any(
            store.check([f"address {rank}"]) for store in found.values() for rank in range(3)
        )
        for rank, store in found.items():
            store.set(f"address {rank}", str(attempt))
        assert all(
            store.get(f"address {r}") == str(attempt).encode()
            for store in found.values()
            for r in range(3)
        )


def test_two_machines_are_one(labels, tmp_path):
    """Stops: a multi-node launch that splits the data, the seed or the writing by local rank; a
    restart by torchrun that hangs, or that starts the run anew instead of going on from its
    last checkpoint."""
    port, out = 20_000 + os.getpid() % 20_000, tmp_path / "nodes"
    line = next(
        line
        for line in (ROOT / "docs" / "recipe.md").read_text().splitlines()
        if "--nnodes" in line
    )
    words = shlex.split(line.replace("HOST:29500", f"127.0.0.1:{port}"))
    assert (
        words[0] == "torchrun"
        and {"--nnodes=2", "--max_restarts=3"} < set(words)
        and words[-1] == "--resume"
    )
    launch = (*words[1 : words.index("grpo.py")], "--local_addr=127.0.0.1")
    command, env = under_torchrun(
        tmp_path / "site",
        "grpo.py",
        *flags("grpo.py", out, labels),
        "--max_steps",
        3,
        "--resume",
        ranks=1,
        launch=launch,
        hook=MOVING + die_once(out, 3),
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    agents = [subprocess.Popen(command, env=env, **pipes) for _ in range(2)]
    said = ""
    for agent in agents:
        told, err = agent.communicate(timeout=300)
        assert agent.returncode == 0, err[-3000:]
        said += told
    assert re.search(r"resuming after step [23] ", said)  # one of them lost its rank
    run("grpo.py", tmp_path / "one", labels, "--max_steps", 3, ranks=2)
    a, b = end_of(out), end_of(tmp_path / "one")
    assert a["metrics"] == b["metrics"] and a["rollouts"] == b["rollouts"]
    assert all(torch.equal(a["weights"][k], b["weights"][k]) for k in a["weights"])


# ---- faults --------------------------------------------------------------------------------------


def poison(when: str, what: str = "nan") -> str:
    """A hook: an entry of the gradient is `what` in those of the optimiser's steps,
    `seen` = 1, 2 .., that `when` names."""
    return f"""
import os, training
step, seen = training.MasterAdamW.step, 0
def poisoned(self, *args):
    global seen
    seen += 1
    if {when}:
        self.flat[7] = float("{what}")
    return step(self, *args)
training.MasterAdamW.step = poisoned
"""


def test_a_loss_that_is_not_finite_skips_the_step(whole, labels, tmp_path):
    """Stops: one NaN that ends a run of days, or lives on in Adam's moments;
    and a run that skips for ever."""
    for what in ("nan", "inf"):
        out = tmp_path / what
        run("grpo.py", out, labels, hook=poison("seen in (2, 4)", what))
        rows = metrics(out)
        assert [r["skipped_steps"] for r in rows] == [0, 1, 1, 2, 2, 2] and len(rows) == STEPS
        assert [r["grad_norm"] is None for r in rows] == [False, True, False, True, False, False]
        assert all(v.isfinite().all() for v in end_of(out)["weights"].values())
        assert rows[0]["loss"] == whole["grpo.py"]["metrics"][0]["loss"]
    done = run(
        "grpo.py",
        tmp_path / "stuck",
        labels,
        check=False,
        hook=poison("seen > 1") + "import training\ntraining.MAX_BAD_STEPS = 3\n",
    )
    assert (
        done.returncode == 1
        and "3 steps in a row" in done.stderr
        and "stopped after step 4" in done.stderr
    )
    assert (tmp_path / "stuck" / "latest").resolve().name == "step_4"


def test_a_bad_gradient_on_one_rank_is_skipped_by_all_and_two_ranks_are_one_for_sft(
    labels, tmp_path
):
    """Stops: ranks that part because one skipped and one did not;
    an SFT loss that is averaged per rank."""
    hook = poison("seen == 2 and os.environ.get('RANK', '1') == '1'")
    run("sft.py", tmp_path / "two", labels, "--save_every", 0, ranks=2, hook=hook)
    run("sft.py", tmp_path / "one", labels, "--save_every", 0, hook=hook)
    two, one = end_of(tmp_path / "two"), end_of(tmp_path / "one")
    assert (
        [r["skipped_steps"] for r in two["metrics"]]
        == [r["skipped_steps"] for r in one["metrics"]]
        == [0, 1, 1, 1, 1, 1]
    )
    for a, b in zip(one["metrics"], two["metrics"]):
        assert (
            a["loss"] == pytest.approx(b["loss"], rel=1e-4) and a["num_tokens"] == b["num_tokens"]
        )
    assert one["metrics"][0]["loss"] == pytest.approx(two["metrics"][0]["loss"], rel=1e-6)
    assert one["metrics"][0]["grad_norm"] == pytest.approx(two["metrics"][0]["grad_norm"], rel=1e-6)
    for k, v in one["weights"].items():
        torch.testing.assert_close(two["weights"][k], v, atol=1e-4, rtol=0)


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int):
    """A file system of that size, if this user may mount one."""
    folder.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", folder],
            capture_output=True,
        ).returncode
    ):
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_full_disk_leaves_the_old_checkpoint_whole(whole, labels, tmp_path):
    """Stops: a full disk that tears the only checkpoint, loses rows, or is not told."""
    run("grpo.py", tmp_path / "size", labels, "--max_steps", 1)
    one = sum(p.stat().st_size for p in (tmp_path / "size" / "latest").resolve().rglob("*")) / 2**20
    with small_disk(tmp_path / "disk", int(2.5 * one) + 1) as disk:  # two checkpoints, not three
        done = run("grpo.py", disk / "run", labels, check=False)
        assert (
            done.returncode == 1 and "cannot write" in done.stderr and "--resume" in done.stderr
        ), done.stderr[-1500:]
        assert (
            "Traceback" not in done.stderr
            and find_damage((disk / "run" / "latest").resolve()) is None
        )
        assert (disk / "run" / "latest").resolve().name == "step_2"
        shutil.rmtree(disk / "run" / "checkpoints" / "step_1")  # room
        run("grpo.py", disk / "run", labels, "--resume", "--keep", 1)
        assert_same(end_of(disk / "run"), whole["grpo.py"])


def test_a_log_that_cannot_be_written_ends_the_run_without_half_a_row(tmp_path, monkeypatch):
    """Stops: half a row that is left in a log, and a run that goes on without its rows."""
    from lib import run_folder
    from lib.args import UserError
    from lib.dist import start_ranks

    folder = object.__new__(run_folder.RunFolder)
    folder.path, folder.ranks = tmp_path, start_ranks("cpu")
    folder.append("metrics.jsonl", [{"step": 1}])

    def full(file):
        file.flush()
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "sync", full)
        with pytest.raises(UserError, match=r"No space left.*--resume"):
            folder.append("metrics.jsonl", [{"step": 2}])
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_out_of_gpu_memory_names_flags_that_exist():
    """Stops: advice to set a flag that is gone."""
    flags = set(re.findall(r"--(\w+)", OUT_OF_MEMORY))
    assert (
        {"num_generations", "max_new_tokens"}
        < flags
        <= {field.name for field in dataclasses.fields(grpo.Args)}
    )


# ---- precision -----------------------------------------------------------------------------------


def test_a_sampler_that_disagrees_is_refused(labels, tmp_path):
    """Stops: training on samples of another policy than the one that is trained."""
    hook = (
        "import sampler\nmake = sampler.generate\n"
        "def other(*args, **kwargs):\n"
        "    completions, lengths, logps = make(*args, **kwargs)\n"
        "    return completions, lengths, logps - 0.7\n"
        "sampler.generate = other\n"
    )
    done = run("grpo.py", tmp_path / "off", labels, "--max_steps", 2, hook=hook)
    assert "2 of 2 steps made no update" in done.stdout  # or it looks trained
    rows = metrics(tmp_path / "off")
    assert [r["skipped_steps"] for r in rows] == [1, 2] and rows[0]["sampler_logp_diff/mean"] > 0.5
    patient = tmp_path / "patient.py"
    patient.write_text(
        "import grpo\nfrom lib.args import run_main\n"
        "grpo.MAX_LOGP_DIFF = 2\nrun_main(grpo.main, grpo.Args)\n"
    )
    run(patient, tmp_path / "told", labels, "--max_steps", 2, hook=hook)
    rows = metrics(tmp_path / "told")
    assert [r["skipped_steps"] for r in rows] == [0, 0]
