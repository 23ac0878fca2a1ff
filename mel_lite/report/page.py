"""`report.html`: one page about a run that needs no other file and no network."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from mel_lite.data.held_out import HELD_OUT
from mel_lite.errors import StoreError
from mel_lite.files import atomic_write_text
from mel_lite.gpus import GPU_PRESETS
from mel_lite.lessons.store import FILE_NAME, ExperienceRow, ExperienceStore
from mel_lite.recipe import resolve
from mel_lite.report import charts, figures
from mel_lite.report.credit import CreditStrip, strips_of
from mel_lite.report.lessons import chosen, status_text, view
from mel_lite.report.record import stage_seconds
from mel_lite.report.runs import Run, generated_tokens, phase_seconds, read_run
from mel_lite.text import first_line, printable
from mel_lite.types import Status

TEMPLATES = Path(__file__).parent / "templates"
MOST_LESSONS = 200
MOST_STRIPS = 40
"""Lessons with token credit in the page: a token takes 60 bytes of it."""
STAGES = {
    "load": "loading model and data",
    "evaluation": "evaluating before and after",
    "training": "training",
    "export": "saving and exporting",
}


def write_report(folder: Path, output: Path | None = None, *, most_lessons: int = MOST_LESSONS) -> Path:
    """Write the report of a run, by default as report.html into its folder. Returns: the file.

    Raises: ConfigError when the folder holds no run; OSError when the file cannot be written.
    """
    output = output or folder / "report.html"
    atomic_write_text(output, report_page(read_run(folder), most_lessons=most_lessons))
    return output


def report_page(run: Run, *, most_lessons: int = MOST_LESSONS) -> str:
    """Return the report of a run as HTML."""
    found, warning = figures.evaluation(run.before, run.after)
    line, meaning = figures.headline(run, found)
    rows, damaged = chosen(run.lessons, most_lessons), list[str]()
    credit = _credit(run, rows, damaged)
    lessons = [view(row, credit.get(row.id, ())) for row in rows]
    counts = {status: sum(row.status is status for row in run.lessons) for status in Status}
    tokens = generated_tokens(run.rows)
    return render(
        "report.html",
        run=run,
        title=f"MEL-Lite: {run.name}",
        headline=line,
        meaning=meaning,
        problems=[*run.problems, *damaged, *([warning] if warning else []), *_state(run)],
        facts=_facts(run, tokens[-1] if tokens else 0),
        measures=found,
        conditions=run.after.conditions() if run.after else "",
        charts=drawn(figures.charts(run)),
        funnel=figures.funnel_table(run),
        quoted=figures.quoted(run),
        uplift=figures.uplift(run),
        times=_times(run),
        options=_options(run),
        lessons=lessons,
        lessons_total=len(run.lessons),
        statuses=[(status.value, status_text(status), counts[status]) for status in Status],
    )


def _credit(run: Run, rows: Sequence[ExperienceRow], problems: list[str]) -> dict[int, tuple[CreditStrip, ...]]:
    """Return the token credit of the newest lessons that have some, by id; a note in `problems` if it is damaged."""
    found: dict[int, tuple[CreditStrip, ...]] = {}
    if not rows:
        return found
    try:
        with ExperienceStore(run.folder / FILE_NAME, read_only=True) as store:
            for row in rows:
                if len(found) < MOST_STRIPS and (strips := strips_of(row, store)):
                    found[row.id] = strips
    except StoreError as error:
        problems.append(printable(first_line(error, 400)))
    return found


def render(template: str, **values: Any) -> str:
    """Fill a template. All values are escaped, except the charts, which hold no text of a model."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    script = (TEMPLATES / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template(template).render(
        values,
        colors={"light": charts.LIGHT, "dark": charts.DARK},
        css=(TEMPLATES / "page.css").read_text(encoding="utf-8"),
        script=script,
        script_hash=f"sha256-{digest}",
    )


def drawn(found: list[tuple[str, charts.Chart]]) -> list[tuple[str, Any]]:
    """Return caption and SVG of each chart."""
    from markupsafe import Markup

    return [(chart.caption, Markup(charts.svg(chart, name))) for name, chart in found]


