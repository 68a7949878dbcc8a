"""Requests of rank 0, answered by all ranks: the harness runs on rank 0, the other ranks compute with it.

In: a forward function, a world. Out: scores and texts, on rank 0. Guarantees: results are bitwise equal at any world
size. Every rank makes a `SharedRequests` and calls `run`; an error on rank 0 is raised on every rank.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from bigmodel.config.settings import Settings, UserError
from bigmodel.data.store.tokenizer import Tokenizer
from bigmodel.distributed.world import World
from bigmodel.evaluation.packed_requests import Continuation, Forward, Score, TextRequest, continue_greedily, score

NOTHING: tuple[str, Any] = ("", None)  # the place of rank 0's message
Value = TypeVar("Value")
Generate = Callable[[Sequence[TextRequest], Sequence[int]], list[str]]  # of prompts and the seeds of their draws


class SharedRequests:
    """`generate`: another way to continue prompts, where each rank has the whole model."""

    def __init__(
        self,
        forward: Forward,
        world: World,
        settings: Settings,
        tokenizer: Tokenizer,
        packs_per_micro_batch: int = 1,
        generate: Generate | None = None,
        advance: Callable[[str, int, int], None] = lambda what, done, total: None,
    ) -> None:
        """`advance` is told of rank 0's requests: what is done with them, how many are done, how many there are."""
        self._forward, self._world, self._settings, self._tokenizer = forward, world, settings, tokenizer
        self._packs, self._own_generate, self._advance = packs_per_micro_batch, generate, advance

    def run(self, action: Callable[[], Value]) -> Value | None:
        """The result of `action` on rank 0, None on the others, which answer until it ends. Collective."""
        if self._world.rank > 0:
            self._follow()
            return None
        error: Exception | None = None
        try:
            return action()
        except UserError as raised:
            error = raised
            raise
        except BaseException as raised:  # a process boundary: the other ranks must not wait
            error = RuntimeError(f"rank 0 failed: {type(raised).__name__}: {raised}")  # any process can read this one
            raise
        finally:
            self._world.broadcast_object(("end", error))

    def score(self, requests: Sequence[Continuation]) -> list[Score]:
        """On rank 0, inside `run`."""
        self._world.broadcast_object(("score", list(requests)))
        return self._score(requests)

    def generate(self, prompts: Sequence[TextRequest]) -> list[str]:
        """On rank 0, inside `run`. Only an own way of generating draws at random."""
        assert self._own_generate or not any(prompt.sampling for prompt in prompts), (
            "these ranks continue prompts greedily"
        )
        self._world.broadcast_object(("generate", list(prompts)))
        return self._generate(prompts)

    def _follow(self) -> None:
        while True:
            what, given = self._world.broadcast_object(NOTHING)
            if what == "end":
                if given:
                    raise given
                return
            if what == "score":
                self._score(given)
            else:
                self._generate(given)

    def _score(self, requests: Sequence[Continuation]) -> list[Score]:
        done = 0

        def advance(more: int) -> None:
            nonlocal done
            done = min(len(requests), done + more * self._world.size)
            self._advance("requests", done, len(requests))

        return score(self._forward, self._world, requests, self._settings.data, self._packs, advance)

    def _generate(self, prompts: Sequence[TextRequest]) -> list[str]:
        if self._own_generate:
            rank, size = self._world.rank, self._world.size
            mine = self._own_generate(prompts[rank::size], range(rank, len(prompts), size))
            parts = self._world.gather_objects(mine)
            return [parts[number % size][number // size] for number in range(len(prompts))]
        tokenizer, ended = self._tokenizer, 0

        def is_done(number: int, ids: list[int]) -> bool:
            nonlocal ended
            prompt, text = prompts[number], tokenizer.decode(ids)
            over = ids[-1] == tokenizer.eos or len(ids) >= prompt.max_tokens or any(end in text for end in prompt.stop)
            ended += over
            self._advance("texts", ended, len(prompts))
            return over

        starts = [prompt.start for prompt in prompts]
        found = continue_greedily(self._forward, self._world, starts, self._settings.data, is_done, self._packs)
        return [tokenizer.decode(ids) for ids in found]
