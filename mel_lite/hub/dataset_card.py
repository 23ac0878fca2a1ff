"""The meta-experiences of a run as a dataset folder that the Hub and `datasets` read."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mel_lite.errors import ConfigError, StoreError
from mel_lite.files import publish_dir
from mel_lite.hub import metadata
from mel_lite.hub.model_card import cell, environment
from mel_lite.lessons.store import FILE_NAME, ExperienceStore
from mel_lite.lessons.store.rows import COLUMNS
from mel_lite.report.runs import Run, read_run
from mel_lite.types import Status

ROWS = Path("data") / "train.parquet"
TAGS = ("mel-lite", "meta-experience-learning", "rlvr", "synthetic", "arxiv:2602.10224")
MEANINGS: Mapping[str, str] = {
    "id": "number in the run, from 1",
    "step": "optimizer step in which it was complete, from 1",
    "prompt_hash": "identifies the question",
    "prompt": "question",
    "answer": "reference answer",
    "right_text": "the model's right answer of the pair",
    "wrong_text": "the model's wrong answer of the pair",
    "right_index": "place of the right answer in its group",
    "wrong_index": "place of the wrong answer in its group",
    "pair_index": "number of the pair in its group",
    "common_prefix_tokens": "tokens before the answers part",
    "analysis": "analysis as sampled",
    "analysis_tokens": "its length",
    "bifurcation": "where the answers part",
    "critique": "why the wrong one went wrong",
    "heuristic": "rule for next time",
    "status": "last stage that it reached",
    "reason": "reason why it was dropped",
    "leak_reasons": "places at which it gives the answer away",
    "redacted": "true if such places were cut out",
    "replay_verdicts": "verdicts of attempts with it in the prompt",
    "replay_texts": "these attempts",
    "control_verdicts": "verdicts of attempts without it, on the same seeds",
    "uplift": "share solved with it minus without",
    "nll_written": "mean negative log-likelihood when it was sampled, nats per token",
    "nll_before": "the same before the update that trained on it",
    "nll_after": "the same after it",
    "trained_tokens": "tokens trained on",
    "written_at": "time, UTC",
    "quote_start": "first character of the quoted step in wrong_text",
    "quote_end": "end of the quote",
    "templates_version": "identifies the texts of the analysis prompt",
    "shift_nats": "how much more it lifts the right answers of its group than the wrong ones",
    "staleness_steps": "optimizer steps from its rollouts to that step",
    "staleness_versions": "updates of the weights among them",
}
"""Meaning of each column of the store."""
STATUSES = {
    Status.UNPARSED: "the analysis does not have the three parts",
    Status.LEAKED: "it gives the answer away",
    Status.NOT_LIFTING: "it does not make the right answers of its group likelier than the wrong ones",
    Status.REPLAY_FAILED: "the attempts with it did not pass",
    Status.KEPT: "it was trained on",
}


def export_dataset(run_dir: Path, output: Path, *, status: Status | str | None = None) -> int:
    """Write a run's meta-experiences into the new folder `output`, with a dataset card. Returns: the number of rows.

    Raises: StoreError when the run has no store, or `output` exists or cannot be written.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise StoreError(f"export path {output} is not an empty folder; choose another.")
    staging = output.with_name(f".{output.name}.{os.getpid()}.partial")
    with ExperienceStore(run_dir / FILE_NAME, read_only=True) as store:
        try:
            (staging / ROWS).parent.mkdir(parents=True)
            rows = store.export(staging / ROWS, status=status)
            counts = store.funnel()
            chosen = counts if status is None else {Status(status): rows}
            (staging / "README.md").write_text(dataset_card(run_dir, output.name, chosen), encoding="utf-8")
            publish_dir(staging, output)
        except OSError as error:
            raise StoreError(f"export path {output}: cannot be written ({error}); choose another folder.") from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return rows


def dataset_card(run_dir: Path, name: str, counts: Mapping[Status, int]) -> str:
    """Return the card of a dataset with this many rows per status.

    Raises: ValueError when huggingface_hub rejects the card's metadata.
    """
    from huggingface_hub import DatasetCard

    try:
        run = read_run(run_dir, lessons=False)
    except ConfigError:  # a store alone
        run = Run(run_dir, {}, {}, (), (), None, None, finished=False)
    base, spec = run.option("model.name"), run.option("data.train")
    hub_id, data_id = metadata.base_hub_id(base), metadata.dataset_hub_id(spec)
    tasks = f"[{data_id}](https://huggingface.co/datasets/{data_id})" if data_id else cell(metadata.shown_dataset(spec))
    text = (
        environment()
        .get_template("dataset_card.md")
        .render(
            metadata=_front_matter(name, sum(counts.values()), data_id),
            name=cell(name),
            model=f"[{hub_id}](https://huggingface.co/{hub_id})" if hub_id else f"`{cell(metadata.shown_name(base))}`",
            tasks=tasks,
            source=f" ({data_id})" if data_id else "",
            steps=run.steps,
            algorithm=cell(run.option("train.algorithm") or "mel"),
            statuses=[(status.value, count, STATUSES[status]) for status, count in counts.items()],
            columns=[(column, MEANINGS[column]) for column in COLUMNS],
        )
    )
    DatasetCard(text)
    return text


def _front_matter(name: str, rows: int, data_id: str | None) -> str:
    from huggingface_hub import DatasetCardData

    sizes = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
    known: dict[str, Any] = {
        "pretty_name": name,
        "tags": list(TAGS),
        "task_categories": ["text-generation"],
        "size_categories": [next((size for most, size in sizes if rows < most), "1M<n<10M")],
        "source_datasets": [data_id] if data_id else None,
        "annotations_creators": ["machine-generated"],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": ROWS.as_posix()}]}],
    }
    return f"---\n{DatasetCardData(**known).to_yaml()}\n---"
