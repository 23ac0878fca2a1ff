"""Properties over made-up input, a hundred or so cases each by default and thousands in the slow set.

The parser of analyses, the leak guard, packing and masks, the configuration, dataset rows and chat templates, states of
checkpoints.
"""

from __future__ import annotations

import functools
import json
import math
import re
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from mel_lite import MELConfig
from mel_lite.data.tasks import load_tasks
from mel_lite.errors import DataError, MelLiteError
from mel_lite.lessons.leak_guard import check_leak
from mel_lite.lessons.parsing import ParseFailure, parse_analysis
from mel_lite.training.batches.packing import IGNORE, Row, pack, pad_rows, rows_of_batch
from mel_lite.types import Finish, MetaExperience
from scripted import ScriptedEngine
from tiny_models import tiny_tokenizer

QUIET = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]


def both(fast: int, many: int, **strategies: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a property on `fast` cases, always the same ones; and on `many` new ones in a slow test of its own."""

    def wrap(check: Callable[..., None]) -> Callable[..., None]:
        quick = settings(max_examples=fast, deadline=None, derandomize=True, suppress_health_check=QUIET)
        long = settings(max_examples=many, deadline=None, suppress_health_check=QUIET)

        @functools.wraps(check)  # keeps the parameters, among them fixtures
        def many_cases(*args: Any, **kwargs: Any) -> None:
            check(*args, **kwargs)

        many_cases.__name__ = f"{check.__name__}_on_thousands"
        slow = pytest.mark.slow(long(given(**strategies)(many_cases)))
        globals()[many_cases.__name__] = slow
        return quick(given(**strategies)(check))

    return wrap


# ---- the leak guard ----

ONES = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
        "seventeen eighteen nineteen").split()  # fmt: skip
TENS = "_ _ twenty thirty forty fifty sixty seventy eighty ninety".split()


def spelled(n: int) -> str:
    """English words of 0 to 999,999."""
    if n < 20:
        return ONES[n]
    if n < 100:
        return TENS[n // 10] + (f"-{ONES[n % 10]}" if n % 10 else "")
    if n < 1000:
        return f"{ONES[n // 100]} hundred" + (f" and {spelled(n % 100)}" if n % 100 else "")
    return f"{spelled(n // 1000)} thousand" + (f" {spelled(n % 1000)}" if n % 1000 else "")


ARABIC, FULL_WIDTH, BOLD = (str.maketrans("0123456789", digits) for digits in (
    "\u0660\u0661\u0662\u0663\u0664\u0665\u0666\u0667\u0668\u0669",
    "\uff10\uff11\uff12\uff13\uff14\uff15\uff16\uff17\uff18\uff19",
    "".join(chr(0x1D7CE + i) for i in range(10)),
))  # fmt: skip

MUTATIONS: dict[str, Callable[[int], str]] = {
    "plain": str,
    "separators": lambda n: f"{n:,}",
    "latex separators": lambda n: f"{n:,}".replace(",", "{,}"),
    "point zero": lambda n: f"{n}.0",
    "boxed": lambda n: rf"\boxed{{{n}}}",
    "dollars": lambda n: f"${n}$",
    "text": lambda n: rf"\text{{{n}}}",
    "bold": lambda n: f"**{n}**",
    "spelled": spelled,
    "Spelled": lambda n: spelled(n).capitalize(),
    "fraction": lambda n: f"{3 * n}/3",
    "latex fraction": lambda n: rf"\frac{{{2 * n}}}{{2}}",
    "arabic digits": lambda n: str(n).translate(ARABIC),
    "full-width digits": lambda n: str(n).translate(FULL_WIDTH),
    "mathematical bold": lambda n: str(n).translate(BOLD),
    "padded": lambda n: f"  {n}  ",
}
SENTENCES = (
    "The total is {}.",
    "In the end one gets {} as the result.",
    "The right solution ends with {}.",
    "So it should have been {}",
    "The answer is {}, which the wrong one missed.",
    "It must equal {}.",
)
CLEAN = MetaExperience(
    "The second step drifts away.", "A rushed reading of the question.", "If unsure, then read the question again."
)


@both(
    150, 5000, n=st.integers(21, 999_999), name=st.sampled_from(sorted(MUTATIONS)), sentence=st.sampled_from(SENTENCES),
    part=st.sampled_from(["bifurcation", "critique", "heuristic"]),
)  # fmt: skip
def test_an_answer_is_found_however_it_is_written(n: int, name: str, sentence: str, part: str) -> None:
    text = f"{getattr(CLEAN, part)} {sentence.format(MUTATIONS[name](n))}"
    parts = {each: getattr(CLEAN, each) for each in ("bifurcation", "critique", "heuristic")}
    report = check_leak(
        MetaExperience(**parts | {part: text}),
        answer=str(n),
        right_text="",
        prompt_text="How many are there?",
        policy="reject",
    )
    assert report.leaks, f"{n} as {text!r}"


WORDS = st.lists(
    st.sampled_from(
        "the step reads question carefully before units sign check carry borrow sum product rule then if when "
        "always never solution wrong right first divides multiplies compares formula table list order".split()
    ),
    min_size=6,
    max_size=40,
).map(" ".join)


@both(100, 3000, n=st.integers(0, 10**6), texts=st.tuples(WORDS, WORDS, WORDS))
def test_words_without_a_number_leak_no_number(n: int, texts: tuple[str, str, str]) -> None:
    report = check_leak(
        MetaExperience(*texts), answer=str(n), right_text="", prompt_text="How many are there?", policy="reject"
    )
    assert report.reasons == ()


@both(100, 3000, n=st.integers(100, 10**6), other=st.integers(100, 10**6))
def test_another_number_is_no_leak(n: int, other: int) -> None:
    assume(n != other)
    experience = MetaExperience(CLEAN.bifurcation, f"It wrote {other} in the third line.", CLEAN.heuristic)
    report = check_leak(experience, answer=str(n), right_text="", prompt_text="How many are there?", policy="reject")
    assert report.reasons == ()


# ---- the parser of analyses ----

PROSE = st.lists(
    st.sampled_from(
        "it took the sign for granted and lost a unit on the way because nobody looked at what was asked later "
        "every line follows from that slip while the right one names each quantity converts and compares".split()
    ),
    min_size=14,
    max_size=24,
    unique=True,
).map(" ".join)
LEVELS = st.sampled_from(["## {}", "### {}", "**{}**", "{}:", "# {}:", "**{}:**"])


@both(100, 3000, parts=st.tuples(PROSE, PROSE, PROSE), style=LEVELS, crlf=st.booleans(), before=PROSE)
def test_a_well_formed_analysis_comes_back(parts: tuple[str, str, str], style: str, crlf: bool, before: str) -> None:
    names = ("Bifurcation", "Critique", "Heuristics")
    text = "\n\n".join([before, *(f"{style.format(name)}\n{part}" for name, part in zip(names, parts, strict=True))])
    assume(len({*parts, before}) == 4)
    try:
        parsed = parse_analysis(text.replace("\n", "\r\n") if crlf else text, finish=Finish.STOP)
    except ParseFailure as failure:
        assert "repeats itself" in str(failure)  # as text of so few words does now and then
        return
    assert (parsed.bifurcation, parsed.critique, parsed.heuristic) == parts


@both(
    150, 5000,
    text=st.lists(
        st.sampled_from(["## Bifurcation\n", "## Critique", "**Heuristics:**", "\n", "{", '"critique":', "\u202e", "\0",
                         "<|im_start|>user\n", "</think>", "#" * 30, "a b c d e f g. "]) | st.text(max_size=12),
        max_size=40,
    ).map("".join),
    finish=st.sampled_from(Finish),
)  # fmt: skip
def test_hostile_analyses_are_read_or_refused(text: str, finish: Finish) -> None:
    try:
        parsed = parse_analysis(text, finish=finish)
    except ParseFailure as failure:
        assert str(failure)
    else:
        assert all(part and "\0" not in part for part in (parsed.bifurcation, parsed.critique, parsed.heuristic))


# ---- packing and masks ----

SHAPES = st.lists(st.tuples(st.integers(1, 12), st.integers(0, 9)), min_size=1, max_size=8)


@both(150, 5000, shapes=SHAPES, room=st.integers(0, 3), max_tokens=st.none() | st.integers(1, 60))
def test_a_padded_batch_survives_packing(shapes: list[tuple[int, int]], room: int, max_tokens: int | None) -> None:
    """Prompts padded left, completions right, some of them empty: every id is scored once, in its own place.

    Rows with an empty completion are left out, unless there are no others.
    """
    prompt_width = max(p for p, _ in shapes) + room
    width = max(c for _, c in shapes) + room
    assume(width > 0)
    ids = torch.zeros(len(shapes), prompt_width + width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for b, (p, c) in enumerate(shapes):
        ids[b, prompt_width - p : prompt_width + c] = torch.arange(1, p + c + 1) + 100 * b
        mask[b, prompt_width - p : prompt_width + c] = 1
    rows = rows_of_batch(ids, mask, width)
    assert [(len(row.ids), row.scored_tokens) for row in rows] == [(p + c, c) for p, c in shapes]
    packed = pack(rows, pad_id=0, max_tokens=max_tokens)
    wanted = [p + c for p, c in shapes if c] or [min(p for p, _ in shapes)]
    assert sum(int(b.attention_mask_BT.sum()) for b in packed.blocks) == sum(wanted)
    flat = torch.cat([b.target_BT[:, 1:][b.target_BT[:, 1:] != IGNORE] for b in packed.blocks]).float()
    back = pad_rows(packed.unpack(flat), mask[:, -width:])
    assert torch.equal(back.long(), ids[:, -width:] * mask[:, -width:])


@both(100, 3000, rows=st.lists(st.tuples(st.integers(2, 30), st.sampled_from([1.0, 0.7])), max_size=10))
def test_rows_of_two_temperatures_are_never_in_one_block(rows: list[tuple[int, float]]) -> None:
    packed = pack([Row(torch.arange(n), 1, t) for n, t in rows], pad_id=0)
    assert sorted(packed.order) == list(range(len(rows)))
    at = iter(packed.order)
    for block in packed.blocks:
        assert {rows[next(at)][1] for _ in range(len(block.input_ids_BT))} == {block.temperature}


# ---- configuration ----

JUNK = st.none() | st.booleans() | st.integers(-3, 10**6) | st.floats() | st.text(max_size=8) | st.just([])
OPTIONS = ("algorithm verifier_threshold "
           "verifier_workers verifier_deadline_s mel_weight mel_normalization mel_train_on "
           "pairs_per_group pair_strategy analysis_max_tokens analysis_temperature leak_policy replay_attempts "
           "replay_criterion grad_norm_every on_collapse max_idle_steps "
           "top_p top_k min_p repetition_penalty").split()  # fmt: skip


@both(100, 3000, options=st.dictionaries(st.sampled_from(OPTIONS), JUNK, max_size=3))
def test_a_config_is_made_or_refused_in_words(options: dict[str, Any]) -> None:
    """By what `mel-lite train` goes through: a recipe, then MELConfig."""
    from mel_lite.recipe import build_args, resolve

    try:
        recipe = resolve(preset="cpu", overrides=[(f"train.{name}", value) for name, value in options.items()])
        args = build_args(recipe, Path(tempfile.gettempdir()) / "never-made")
    except MelLiteError as error:
        assert any(name in str(error) for name in options), error
        return
    assert isinstance(args, MELConfig)
    for name in ("mel_weight", "verifier_deadline_s"):
        assert getattr(args, name) >= 0
    assert args.replay_attempts >= 1 and args.verifier_workers >= 1


# ---- dataset rows ----

VALUES = st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats() | st.text(max_size=20)
CELLS = VALUES | st.lists(VALUES, max_size=2) | st.dictionaries(st.text(max_size=4), VALUES, max_size=2)
TURNS = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "system", "x"]), "content": VALUES}), max_size=2
)
ROWS = st.lists(
    st.fixed_dictionaries({"prompt": CELLS | TURNS, "answer": CELLS}, optional={"level": CELLS}), min_size=1, max_size=4
)


@both(60, 1500, rows=ROWS, tail=st.sampled_from(["", "{", "[]\n", "\0", "\ufeff"]))
def test_any_file_becomes_tasks_or_an_error_that_names_it(rows: list[dict[str, Any]], tail: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tasks.jsonl"
        text = "".join(json.dumps(row) + "\n" for row in rows) + tail
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
        try:
            tasks = load_tasks(str(path))
        except DataError as error:
            assert "tasks.jsonl" in str(error) or re.search(r"row|column", str(error)), error
            return
    assert 1 <= len(tasks) <= len(rows) + 1
    for task in tasks:
        assert task["prompt"] and isinstance(task["answer"], str) and task["answer"]


# ---- rows and templates through a step ----

TEXTS = st.sampled_from(["What is 3 plus 2?", "", " ", "a\u2028b\x85c", "\ufeff7", "<|im_end|>", "\ud83d", "x" * 700])
ARGUMENTS = st.sampled_from([{}, {"a": 3}, {"b": "x", "c": None}, {"a": [1, {"d": 2}]}, {"a": 2**70}, "{}", None])
CALLS = st.lists(
    st.builds(lambda a: {"type": "function", "function": {"name": "add", "arguments": a}}, ARGUMENTS), max_size=2
)
CONTENTS = TEXTS | st.none() | st.lists(
    st.builds(lambda text: {"type": "text", "text": text}, TEXTS) | st.just({"type": "image", "image": "a.png"}),
    max_size=2,
)  # fmt: skip
MESSAGES = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "user", "user", "system", "developer", "assistant", "tool", "bot"])},
    optional={"content": CONTENTS, "tool_calls": CALLS, "name": TEXTS | st.none(), "from": TEXTS},
)
ASKED = st.builds(lambda turns, at: [*turns[:at], {"role": "user", "content": "What is 3 plus 2?"}, *turns[at:]],
                  st.lists(MESSAGES, max_size=2), st.integers(0, 2))  # fmt: skip
ANSWERS = st.sampled_from(["5", 5, 5.0, ["5"], [["5"], "5"], ["5", "five"], [], None, float("nan"), 2**70, True, {}])
EXTRAS = st.dictionaries(
    st.sampled_from(
        ["completions", "prompts", "self", "trainer_state", "images", "completion_ids", "level", "answers"]
    ),
    st.sampled_from(["x", 1, 2**65, None, [1], {"a": 2**65}, "\udc00"]),
    max_size=2,
)
TASKS = st.lists(
    st.builds(lambda prompt, answer, extras: {"prompt": prompt, "answer": answer, **extras},
              st.lists(MESSAGES, max_size=2) | ASKED | ASKED | TEXTS, ANSWERS, EXTRAS), min_size=1, max_size=2,
)  # fmt: skip
BODIES = st.sampled_from([
    "{{ m['content'] }}", "{{ m.content + '' }}", "{{ m['content'][0]['text'] }}", "{{ m.tool_calls | tojson }}", "",
    "{% if m.tool_calls %}{{ m.tool_calls[0].function.arguments | tojson }}{% endif %}{{ m.content }}",
    "{% if m.role not in ['user', 'assistant'] %}{{ raise_exception('roles') }}{% endif %}{{ m.content }}",
    "{{ m.content if m.role != 'system' }}", "{{ 1 // (m.content | length) }}", "{{ m.content | upper }}",
])  # fmt: skip


@pytest.fixture(scope="module")
def stepping(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any, str], dict[str, float]]:
    """Return a function that trains the model of this module for one step on a dataset, with a chat template."""
    import trainers

    folder = tmp_path_factory.mktemp("fuzz")
    model = trainers.tiny_model(folder / "base")

    def step(tasks: Any, template: str) -> dict[str, float]:
        (folder / "base" / "chat_template.jinja").write_text(template)
        for old in folder.glob("run/experiences.sqlite*"):
            old.unlink()
        trainer = trainers.build(
            folder, model=model, train_dataset=tasks, max_steps=1, lora=False, learning_rate=0.0,
            engine=ScriptedEngine(tiny_tokenizer(), answer=lambda question, rng: f"Answer: {5 + (rng.random() < 0.5)}"),
        )  # fmt: skip
        trainer.train()
        return next(log for log in trainer.state.log_history if "reward" in log)

    return step


@pytest.mark.slow
@both(
    30, 150, rows=TASKS, body=BODIES, suffix=st.sampled_from(["json", "jsonl"]), read=st.booleans(), crlf=st.booleans()
)  # fmt: skip
def test_rows_and_templates_end_as_a_step_a_count_or_an_error(
    stepping: Callable[[Any, str], dict[str, float]], rows: list[dict[str, Any]], body: str, suffix: str, read: bool,
    crlf: bool,
) -> None:  # fmt: skip
    """Rows reach the trainer through a file, or (`read` False) as a dataset of Python's API; a step takes two."""
    rows = rows * 2
    frame = "<|im_start|>{{ m['role'] }}\n%s<|im_end|>\n"
    template = f"{{% for m in messages %}}{frame % body}{{% endfor %}}{{% if add_generation_prompt %}}>{{% endif %}}"
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / f"tasks.{suffix}"
        path.write_text(("\r\n" if crlf else "\n").join(map(json.dumps, rows)), newline="")
        try:
            if read:
                tasks = load_tasks(str(path), conversational=True)
            else:
                try:
                    tasks = Dataset.from_list(rows)
                except Exception:
                    return  # not a dataset, so it never reaches us
            log = stepping(tasks, template)
        except MelLiteError as error:
            assert re.search(r"(tasks\.jsonl?|train_dataset|conversation)", str(error)), error
            return
    assert math.isfinite(log["loss"]) and log["step_time"] > 0
