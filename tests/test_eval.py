"""eval.py as a user calls it: views, prompts, sound files, result files,
flags that have no meaning together."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from conftest import GOLDEN

import eval as eval_script
import grpo
from data import CHOICES, THINK, PromptSpec
from lib import protocol
from lib.args import UserError, parse_args

MODEL, MEDIA = GOLDEN / "humanomni", GOLDEN / "media"
LABELS = {"wide.mp4": "happy", "tall_30fps.mp4": "sad", "short_5frames.mp4": "calm"}


def write_rows(
    path: Path, labels: dict[str, str] = LABELS, question: str = "Which emotion?", dataset: str = ""
) -> Path:
    path.write_text(
        json.dumps(
            [
                {
                    "video": str(MEDIA / clip),
                    "dataset": dataset,
                    "conversations": [
                        {"from": "human", "value": f"<video>\n<audio>\n{question}"},
                        {"from": "gpt", "value": label},
                    ],
                }
                for clip, label in labels.items()
            ]
        )
    )
    return path


def run(*flags) -> None:
    """eval.py with these flags, in this process."""
    eval_script.main(parse_args(eval_script.Args, [str(flag) for flag in flags]))


@pytest.fixture
def score(tmp_path):
    """score(rows, *flags) -> the result file."""

    def call(rows: Path, *flags) -> dict:
        run(
            "--model",
            MODEL,
            "--data",
            rows,
            "--max_new_tokens",
            6,
            "--workers",
            0,
            "--device",
            "cpu",
            "--out",
            tmp_path / "new" / "result.json",
            *flags,
        )
        return json.loads((tmp_path / "new" / "result.json").read_text())

    return call


def texts(result: dict) -> list[str]:
    return [p["text"] for p in result["predictions"]]


@pytest.fixture
def inputs_for_answers(monkeypatch):
    """The model's inputs in place of its answers: the golden one hardly listens,
    so a lost flag would not show in words."""

    def told(model, processor, batch, max_new_tokens, cache=None) -> list[str]:
        means = {name: x.double().mean().item() for name, x in batch.media.items()}
        return [f"<answer>{ids} {means}</answer>" for ids in batch.input_ids]

    monkeypatch.setattr(eval_script, "answer", told)


@pytest.fixture
def wav(tmp_path) -> Path:
    rate = 16_000
    soundfile.write(
        tmp_path / "voice.wav", 0.3 * np.sin(np.arange(2 * rate) * 0.1).astype(np.float32), rate
    )
    return tmp_path / "voice.wav"


# ------------------------------------------------------------------------------------------------
# One sample file
# ------------------------------------------------------------------------------------------------


def test_result_file(score, tmp_path, capsys):
    """Stops: fields that users and --table rely on missing,
    and the paper's numbers not shown for a real set."""
    result = score(write_rows(tmp_path / "rows.json", dataset="ravdess"))
    assert {
        "model",
        "data",
        "dataset",
        "view",
        "war",
        "uar",
        "war_normalised",
        "uar_normalised",
        "war_ci",
        "uar_ci",
        "n",
        "war_normalised_ci",
        "uar_normalised_ci",
        "per_class",
        "confusion",
        "format_rate",
        "unparsable_rate",
        "out_of_vocabulary_rate",
        "unmatched",
        "readings",
        "skipped",
        "notes",
        "predictions",
        "epc",
        "eea",
        "fcr",
        "epc_ci",
        "eea_ci",
        "fcr_ci",
        "unconcluded_rate",
        "right_without_reason",
        "claims_seen",
        "claims_heard",
    } == set(result)
    assert result["dataset"] == "ravdess" and result["n"] == 3 and protocol.is_result(result)
    assert [p["answer"] for p in result["predictions"]] == list(LABELS.values())
    shown = capsys.readouterr().out
    assert (
        "R1-Omni 43.00/44.69" in shown
        and "calm counted as neutral: WAR/UAR" in shown
        and "95 % intervals" in shown
    )
    score(write_rows(tmp_path / "rows.json", {"wide.mp4": "happy"}, dataset="toy_dfew"))
    assert "paper" not in capsys.readouterr().out


