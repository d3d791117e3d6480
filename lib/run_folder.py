"""What a run leaves on disk, so that nothing of it is ever lost or half written.

    out/config.json         the arguments
        metrics.jsonl       a row a step
        rollouts.jsonl      every sampled completion (grpo.py)
        skipped.jsonl       every clip that could not be used
        checkpoints/step_N  a folder that `from_pretrained` loads, and the trainer's state
        latest              a link to the newest complete checkpoint: `--model out/latest`

A checkpoint is written beside its place, listed in a manifest (size and SHA-256 of every file), forced to
the disk, and renamed: `step_N` exists only when it is complete.  It also keeps how long each log was.  So a
run that is killed at any moment goes on from the newest sound checkpoint, with the logs cut back to it, and
ends as if it had never been interrupted.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError

from lib.common import Ranks, UserError, check_writable, printable, sync, write_json
from lib.trackers import Mirror, check_tracker

LOGS = ("metrics.jsonl", "rollouts.jsonl", "skipped.jsonl")
MANIFEST = "manifest.json"
STATE = "trainer.pt"

# Flags that may change between a run and its continuation: they decide how the work is done or looked at, not
# what is learned.
FREE = {
    "out",
    "resume",
    "overwrite",
    "device",
    "workers",
    "save_every",
    "keep",
    "on_save_error",
    "max_bad_steps",
    "micro_batch",
    "tokens_per_micro_batch",
    "compile",
    "checkpoint_layers",
    "feature_cache",
    "eval_data",
    "eval_every",
    "eval_limit",
    "allow_changes",
    "strict_paths",
    "media_root",
    "log",
    "show_every",
    "log_tokens",
}
IN_PASSING = {"argv", "torch", "world_size", "model_resolved"}  # recorded, never compared
LENGTH = {"max_steps", "epochs"}  # may grow; but they shape the schedule


def read_rows(path: Path) -> Iterator[dict]:
    """Rows of a jsonl file, one at a time.  What is no row (a last line that is half written) is passed over."""
    try:
        # newline: U+2028 and its like end no line, and a policy can sample them.
        with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
            for line in file:
                row = None
                with contextlib.suppress(ValueError, RecursionError):
                    row = json.loads(line)
                if isinstance(row, dict):
                    yield row
    except FileNotFoundError:
        return  # not written yet, or never
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None


def finite(row: dict) -> dict:
    """NaN and infinity are no JSON: null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text())
        for name, (size, sha256) in files.items():
            if (checkpoint / name).stat().st_size != size:
                return f"{name} has {(checkpoint / name).stat().st_size} bytes and not {size}"
            if digest(checkpoint / name) != sha256:
                return f"{name} is not what was written"
    except (OSError, ValueError, AttributeError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return None if STATE in files else f"{STATE} is not listed"


def check_outputs(args, ranks: Ranks) -> None:
    """Can the run write where it is to, and is --out its own?  Asked before anything is loaded; raises UserError."""
    out = Path(args.out)
    if args.feature_cache:  # may be another disk on every machine
        check_writable(args.feature_cache, "--feature_cache")
    if not ranks.is_main:
        return
    check_tracker(args.log)
    check_writable(out, "--out")
    config, found = None, sorted(out.iterdir()) if out.is_dir() else []
    with contextlib.suppress(OSError, ValueError):
        config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    if isinstance(config, dict) and "world_size" in config:
        if not (args.resume or args.overwrite):
            raise UserError(
                f"--out {out} already holds a run: continue it with --resume, replace it with --overwrite, or "
                "choose another folder."
            )
        return
    # A run may have been killed before its config.json; shells and schedulers write their logs here.
    own = {
        *LOGS,
        "checkpoints",
        "latest",
        Path(os.path.relpath(args.feature_cache or out / "latest", out)).parts[0],
    }
    others = [
        p.name
        for p in found
        if p.name not in own
        and p.suffix not in (".log", ".out", ".err", ".txt")
        and not p.name.startswith((".", "config.json.tmp"))
    ]
    if others:
        raise UserError(
            f"--out {out} holds other things and no run ({', '.join(others[:3])}{', ...' * (len(others) > 3)}): "
            "choose a new or an empty folder."
        )


class RunFolder:
    """The folder of one run.  Rank 0 writes; every rank calls, because some calls wait for all."""

    mirror: Mirror | None = None  # --log, on rank 0

    def __init__(self, args, ranks: Ranks, start_model: str = ""):
        """`start_model`: fingerprint of the weights that the run starts from, the KL's reference."""
        self.path, self.ranks = Path(args.out), ranks
        self.keep, self.on_save_error = args.keep, args.on_save_error
        self.checkpoints = self.path / "checkpoints"
        self.unwritten: dict[str, str] = {}  # log -> rows that could not be written yet
        if ranks.is_main:
            self._prepare(args, start_model)
            if args.log != "none":
                self.mirror = Mirror(args.log, self.path, dataclasses.asdict(args), ranks.print0)
        ranks.barrier()

    # ---- starting and resuming --------------------------------------------------------------------

    def _prepare(self, args, start_model: str) -> None:
        check_outputs(args, self.ranks)
        before = self.path / "config.json"
        # A link (`RUN/latest`) points elsewhere tomorrow.  A place alone may change, the weights may not: start_model.
        start = str(Path(args.model).resolve()) if Path(args.model).is_dir() else args.model
        config = dataclasses.asdict(args) | {
            "argv": sys.argv,
            "world_size": self.ranks.world,
            "torch": torch.__version__,
            "data_sha256": digest(Path(args.data)),
            "start_model": start_model,
            "model_resolved": start,
            "rewards_sha256": {
                s: digest(Path(s.rpartition(":")[0]))
                for s in getattr(args, "rewards", [])
                if ".py:" in s
            },
        }
        if before.exists() and args.resume:
            self._check_same(json.loads(before.read_text()), config, args.allow_changes)
        elif before.exists():  # --overwrite
            for name in ("config.json", *LOGS, "latest"):
                (self.path / name).unlink(missing_ok=True)
            shutil.rmtree(self.checkpoints, ignore_errors=True)
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        for left in self.checkpoints.glob(".step_*"):  # of a process that was killed while it saved
            shutil.rmtree(left, ignore_errors=True)
        write_json(before, config)

    def _check_same(self, old: dict, new: dict, allow: bool) -> None:
        """A continuation under other flags would be another run under the old one's name."""
        changed = sorted(
            k for k in new if k in old and old[k] != new[k] and k not in FREE | IN_PASSING
        )
        contents = {
            "data_sha256": f"the sample file {new['data']} has other contents",
            "start_model": f"{new['model']} holds other weights than the run started from (the KL would change its "
            "reference)",
            "rewards_sha256": "a reward's file was edited",
        }
        told = [
            contents.get(k, f"--{k} was {old.get(k)!r} and is {new[k]!r}")
            for k in changed
            if k not in LENGTH
        ]
        if told and not allow:
            raise UserError(
                f"--resume {self.path}: {'; '.join(told)}. Give what the run was started with, "
                "or --allow_changes."
            )
        if LENGTH.intersection(changed) and (old["schedule"] != "constant" or old["warmup"]):
            self.ranks.print0(
                "--max_steps or --epochs changed: the learning-rate schedule is stretched, so this is not what "
                "one run of that length would have been"
            )
        if old["world_size"] != new["world_size"]:
            self.ranks.print0(
                f"{old['world_size']} rank(s) before, {new['world_size']} now: same data order, same samples"
            )

    def _complete(self) -> list[Path]:
        there = [p for p in self.checkpoints.iterdir() if re.fullmatch(r"step_\d+", p.name)]
        return sorted(there, key=lambda p: int(p.name.removeprefix("step_")))

    def newest(self) -> Path | None:
        """The newest sound checkpoint, the same on every rank; None if there is none yet.  Warns of damaged ones."""
        found = None
        if self.ranks.is_main:
            there = self._complete()
            for checkpoint in reversed(there):
                problem = damage(checkpoint)
                if problem is None:
                    found = checkpoint
                    break
                self.ranks.print0(
                    f"warning: {checkpoint} is damaged ({problem}); trying the one before"
                )
            if there and found is None:
                raise UserError(
                    f"{self.checkpoints}: every checkpoint is damaged; start anew with --overwrite."
                )
            if found:
                self._link(found)
        return self.ranks.gather([found])[0]

    def cut_logs(self, lengths: dict[str, int]) -> None:
        """Forget what was logged after a checkpoint: the resumed run writes it again, each row exactly once."""
        if self.ranks.is_main:
            for name in LOGS:
                file, length = self.path / name, lengths.get(name, 0)
                if not file.exists():
                    continue
                if file.stat().st_size < length:
                    self.ranks.print0(
                        f"warning: {file} is shorter than when the checkpoint was written: rows are missing"
                    )
                os.truncate(file, min(length, file.stat().st_size))
        self.ranks.barrier()

    # ---- writing ----------------------------------------------------------------------------------

    def append(self, name: str, rows: list[dict]) -> None:
        """Add rows to a log."""
        if self.ranks.is_main and rows:
            lines = "".join(json.dumps(finite(row), ensure_ascii=False) + "\n" for row in rows)
            self.unwritten[name] = self.unwritten.get(name, "") + lines
            self._write_logs()
            if name == "metrics.jsonl" and self.mirror:
                self.mirror.add(rows)

    def _write_logs(self) -> None:
        for name in list(self.unwritten):
            path = self.path / name
            length = path.stat().st_size if path.exists() else 0
            try:
                with open(path, "a", encoding="utf-8") as file:
                    file.write(self.unwritten[name])
                    sync(file)
            except OSError as error:
                with contextlib.suppress(OSError):
                    os.truncate(
                        path, length
                    )  # no half row; all of it is tried again with the next one
                self._failed(path, error)
            else:
                del self.unwritten[name]

    def _failed(self, what: Path, error: Exception) -> None:
        free = shutil.disk_usage(self.path if self.path.exists() else ".").free
        told = f"cannot write {what}: {str(error).splitlines()[0]} ({free / 2**20:.0f} MB are free there)"
        if self.on_save_error == "stop":
            raise UserError(
                f"{told}. The checkpoints before it are whole: make room and go on with --resume. "
                "(--on_save_error continue would go on training.)"
            )
        self.ranks.print0(f"\nwarning: {told}; training goes on (--on_save_error continue)")

    def save(self, step: int, model, state: dict) -> None:
        """Write checkpoint `step_N` and point `latest` to it."""
        if self.ranks.is_main:
            final = self.checkpoints / f"step_{step}"
            beside, replaced = (final.with_name(f".{final.name}.{word}") for word in ("tmp", "old"))
            try:
                self._write_checkpoint(beside, final, model, state)
                if final.exists():  # a damaged one, which the run fell back behind
                    os.rename(final, replaced)
                os.rename(beside, final)
                sync(self.checkpoints)
                self._link(final)
            except (
                OSError,
                RuntimeError,
                SafetensorError,
            ) as error:  # torch and safetensors have their own
                shutil.rmtree(beside, ignore_errors=True)
                self._failed(final, error)
            shutil.rmtree(replaced, ignore_errors=True)
            self._prune()
        self.ranks.barrier()

    def _write_checkpoint(self, folder: Path, final: Path, model, state: dict) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        model.save_pretrained(folder, final=final)
        logs = {
            name: (self.path / name).stat().st_size for name in LOGS if (self.path / name).exists()
        }
        torch.save(state | {"logs": logs}, folder / STATE)
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        write_json(
            folder / MANIFEST,
            {str(p.relative_to(folder)): [p.stat().st_size, digest(p)] for p in files},
        )
        for path in (*files, *(p for p in folder.rglob("*") if p.is_dir()), folder):
            sync(path)

    def _link(self, checkpoint: Path) -> None:
        link = self.path / ".latest.tmp"
        link.unlink(missing_ok=True)
        link.symlink_to(Path("checkpoints") / checkpoint.name)
        os.replace(link, self.path / "latest")
        sync(self.path)

    def _prune(self) -> None:
        """Keep the newest `keep` checkpoints (0: all)."""
        for old in self._complete()[: -self.keep] if self.keep else []:
            gone = old.with_name(
                f".{old.name}.old"
            )  # renamed first: what is half deleted is no checkpoint
            os.rename(old, gone)
            shutil.rmtree(gone, ignore_errors=True)

    def tell_skipped(self, step: int, clips: list[dict]) -> None:
        self.append("skipped.jsonl", [{"step": step} | clip for clip in clips])
        for clip in clips:
            self.ranks.print0(f"\nskipped {printable(clip['id'])}: {printable(clip['reason'])}")
