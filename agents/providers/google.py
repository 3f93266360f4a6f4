"""The Google adapter: the Gemini API by google-genai, the supported successor of google-generativeai.

In: a rendered prompt. Out: a completion. The SDK takes a second to import, so that happens on first use. The API knows
no idempotency keys, so none is sent.
"""

from typing import TYPE_CHECKING, ClassVar

from agents.context import LlmRequest
from agents.errors import EffectFailedError
from agents.providers.prompt import Prompt
from agents.providers.vendor import Completion, VendorModel, malformed, status_failure

if TYPE_CHECKING:
    import httpx
    from google.genai import Client

__all__ = ["GoogleModel"]


class GoogleModel(VendorModel):
    """Gemini, of Google or of a compatible server at ``base_url``."""

    name: str = "google"
    default_model: ClassVar[str] = "gemini-3.6-flash"

    _client: "Client | None" = None
    _http: "httpx.AsyncClient | None" = None

    async def _call(self, model: str, prompt: Prompt, request: LlmRequest, key: str) -> Completion:
        from google.genai import Client, types

        if self._client is None:
            import httpx

            # Given a client, the SDK does not look around for one: with aiohttp installed it would take that, whose
            # retries it can't be talked out of.
            self._http = httpx.AsyncClient(timeout=self._timeout_s)
            self._client = Client(
                api_key=self._api_key,
                vertexai=False,
                http_options=types.HttpOptions(
                    base_url=self._base_url or None,
                    timeout=int(self._timeout_s * 1000),
                    retry_options=types.HttpRetryOptions(attempts=1),
                    httpx_async_client=self._http,
                ),
            )
        response = await self._client.aio.models.generate_content(
            model=model,
            contents=[
                types.Content(
                    role="model" if turn.role == "assistant" else "user", parts=[types.Part(text=turn.content)]
                )
                for turn in prompt.turns
            ],
            config=types.GenerateContentConfig(
                system_instruction=prompt.system or None,
                temperature=request.temperature,
                max_output_tokens=request.max_tokens,
                response_mime_type=None if prompt.schema is None else "application/json",
                response_json_schema=prompt.schema,
            ),
        )
        if not response.candidates:
            blocked = response.prompt_feedback and response.prompt_feedback.block_reason
            if blocked:
                raise EffectFailedError(
                    "PromptBlocked", f"{self.name}: the prompt was blocked: {blocked}", retryable=False
                )
            raise malformed(self.name, "the response holds no candidates")
        usage, reason = response.usage_metadata, response.candidates[0].finish_reason
        return Completion(
            text=response.text or "",
            model=response.model_version or model,
            prompt_tokens=(usage and usage.prompt_token_count) or 0,
            completion_tokens=((usage and usage.candidates_token_count) or 0)
            + ((usage and usage.thoughts_token_count) or 0),
            finish_reason=reason.value.lower() if reason else "stop",
        )

    def _failure(self, error: Exception) -> EffectFailedError:
        import httpx
        from google.genai import errors

        if isinstance(error, errors.APIError):
            return status_failure(self.name, error.code or 0, error.message or str(error))
        if isinstance(error, httpx.TimeoutException):
            return EffectFailedError("Timeout", f"{self.name}: {error!r}", retryable=True)
        if isinstance(error, httpx.TransportError):
            return EffectFailedError("ConnectionFailed", f"{self.name}: {error!r}", retryable=True)
        return malformed(self.name, f"{type(error).__name__}: {error}")

    async def aclose(self) -> None:
        """Close the connections."""
        client, self._client = self._client, None
        http, self._http = self._http, None
        if client is not None:
            client.close()
        if http is not None:
            await http.aclose()
