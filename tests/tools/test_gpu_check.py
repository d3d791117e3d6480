"""The acceptance test on a GPU, as far as a CPU can run it: the main process with stages that fail,
and every check."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gpu_stages
import pytest
import torch

import sampler
from lib.args import UserError
from lib.dist import Ranks
from tools import gpu_check

ROOT = Path(__file__).parents[2]
CPU = Ranks(0, 1, torch.device("cpu"))


# ---- the main process ---------------------------------------------------------------------------


def program(body: str) -> str:
    """A stage that records one finding and then does `body`."""
    return f"""
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, {str(ROOT / "tests")!r})
import gpu_stages
from tools import gpu_check
def stage(s):
    s.check("first", lambda: ("something", "measured"))
    {body}
gpu_stages.STAGES["smoke"] = stage
path, until = Path(sys.argv[1]), float(sys.argv[2])
gpu_stages.stage_main(gpu_check.StageArgs("smoke", path, "toy", "cpu", until))
"""


BODIES = {
    "hangs": "time.sleep(600)",
    "dies": "os.kill(os.getpid(), signal.SIGSEGV)",
    "raises": "1 / 0",
    "ends": "s.check('second', lambda: ('more', True))",
    "has a check that raises": (
        "s.check('bad', lambda: 1 / 0); s.check('second', lambda: ('more', True))"
    ),
}


@pytest.fixture
def supervise(tmp_path, monkeypatch):
    """-> a function: kinds of BODIES, one per stage -> findings, exit status, table and log"""

    def supervise(*kinds, seconds=100.0, limit=90.0):
        bodies = dict(zip(gpu_check.LIMITS, kinds))

        def command(args):
            body = program(BODIES[bodies[args.stage]])
            return [sys.executable, "-c", body, str(args.findings), str(args.until)]

        monkeypatch.setattr(gpu_check, "stage_command", command)
        monkeypatch.setattr(gpu_check, "LIMITS", dict.fromkeys(bodies, limit))
        args = gpu_check.Args(device="cpu", out=str(tmp_path), seconds=seconds, stages=list(bodies))
        with pytest.raises(SystemExit) as ended:
            gpu_check.main(args)
        rows = [json.loads(line) for line in (tmp_path / "gpu_cpu.jsonl").read_text().splitlines()]
        table, log = ((tmp_path / f"gpu_cpu.{end}").read_text() for end in ("md", "log"))
        assert table.count("\n| ") == 2 + len(rows)
        command_row, *rows = rows
        assert command_row["check"] == "command"
        rows = [(row["check"], row["verdict"], row["found"]) for row in rows]
        return rows, ended.value.code, table, log

    before = signal.getsignal(signal.SIGTERM)
    yield supervise
    signal.signal(signal.SIGTERM, before)


def test_what_goes_wrong_in_a_stage_does_not_touch_the_others(supervise):
    """Stops an illegal address, a crash or an exception that loses the findings of all other
    stages."""
    rows, status, *_ = supervise("dies", "raises", "has a check that raises", "ends")
    first = ("first", "measured", "something")
    assert [rows[i] for i in (0, 2, 4, 7)] == [first] * 4 and status == 1
    assert rows[1] == ("the stage itself", "WRONG", rows[1][2]) and rows[1][2].startswith(
        "died by SIGSEGV"
    )
    assert rows[3][:2] == ("the stage itself", "WRONG")
    assert "exit status 1" in rows[3][2] and "ZeroDivisionError: division by zero" in rows[3][2]
    assert rows[5] == ("bad", "WRONG", "ZeroDivisionError: division by zero") and rows[6] == (
        "second",
        "right",
        "more",
    )
    assert rows[8] == ("second", "right", "more") and len(rows) == 9


def test_a_stage_that_hangs_is_killed_and_its_stack_kept(supervise):
    """Stops a hanging kernel that uses up the whole time, and one without a stack in the log."""
    start = time.monotonic()
    rows, status, _, log = supervise("hangs", "ends", limit=25.0)
    assert time.monotonic() - start < 60
    assert rows[0] == ("first", "measured", "something")
    assert (
        rows[1][:2] == ("the stage itself", "WRONG") and "killed at its limit of 25 s" in rows[1][2]
    )
    assert rows[3] == ("second", "right", "more") and status == 1
    assert "Timeout (0:00:" in log and "in stage" in log  # the stack of the thread that slept


def test_a_stage_without_time_is_listed_as_left_out(supervise):
    """Stops a run that exceeds its time and loses its findings with the machine, and a stage that
    is missing in the table."""
    rows, status, table, _ = supervise("ends", "ends", seconds=gpu_check.MIN_SECONDS - 1)
    assert [row[:2] for row in rows] == [
        ("the stage itself", "left out")
    ] * 2 and "left out" in table
    assert status == 0
    with pytest.raises(UserError, match="--stages nccl"):
        gpu_check.main(gpu_check.Args(stages=["nccl"]))


def processes_that_name(path: Path) -> list[int]:
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if str(path).encode() in file.read_bytes():
                found.append(int(file.parent.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs /proc")
@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGKILL])
def test_killed_half_way_the_findings_so_far_are_there(tmp_path, kind):
    """Stops findings that are only written at the end. SIGTERM also ends the running stage."""
    flags = ["--device", "cpu", "--size", "toy", "--out", str(tmp_path)]
    command = [sys.executable, "-m", "tools.gpu_check", *flags]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    findings = tmp_path / "gpu_cpu.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (
        findings.exists() and findings.read_text().count("\n") >= 3
    ):
        time.sleep(0.05)
    process.send_signal(kind)
    assert process.wait(30) == (143 if kind == signal.SIGTERM else -signal.SIGKILL)
    rows = findings.read_text().splitlines()
    assert len(rows) >= 3 and json.loads(rows[1])["check"] == "versions"
    # The table lacks at most the line that was just written when the processes were killed.
    assert findings.with_suffix(".md").read_text().count("\n| smoke") >= len(rows) - 2
    if kind == signal.SIGTERM:
        assert not processes_that_name(findings)
    for pid in processes_that_name(findings):  # later an alarm of their own would end them
        os.kill(pid, signal.SIGKILL)


def test_a_finding_with_a_bar_is_one_cell_of_the_table(tmp_path):
    """Stops a table whose columns are shifted by an error message."""
    path = tmp_path / "gpu_cpu.jsonl"
    path.write_text("")
    gpu_check.add_finding(path, "smoke", "a", "right", "x | y", time.monotonic() - 1)
    assert [row["found"] for row in gpu_check.read_findings(path)] == ["x | y"]
    assert "| smoke | a | right | x / y | 1.0 |" in path.with_suffix(".md").read_text()


# ---- the checks ---------------------------------------------------------------------------------


@pytest.fixture
def findings(tmp_path):
    """-> a function: stage -> {check: verdict}; the stage runs in this process"""

    def findings(stage: str) -> dict:
        path = tmp_path / "findings.jsonl"
        path.write_text("")
        args = gpu_check.StageArgs(stage, path, "toy", "cpu", until=0.0)
        gpu_stages.STAGES[stage](gpu_stages.Stage(args, CPU))
        return {row["check"]: row["verdict"] for row in gpu_check.read_findings(path)}

    return findings


EXPECTED = {  # stage -> (checks that are right, checks that are measured)
    "smoke": (4, 2),
    "full": (2, 5),
    "golden": (2, 1),
    "bench": (2, 0),
    "ranks": (1, 0),
}


@pytest.mark.parametrize("stage", gpu_check.LIMITS)
def test_every_stage_runs_without_a_gpu(findings, stage):
    """Stops a check that first fails on a GPU, where time is short."""
    verdicts = list(findings(stage).values())
    assert (verdicts.count("right"), verdicts.count("measured")) == EXPECTED[stage] and len(
        verdicts
    ) == sum(EXPECTED[stage])


def test_what_is_wrong_is_found(findings, monkeypatch):
    """Stops checks that cannot fail: each is run on the fault that it must find."""
    device, choose = CPU.device, sampler.sample_token

    def blind(qkv, rope, prefix, suffix, bias, t):  # does not see what the bias hides
        return gpu_stages.attention_twin(
            qkv, rope, prefix, suffix, torch.where(bias < 0, 0.0, bias), t
        )

    def unwritten(qkv, rope, prefix, suffix, bias, t):  # does not write the cache
        return gpu_stages.attention_twin(qkv, rope, prefix, suffix.clone(), bias, t)

    def shifted(logits, u, *rest):  # another random number
        return gpu_stages.append_token_twin(logits, (u + 0.5) % 1, *rest)

    def rounded(x, w, real=torch.conv1d):  # as TF32 does, a little more
        return real(x.bfloat16().to(x) if x.dtype == torch.float32 else x, w)

    assert gpu_stages.attention_kernels(device)[1] and gpu_stages.sampling_kernels(device)[1]
    assert (
        not gpu_stages.attention_kernels(device, blind)[1]
        and not gpu_stages.attention_kernels(device, unwritten)[1]
    )
    assert not gpu_stages.sampling_kernels(device, shifted)[1]
    with monkeypatch.context() as wrong:
        wrong.setattr(gpu_stages.F, "conv1d", rounded)
        assert not gpu_stages.products(device)[1]
    with monkeypatch.context() as wrong:
        wrong.setattr(
            gpu_stages, "causal_lower_right", lambda S, L: torch.ones(S, L, dtype=torch.bool).tril()
        )
        assert not gpu_stages.training_attention(device)[1]
    with monkeypatch.context() as wrong:
        other = torch.zeros(2, gpu_stages.GROUP, 48, dtype=torch.long)
        wrong.setattr(gpu_stages, "naive_tokens", lambda _: {"greedy": other, "sampled": other})
        assert not gpu_stages.path_equals_naive(device, "eager")[1]
    with monkeypatch.context() as wrong:
        loss = gpu_stages.grpo.grpo_loss
        wrong.setattr(gpu_stages.grpo, "grpo_loss", lambda *a, **k: loss(*a, **k | {"beta": 9.0}))
        assert not gpu_stages.reference_parity(device)[1]
    with monkeypatch.context() as wrong:  # a sampler that is not the trainer's policy
        wrong.setattr(sampler, "sample_token", lambda logits, *a: choose(logits * 3, *a))
        assert findings("full")["one GRPO step"] == "WRONG"
    monkeypatch.setitem(
        torch._dynamo.utils.counters["unimplemented"], "Dynamo recompile limit exceeded", 1
    )
    assert not gpu_stages.compiler_counters()[1]


def test_one_process_really_calls_the_collectives(monkeypatch, tmp_path):
    """Stops a check of NCCL that never calls it: with one rank our own `Ranks` leaves the
    collectives out."""
    called = []
    for name in ("all_reduce", "all_gather_object", "barrier"):
        real = getattr(torch.distributed, name)
        monkeypatch.setattr(
            torch.distributed,
            name,
            lambda *a, real=real, name=name: called.append(name) or real(*a),
        )
    gpu_stages.one_rank(0, 1, "gloo", "cpu", str(tmp_path / "store"))
    assert called == ["all_reduce", "all_gather_object", "barrier"]


def test_nothing_but_reading_clips_needs_av():
    """Stops checks and benchmarks that cannot run on a GPU machine because it has no FFmpeg."""
    code = (
        "import sys; sys.modules['av'] = None\nimport grpo, sft, eval"
        "\nimport tools.bench, tools.gpu_check, gpu_stages"
    )
    paths = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=paths)
    assert done.returncode == 0, done.stderr[-2000:]
