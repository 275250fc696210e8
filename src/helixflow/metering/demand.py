"""What a call asks for, before anybody knows what it will use."""

from typing import Final

from msgspec import Struct

from helixflow.core.call import Call, Plan
from helixflow.dialects.openai_chat import ChatParams
from helixflow.dialects.openai_completions import CompletionParams

# A token has at least one byte, and what a template adds to each message is less than that message's JSON around it.
_TEMPLATE_TOKENS: Final = 64
# For expectations only: what a token is on average.
_BYTES_A_TOKEN: Final = 4


class Bounds(Struct, frozen=True, gc=False):
    """Tokens: at most of the prompt and of the answers, and as many as are expected in all."""

    prompt: int
    completion: int
    expected: int


NO_BOUNDS: Final = Bounds(0, 0, 0)


class Estimator:
    """Estimates by the size of a request, what it says and what its route is."""

    def __init__(self, *, expected_completion: int, media_tokens: int) -> None:
        self._expected_completion = expected_completion
        self._media_tokens = media_tokens

    def bounds(self, call: Call) -> Bounds:
        """Upper bounds that hold whatever engine serves it, and an expectation that is right on average.

        Of one attempt.
        """
        params = call.params
        context = plan_of(call).context
        if isinstance(params, ChatParams):
            media = params.media
            text = call.body_bytes - media.inlined_bytes
            # No request uses more than the context.
            prompt = min(text + _TEMPLATE_TOKENS + media.parts * self._media_tokens, context)
            expected = min(text // _BYTES_A_TOKEN + media.parts * self._media_tokens, prompt)
            answers = params.choices
        elif isinstance(params, CompletionParams):
            # Several prompts in one body have a context each.
            prompts = len(params.prompts)
            prompt = min(call.body_bytes + _TEMPLATE_TOKENS, context * prompts)
            expected, answers = min(call.body_bytes // _BYTES_A_TOKEN, prompt), prompts
        else:
            return Bounds(call.body_bytes + _TEMPLATE_TOKENS, 0, call.body_bytes // _BYTES_A_TOKEN)
        limit = params.answer_limit
        if limit is None:
            return Bounds(prompt, context * answers, expected + self._expected_completion * answers)
        return Bounds(prompt, limit, expected + limit)


def plan_of(call: Call) -> Plan:
    """That of its route: who is metered has one."""
    assert call.route is not None
    return call.route.plan


def estimate_prompt(call: Call) -> int:
    """Tokens of a prompt of which its engine does not say how long it was."""
    params = call.params
    inlined = params.media.inlined_bytes if isinstance(params, ChatParams) else 0
    return -(-(call.body_bytes - inlined) // _BYTES_A_TOKEN)