def test_views_reach_the_model(score, model, processor, tmp_path, inputs_for_answers):
    """Stops: a flag of the view that eval reads and then forgets."""
    rows = write_rows(tmp_path / "rows.json")
    (tmp_path / "question.txt").write_text("Is anybody there?\n")
    cases = {
        "": PromptSpec(),
        "--prompt label": PromptSpec(prompt="label"),
        "--modal video": PromptSpec(modal="video"),
        "--modal audio": PromptSpec(modal="audio"),
        "--mute": PromptSpec(mute=1.0),
        "--blank": PromptSpec(blank=1.0),
        "--choices dfew": PromptSpec(choices=CHOICES["dfew"]),
        "--seed 3": PromptSpec(seed=3),
        f"--question {tmp_path / 'question.txt'}": PromptSpec(question="Is anybody there?"),
    }
    samples, ranks = eval_script.read_samples(rows), eval_script.start_ranks("cpu")
    said = {}
    for line, view in cases.items():
        result = score(rows, *line.split())
        by_hand = eval_script.evaluate(model, processor, samples, ranks, spec=view, workers=0)
        assert (
            result["predictions"] == by_hand["predictions"]
            and result["war_ci"] == by_hand["war_ci"]
        ), line
        assert result["view"] == json.loads(json.dumps(vars(view))), line
        said[line] = tuple(texts(result))
    assert said.pop("--seed 3") == said[""] and len(set(said.values())) == len(said)


def test_what_counts_as_the_answer(score, tmp_path):
    """Stops: bare words looked for between tags, and text without tags taken for an answer."""
    thinking, bare = (
        score(write_rows(tmp_path / "rows.json"), "--prompt", prompt)
        for prompt in ("think", "label")
    )
    assert [p["predicted"] for p in bare["predictions"]] == [t.strip() or None for t in texts(bare)]
    assert [p["predicted"] for p in thinking["predictions"]] == [None] * 3 and thinking[
        "unparsable_rate"
    ] == 100.0


def test_what_is_asked_is_what_the_flags_say(score, tmp_path):
    """Stops: a question from a file that is asked beside the row's own,
    or a list of choices in another form."""
    (tmp_path / "question.txt").write_text("Is anybody there?")
    flagged = score(
        write_rows(tmp_path / "a.json"),
        "--question",
        tmp_path / "question.txt",
        "--choices",
        "happy",
        "sad",
    )
    asked = "Is anybody there?\nhappy, sad" + THINK
    assert texts(flagged) == texts(score(write_rows(tmp_path / "b.json", question=asked)))


def test_labels_outside_the_choices_are_named(score, tmp_path, capsys):
    """Stops: a candidate list that lacks a class of the data set, unnoticed."""
    score(write_rows(tmp_path / "rows.json"), "--choices", "ravdess")
    assert "outside --choices" not in capsys.readouterr().err
    score(write_rows(tmp_path / "rows.json"), "--choices", "happy", "sad")
    assert (
        "these labels are not in --choices, so only an exact match is correct: calm"
        in capsys.readouterr().err
    )


def test_a_sound_file_is_a_clip_without_picture(score, wav, tmp_path, capsys):
    """Stops: an audio-only row asked about a video that it lacks, scored with --modal video,
    or ending the run."""
    shutil.copy(MEDIA / "wide.mp4", tmp_path / "wide.mp4")
    rows = write_rows(tmp_path / "rows.json", {str(wav): "sad", "wide.mp4": "happy"})
    result = score(rows)
    assert result["n"] == 2 and texts(result)[:1] == texts(score(rows, "--modal", "audio"))[:1]
    lost = score(rows, "--modal", "video")
    assert (
        lost["n"] == 1
        and lost["skipped"][0]["id"] == str(wav)
        and "no video" in lost["skipped"][0]["reason"]
    )
    capsys.readouterr()
    run(
        "--model",
        MODEL,
        "--clip",
        wav,
        "--max_new_tokens",
        6,
        "--device",
        "cpu",
        "--question",
        write_question(tmp_path),
    )
    assert capsys.readouterr().out == texts(result)[0] + "\n"


def write_question(folder: Path) -> Path:
    (folder / "asked.txt").write_text("Which emotion?")
    return folder / "asked.txt"


