"""Replay validation: what is asked, with which seeds, and what the verdicts mean."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from experiences import lesson_context
from mel_lite.engines.base import Completion, Request, Sampling
from mel_lite.errors import ConfigError, EngineError
from mel_lite.lessons.prompts import DEFAULT_TEMPLATES, question_prompt, replay_prompt
from mel_lite.lessons.replay import is_kept, replay
from mel_lite.types import Finish, Group, Pair, Replay, Rollout, Verdict
from tiny_models import tiny_tokenizer

R, W, A = Verdict.RIGHT, Verdict.WRONG, Verdict.ABSTAIN
SAMPLING = Sampling(max_new_tokens=8)
TOKENIZER = tiny_tokenizer()


class Echo:
    """Answers a request with its place in the batch, and remembers what was asked."""

    name = "echo"

    def __init__(self, lost: int = 0) -> None:
        self.calls: list[tuple[Sequence[Request], Sampling]] = []
        self.lost = lost

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        self.calls.append((list(requests), sampling))
        answered = range(len(requests) - self.lost)
        return [Completion((*TOKENIZER(f"a{i}")["input_ids"], 2), (-1.0,) * 3, Finish.STOP) for i in answered]

    def wake(self) -> None: ...

    def sleep(self) -> None: ...


def pair(prompt: str, index: int) -> Pair:
    rollouts = (Rollout(0, (5,), "r", R), Rollout(1, (6,), "w", W))
    group = Group([{"role": "user", "content": prompt}], f"hash-{prompt}", rollouts, answer="7")
    return Pair(group, *rollouts, 0, index)


def run(
    items, *, attempts: int = 1, control: bool = False, engine: Echo | None = None, verdict=lambda text: W, **kwargs
):
    engine = engine or Echo()
    judged: list[tuple[str, str]] = []

    def judge(groups: Sequence[Group], texts: Sequence[str]) -> list[Verdict]:
        judged.extend((group.prompt_hash, text) for group, text in zip(groups, texts, strict=True))
        return [verdict(text) for text in texts]

    batch = kwargs.pop("batch", 4)
    options = {"run_seed": 3, "replay": SAMPLING, "replay_attempts": attempts, "control": control} | kwargs
    context = lesson_context(TOKENIZER, engine=engine, judge=judge, **options)
    return replay(items, context, batch=batch), engine, judged


ITEMS = [(pair("one", 0), "notes 1"), (pair("two", 1), "notes 2")]


def test_one_batch_serves_attempts_and_control_of_all_items() -> None:
    replays, engine, judged = run(ITEMS, attempts=2, control=True, verdict=lambda text: R if text < "a3" else A)
    ((requests, sampling),) = engine.calls
    assert sampling == SAMPLING
    with_m = [replay_prompt(item.group, notes, TOKENIZER, DEFAULT_TEMPLATES) for item, notes in ITEMS]
    without = [question_prompt(item.group, TOKENIZER) for item, _ in ITEMS]
    expected = [with_m[0]] * 2 + [without[0]] * 2 + [with_m[1]] * 2 + [without[1]] * 2
    assert [request.prompt_ids for request in requests] == expected
    assert judged == [("hash-one", f"a{i}") for i in range(4)] + [("hash-two", f"a{i}") for i in range(4, 8)]
    assert replays == [Replay((R, R), ("a0", "a1"), (R, A)), Replay((A, A), ("a4", "a5"), (A, A))]


def test_the_control_has_the_seeds_of_the_attempts_and_no_others_repeat() -> None:
    _, engine, _ = run(ITEMS, attempts=3, control=True)
    seeds = [request.seed for request in engine.calls[0][0]]
    assert seeds[0:3] == seeds[3:6] and seeds[6:9] == seeds[9:12]
    assert len(set(seeds)) == 6


def test_seeds_depend_on_run_step_and_pair_only() -> None:
    def seeds(items, **kwargs: int) -> list[int]:
        return [request.seed for request in run(items, **kwargs)[1].calls[0][0]]

    assert seeds(ITEMS)[1] == seeds(ITEMS[1:])[0], "the other items of the step must not matter"
    assert len({seeds(ITEMS)[0], seeds(ITEMS, batch=5)[0], seeds(ITEMS, run_seed=4)[0]}) == 3
    twice = seeds([(pair("one", 0), "m"), (pair("one", 1), "m")])
    assert twice[0] != twice[1], "two pairs of one group are tried apart"


def test_without_control_there_are_no_control_verdicts() -> None:
    replays, engine, _ = run(ITEMS, verdict=lambda text: R)
    assert len(engine.calls[0][0]) == 2
    assert [(each.verdicts, each.control_verdicts, each.uplift) for each in replays] == [((R,), (), None)] * 2


def test_nothing_to_replay_asks_nobody() -> None:
    replays, engine, judged = run([])
    assert (replays, engine.calls, judged) == ([], [], [])


def test_a_short_answer_of_the_engine_is_an_error() -> None:
    with pytest.raises(EngineError, match="'echo' answered 1 of 2 replay requests"):
        run(ITEMS, engine=Echo(lost=1))


def test_no_attempts_is_an_error() -> None:
    with pytest.raises(ConfigError, match="replay_attempts=0 must be 1 or more"):
        run(ITEMS, attempts=0)


@pytest.mark.parametrize(
    ("verdicts", "control", "criterion", "kept"),
    [
        ((R,), (), "solved", True),
        ((W,), (), "solved", False),
        ((A,), (), "solved", False),
        ((R, W), (), "solved", False),
        ((R, R, W), (), "solved", True),
        ((R,), (R,), "solved", True),
        ((R,), (R,), "uplift", False),
        ((R,), (W,), "uplift", True),
        ((R, W, W, W), (W, W, W, W), "uplift", True),
        ((W, W), (W, R), "uplift", False),
        ((R, A), (A, A), "uplift", True),
    ],
)
def test_criteria(verdicts: tuple[Verdict, ...], control: tuple[Verdict, ...], criterion: str, kept: bool) -> None:
    assert is_kept(Replay(verdicts, ("",) * len(verdicts), control), criterion)[0] is kept


def test_the_reason_names_both_counts() -> None:
    texts = ("",) * 4
    assert is_kept(Replay((R, W, W, W), texts), "solved")[1] == "1 of 4 replays right, more than half needed"
    assert is_kept(Replay((R, W), ("", ""), (R, R)), "uplift")[1] == (
        "1 of 2 replays right, 2 of 2 without the meta-experience; more than without needed"
    )


def test_uplift_without_control_and_unknown_criteria_are_errors() -> None:
    with pytest.raises(ConfigError, match=r"needs the control attempts\. Set replay_control=True"):
        is_kept(Replay((R,), ("",)), "uplift")
    with pytest.raises(ConfigError, match="replay_criterion='better' is not one of solved, uplift"):
        is_kept(Replay((R,), ("",)), "better")


def test_one_by_one_until_the_first_right_answer() -> None:
    """The attempts are those of the same number; the first right one ends them, and one is enough."""
    items = [(pair("one", 0), "M"), (pair("two", 1), "M"), (pair("three", 2), "M")]
    together = run(items, attempts=3)[1].calls[0][0]
    right_at = {"hash-one": 0, "hash-two": 2, "hash-three": 9}
    made: list[str] = []

    def judge(groups: Sequence[Group], texts: Sequence[str]) -> list[Verdict]:
        found = []
        for group in groups:
            found.append(R if made.count(group.prompt_hash) == right_at[group.prompt_hash] else W)
            made.append(group.prompt_hash)
        return found

    engine = Echo()
    options = {"run_seed": 3, "replay": SAMPLING, "replay_attempts": 3, "replay_criterion": "solved_once"}
    replays = replay(items, lesson_context(TOKENIZER, engine=engine, judge=judge, **options), batch=4)
    assert [each.verdicts for each in replays] == [(R,), (W, W, R), (W, W, W)]
    asked = [[(r.prompt_ids, r.seed) for r in requests] for requests, _ in engine.calls]
    plain = [(r.prompt_ids, r.seed) for r in together]
    assert asked == [[plain[0], plain[3], plain[6]], [plain[4], plain[7]], [plain[5], plain[8]]]
    assert [is_kept(each, "solved_once") for each in replays] == [
        (True, "1 of 1 replays right, one needed"),
        (True, "1 of 3 replays right, one needed"),
        (False, "0 of 3 replays right, one needed"),
    ]
    assert [is_kept(each, "scored+solved_once")[0] for each in replays] == [True, True, False]


def test_controls_need_all_attempts() -> None:
    (found,), engine, _ = run([(pair("one", 0), "M")], attempts=3, control=True, verdict=lambda text: R,
                              replay_criterion="solved_once")  # fmt: skip
    assert [len(requests) for requests, _ in engine.calls] == [6]
    assert found.verdicts == found.control_verdicts == (R, R, R) and is_kept(found, "solved_once")[0]
