"""Which attempts at which images come next, and which seeds they get.

An attempt is a pair: the index of its prompt and its number among those of the prompt. Each image wanted has attempts of
its own: with ``images_per_prompt=2`` the numbers 0, 2, 4, ... belong to the first image of a prompt and 1, 3, 5, ... to
the second. So neither the number of an attempt nor its seed depends on how many are made at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from moe_artifacts.guard.run_folder import Attempt
from moe_artifacts.seeds import attempt_seed

Place = tuple[int, int]  # of an attempt: the index of its prompt, its number among those of the prompt


class AttemptQueue:
    """Attempts still to be made; each image wanted is attempted until one attempt is kept.

    Example:
        >>> queue = AttemptQueue(["a bag", "a coat"], images_per_prompt=2, max_attempts=4, seed=0)
        >>> queue.next(3)
        [(0, 0), (0, 1), (1, 0)]
    """

    def __init__(self, prompts: list[str], images_per_prompt: int, max_attempts: int, seed: int) -> None:
        self.wanted = len(prompts) * images_per_prompt
        self.kept: Counter[int] = Counter()  # images, by the index of their prompt
        self._prompts, self._occurrences = prompts, _occurrences(prompts)
        self._per_prompt = images_per_prompt
        self._end = images_per_prompt * max_attempts  # of a prompt's attempts
        self._seed = seed
        self._begun = 0  # images wanted that were attempted at least once: they are the first ones
        self._again: set[Place] = set()  # what takes the place of an attempt that was not kept

    def next(self, count: int) -> list[Place]:
        """The next attempts, at most ``count``: first those that take another's place, then first ones in order."""
        again = sorted(self._again)[:count]
        first = range(self._begun, min(self.wanted, self._begun + count - len(again)))
        return again + [divmod(number, self._per_prompt) for number in first]

    def settle(self, attempts: Iterable[Attempt]) -> None:
        """These were made, and are no longer to be made."""
        for made in attempts:
            self._again.discard((made.prompt_index, made.attempt))
            self._begun += made.attempt < self._per_prompt
            follower = made.attempt + self._per_prompt
            if made.kept:
                self.kept[made.prompt_index] += 1
            elif follower < self._end:
                self._again.add((made.prompt_index, follower))

    def missing(self) -> dict[int, tuple[int, int]]:
        """Of each prompt that lacks images: how many have used up their attempts, how many have not."""
        waiting = Counter(index for index, _ in self.next(self.wanted))
        lacking = {index: self._per_prompt - self.kept[index] for index in range(len(self._prompts))}
        return {index: (count - waiting[index], waiting[index]) for index, count in lacking.items() if count}

    def seed_of(self, place: Place) -> int:
        index, attempt = place
        return attempt_seed(self._seed, self._prompts[index], attempt, self._occurrences[index])


def _occurrences(prompts: list[str]) -> list[int]:
    """How often each prompt came before in the list.

    Example:
        >>> _occurrences(["a bag", "a coat", "a bag"])
        [0, 0, 1]
    """
    seen: Counter[str] = Counter()
    occurrences = []
    for prompt in prompts:
        occurrences.append(seen[prompt])
        seen[prompt] += 1
    return occurrences
