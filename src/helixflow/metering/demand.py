"""What a call asks for, before anybody knows what it will use."""

from collections.abc import Mapping, Sequence
from typing import Final

from msgspec import Struct

from helixflow.core.call import Call
from helixflow.dialects.openai_chat import ChatParams
from helixflow.dialects.openai_completions import DEFAULT_MAX_TOKENS, CompletionParams

# A token has at least one byte, and what a template adds to each message is less than that message's JSON around it.
_TEMPLATE_TOKENS: Final = 64
# For expectations only: what a token is on average.
_BYTES_A_TOKEN: Final = 4
_IMAGE: Final = b'"image_url"'
_ADDRESS: Final = b'"http'


class ModelPlan(Struct, frozen=True):
    """The deployments of a public model that may serve a call, and the most tokens one of them takes in a request."""

    deployments: Sequence[str]
    context: int


class Bounds(Struct, frozen=True, gc=False):
    """Tokens: at most of the prompt and of the answers, and as many as are expected in all."""

    prompt: int
    completion: int
    expected: int


NO_BOUNDS: Final = Bounds(0, 0, 0)


class Estimator:
    """Estimates by the size of a request and what it says. `models` holds all models that are served."""

    def __init__(self, models: Mapping[str, ModelPlan], *, expected_completion: int, media_tokens: int) -> None:
        self._models = models
        self._expected_completion = expected_completion
        self._media_tokens = media_tokens

    def plan(self, model: str) -> ModelPlan:
        return self._models[model]

    def bounds(self, call: Call) -> Bounds:
        """Upper bounds that hold whatever engine serves it, and an expectation that is right on average."""
        params = call.params
        size = call.body_bytes
        context = self._models[call.model].context
        if isinstance(params, ChatParams):
            limit, answers, prompts = params.token_limit, params.n or 1, 1
            media = self._media(call)
        elif isinstance(params, CompletionParams):
            limit = DEFAULT_MAX_TOKENS if params.max_tokens is None else params.max_tokens
            prompts = len(params.prompts)
            answers, media = max(params.best_of or 1, params.n or 1) * prompts, 0
        else:
            return Bounds(size + _TEMPLATE_TOKENS, 0, size // _BYTES_A_TOKEN)
        # No request uses more than the context; several prompts in one body have one each.
        prompt = min(size + _TEMPLATE_TOKENS + media, context * prompts)
        expected = min(size // _BYTES_A_TOKEN + media, prompt)
        if limit is None:
            return Bounds(prompt, context * answers, expected + self._expected_completion * answers)
        completion = min(limit, context) * answers
        return Bounds(prompt, completion, expected + completion)

    def _media(self, call: Call) -> int:
        """What images given by their address may take: the body does not show their size."""
        messages = bytes(call.fields["messages"])
        if _IMAGE not in messages:
            return 0
        return min(messages.count(_IMAGE), messages.count(_ADDRESS)) * self._media_tokens
