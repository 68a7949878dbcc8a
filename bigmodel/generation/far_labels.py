"""Generation of models whose labels are further ahead than the next token.

An encoder-decoder with data.target_ahead = k reads the start token k times, then its own answer k tokens late. A
decoder whose objectives all have ahead above 1 predicts no next token, so it cannot generate.
"""

from collections.abc import Sequence

from bigmodel.config.settings import Settings, UserError


def next_input(start: int, answer: Sequence[int], target_ahead: int) -> int:
    """The decoder's input after these tokens of an answer."""
    return answer[-target_ahead] if len(answer) >= target_ahead else start


def predicts_next_token(settings: Settings) -> bool:
    """Whether an objective, or the targets of an encoder-decoder, can be generated token by token."""
    objectives = settings.data.wanted_objectives
    return settings.model.has_source or any(one.ahead == 1 for one in objectives)


def target_ahead_of(settings: Settings) -> int:
    """`data.target_ahead` of a run that generates. Raises `UserError` if it predicts no next token."""
    if not predicts_next_token(settings):
        ahead = min(one.ahead for one in settings.data.wanted_objectives)
        raise UserError(
            f"data.objectives: the run was trained to predict the token {ahead} ahead, never the next one, so it "
            "cannot generate text; choose a run with an objective of ahead = 1"
        )
    return settings.data.target_ahead
