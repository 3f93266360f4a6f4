"""The Anthropic adapter: the Messages API.

In: a rendered prompt. Out: a completion. The SDK takes two seconds to import, so that happens on first use. It has no
temperature any more, so a request's is not passed on.
"""

from typing import TYPE_CHECKING, Any, ClassVar

from agents.context import LlmRequest
from agents.providers.prompt import Prompt
from agents.providers.vendor import Completion, SdkModel, idempotency_headers, malformed

if TYPE_CHECKING:
    from anthropic import AsyncAnthropic

__all__ = ["AnthropicModel"]


class AnthropicModel(SdkModel):
    """Claude, of Anthropic or of a compatible server at ``base_url``."""

    name: str = "anthropic"
    default_model: ClassVar[str] = "claude-haiku-4-5"
    sdk: ClassVar[str] = "anthropic"

    _client: "AsyncAnthropic | None" = None

    async def _call(self, model: str, prompt: Prompt, request: LlmRequest, key: str) -> Completion:
        if self._client is None:
            from anthropic import AsyncAnthropic

            self._client = AsyncAnthropic(
                api_key=self._api_key, base_url=self._base_url or None, timeout=self._timeout_s, max_retries=0
            )
        options: dict[str, Any] = {}
        if prompt.system:
            options["system"] = prompt.system
        if prompt.schema is not None:
            options["output_config"] = {"format": {"type": "json_schema", "schema": prompt.schema}}
        messages: list[Any] = [{"role": turn.role, "content": turn.content} for turn in prompt.turns]
        response = await self._client.messages.create(
            model=model,
            max_tokens=request.max_tokens,
            messages=messages,
            extra_headers=idempotency_headers(key),
            **options,
        )
        blocks, usage = getattr(response, "content", None), getattr(response, "usage", None)
        if blocks is None or usage is None:
            raise malformed(self.name, "the response holds no content or no usage")
        cached = (usage.cache_creation_input_tokens or 0) + (usage.cache_read_input_tokens or 0)
        return Completion(
            text="".join(block.text for block in blocks if block.type == "text"),
            model=response.model or model,
            prompt_tokens=usage.input_tokens + cached,
            completion_tokens=usage.output_tokens,
            finish_reason=response.stop_reason or "stop",
        )
