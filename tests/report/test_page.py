"""The report as HTML: its figures, what it escapes, and what it says when something is missing."""

from __future__ import annotations

import html
import json
import re
import shutil
import sqlite3
from pathlib import Path

import pytest

from mel_lite.errors import ConfigError
from mel_lite.report.charts import Chart, Line, svg, thinned, trend
from mel_lite.report.figures import PHASES, charts, evaluation, headline, uplift
from mel_lite.report.page import report_page, write_report
from mel_lite.report.record import RunRecord, stage_seconds
from mel_lite.report.runs import read_run
from run_folders import HOSTILE, make_run, metrics

PACKAGE = Path(__file__).resolve().parents[2] / "mel_lite"
OLD_RUNS = Path(__file__).resolve().parents[1] / "resilience" / "old_runs"


def text_of(page: str) -> str:
    """The page without style, script and tags."""
    page = re.sub(r"<(style|script)\b.*?</\1>|<wbr>", "", page, flags=re.DOTALL)
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page)))


def test_the_result_is_the_paired_difference(tmp_path: Path) -> None:
    """Tasks differ much, and nearly each gains one sample of four: pairing makes the gain clear."""
    before, after = [0, 1, 2, 3, 0, 1, 2, 3], [1, 2, 3, 4, 1, 2, 3, 3]
    run = read_run(make_run(tmp_path / "run", before=before, after=after))
    found, warning = evaluation(run.before, run.after)
    assert warning == "" and [measure.name for measure in found] == ["Pass@1 (greedy)", "Avg@4", "Pass@4"]
    average = found[1]
    assert (average.before.value, average.after.value) == (12 / 32, 19 / 32)
    assert average.change is not None and average.change.value == pytest.approx(7 / 32)
    assert 0.1 < average.change.low and average.change.high == 0.25
    assert average.after.low < average.before.high, "unpaired intervals overlap"
    line, meaning = headline(run, found)
    assert line == "Avg@4: 37.5% → 59.4%"
    assert meaning.startswith(
        "+21.9 [+15.6, +25.0] points on 8 held-out tasks, paired. After training the model is bet"
    )
    page = text_of(report_page(run))
    assert line in page and "+21.9 [+15.6, +25.0]" in page and average.after.as_share() in page


def test_an_interval_around_zero_is_called_no_difference(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run", before=[2] * 6, after=[2] * 6))
    assert "shows no difference" in headline(run, evaluation(run.before, run.after)[0])[1]


def test_evaluations_of_other_tasks_are_not_compared(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", before=[1, 2, 3], after=[4, 4, 4])
    path = folder / "eval" / "before.json"
    path.write_text(path.read_text().replace('"task2"', '"other"'))
    run = read_run(folder)
    found, warning = evaluation(run.before, run.after)
    assert warning == "Only the 2 tasks that both evaluations judged are compared."
    assert found[1].change is not None and found[1].change.value == pytest.approx((3 + 2) / 8)
    path.write_text(path.read_text().replace('"task', '"else'))
    run = read_run(folder)
    found, warning = evaluation(run.before, run.after)
    assert "do not have the same tasks" in warning and found[1].change is None
    assert "cannot be compared" in headline(read_run(folder), found)[1]


def test_what_a_model_wrote_stays_text(tmp_path: Path) -> None:
    page = report_page(read_run(make_run(tmp_path / "run", hostile=True, lessons=1)))
    assert "<script>document" not in page and "<img" not in page
    assert page.count("<script>") == page.count("</script>") == 1
    body = page[page.index("<main>") :]
    assert body.count("&lt;script&gt;document.title") >= 8, "question, solutions, parts, replay"
    assert "${7*7} {{ 7*7 }}" in body and "49 49" not in body
    assert not {"\u202e", "\x1b", "\x00"} & set(page), "characters that reorder text or control a terminal"
    assert "alert(1)" in HOSTILE and not re.search(r'(?:href|src)="(?!#)', page)


def test_names_in_the_folder_are_escaped_too(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "<b>run&", lessons=0)
    config = (folder / "config.yaml").read_text().replace("train: demo", "train: <i>tasks</i>")
    (folder / "config.yaml").write_text(config)
    page = report_page(read_run(folder))
    assert "<b>run" not in page and "<i>tasks" not in page and "&lt;i&gt;tasks&lt;/i&gt;" in page


def test_all_figures_of_a_run_have_a_chart(tmp_path: Path) -> None:
    names = [name for name, _ in charts(read_run(make_run(tmp_path / "run")))]
    assert names == [
        "pass", "policy", "nll", "norms", "cosine", "entropy", "length", "memory", "speed", "funnel",
        "retention", "time",
    ]  # fmt: skip
    page = report_page(read_run(tmp_path / "run"))
    assert page.count("<svg") == len(names)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids)) and set(re.findall(r'(?:url\(|href=")#([^")]+)', page)) <= set(ids)


