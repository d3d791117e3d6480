"""The real commands, as a user calls them: one process and two, good input and bad,
and learning itself."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import forkserver
import pytest
import torch
from conftest import GOLDEN
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
MEDIA = GOLDEN / "media"
MODEL = GOLDEN / "humanomni"
# A random policy never says a label, so all its groups would be dead; these rewards differ within
# a group, so that every step moves the weights. A hook: executed in the process of the run
# before its script.
MOVING = """
import rewards
rewards.accuracy_reward = lambda text, answer: float(sum(map(ord, text)) % 3 == len(answer) % 3)
rewards.label_accuracy = lambda text, answer: float(sum(map(ord, text)) % 2)
"""
LABELS = {
    "wide.mp4": "happy",
    "tall_30fps.mp4": "sad",
    "short_5frames.mp4": "angry",
    "silent_no_track.mp4": "fear",
}


def write_rows(
    path: Path, targets: list[tuple[str, str]], asked: dict[str, str] | None = None
) -> Path:
    """A sample file of (clip, target) pairs; `asked`: clip -> its question."""
    question = lambda clip: asked[clip] if asked else "Which emotion?"
    path.write_text(
        json.dumps(
            [
                {
                    "video": clip,
                    "conversations": [
                        {"from": "human", "value": f"<video>\n<audio>\n{question(clip)}"},
                        {"from": "gpt", "value": target},
                    ],
                }
                for clip, target in targets
            ]
        )
    )
    return path


def under_torchrun(
    folder: Path, script: str, *flags, ranks: int = 2, launch=("--standalone",), hook: str = ""
) -> tuple:
    """Command and environment of a run on several ranks; `hook`, which `folder` keeps,
    is executed in each of them."""
    folder.mkdir(exist_ok=True)
    (folder / "hook.py").write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{hook}")
    # not in torchrun itself
    (folder / "sitecustomize.py").write_text("import os\nif 'RANK' in os.environ: import hook\n")
    env = dict(os.environ) | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)}
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *launch,
        f"--nproc_per_node={ranks}",
        str(ROOT / script),
        *map(str, flags),
    ], env


def call(
    script: str, *flags, ranks: int = 1, check: bool = True, hook: str = "", **how
) -> subprocess.CompletedProcess:
    """Run a script of the project; `ranks` > 1: under torchrun, as the README says."""
    if ranks == 1:
        done = forkserver.shared().run(script, *flags, hook=hook)
    else:
        with tempfile.TemporaryDirectory() as site:
            command, env = under_torchrun(Path(site), script, *flags, ranks=ranks, hook=hook, **how)
            done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    if check:
        assert done.returncode == 0, done.stderr[-3000:]
    return done


def grpo(out: Path, data: Path, *flags, model: Path = MODEL, **how) -> subprocess.CompletedProcess:
    return call(
        "grpo.py",
        "--model",
        model,
        "--data",
        data,
        "--media_root",
        MEDIA,
        "--out",
        out,
        "--max_new_tokens",
        8,
        "--num_generations",
        3,
        "--prompts_per_step",
        4,
        "--workers",
        1,
        *flags,
        **{"hook": MOVING} | how,
    )


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "latest" / "model.safetensors")


@pytest.fixture(scope="module")
def labels(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "labels.json", list(LABELS.items()))


@pytest.mark.parametrize("reuse", ["--update_epochs", "--num_minibatches"])
def test_two_processes_are_one_process(labels, tmp_path, reuse):
    """Stops: ranks that sample alike, local denominators, a gradient that is
    averaged instead of summed."""
    flags = ("--max_steps", 3, "--lr", 1e-3, reuse, 2)
    grpo(tmp_path / "one", labels, *flags)
    grpo(tmp_path / "two", labels, *flags, ranks=2)
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert [r["step"] for r in one] == [1, 2, 3]
    for name in (
        "reward",
        "reward_std",
        "loss",
        "kl",
        "entropy",
        "grad_norm",
        "num_tokens",
        "ratio/max",
        "completions/mean_length",
        "frac_reward_zero_std",
        "clip_ratio/high_mean",
    ):
        assert [r[name] for r in one] == pytest.approx(
            [r[name] for r in two], rel=2e-3, abs=2e-5
        ), name
    for name in ("loss", "grad_norm", "kl", "entropy"):  # one step: only the order of sums differs
        assert one[0][name] == pytest.approx(two[0][name], rel=1e-5, abs=1e-6), name
    # it learned, so there was something to compare
    assert one[0]["grad_norm"] > 0 and one[-1]["kl"] > 0
    a, b = weights(tmp_path / "one"), weights(tmp_path / "two")
    start = load_file(MODEL / "model.safetensors")
    moved = max(float((a[k] - start[k]).abs().max()) for k in a)
    apart = max(float((a[k] - b[k]).abs().max()) for k in a)
    assert moved > 1e-3 and apart < 0.05 * moved
    texts = [
        sorted(
            (r["step"], r["clip"], r["completion"], r["text"])
            for r in map(json.loads, (tmp_path / run / "rollouts.jsonl").read_text().splitlines())
        )
        for run in ("one", "two")
    ]
    assert texts[0] == texts[1]  # every completion, token for token


def test_run_folder_has_what_the_readme_promises(labels, tmp_path):
    """Stops: renamed files or metrics that users' plots rely on; eval rows missing at step 0 or at
    the end; dropout, another prompt or another temperature between sampling and training."""
    out = tmp_path / "run"
    grpo(
        out,
        labels,
        "--max_steps",
        3,
        "--save_every",
        2,
        "--eval_every",
        2,
        "--eval_data",
        labels,
        "--lr",
        1e-4,
    )
    rows = metrics(out)
    assert [r["step"] for r in rows] == [0, 1, 2, 3]
    assert [any(k.startswith("eval/") for k in r) for r in rows] == [True, False, True, True]
    assert {f"eval/labels/{key}" for key in ("war", "uar", "format_rate", "epc", "eea")} <= set(
        rows[0]
    )
    for name in (
        "reward",
        "reward_std",
        "rewards/accuracy/mean",
        "rewards/format/std",
        "frac_reward_zero_std",
        "kl",
        "entropy",
        "completions/mean_length",
        "completions/min_length",
        "completions/max_length",
        "completions/clipped_ratio",
        "unique_completions",
        "clip_ratio/low_mean",
        "ratio/mean",
        "ratio/max",
        "sampler_logp_diff/max",
        "grad_norm",
        "lr",
        "skipped_steps",
        "skipped_samples",
        "num_tokens",
        "tokens_per_second/generate",
        "tokens_per_second/train",
        "time/load",
        "time/encode",
        "time/generate",
        "time/reward",
        "time/train",
        "memory_gb",
        "epoch",
    ):
        assert isinstance(rows[1][name], int | float), name
    assert rows[1]["kl"] == 0.0 < rows[3]["kl"]
    for row in rows[1:]:  # one update per rollout: on policy, exactly
        assert row["ratio/mean"] == row["ratio/max"] == 1.0
        assert row["sampler_logp_diff/mean"] <= row["sampler_logp_diff/max"] < 1e-4
    rollouts = [json.loads(line) for line in (out / "rollouts.jsonl").read_text().splitlines()]
    assert len(rollouts) == 3 * 4 * 3
    assert {"step", "clip", "prompt", "text", "rewards", "advantage", "length", "finished"} <= set(
        rollouts[0]
    )
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step_2", "step_3"]
    assert (out / "latest").resolve().name == "step_3" and json.loads(
        (out / "config.json").read_text()
    )["lr"] == 1e-4
    call(
        "eval.py",
        "--model",
        out / "latest",
        "--data",
        labels,
        "--media_root",
        MEDIA,
        "--max_new_tokens",
        4,
        "--out",
        out / "e.json",
    )
    result = json.loads((out / "e.json").read_text())
    assert result["n"] == 4 and {p["id"] for p in result["predictions"]} == set(LABELS)
    assert {"war", "uar", "per_class"} <= set(result)


def test_bad_clips_are_skipped_counted_and_listed(tmp_path):
    """Stops: a crash on a bad file, or the reference's silent replacement by another sample;
    also an all-bad step."""
    media = tmp_path / "media"
    media.mkdir()
    for clip in LABELS:
        shutil.copy(MEDIA / clip, media)
    (media / "broken.mp4").write_bytes(b"no movie")
    data = write_rows(
        tmp_path / "rows.json",
        [*list(LABELS.items())[:3], ("broken.mp4", "sad"), ("missing.mp4", "sad")],
    )
    for ranks in (1, 2):  # with 2 ranks, one of them sometimes has nothing at all
        out = tmp_path / f"run{ranks}"
        grpo(
            out,
            data,
            "--media_root",
            media,
            "--max_steps",
            5,
            "--prompts_per_step",
            ranks,
            ranks=ranks,
        )
        skipped = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
        # each is met once an epoch
        assert metrics(out)[-1]["skipped_samples"] == len(skipped) == 2 * ranks
        assert {s["id"] for s in skipped} == {"broken.mp4", "missing.mp4"}
        assert all("broken.mp4" in s["reason"] or "no such file" in s["reason"] for s in skipped)
        rollouts = [json.loads(line) for line in (out / "rollouts.jsonl").read_text().splitlines()]
        assert {r["clip"] for r in rollouts} == set(list(LABELS)[:3])
    single = metrics(tmp_path / "run1")
    assert single[-1]["skipped_steps"] == 2  # alone in its step, a bad clip leaves nothing to learn
    done = call(
        "eval.py",
        "--model",
        MODEL,
        "--data",
        data,
        "--media_root",
        media,
        "--max_new_tokens",
        2,
        "--out",
        tmp_path / "e.json",
    )
    result = json.loads((tmp_path / "e.json").read_text())
    assert (
        result["n"] == 3 and len(result["skipped"]) == 2 and "2 clips were left out" in done.stdout
    )


def test_eval_scores_every_sample_once_on_two_ranks(tmp_path):
    """Stops: padding the last batch with repeated samples, which a distributed sampler does,
    and counting them."""
    # 5 over 2 ranks
    data = write_rows(tmp_path / "rows.json", [*LABELS.items(), ("wide.mp4", "sad")])
    for ranks in (1, 2):
        call(
            "eval.py",
            "--model",
            MODEL,
            "--data",
            data,
            "--media_root",
            MEDIA,
            "--max_new_tokens",
            6,
            "--batch_size",
            2,
            "--out",
            tmp_path / f"{ranks}.json",
            ranks=ranks,
        )
    one, two = (json.loads((tmp_path / f"{r}.json").read_text()) for r in (1, 2))
    assert one["predictions"] == two["predictions"] and [
        p["index"] for p in two["predictions"]
    ] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "flags,words",
    [
        (["--num_generations", 1], ["--num_generations 1", "2 or more"]),
        (["--top_p", 0.9], ["--top_p", "full distribution"]),
        (["--no_such_flag", 1], ["unrecognized arguments: --no_such_flag"]),
        (["--model", "nowhere/at/all"], ["nowhere/at/all", "no such folder"]),
        (["--data", "nothing.json"], ["nothing.json"]),
        (["--train", "decoder", "wings"], ["wings", "projectors"]),
        (["--feature_cache", "x", "--train", "vision"], ["--feature_cache"]),
    ],
)
def test_user_errors_are_one_sentence(flags, words, labels, tmp_path):
    """Stops: a traceback where the user can mend the cause, and an exit code of 0."""
    done = grpo(tmp_path / "run", labels, *flags, check=False)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


def test_compiling_reaches_its_code(labels, tmp_path):
    """Stops COMPILE_LAYERS being set and forgotten."""
    hook = (
        "import model, training\nfrom lib.args import UserError\n"
        "def compile_layers(self): raise UserError('compiling')\n"
        "model.HumanOmni.compile_layers = compile_layers\ntraining.COMPILE_LAYERS = True\n"
    )
    place = ("--model", MODEL, "--out", tmp_path / "run", "--max_steps", 1, "--workers", 0)
    for script in ("grpo.py", "sft.py"):
        data = ("--data", labels, "--media_root", MEDIA)
        done = call(script, *place, *data, hook=hook, check=False)
        assert done.returncode == 1 and done.stderr.strip() == "error: compiling"


def test_labels_outside_the_vocabulary_are_refused_by_name(tmp_path):
    """Stops: training on a typing error."""
    data = write_rows(tmp_path / "rows.json", [("wide.mp4", "hapy")])
    done = grpo(tmp_path / "run", data, check=False)
    assert done.returncode == 1 and "hapy" in done.stderr and "--allow_labels" in done.stderr
    grpo(tmp_path / "run", data, "--allow_labels", "--max_steps", 1, "--prompts_per_step", 1)


def test_a_used_run_folder_is_not_overwritten_by_accident(labels, tmp_path):
    """Stops: the loss of a finished run to a repeated command line."""
    out = tmp_path / "run"
    grpo(out, labels, "--max_steps", 1)
    kept = (out / "metrics.jsonl").read_text()
    done = grpo(out, labels, "--max_steps", 1, check=False)
    assert (
        done.returncode == 1
        and "--resume" in done.stderr
        and (out / "metrics.jsonl").read_text() == kept
    )
    grpo(out, labels, "--max_steps", 2, "--overwrite")
    assert [r["step"] for r in metrics(out)] == [1, 2]


def test_outputs_are_checked_before_anything_is_loaded(labels, tmp_path):
    """Stops: a traceback after minutes of loading, or a run that is mixed into, or replaces,
    a folder that is no run."""
    (tmp_path / "file").write_text("")
    shutil.copytree(MODEL, tmp_path / "checkpoint")
    for name in ("thesis", "logged"):
        (tmp_path / name).mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("kept")
    (tmp_path / "logged" / "train.log").write_text("")  # `... | tee OUT/train.log`
    told = {
        ("--out", "file"): ["cannot write", "it is no folder; give --out a folder"],
        ("--out", "file/run"): ["cannot write", "Not a directory; give --out a folder"],
        ("--feature_cache", "file"): ["it is no folder; give --feature_cache"],
        ("--out", "thesis"): ["holds other things and no run (chapter.tex)"],
        ("--out", "thesis", "--overwrite"): ["holds other things"],
        ("--out", "thesis", "--resume"): ["holds other things"],
        ("--out", "checkpoint", "--overwrite"): [
            "holds other things and no run (added_tokens.json, config.json,"
        ],
        ("--out", "logged"): ["cannot find config.json of nowhere/at/all"],
    }
    for (
        flag,
        name,
        *more,
    ), words in told.items():  # a model that is not there would be told of otherwise
        done = grpo(
            tmp_path / "run",
            labels,
            flag,
            tmp_path / name,
            *more,
            model=Path("nowhere/at/all"),
            check=False,
        )
        assert (
            done.returncode == 1
            and "Traceback" not in done.stderr
            and "\n" not in done.stderr.strip()
        )
        assert all(word in done.stderr for word in words), done.stderr
    assert not (tmp_path / "run").exists() and [
        p.name for p in (tmp_path / "thesis").iterdir()
    ] == ["chapter.tex"]
    assert (tmp_path / "checkpoint" / "config.json").read_bytes() == (
        MODEL / "config.json"
    ).read_bytes()


def test_a_start_that_is_a_link_is_recorded(labels, tmp_path):
    """Stops: a finished run of which nobody can tell what it started from,
    because `latest` points elsewhere by now."""
    start, out = tmp_path / "start", tmp_path / "run"
    for folder in ("humanomni", "siglip", "whisper", "bert"):
        shutil.copytree(GOLDEN / folder, start / folder)
    (start / "latest").symlink_to("humanomni")
    grpo(out, labels, "--max_steps", 1, model=start / "latest")
    config = json.loads((out / "config.json").read_text())
    assert (config["model"], config["model_resolved"]) == (
        str(start / "latest"),
        str(start / "humanomni"),
    )
    start.rename(tmp_path / "moved")  # a place is no fault, if the weights are the same
    start.symlink_to("moved")
    grpo(out, labels, "--max_steps", 1, "--resume", model=start / "latest")
    assert json.loads((out / "config.json").read_text())["model_resolved"] == str(
        tmp_path / "moved" / "humanomni"
    )


def test_feature_cache_changes_nothing_but_the_work(labels, tmp_path):
    """Stops: stale or mixed-up features; a second epoch that sees other numbers than the first."""
    flags = ("--max_steps", 2, "--lr", 1e-3, "--feature_cache", tmp_path / "features")
    grpo(tmp_path / "first", labels, *flags)
    files = list((tmp_path / "features").glob("*/*.safetensors"))
    assert len(files) == 8  # 4 clips, video and audio each
    stamps = {f: f.stat().st_mtime_ns for f in files}
    grpo(tmp_path / "second", labels, *flags)
    assert {f: f.stat().st_mtime_ns for f in files} == stamps  # nothing was encoded again
    a, b = weights(tmp_path / "first"), weights(tmp_path / "second")
    assert all(torch.equal(a[k], b[k]) for k in a)
    # Every clip is known: whoever opens one now, or runs a tower, ends the run.
    # All three scripts use the folder.
    forbid = (
        "import lib.media, model\n"
        "lib.media.read_clip = model.HumanOmni.encode_video = "
        "model.HumanOmni.encode_audio = None\n"
    )
    place = ("--model", MODEL, "--data", labels, "--media_root", MEDIA, "--workers", 0)
    cached = ("--feature_cache", tmp_path / "features")
    short = ("--max_steps", 2, "--max_new_tokens", 3, "--num_generations", 2)
    for script, more in (
        ("grpo.py", ("--out", tmp_path / "g", *short)),
        ("sft.py", ("--out", tmp_path / "s", *short[:2])),
        ("eval.py", ("--out", tmp_path / "e.json", *short[2:4])),
    ):
        call(script, *place, *cached, *more, hook=forbid)
    # it does forbid
    assert call("eval.py", *place, *short[2:4], hook=forbid, check=False).returncode == 1


def test_sft_then_grpo_learn_a_small_task(tmp_path):
    """Stops: any fault of sign, mask, shift or seed in the real loop: it would not learn.

    The cold start teaches the form and random words; only the reward says which word belongs to
    which question.
    """
    words = ["happy", "sad", "angry", "fear"]
    asked = {"wide.mp4": "first", "tall_30fps.mp4": "second"}
    cold = [
        (clip, f"<think>{word[0]}</think>\n<answer>{word}</answer>")
        for clip in asked
        for word in words
    ]
    data = write_rows(tmp_path / "cold.json", cold, asked)
    call(
        "sft.py",
        "--model",
        MODEL,
        "--data",
        data,
        "--media_root",
        MEDIA,
        "--out",
        tmp_path / "sft",
        "--max_steps",
        60,
        "--lr",
        2e-3,
        "--batch_size",
        16,
        "--micro_batch",
        16,
        "--feature_cache",
        tmp_path / "features",
        "--workers",
        0,
    )
    data = write_rows(tmp_path / "rl.json", [(clip, LABELS[clip]) for clip in asked], asked)
    grpo(
        tmp_path / "rl",
        data,
        "--model",
        tmp_path / "sft" / "latest",
        "--max_steps",
        50,
        "--num_generations",
        16,
        "--lr",
        1e-4,
        "--schedule",
        "constant",
        "--max_new_tokens",
        24,
        "--beta",
        0.02,
        "--feature_cache",
        tmp_path / "features",
        "--workers",
        0,
        hook="",
    )
    rows = metrics(tmp_path / "rl")
    accuracy, form = ([r[f"rewards/{name}/mean"] for r in rows] for name in ("accuracy", "format"))
    assert accuracy[0] < 0.3 and form[0] > 0.8  # the form is there, the word is a guess among four
    assert sum(accuracy[-5:]) / 5 > 0.9 and sum(form[-5:]) / 5 > 0.9


def test_grpo_on_bare_words_with_missing_modalities(labels, tmp_path):
    """Stops `--prompt label` asking or paying for reasoning; `--question`,
    `--choices` and `--mute` and `--blank` being ignored."""
    (tmp_path / "question.txt").write_text("How does it feel?")
    flags = (
        "--prompt",
        "label",
        "--question",
        tmp_path / "question.txt",
        "--choices",
        "happy",
        "sad",
        "--seed",
        4,
    )
    out = tmp_path / "run"
    grpo(out, labels, *flags, "--mute", 0.5, "--blank", 0.5, "--max_steps", 3)
    rows = [json.loads(line) for line in (out / "rollouts.jsonl").read_text().splitlines()]
    assert len(rows) == 3 * 4 * 3
    assert {r["prompt"] for r in rows} == {
        f"How does it feel?\n{words}" for words in ("happy, sad", "sad, happy")
    }
    for r in rows:
        text = r["text"]
        assert r["rewards"] == {
            "accuracy": float(sum(map(ord, text)) % 2),
            "format": float(text.strip().isalpha()),
        }
    # One prompt for a whole group; and without their picture or sound the
    # clips are answered otherwise.
    groups = {}
    for r in rows:
        groups.setdefault((r["step"], r["clip"]), set()).add(r["prompt"])
    assert all(len(prompts) == 1 for prompts in groups.values())
    plain = tmp_path / "plain"
    grpo(plain, labels, *flags, "--max_steps", 1)
    texts = {
        name: [
            json.loads(line)["text"]
            for line in (tmp_path / name / "rollouts.jsonl").read_text().splitlines()[:12]
        ]
        for name in ("run", "plain")
    }
    assert texts["run"] != texts["plain"]
    bad = grpo(tmp_path / "bad", labels, "--mute", 0.7, "--blank", 0.7, check=False)
    assert bad.returncode == 1 and "--mute" in bad.stderr and "Traceback" not in bad.stderr