def test_the_answer_to_one_clip(tmp_path, capsys):
    """Stops: --out or --modal ignored with --clip, an answer of bare words looked for between tags,
    a traceback for a bad clip."""
    out, said = tmp_path / "new" / "answer.json", set()
    for prompt, modal in (
        ("think", "video_audio"),
        ("label", "video_audio"),
        ("think", "video"),
        ("think", "audio"),
    ):
        run(
            "--model",
            MODEL,
            "--clip",
            MEDIA / "wide.mp4",
            "--max_new_tokens",
            9,
            "--device",
            "cpu",
            "--prompt",
            prompt,
            "--modal",
            modal,
            "--out",
            out,
        )
        got = json.loads(out.read_text())
        text = capsys.readouterr().out.removesuffix("\n")
        assert got == {
            "clip": str(MEDIA / "wide.mp4"),
            "text": text,
            "predicted": text.strip() if prompt == "label" else None,
        }
        said.add(text)
    assert len(said) == 3  # the golden model answers both prompts alike
    with pytest.raises(UserError, match=r"none\.mp4: no such file$"):
        run("--model", MODEL, "--clip", MEDIA / "none.mp4", "--device", "cpu")


def test_modalities_are_the_five_runs(score, tmp_path, capsys, monkeypatch, inputs_for_answers):
    """Stops: a setting that is another one under its name, a model loaded five times,
    and results that are not kept."""
    rows = write_rows(tmp_path / "rows.json")
    lines = {
        "full": "",
        "video": "--modal video",
        "audio": "--modal audio",
        "mute": "--mute",
        "blank": "--blank",
    }
    alone = {name: score(rows, "--prompt", "label", *line.split()) for name, line in lines.items()}
    loaded, load = [], eval_script.HumanOmni.from_pretrained
    monkeypatch.setattr(
        eval_script.HumanOmni, "from_pretrained", lambda *a, **k: loaded.append(1) or load(*a, **k)
    )
    capsys.readouterr()
    result = score(rows, "--prompt", "label", "--modalities")
    assert (
        len(loaded) == 1
        and list(result["modalities"]) == list(lines)
        and not protocol.is_result(result)
    )
    for name, kept in result["modalities"].items():
        assert (
            kept["predictions"] == alone[name]["predictions"]
            and kept["view"] == alone[name]["view"]
        ), name
    assert len({tuple(texts(kept)) for kept in result["modalities"].values()}) == 5
    assert capsys.readouterr().out == protocol.modality_table(alone) + "\n"


def test_modalities_with_a_cache(score, tmp_path):
    """Stops: grey frames or silence answered from what the cache holds of the clip itself."""
    rows = write_rows(tmp_path / "rows.json", {"wide.mp4": "happy"})
    flags = ("--modalities", "--feature_cache", tmp_path / "cache")
    first, second = score(rows, *flags), score(rows, *flags)
    for name, kept in first["modalities"].items():
        assert texts(kept) == texts(second["modalities"][name]), name
    # frames, sound, grey, silence
    assert len(list((tmp_path / "cache").glob("*/*.safetensors"))) == 4


def test_the_seed_is_the_bootstraps(score, tmp_path, monkeypatch):
    """Stops: a --seed without effect. By the sum of the resamples:
    the interval of three clips is always the same."""
    monkeypatch.setattr(
        eval_script,
        "answer",
        lambda model, p, batch, *rest: ["<answer>happy</answer>"] * len(batch),
    )
    monkeypatch.setattr(
        protocol, "intervals", lambda values: [[x, x] for x in values.sum(0).tolist()]
    )
    rows = write_rows(tmp_path / "rows.json")
    one, again, other = (score(rows, "--seed", seed) for seed in (0, 0, 3))
    assert one["war_ci"] == again["war_ci"] != other["war_ci"] and one["war"] == other[
        "war"
    ] == pytest.approx(100 / 3)


