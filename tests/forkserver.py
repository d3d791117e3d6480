"""Runs the project's scripts and `-m` programs without paying for their imports each time.

`python grpo.py` spends most of a test's time on importing torch and transformers. This process
imports them once and forks for every run; a fork executes the script file itself as __main__, with
its own arguments and output.

    server = shared()
    job = server.start("grpo.py", "--model", ...,
                       hook="import rewards; rewards.accuracy_reward = ...")
    os.kill(job.pid, signal.SIGKILL)    # as a test likes
    done = server.wait(job)             # .returncode (negative: the signal), .stdout, .stderr
"""

import atexit
import dataclasses
import functools
import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclasses.dataclass
class Job:
    pid: int
    folder: Path  # holds out.txt and err.txt
    args: list[str]

    @property
    def stdout(self) -> str:
        return (self.folder / "out.txt").read_text(errors="replace")

    @property
    def stderr(self) -> str:
        return (self.folder / "err.txt").read_text(errors="replace")


class ForkServer:
    def __init__(self):
        env = dict(os.environ) | {
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(ROOT),
        }
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )

    def _ask(self, request: dict):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, script, *flags, hook: str = "", cwd=None, env: dict | None = None) -> Job:
        folder = Path(tempfile.mkdtemp(prefix="job"))
        for name in ("out.txt", "err.txt"):  # here: a child may be killed before it opens them
            (folder / name).touch()
        args = [str(ROOT / script) if str(script).endswith(".py") else script, *map(str, flags)]
        return Job(
            self._ask(
                {
                    "args": args,
                    "hook": hook,
                    "folder": str(folder),
                    "cwd": str(cwd or ROOT),
                    "env": env or {},
                }
            ),
            folder,
            args,
        )

    def wait(self, job: Job) -> subprocess.CompletedProcess:
        return subprocess.CompletedProcess(
            job.args, self._ask({"wait": job.pid}), job.stdout, job.stderr
        )

    def run(self, script: str, *flags, **options) -> subprocess.CompletedProcess:
        return self.wait(self.start(script, *flags, **options))

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


@functools.cache
def shared() -> ForkServer:
    """One for the whole test session."""
    server = ForkServer()
    atexit.register(server.close)
    return server


def child(request: dict) -> int:
    """In the fork: be that command."""
    for name, stream in (("out.txt", 1), ("err.txt", 2)):
        os.dup2(
            os.open(Path(request["folder"]) / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream
        )
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdin, sys.stdout = open(0), open(1, "w")  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1)  # noqa: SIM115
    os.setpgid(0, 0)
    os.chdir(request["cwd"])
    os.environ.update(request["env"])
    sys.argv = request["args"]
    try:
        exec(request["hook"], {})
        program = request["args"][0]
        if program.endswith(".py"):
            runpy.run_path(program, run_name="__main__")
        else:  # tools.doctor, toy: as `python -m` does
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


# What a script imports, and what it imports only where it is needed.
IMPORTED = (
    "eval",
    "grpo",
    "sft",
    "huggingface_hub",
    "lib.media",
    "transformers.models.bert.modeling_bert",
    "transformers.models.siglip.modeling_siglip",
    "transformers.models.whisper.feature_extraction_whisper",
    "transformers.models.whisper.modeling_whisper",
)


def serve() -> None:
    import torch

    for name in IMPORTED:  # a run executes the script's own file anew
        importlib.import_module(name)
    transformers = importlib.import_module("transformers")
    for name in ("AutoTokenizer", "BertModel", "SiglipVisionModel", "WhisperFeatureExtractor"):
        getattr(transformers, name)
    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            answer = os.waitstatus_to_exitcode(status)
        else:
            answer = os.fork()
            if answer == 0:
                os._exit(child(request))
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
