"""The OpenAI adapter: Chat Completions, of OpenAI or of any server that speaks it (vLLM, Ollama, LiteLLM, Azure v1).

In: a rendered prompt. Out: a completion. The SDK takes most of a second to import, so that happens on first use.
"""

import re
from typing import TYPE_CHECKING, Any, ClassVar, Final

from agents.context import LlmRequest
from agents.providers.prompt import Prompt
from agents.providers.vendor import Completion, SdkModel, idempotency_headers, malformed

if TYPE_CHECKING:
    from openai import AsyncOpenAI

__all__ = ["OpenAIModel"]

_REASONS: Final = re.compile(r"^(?:o\d|gpt-(?:[5-9]|\d\d))")
"""OpenAI's models that think before they answer: they refuse a temperature, and count the thinking as output."""

_THINKING_TOKENS: Final = 4096
"""Room for the thinking of such a model, on top of what the answer may take."""


class OpenAIModel(SdkModel):
    """OpenAI, or an OpenAI-compatible server at ``base_url``."""

    name: str = "openai"
    default_model: ClassVar[str] = "gpt-5.4-mini"
    sdk: ClassVar[str] = "openai"

    _client: "AsyncOpenAI | None" = None

    async def _call(self, model: str, prompt: Prompt, request: LlmRequest, key: str) -> Completion:
        if self._client is None:
            from openai import AsyncOpenAI

            self._client = AsyncOpenAI(
                api_key=self._api_key, base_url=self._base_url or None, timeout=self._timeout_s, max_retries=0
            )
        system = [{"role": "system", "content": prompt.system}] if prompt.system else []
        options: dict[str, Any] = {}
        if prompt.schema is not None:
            options["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": "response", "schema": prompt.schema, "strict": True},
            }
        if _REASONS.match(model):
            options["max_completion_tokens"] = request.max_tokens + _THINKING_TOKENS
        else:
            options |= {"max_tokens": request.max_tokens, "temperature": request.temperature}
        messages: list[Any] = [*system, *({"role": turn.role, "content": turn.content} for turn in prompt.turns)]
        response = await self._client.chat.completions.create(
            model=model, messages=messages, extra_headers=idempotency_headers(key), **options
        )
        choices = getattr(response, "choices", None)
        if not choices or choices[0].message is None:
            raise malformed(self.name, "the response holds no choices")
        usage = response.usage
        return Completion(
            text=choices[0].message.content or choices[0].message.refusal or "",
            model=response.model or model,
            prompt_tokens=usage.prompt_tokens if usage else 0,
            completion_tokens=usage.completion_tokens if usage else 0,
            finish_reason=choices[0].finish_reason or "stop",
        )
