"""Comparisons of runs: which runs are one arm, paired figures, and what the words say."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from mel_lite.errors import ConfigError
from mel_lite.report import figures
from mel_lite.report.arms import group, read_arms
from mel_lite.report.charts import LIGHT
from mel_lite.report.compare import charts, compare
from mel_lite.report.comparison_page import comparison_table, write_comparison
from mel_lite.report.runs import read_run
from run_folders import evaluation, make_run, metrics

BEFORE = [0, 1, 2, 3] * 10
WORSE = [1, 1, 2, 3] * 10
"""0.4375 on average, of four samples."""
BETTER = [2, 2, 3, 4] * 10
"""0.6875 on average."""


def arms_of(folder: Path, seeds: int = 2, **changes: list[int]) -> list[Path]:
    """Runs of GRPO, which end WORSE, and of MEL, which end BETTER, with the same seeds."""
    return [
        make_run(
            folder / f"{arm}-{seed}", before=BEFORE, after=changes.get(arm, after), lessons=0, algorithm=arm, seed=seed
        )
        for arm, after in (("grpo", WORSE), ("mel", BETTER))
        for seed in range(seeds)
    ]


def test_runs_that_differ_in_their_seed_are_one_arm(tmp_path: Path) -> None:
    arms = read_arms(list(reversed(arms_of(tmp_path, seeds=3))))
    assert [(arm.name, arm.seeds) for arm in arms] == [("mel", [0, 1, 2]), ("grpo", [0, 1, 2])]
    planned = {"max_cache_tokens": 512, "max_micro_batch_tokens": 64, "gradient_checkpointing": True}
    again = make_run(tmp_path / "again", lessons=0, algorithm="mel", seed=3, **planned)
    (arm,) = group([read_run(tmp_path / "mel-0"), read_run(again)])
    assert arm.seeds == [0, 3], "what is planned for the free memory makes no other arm"
    other = make_run(tmp_path / "tenth", lessons=0, algorithm="mel", seed=0, mel_weight=0.1)
    names = [arm.name for arm in group([read_run(tmp_path / "grpo-0"), read_run(tmp_path / "mel-0"), read_run(other)])]
    assert names == ["grpo", "mel", "mel, mel_weight=0.1"]


def test_the_difference_is_paired_by_task_and_seed(tmp_path: Path) -> None:
    found = compare(read_arms(arms_of(tmp_path)))
    grpo, mel = found.arms
    assert (found.tasks, found.samples, grpo.difference) == (40, 4, {}) and mel.folders[0].endswith("mel-0")
    assert (grpo.after["avg_at_k"].value, mel.after["avg_at_k"].value) == (0.4375, 0.6875)
    lead = mel.difference["avg_at_k"]
    assert lead.value == pytest.approx(0.25), "every task gains one sample of four"
    assert (mel.paired_seeds, mel.seeds_ahead) == (2, 2)
    assert found.conclusions == (
        f"mel ends 25.0 points [{100 * lead.low:+.1f}, {100 * lead.high:+.1f}] above grpo in Avg@4. It is ahead on 2 "
        "of 2 seeds.",
    )
    assert [limit for limit in found.limits if "2 seeds per arm" in limit] == list(found.limits)


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("name", ["mel", "an-arm-whose-name-is-long"])
def test_the_table_is_whole_at_any_width(tmp_path: Path, width: int, name: str) -> None:
    found = compare(read_arms(arms_of(tmp_path)))
    found = replace(found, arms=(found.arms[0], replace(found.arms[1], name=name)))
    screen = Console(width=width, file=io.StringIO())
    screen.print(comparison_table(found, screen.width))
    text = screen.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in text and max(map(len, text.splitlines())) <= width
    assert "43.8%" in text and "68.8%" in text and "+25.0" in text and name in text
    assert ("Pass@1" in text) == (width >= 120 and name == "mel") and "Avg@4" in text
    assert found.arms[1].after["avg_at_k"].as_share().partition(" ")[2] in text, "an interval is not broken inside"


def test_the_words_follow_the_figures(tmp_path: Path) -> None:
    below = compare(list(reversed(read_arms(arms_of(tmp_path / "a", seeds=5)))))
    assert "grpo ends 25.0 points" in below.conclusions[0] and "below mel" in below.conclusions[0]
    assert "ahead on 0 of 5 seeds" in below.conclusions[0] and below.limits == ()
    mixed = [1, 1, 3, 2] * 10
    same = compare(read_arms(arms_of(tmp_path / "b", seeds=1, mel=mixed)))
    assert "cannot be told apart" in same.conclusions[0] and "contains 0" in same.conclusions[0]
    assert "single run" in same.limits[0] and "luck of training" in same.limits[0]


def test_seeds_that_differ_are_not_paired(tmp_path: Path) -> None:
    folders = [
        make_run(tmp_path / f"{arm}-{seed}", before=BEFORE, after=after, lessons=0, algorithm=arm, seed=seed)
        for arm, after, seeds in (("grpo", WORSE, (0, 1)), ("mel", BETTER, (2, 3)))
        for seed in seeds
    ]
    found = compare(read_arms(folders))
    assert found.arms[1].paired_seeds == 0 and found.arms[1].difference["avg_at_k"].value == pytest.approx(0.25)
    assert any("do not have the same seeds" in limit for limit in found.limits)


def test_runs_on_other_tasks_or_without_evaluation_have_curves_alone(tmp_path: Path) -> None:
    folders = arms_of(tmp_path, seeds=1)
    (folders[1] / "eval" / "after.json").write_text(evaluation(BETTER, first=100).to_json())
    found = compare(arms := read_arms(folders))
    assert found.tasks == 0 and found.conclusions == () and "on different tasks" in found.limits[0]
    assert {name for name, _ in charts(arms)} == {"eval-tokens", "pass-tokens", "eval-time", "pass-time"}
    (folders[1] / "eval" / "after.json").write_text(evaluation(BETTER, first=20).to_json())
    partly = compare(read_arms(folders))
    assert partly.tasks == 20 and "Only the 20 of 40 tasks" in partly.limits[0]
    (folders[1] / "eval" / "after.json").unlink()
    assert "No final evaluation: mel-0" in compare(read_arms(folders)).limits[0]


def test_runs_of_one_folder_name_are_told_apart(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / part / "run", before=BEFORE, after=WORSE, lessons=0) for part in "ab"]
    for folder in folders:
        (folder / "config.yaml").unlink()
        (folder / "eval" / "after.json").unlink()
    found = compare(read_arms(folders))
    assert [arm.name for arm in found.arms] == [str(folder) for folder in folders]
    assert found.limits[0].startswith(f"No final evaluation: {folders[0]}, {folders[1]}.")


def test_a_difference_over_fewer_seeds_than_the_arms_have_says_so(tmp_path: Path) -> None:
    grpo, mel = (
        [make_run(tmp_path / f"{arm}-{seed}", before=BEFORE, after=after, lessons=0, algorithm=arm, seed=seed)
         for seed in seeds]
        for arm, after, seeds in (("grpo", WORSE, (0, 1)), ("mel", BETTER, (0,)))
    )  # fmt: skip
    text = "The difference of mel is over the seeds that it shares with grpo (1), the figures of an arm over all of"
    assert any(limit.startswith(text) for limit in compare(read_arms([*grpo, *mel])).limits)
    assert not any(limit.startswith(text) for limit in compare(read_arms([grpo[0], *mel])).limits)


def test_damaged_files_and_runs_without_steps_are_named(tmp_path: Path) -> None:
    folders = arms_of(tmp_path, seeds=1)
    (folders[0] / "metrics.jsonl").write_text("")
    with (folders[1] / "metrics.jsonl").open("a") as file:
        file.write("cut off")
    (folders[1] / "experiences.sqlite").write_text("no store is read")
    found = compare(read_arms(folders)).limits
    assert found[:2] == (
        "grpo-0: metrics.jsonl holds no step. There are no curves.",
        "mel-0: metrics.jsonl: 1 of 13 lines cannot be read and are left out.",
    )
    assert not any("experience" in limit for limit in found)


def test_unequal_costs_and_beginnings_are_named(tmp_path: Path) -> None:
    folders = arms_of(tmp_path, seeds=1)
    rows = metrics(12, tokens=150.0)
    (folders[1] / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folders[1] / "eval" / "before.json").write_text(evaluation(BETTER).to_json())
    (folders[1] / "adapter").rmdir()
    limits = " ".join(compare(read_arms(folders)).limits)
    assert "equally many tokens (grpo 1,200, mel 1,800)" in limits
    assert "began with different models" in limits and "mel-0 has not finished (12 steps)" in limits


def test_too_few_or_equal_folders_are_refused(tmp_path: Path) -> None:
    (folder,) = arms_of(tmp_path, seeds=1)[:1]
    with pytest.raises(ConfigError, match="at least two runs"):
        read_arms([folder])
    with pytest.raises(ConfigError, match="named twice"):
        read_arms([folder, folder / ".." / folder.name])


def test_curves_are_over_tokens_and_time(tmp_path: Path) -> None:
    found = dict(charts(read_arms(arms_of(tmp_path))))
    tokens, minutes = found["pass-tokens"].lines[0], found["pass-time"].lines[0]
    assert list(tokens.x) == pytest.approx([0.1 * i for i in range(1, 13)]), "thousands"
    assert list(minutes.x) == pytest.approx([3 * i / 60 for i in range(1, 13)])
    shown = [(line.label, line.faint) for line in found["eval-tokens"].lines]
    assert shown == [("", True), ("", True), ("grpo", False), ("", True), ("", True), ("mel", False)]
    assert list(found["eval-tokens"].lines[-1].y) == [0.375, 0.6875] and found["eval-tokens"].lines[-1].color == 1


def test_evaluations_during_training_are_points_of_the_curves(tmp_path: Path) -> None:
    """Steps of 100 tokens and 3 seconds; the steps 4 and 8 were evaluated, the latter by TRL, too."""
    measured = [{"step": 4, "eval_avg_at_k": 0.4}, {"step": 8, "eval_avg_at_k": 0.5, "eval_reward": 0.7}]
    rows = sorted([*metrics(12), *measured], key=lambda row: row["step"])
    folders = [make_run(tmp_path / name, rows=rows, before=[0, 1], after=[4, 2], lessons=0, seed=i)
               for i, name in enumerate(("a-0", "a-1"))]  # fmt: skip
    found = dict(charts(read_arms(folders)))
    for line in found["eval-tokens"].lines:
        assert list(line.x) == pytest.approx([0.0, 0.4, 0.8, 1.2]) and list(line.y) == [0.125, 0.4, 0.5, 0.75]
    assert list(found["eval-time"].lines[-1].x) == pytest.approx([0.0, 0.2, 0.4, 0.6]), "minutes"
    (reward, *_) = found["reward-tokens"].lines
    assert (list(reward.x), list(reward.y)) == ([0.8], [0.7])
    (chart,) = [chart for name, chart in figures.charts(read_run(folders[0])) if name == "evaluation"]
    assert [(list(line.x), line.y[1]) for line in chart.lines if line.label == "Avg@k"] == [([0, 4, 8, 12], 0.4)]


def test_a_run_without_lessons_has_a_curve_of_its_rollouts(tmp_path: Path) -> None:
    rows = [{**row, "rewards/_verifier_reward/mean": row.pop("mel/pass_rate")} for row in metrics(12)]
    folders = [
        make_run(tmp_path / "grpo", rows=rows, lessons=0, algorithm="grpo"),
        make_run(tmp_path / "mel", lessons=0, algorithm="mel"),
    ]
    one, other = dict(charts(read_arms(folders)))["pass-tokens"].lines
    assert list(one.y) == list(other.y) and len(one.y) == 12


def test_the_mean_goes_as_far_as_all_runs_of_an_arm(tmp_path: Path) -> None:
    folders = arms_of(tmp_path)
    rows = metrics(8, tokens=100.0)  # a pass rate of step / 8, for 800 tokens in place of 1,200
    (folders[1] / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    *runs, mean = dict(charts(read_arms(folders)))["pass-tokens"].lines[:3]
    assert [run.x[-1] for run in runs] == pytest.approx([1.2, 0.8]) and mean.x[-1] == pytest.approx(0.8)
    assert mean.y[-1] == pytest.approx((8 / 12 + 8 / 8) / 2)


def test_page_picture_and_json_are_written(tmp_path: Path) -> None:
    arms = read_arms(arms_of(tmp_path))
    page, data, picture = write_comparison(arms, compare(arms), tmp_path / "out" / "here")
    values = json.loads(data.read_text())
    assert values["arms"][1]["difference"]["avg_at_k"]["value"] == pytest.approx(0.25)
    text = page.read_text()
    assert "What this cannot show" in text and "train.<wbr>algorithm" in text and text.count("<svg") == 4
    assert picture.read_bytes().startswith(b"\x89PNG") and len(picture.read_bytes()) < 150_000
    assert LIGHT["s0"] not in text.split("</style>")[1], "the page's own colors"


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    folders = arms_of(tmp_path / "<img src=x>", seeds=1)
    for folder in folders:
        (folder / "config.yaml").unlink()
    arms = read_arms(folders)
    assert [arm.name for arm in arms] == ["grpo-0", "mel-0"]
    page, *_ = write_comparison(arms, compare(arms), tmp_path / "out")
    assert "<img" not in page.read_text() and "&lt;img src=x&gt;" in page.read_text()


def test_steps_without_rollouts_leave_the_curve_where_the_tokens_are(tmp_path: Path) -> None:
    rows = metrics(8)
    for row in rows:
        if row["step"] % 4 != 1:  # num_iterations=4: updates on an earlier batch again
            del row["reward"], row["mel/pass_rate"]
            row |= {"loss": 0.1, "mel/generated_tokens": 0.0}
    arms = [
        make_run(tmp_path / name, rows=rows, lessons=0, algorithm=name, num_iterations=4) for name in ("grpo", "mel")
    ]
    (chart,) = [chart for name, chart in charts(read_arms(arms)) if name == "pass-tokens"]
    assert [line.x for line in chart.lines] == [[0.1, 0.2], [0.1, 0.2]], "100 tokens per batch, in thousands"