def test_no_scored_clip_is_no_result(score, model, processor, tmp_path, capsys):
    """Stops: WAR 0.00 on 0 clips, exit 0 and a result file, for a wrong --media_root."""
    rows = write_rows(tmp_path / "rows.json", {"gone.mp4": "sad", "lost.mp4": "happy"})
    rows.write_text(rows.read_text().replace(f"{MEDIA}/", ""))
    with pytest.raises(UserError) as error:
        score(rows, "--media_root", tmp_path / "typo")
    assert str(error.value) == (
        f"{rows}: none of its 2 clips can be read. The first is gone.mp4: "
        f"{tmp_path}/typo/gone.mp4: no such file. Set --media_root to the folder of the clips."
    )
    assert not (tmp_path / "new").exists() and not capsys.readouterr().out
    run = SimpleNamespace(
        model=model,
        processor=processor,
        spec=PromptSpec(),
        cache=None,
        eval_sets={"val": eval_script.read_samples(rows)},
    )
    with pytest.raises(UserError, match=r"^--eval_data val: none of its 2 clips .* gone\.mp4"):
        grpo.evaluate_all(
            run,
            SimpleNamespace(max_new_tokens=4, workers=0),
            eval_script.start_ranks("cpu"),
        )


@pytest.mark.parametrize(
    "out, words",
    [
        ("", "it is a folder or a device, not a file"),
        ("rows.json/a.json", "Not a directory"),
        ("rows.json/b/a.json", "Not a"),
        ("link/a.json", "No such file"),
        ("a" * 300, "File name too long"),
        ("/dev/null", "it is a folder or a device"),
        ("/proc/a.json", ""),
    ],
)
def test_out_is_tried_before_the_work(out, words, tmp_path):
    """Stops: an evaluation of hours whose result cannot be written;
    what was made for the trial must not stay."""
    rows = write_rows(tmp_path / "rows.json")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for job in (("--data", rows), ("--clip", MEDIA / "wide.mp4")):
        with pytest.raises(
            UserError, match=f"^cannot write {tmp_path / out}: .*{words}.*; name a file in a folder"
        ):
            run("--model", "never loaded", *job, "--out", tmp_path / out)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["link", "rows.json"]


REASONED = "<think>a</think><answer>sad</answer>"


@pytest.mark.parametrize(
    "texts, flag, told",
    [
        (
            ("Sad", "Sad", "who?"),
            "think",
            "67 % of the answers are bare words, as of a label model, which was not asked",
        ),
        (
            (REASONED, REASONED, "who?"),
            "label",
            "67 % of the answers are reasoning and answer in tags, which was not asked for",
        ),
        (("Sad", "Sad", "who?"), "label", None),
        ((REASONED, REASONED, "who?"), "think", None),
        (("mumble",) * 3, "think", None),
        (("Sad", "Sad", REASONED), "think", None),
    ],
)
def test_the_other_prompt_is_named(texts, flag, told, score, tmp_path, monkeypatch, capsys):
    """Stops: a label model asked to reason, or the reverse, that scores 0.00 without a hint;
    hints where all is well."""
    monkeypatch.setattr(eval_script, "answer", lambda *_: list(texts))
    for more in ((), ("--modalities",)):
        score(write_rows(tmp_path / "rows.json"), "--prompt", flag, *more)
        printed = capsys.readouterr().out
        assert told in printed if told else "give --prompt" not in printed


# ------------------------------------------------------------------------------------------------
# Flags
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line, words",
    [
        ("", "exactly one of --data, --clip, --compare, --folds, --table; there is none"),
        ("--model m", "there is none"),
        ("--table", "there is none"),
        ("--model m --data d --clip c", "--data and --clip are too many"),
        ("--compare a b --folds a b", "--compare and --folds are too many"),
        ("--data d", "--data needs --model"),
        ("--clip c", "--clip needs --model"),
        ("--compare a", "takes two result files, not 1"),
        ("--compare a b c", "takes two result files, not 3"),
        ("--folds a", "two or more different result files"),
        ("--compare a b --model m", "--model: has no meaning with --compare"),
        ("--table a --out t.json --mute", "--mute, --out: has no meaning with --table"),
        ("--model m --clip c --limit 3", "--limit: has no meaning with --clip"),
        ("--model m --clip c --modalities", "--modalities: has no meaning with --clip"),
        ("--model m --data d --mute --modal video", "--mute with --modal video"),
        ("--model m --data d --blank --modal audio", "--blank with --modal audio"),
        ("--model m --data d --modalities --mute", "--modalities evaluates every setting"),
        ("--model m --data d --modalities --modal audio", "--modalities evaluates every setting"),
        ("--model m --data d --choices happy", "--choices happy: give at least two"),
        ("--model m --data d --question none.txt", "--question none.txt"),
        ("--model m --data d --seed -1", "--seed must be 0 or more"),
        ("--model m --data d --limit -1", "--limit must be 0 or more"),
        ("--model m --data d --batch_size 0", "--batch_size must be 1 or more"),
    ],
)
def test_flags_without_a_meaning_are_refused(line, words):
    """Stops: a flag that is read and silently does nothing,
    and hours of a run that answers another question."""
    with pytest.raises(UserError) as error:
        run(*line.split())
    assert words in str(error.value)


