"""What the vendors' adapters share: a client that is made on first use, a time limit, and errors made typed.

In: a request, and one vendor's call. Out: the port's response, or EffectFailedError that says whether another attempt
may succeed. SDKs are told not to retry: a retry is a recorded attempt of the processor's, or it is not accountable.
"""

import asyncio
import importlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from agents.context import LlmRequest, LlmResponse
from agents.errors import EffectFailedError
from agents.providers.prices import cost_usd
from agents.providers.prompt import Prompt, render

__all__ = ["Completion", "SdkModel", "VendorModel", "idempotency_headers", "malformed", "status_failure"]


@dataclass(frozen=True, slots=True)
class Completion:
    """What a vendor's call gave. ``completion_tokens`` holds all that is billed as output, reasoning too."""

    text: str
    model: str
    prompt_tokens: int
    completion_tokens: int
    finish_reason: str


class VendorModel(ABC):
    """A vendor's language model. ``timeout_s`` bounds a whole call; an empty ``base_url`` is the vendor's own."""

    name: str
    default_model: ClassVar[str]

    def __init__(self, *, api_key: str, model: str = "", base_url: str = "", timeout_s: float = 60.0) -> None:
        self._api_key = api_key
        self._model = model or self.default_model
        self._base_url = base_url
        self._timeout_s = timeout_s

    async def complete(self, request: LlmRequest, *, idempotency_key: str) -> LlmResponse:
        """Answer ``request``; see :class:`~agents.context.LanguageModel`.

        Raises:
            EffectFailedError: the call failed; ``retryable`` for timeouts, lost connections, rate limits, server errors
                and responses that can't be understood.
        """
        model = request.model or self._model
        try:
            async with asyncio.timeout(self._timeout_s):
                done = await self._call(model, render(request), request, idempotency_key)
        except EffectFailedError:
            raise
        except TimeoutError:
            raise EffectFailedError(
                "Timeout", f"{self.name}: {model} gave no answer within {self._timeout_s:g} s", retryable=True
            ) from None
        except Exception as error:
            raise self._failure(error) from error
        if not done.text.strip():
            raise EffectFailedError(
                "EmptyResponse", f"{self.name}: {model} answered nothing ({done.finish_reason})", retryable=False
            )
        return LlmResponse(
            text=done.text,
            provider=self.name,
            model=done.model,
            prompt_tokens=done.prompt_tokens,
            completion_tokens=done.completion_tokens,
            cost_usd=cost_usd(done.model, done.prompt_tokens, done.completion_tokens),
            finish_reason=done.finish_reason,
        )

    @abstractmethod
    async def aclose(self) -> None:
        """Close the connections. The model can be used again afterwards."""

    @abstractmethod
    async def _call(self, model: str, prompt: Prompt, request: LlmRequest, key: str) -> Completion:
        """One call by the vendor's SDK; ``key`` tells the vendor a repeat, if it takes one."""

    @abstractmethod
    def _failure(self, error: Exception) -> EffectFailedError:
        """What an error of the SDK means."""


class SdkModel(VendorModel):
    """A vendor whose SDK Stainless generates, as OpenAI and Anthropic have it: their clients and errors are alike."""

    sdk: ClassVar[str]
    """The SDK's module."""
    _client: Any = None

    def _failure(self, error: Exception) -> EffectFailedError:
        sdk: Any = importlib.import_module(self.sdk)
        if isinstance(error, sdk.APIStatusError):
            return status_failure(self.name, error.status_code, error.message)
        if isinstance(error, sdk.APITimeoutError):
            return EffectFailedError("Timeout", f"{self.name}: {error}", retryable=True)
        if isinstance(error, sdk.APIConnectionError):
            return EffectFailedError(
                "ConnectionFailed", f"{self.name}: {error} ({error.__cause__ or 'no cause given'})", retryable=True
            )
        return malformed(self.name, f"{type(error).__name__}: {error}")

    async def aclose(self) -> None:
        """Close the connections."""
        client, self._client = self._client, None
        if client is not None:
            await client.close()


def idempotency_headers(key: str) -> dict[str, str]:
    """The header of the IETF draft, which the SDKs send for nobody who does not set it themselves."""
    return {"Idempotency-Key": key}


def status_failure(provider: str, status: int, message: str) -> EffectFailedError:
    """The failure for an HTTP error status: timeouts, conflicts, rate limits and server errors are worth a retry."""
    retryable = status in (408, 409, 425, 429) or status >= 500
    return EffectFailedError(f"Http{status}", f"{provider}: {message}"[:1000], retryable=retryable)


def malformed(provider: str, what: object) -> EffectFailedError:
    """The failure for a response that is not what the vendor's API promises; a proxy's page, or half an answer."""
    return EffectFailedError("MalformedResponse", f"{provider}: {what}"[:1000], retryable=True)
