import pytest

from mel_lite.training.prompts.difficulty import DifficultyMemory
from mel_lite.types import Finish, Group, Rollout, Verdict


def group(key: str, verdicts: str) -> Group:
    names = {"+": Verdict.RIGHT, "-": Verdict.WRONG, "?": Verdict.ABSTAIN}
    rollouts = tuple(Rollout(i, (1,), "", names[v], Finish.STOP, 0.0) for i, v in enumerate(verdicts))
    return Group("question", key, rollouts)


def rested(memory: DifficultyMemory, key: str, batches: int = 200) -> list[int]:
    return [batch for batch in range(batches) if memory.rests(key, batch)]


@pytest.mark.parametrize("verdicts", ["++++", "----", "-?--"])
def test_a_prompt_rests_after_so_many_equal_groups_in_a_row(verdicts: str) -> None:
    memory = DifficultyMemory(after=2, batches=3)
    memory.saw(group("a", verdicts), 0)
    assert rested(memory, "a") == []
    memory.saw(group("a", verdicts), 4)
    assert rested(memory, "a")[-3:] == [5, 6, 7] and not memory.rests("a", 8) and memory.resting(5) == 1
    assert not memory.rests("b", 5)


def test_a_prompt_that_comes_back_unchanged_rests_twice_as_long() -> None:
    memory, batch, lengths = DifficultyMemory(after=1, batches=1), 0, []
    for _ in range(8):
        memory.saw(group("a", "++"), batch)
        first = batch + 1
        while memory.rests("a", batch + 1):
            batch += 1
        lengths.append(batch + 1 - first)
        batch += 1
    assert lengths == [1, 2, 4, 8, 16, 32, 32, 32]


@pytest.mark.parametrize("other", ["+-", "--"])
def test_another_outcome_ends_the_row(other: str) -> None:
    memory = DifficultyMemory(after=2, batches=1)
    memory.saw(group("a", "++"), 0)
    memory.saw(group("a", other), 1)
    memory.saw(group("a", "++"), 2)
    assert rested(memory, "a") == []
    memory.saw(group("a", "++"), 3)
    assert memory.rests("a", 4)


def test_its_state_is_all_there_is() -> None:
    memory, other = DifficultyMemory(after=2, batches=3), DifficultyMemory(after=2, batches=3)
    for batch in range(3):
        memory.saw(group("a", "++"), batch)
    other.load_state_dict(memory.state_dict())
    for each in (memory, other):
        each.saw(group("a", "++"), 9)
    assert other.state_dict() == memory.state_dict() and rested(other, "a") == rested(memory, "a")
    other.load_state_dict({})  # a checkpoint of a run without it
    assert rested(other, "a") == []