def test_the_page_says_where_the_time_went(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    record = RunRecord(folder, preset="cpu", device="CPU", resume=False)
    record.write()
    values = json.loads((folder / "run.json").read_text())
    values["sessions"][0]["stages_s"] = {"load": 4.0, "training": 46.0}
    (folder / "run.json").write_text(json.dumps(values))
    again = RunRecord(folder, preset=None, device="CPU", resume=True)
    with again.stage("load"):
        pass
    run = read_run(folder)
    assert len(run.record["sessions"]) == 2 and run.record["preset"] == "cpu", "a resumed run keeps what was there"
    assert 4.0 <= stage_seconds(run.record)["load"] < 4.5 and stage_seconds(run.record)["training"] == 46.0
    page = text_of(report_page(run))
    # 36 of the 46 seconds are in the phases of the steps.
    assert "sampling rollouts 24 s 48%" in page and "rest of training 10 s 20%" in page
    assert "All options are those of the preset" not in page and "train.max_steps 12 3" in page


def test_a_run_with_a_token_budget_shows_the_budget_and_not_its_bound_on_steps(tmp_path: Path) -> None:
    page = text_of(report_page(read_run(make_run(tmp_path / "run", steps=1_000_000, rows=metrics(12)))))
    assert "steps 12 of 1000000" in page and "generated 1,200 tokens took" in page
    folder = make_run(tmp_path / "budget", steps=1_000_000, rows=metrics(12), max_generated_tokens=1100)
    page = text_of(report_page(read_run(folder)))
    assert "steps 12 generated 1,200 tokens (budget: 1,100) took" in page


def test_every_phase_of_the_clock_has_a_name_for_readers() -> None:
    sources = (path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py"))
    timed = {name for source in sources for name in re.findall(r"\bclock(?:\.rest)?\(\"(\w+)\"", source)}
    assert len(timed) > 10 and timed == set(PHASES)


def test_options_are_compared_with_the_nearest_preset_where_none_is_named(tmp_path: Path) -> None:
    page = text_of(report_page(read_run(make_run(tmp_path / "run", learning_rate=0.001, temperature=1.0))))
    assert "The folder names no preset. Differences from the nearest one, cpu :" in page
    assert "train.learning_rate 0.001 5e-05" in page and "train.temperature" not in page


def test_a_run_without_lessons_or_evaluation_has_a_page(tmp_path: Path) -> None:
    rows = [{name: value for name, value in row.items() if not name.startswith("mel/")} for row in metrics(10)]
    folder = make_run(tmp_path / "run", lessons=0, rows=rows, algorithm="grpo")
    page = text_of(report_page(read_run(folder)))
    assert "Reward: 0.15 → 0.95" in page and "this is no test" in page
    assert "plain GRPO draws none" in page and "From rollouts to lessons" not in page


def test_a_run_without_reward_or_last_evaluation_says_so(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", before=[1, 2], after=[2, 2], lessons=0, rows=[{"step": 1, "loss": 0.5}])
    (folder / "eval" / "after.json").unlink()
    page = text_of(report_page(read_run(folder)))
    assert "No reward was logged" in page
    assert "no evaluation after training: it is under way, or the run stopped" in page


def test_a_line_alone_of_a_chart_of_several_is_named() -> None:
    chart = Chart("Lessons: kept, and their effect", (Line("kept / written", [1, 2], [0.5, 1.0]),), percent=True)
    assert "kept / written" in svg(chart, "one") and "Entropy" not in svg(chart, "one")


def test_names_of_options_break_at_their_parts_and_stay_text(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", lessons=0)
    with (folder / "config.yaml").open("a") as file:
        file.write("other: {a_<b>_c: 1}\n")
    page = report_page(read_run(folder))
    assert "<code>other.<wbr>a_<wbr>&lt;b&gt;_<wbr>c</code>" in page and "<b>_" not in page


def test_a_running_and_an_empty_run_have_a_page(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", lessons=0, rows=metrics(40)[:7], steps=40)
    (folder / "adapter").rmdir()
    page = text_of(report_page(read_run(folder)))
    assert "This run has not finished: 7 of 40 steps" in page
    (folder / "metrics.jsonl").write_text("")
    assert "No step was logged yet" in text_of(report_page(read_run(folder)))


@pytest.mark.parametrize("name", ["cli", "trainer"])
def test_runs_of_an_older_version_have_a_page(tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(OLD_RUNS / name / "run", tmp_path / "run")  # a reader of the store leaves files there
    path = write_report(folder, tmp_path / "page.html")
    page = path.read_text()
    assert page.count("<svg") > 8 and page.count('class="lesson"') == (8 if name == "trainer" else 0)


@pytest.mark.slow
def test_the_page_of_a_long_run_stays_small(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps=5000, lessons=300)
    page = report_page(read_run(folder), most_lessons=50)
    assert page.count('class="lesson"') == 50 and "300 meta-experiences, of which this page holds 50" in text_of(page)
    assert len(report_page(read_run(folder))) < 1_500_000


def test_uplift_is_over_replayed_lessons_with_a_control(tmp_path: Path) -> None:
    found = uplift(read_run(make_run(tmp_path / "run", lessons=8)))
    assert found is not None and found.value == 1.0 and 0.3 < found.low < 0.5, "four of four"
    assert uplift(read_run(make_run(tmp_path / "none", lessons=0))) is None


def test_the_page_is_written_in_one_go(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    assert write_report(folder) == folder / "report.html"
    with pytest.raises(ConfigError, match="holds no run"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_charts_take_their_colors_and_font_from_the_page() -> None:
    text = svg(Chart("a $x_1$ <b>", (Line("one", [1, 2], [0.5, 1.0]), Line("two", [1, 2], [1.0, 0.5], 1))), "name")
    assert "var(--s0)" in text and "var(--s1)" in text and "var(--text)" in text
    assert re.findall(r"#[0-9a-f]{6}\b", text) == [] and "DejaVu" not in text and "<style" not in text
    assert "a $x_1$ &lt;b&gt;" in text, "text stays text: no formula, no markup"
    assert svg(Chart("t", (Line("", [1], [1]),)), "name") == svg(Chart("t", (Line("", [1], [1]),)), "name")


def test_long_lines_are_thinned_to_means() -> None:
    values = [float(i % 7) for i in range(6000)]
    short = thinned(values)
    assert len(short) == 300 and sum(short) / 300 == pytest.approx(sum(values) / 6000)
    assert thinned([1.0, 2.0]) == [1.0, 2.0]
    faint, mean = trend("x", list(range(100)), [0.0, 1.0] * 50)
    assert faint.faint and max(mean.y[10:-10]) < 0.6, "the moving average is in front"


def test_a_reward_that_is_not_the_pass_rate_has_its_own_chart(tmp_path: Path) -> None:
    rows = [row | {"reward": 2 * row["reward"]} for row in metrics(4)]
    assert [name for name, _ in charts(read_run(make_run(tmp_path / "run", rows=rows)))][:2] == ["pass", "reward"]


def test_lessons_that_quote_a_step_are_counted(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", lessons=4)  # the fourth is not parsed; the helper stores no quote
    with sqlite3.connect(folder / "experiences.sqlite") as store:
        store.execute("UPDATE experiences SET quote_start = 0, quote_end = 5 WHERE id < 3")
    page = text_of(report_page(read_run(folder)))
    assert "2 of 3 parsed lessons quote a step that is in the wrong solution." in page