def _state(run: Run) -> list[str]:
    if run.finished:
        if run.before is None or run.after is not None or any("after.json" in problem for problem in run.problems):
            return []
        return ["There is no evaluation after training: it is under way, or the run stopped before it ended."]
    of = f" of {run.planned_steps}" if run.planned_steps else ""
    return [f"This run has not finished: {run.steps}{of} steps were logged when this page was made."]


def _facts(run: Run, tokens: float) -> list[tuple[str, str]]:
    """Return the run's main settings as (name, value); unknown ones are left out."""
    record = run.record
    of = f" of {run.planned_steps}" if run.planned_steps not in (None, run.steps) else ""
    budget = run.option("train.max_generated_tokens")
    allowed = f" (budget: {budget:,})" if isinstance(budget, int) else ""
    total_s = sum(stage_seconds(record).values()) or sum(phase_seconds(run.rows).values())
    packages = record.get("packages") or {}
    values = {
        "model": run.option("model.name"),
        "algorithm": run.option("train.algorithm") or ("mel" if run.config else None),
        "tasks": run.option("data.train"),
        "evaluated on": "held-out training tasks" if run.option("data.eval") == HELD_OUT else run.option("data.eval"),
        "steps": f"{run.steps}{of}",
        "generated": f"{tokens:,.0f} tokens{allowed}" if tokens else None,
        "took": figures.duration(total_s) if total_s else None,
        "device": record.get("device"),
        "started": _date(record),
        "MEL-Lite": record.get("mel_lite"),
        "torch": packages.get("torch") if isinstance(packages, Mapping) else None,
    }
    return [(name, printable(str(value))) for name, value in values.items() if value is not None]


def _date(record: dict[str, Any]) -> str | None:
    try:
        return f"{datetime.fromisoformat(record['sessions'][0]['started_at']):%Y-%m-%d %H:%M} UTC"
    except (LookupError, TypeError, ValueError):
        return None


def _times(run: Run) -> list[tuple[str, str, float]]:
    """Return name, duration and share of the run's stages, with training split into the phases of its steps."""
    stages = stage_seconds(run.record)
    phases = phase_seconds(run.rows)
    rest = max(0.0, stages.pop("training", 0.0) - sum(phases.values()))
    parts = {figures.PHASES.get(name, name): seconds for name, seconds in phases.items()}
    parts |= {STAGES.get(name, name): seconds for name, seconds in stages.items()}
    if rest:
        parts["checkpoints, logs and the rest of training"] = rest
    total = sum(parts.values())
    ordered = sorted(parts.items(), key=lambda part: -part[1])
    return [(printable(name), figures.duration(seconds), seconds / total) for name, seconds in ordered if total]


def _options(run: Run) -> dict[str, Any]:
    """Return the options that differ from the run's preset, and the name of the preset."""
    if not run.config:
        return {"preset": None, "named": False, "rows": []}
    ours = flat(run.config)
    presets = {name: flat(_sections(name)) for name in GPU_PRESETS}
    preset = str(run.record.get("preset"))
    named = preset in presets
    if not named:
        preset = min(presets, key=lambda name: len(_changed(ours, presets[name])))
    theirs = presets[preset]
    rows = [(key, _shown(ours, key), _shown(theirs, key)) for key in _changed(ours, theirs)]
    return {"preset": preset, "named": named, "rows": rows}


def _sections(preset: str) -> dict[str, Any]:
    import yaml

    return dict(yaml.safe_load(resolve(preset=preset).as_yaml()))


def _changed(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    return [key for key in {**theirs, **ours} if ours.get(key) != theirs.get(key)]


def _shown(options: Mapping[str, Any], key: str) -> str:
    if key not in options:
        return "(default)"
    return "none" if options[key] is None else printable(str(options[key]))


def flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a config's sections by dotted name."""
    return {
        f"{section}.{key}": value
        for section, options in config.items()
        if isinstance(options, Mapping)
        for key, value in options.items()
    }
