"""The folder of a training run: config, logs and checkpoints that survive a kill at any moment.

    out/config.json         the arguments of the run
        metrics.jsonl       one row per step
        rollouts.jsonl      every sampled completion (grpo.py)
        skipped.jsonl       every clip that could not be used
        checkpoints/step_N  a folder that `from_pretrained` loads, with the trainer's state
        latest              a link to the newest complete checkpoint: `--model out/latest`
        report.html         the page of `python -m tools.report out`

A checkpoint is written to a temporary folder with a manifest of its files, forced to the disk, and
then renamed to `step_N`. So a folder with this name is always complete.

A run continues with --resume from the newest undamaged checkpoint. The logs are cut back to the
lengths that it recorded, so weights and logs end as without the interruption.
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

from lib.args import UserError, printable
from lib.dist import Ranks
from lib.files import check_writable, sync, write_json
from lib.trackers import Mirror, check_tracker

LOGS = ("metrics.jsonl", "rollouts.jsonl", "skipped.jsonl")
REPORT = "report.html"
MANIFEST = "manifest.json"
STATE = "trainer.pt"

# Flags that may change when a run is resumed, because what is learned does not depend on them.
MAY_CHANGE = set(
    "out resume overwrite workers save_every keep micro_batch towers checkpoint_layers "
    "feature_cache eval_data eval_every allow_changes media_root log".split()
)
# Entries of config.json that are recorded for information and never compared.
NEVER_COMPARED = {"argv", "torch", "world_size", "model_resolved"}
# Flags that may change, too, but the learning-rate schedule depends on them.
LENGTH_FLAGS = {"max_steps", "epochs"}

# Shells and schedulers write their own logs, of these file types, into a run's folder.
FOREIGN_LOG_SUFFIXES = (".log", ".out", ".err", ".txt")


def read_rows(path: Path) -> Iterator[dict]:
    """Yield the rows of a jsonl file. A missing file has none. Raises UserError.

    Lines that are not a JSON object are skipped, such as a last line that is half written.
    """
    try:
        # Only "\n" ends a row. Completions can contain U+2028 and similar characters, which do not.
        with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
            for line in file:
                row = None
                with contextlib.suppress(ValueError, RecursionError):
                    row = json.loads(line)
                if isinstance(row, dict):
                    yield row
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None


def json_safe(row: dict) -> dict:
    """Return the row with None in place of NaN and infinity, which JSON does not have."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }


def digest(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_damage(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint folder, or None if it matches its manifest."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text())
        for name, recorded in files.items():
            file = checkpoint / name
            if [file.stat().st_size, digest(file)] != recorded:
                return f"{name} is not what was written"
    except (OSError, ValueError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None if STATE in files else f"{STATE} is not listed"


def check_outputs(args, ranks: Ranks) -> None:
    """Check the folders of a run before anything is loaded.

    Raises UserError if one cannot be written, if --out holds a run and neither --resume nor
    --overwrite is given, or if it holds other files.
    """
    out = Path(args.out)
    # The cache may be on a different disk on every machine, so every rank checks it.
    if args.feature_cache:
        check_writable(args.feature_cache, "--feature_cache")
    if not ranks.is_main:
        return
    check_tracker(args.log)
    check_writable(out, "--out")

    config = None
    with contextlib.suppress(OSError, ValueError):
        config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    if isinstance(config, dict) and "world_size" in config:
        if not (args.resume or args.overwrite):
            raise UserError(
                f"--out {out} already holds a run: continue it with --resume, "
                "replace it with --overwrite, or choose another folder."
            )
        return

    names = foreign_files(out, args.feature_cache)
    if names:
        more = ", ..." if len(names) > 3 else ""
        raise UserError(
            f"--out {out} holds other things and no run ({', '.join(names[:3])}{more}): "
            "choose a new or an empty folder."
        )


def foreign_files(out: Path, feature_cache: str | None) -> list[str]:
    """Return the names of the files in `out` that no run and no scheduler has written."""
    # A run that was killed before it wrote config.json can have left these.
    own = {*LOGS, REPORT, "checkpoints", "latest"}
    if feature_cache:
        own.add(Path(os.path.relpath(feature_cache, out)).parts[0])
    files = sorted(out.iterdir()) if out.is_dir() else []
    return [
        file.name
        for file in files
        if file.name not in own
        and file.suffix not in FOREIGN_LOG_SUFFIXES
        and not file.name.startswith((".", "config.json.tmp"))
    ]


class RunFolder:
    """The folder of one run. Only rank 0 writes, but every rank must call the methods."""

    mirror: Mirror | None = None  # sends the rows of metrics.jsonl to the tracker of --log

    def __init__(self, args, ranks: Ranks, start_model: str = ""):
        """Create the folder, or prepare it for a resumed run.

        `start_model` is the fingerprint of the weights that the run starts from.
        """
        self.path, self.ranks, self.keep = Path(args.out), ranks, args.keep
        self.checkpoints = self.path / "checkpoints"
        if ranks.is_main:
            self._prepare(args, start_model)
            if args.log != "none":
                self.mirror = Mirror(args.log, self.path, dataclasses.asdict(args), ranks.print0)
        ranks.barrier()

    # ---- starting and resuming -------------------------------------------------------------------

    def _prepare(self, args, start_model: str) -> None:
        """Check and write config.json, and remove what a replaced or killed run has left."""
        check_outputs(args, self.ranks)
        config_file = self.path / "config.json"
        config = self._config(args, start_model)
        if config_file.exists() and args.resume:
            self._check_same(json.loads(config_file.read_text()), config, args.allow_changes)
        elif config_file.exists():  # --overwrite
            for name in ("config.json", *LOGS, REPORT, "latest"):
                (self.path / name).unlink(missing_ok=True)
            shutil.rmtree(self.checkpoints, ignore_errors=True)

        self.checkpoints.mkdir(parents=True, exist_ok=True)
        # A process that is killed while it saves leaves its temporary folder.
        for temporary in self.checkpoints.glob(".step_*"):
            shutil.rmtree(temporary, ignore_errors=True)
        write_json(config_file, config)

    def _config(self, args, start_model: str) -> dict:
        """Return the content of config.json: the flags and what identifies the run's inputs."""
        model = Path(args.model)  # may be a link such as RUN/latest, which later points elsewhere
        reward_files = {
            spec: digest(Path(spec.rpartition(":")[0]))
            for spec in getattr(args, "rewards", [])
            if ".py:" in spec
        }
        return dataclasses.asdict(args) | {
            "argv": sys.argv,
            "world_size": self.ranks.world,
            "torch": torch.__version__,
            "data_sha256": digest(Path(args.data)),
            "start_model": start_model,
            "model_resolved": str(model.resolve()) if model.is_dir() else args.model,
            "rewards_sha256": reward_files,
        }

    def _check_same(self, old: dict, new: dict, allow: bool) -> None:
        """Raise UserError if a resumed run has other flags or inputs than before.

        `old` and `new` are the contents of config.json. `allow` is --allow_changes.
        """
        ignored = MAY_CHANGE | NEVER_COMPARED
        changed = sorted(
            key for key in new if key in old and old[key] != new[key] and key not in ignored
        )
        descriptions = {
            "data_sha256": f"the sample file {new['data']} has other contents",
            "start_model": f"{new['model']} holds other weights than the run started from "
            "(the KL would change its reference)",
            "rewards_sha256": "a reward's file was edited",
        }
        problems = [
            descriptions.get(key, f"--{key} was {old.get(key)!r} and is {new[key]!r}")
            for key in changed
            if key not in LENGTH_FLAGS
        ]
        if problems and not allow:
            raise UserError(
                f"--resume {self.path}: {'; '.join(problems)}; give what the run was started with, "
                "or --allow_changes."
            )

        if LENGTH_FLAGS.intersection(changed) and old["schedule"] != "constant":
            self.ranks.print0(
                "--max_steps or --epochs has changed, so the learning-rate schedule is stretched: "
                "the result differs from that of one run of this length"
            )
        if old["world_size"] != new["world_size"]:
            self.ranks.print0(
                f"{old['world_size']} rank(s) before, {new['world_size']} now: the order of the "
                "data and the sampled tokens stay the same"
            )

    def _complete(self) -> list[Path]:
        """Return the folders of the complete checkpoints, the oldest first."""
        folders = [p for p in self.checkpoints.iterdir() if re.fullmatch(r"step_\d+", p.name)]
        return sorted(folders, key=lambda p: int(p.name.removeprefix("step_")))

    def newest(self) -> Path | None:
        """Return the newest undamaged checkpoint on every rank, or None if there is none yet.

        Damaged checkpoints cause a warning. Raises UserError if all are damaged.
        """
        newest = self._find_newest() if self.ranks.is_main else None
        if newest:
            self._link(newest)
        return self.ranks.gather([newest])[0]

    def _find_newest(self) -> Path | None:
        """Return the newest undamaged checkpoint on this rank."""
        checkpoints = self._complete()
        for checkpoint in reversed(checkpoints):
            problem = find_damage(checkpoint)
            if problem is None:
                return checkpoint
            self.ranks.print0(
                f"warning: {checkpoint} is damaged ({problem}); trying the one before"
            )
        if checkpoints:
            raise UserError(
                f"{self.checkpoints}: every checkpoint is damaged; start anew with --overwrite."
            )
        return None

    def cut_logs(self, lengths: dict[str, int]) -> None:
        """Cut the logs back to the lengths in bytes that a checkpoint recorded.

        The resumed run writes the later rows again.
        """
        files = [file for name in LOGS if (file := self.path / name).exists()]
        for file in files if self.ranks.is_main else []:
            length, actual_length = lengths.get(file.name, 0), file.stat().st_size
            if actual_length < length:
                self.ranks.print0(
                    f"warning: {file} is shorter than when the checkpoint was written: "
                    "rows are missing"
                )
            os.truncate(file, min(length, actual_length))
        self.ranks.barrier()

    # ---- writing ---------------------------------------------------------------------------------

    def append(self, name: str, rows: list[dict]) -> None:
        """Append rows to the log called `name`."""
        if not self.ranks.is_main or not rows:
            return
        path = self.path / name
        length = path.stat().st_size if path.exists() else 0
        lines = "".join(json.dumps(json_safe(row), ensure_ascii=False) + "\n" for row in rows)
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(lines)
                sync(file)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(path, length)  # no half row stays
            raise self._cannot_write(path, error) from None
        if name == "metrics.jsonl" and self.mirror:
            self.mirror.add(rows)

    def _cannot_write(self, path: Path, error: Exception) -> UserError:
        """Return the error that ends the run if a file cannot be written."""
        free = shutil.disk_usage(self.path if self.path.exists() else ".").free
        reason = str(error).splitlines()[0]
        return UserError(
            f"cannot write {path}: {reason} ({free / 2**20:.0f} MB are free there); make room and "
            "continue from the last complete checkpoint with --resume."
        )

    def save(self, step: int, model, state: dict) -> None:
        """Write the checkpoint `step_N`, point `latest` to it, and remove the oldest ones."""
        if self.ranks.is_main:
            final = self.checkpoints / f"step_{step}"
            temporary = final.with_name(f".{final.name}.tmp")
            replaced = final.with_name(f".{final.name}.old")
            try:
                self._write_checkpoint(temporary, final, model, state)
                # The folder exists if it was damaged and the run resumed from an earlier one.
                if final.exists():
                    os.rename(final, replaced)
                os.rename(temporary, final)
                sync(self.checkpoints)
                self._link(final)
            # torch and safetensors raise their own errors if the disk is full.
            except (OSError, RuntimeError, SafetensorError) as error:
                shutil.rmtree(temporary, ignore_errors=True)
                raise self._cannot_write(final, error) from None
            shutil.rmtree(replaced, ignore_errors=True)
            self._prune()
        self.ranks.barrier()

    def _write_checkpoint(self, folder: Path, final: Path, model, state: dict) -> None:
        """Write a checkpoint to `folder` and force it to the disk; `final` is its later name."""
        shutil.rmtree(folder, ignore_errors=True)
        model.save_pretrained(folder, final=final)
        log_files = {name: self.path / name for name in LOGS}
        lengths = {name: file.stat().st_size for name, file in log_files.items() if file.exists()}
        torch.save(state | {"logs": lengths}, folder / STATE)

        paths = sorted(folder.rglob("*"))
        manifest = {
            str(path.relative_to(folder)): [path.stat().st_size, digest(path)]
            for path in paths
            if path.is_file()
        }
        write_json(folder / MANIFEST, manifest)
        for path in (*paths, folder):
            sync(path)

    def _link(self, checkpoint: Path) -> None:
        """Point `latest` to a checkpoint in one step, so that the link is never missing."""
        link = self.path / ".latest.tmp"
        link.unlink(missing_ok=True)
        link.symlink_to(Path("checkpoints") / checkpoint.name)
        os.replace(link, self.path / "latest")
        sync(self.path)

    def _prune(self) -> None:
        """Remove all but the newest `keep` checkpoints. If `keep` is 0, all stay."""
        for checkpoint in self._complete()[: -self.keep] if self.keep else []:
            # The folder is renamed first, so that half of a checkpoint never has its name.
            renamed = checkpoint.with_name(f".{checkpoint.name}.old")
            os.rename(checkpoint, renamed)
            shutil.rmtree(renamed, ignore_errors=True)

    def log_skipped(self, step: int, clips: list[dict]) -> None:
        """Log the clips that a step could not use, and print each with its reason."""
        self.append("skipped.jsonl", [{"step": step} | clip for clip in clips])
        for clip in clips:
            self.ranks.print0(f"\nskipped {printable(clip['id'])}: {printable(clip['reason'])}")