def test_flags_with_a_meaning_are_not_refused():
    """Stops: a check that knows too few combinations: silence and grey at once is
    the prior of the prompt."""
    for line, job in (
        ("--model m --data d --mute --blank", "data"),
        ("--model m --data d --mute --modal audio", "data"),
        ("--model m --clip c --blank --prompt label --choices mafw --out o --seed 3", "clip"),
        ("--compare a b --seed 3", "compare"),
        ("--folds a b", "folds"),
        ("--table a", "table"),
        (
            "--model m --data d --modalities --choices a b --limit 3 --batch_size 2 --workers 1",
            "data",
        ),
    ):
        assert eval_script.mode_of(parse_args(eval_script.Args, line.split())) == job


def test_result_files_need_no_model(score, tmp_path, capsys):
    """Stops: --compare, --folds and --table that cannot read what --out wrote."""
    for k in (1, 2):
        score(
            write_rows(
                tmp_path / "rows.json", {list(LABELS)[k]: "sad"}, dataset=f"dfew/fold{k}/test"
            )
        )
        (tmp_path / "r1_omni").mkdir(exist_ok=True)
        shutil.move(tmp_path / "new" / "result.json", tmp_path / "r1_omni" / f"{k}.json")
    capsys.readouterr()
    one, two = (tmp_path / "r1_omni" / f"{k}.json" for k in (1, 2))
    run("--compare", one, one)
    assert "p = 1" in capsys.readouterr().out
    run("--folds", one, two)
    assert capsys.readouterr().out == protocol.folds([str(one), str(two)]) + "\n"
    run("--table", tmp_path / "r1_omni")
    assert "| r1_omni | 0.00/0.00 (paper 65.83/56.27) |" in capsys.readouterr().out


def test_reasoning_is_measured_for_every_result(score, tmp_path, monkeypatch, capsys):
    """Stops: a result that is right about words and silent about reasons;
    cues or subtitles of a row that nobody asks."""
    rows = json.loads(Path(write_rows(tmp_path / "rows.json")).read_text())
    for row in rows:
        row |= {
            "cues": {"seen": {"lips": "open"}, "heard": {"pitch": "low"}},
            "transcript": "leave me alone",
        }
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    said = '<think>Lips open. The voice says "leave me". She is sad.</think><answer>happy</answer>'
    monkeypatch.setattr(
        eval_script, "answer", lambda model, processor, batch, *rest: [said] * len(batch)
    )
    result = score(tmp_path / "rows.json")
    assert [p["concluded"] for p in result["predictions"]] == ["sad"] * 3
    sad, happy = (
        100 * sum(label == word for label in LABELS.values()) / 3 for word in ("sad", "happy")
    )
    assert (result["epc"], result["eea"], result["war"], result["fcr"]) == pytest.approx(
        (0, sad, happy, 0)
    )
    assert (result["cue_recall"], result["cue_precision"], result["cues_heard_claimed"]) == (
        50,
        100,
        0,
    )
    assert result["claims_seen"] == result["claims_heard"] == 100 and result[
        "quote_error"
    ] == pytest.approx(100 / 3)
    shown = capsys.readouterr().out
    assert (
        "EPC 0.00 [0.00, 0.00]" in shown and "word error rate of quoted subtitles 33.33 %" in shown
    )
    assert score(tmp_path / "rows.json", "--prompt", "label")["epc"] is None


def test_bare_words_have_their_own_form():
    """Stops: label-only models said to lack a form that nobody asked them for."""
    assert [eval_script.has_format(t, "label") for t in ("Happy", "I think it is sad")] == [
        1.0,
        0.0,
    ]
    assert [
        eval_script.has_format(t, "think") for t in ("Happy", "<think>a</think><answer>b</answer>")
    ] == [0.0, 1.0]
