"""Language models behind one port: ``extractive``, which needs nothing, and the vendors' adapters.

In: a provider's name and settings. Out: a :class:`~agents.context.LanguageModel`. Vendor SDKs are imported only when a
model of theirs is called for the first time.
"""

from typing import Final

from agents.context import LanguageModel
from agents.errors import ProviderError

__all__ = ["PROVIDERS", "create_provider"]

PROVIDERS: Final = ("extractive", "openai", "anthropic", "google")
"""The names that :func:`create_provider` knows."""


def create_provider(
    name: str = "extractive",
    *,
    api_key: str = "",
    model: str = "",
    base_url: str = "",
    timeout_s: float = 60.0,
) -> LanguageModel:
    """The language model that ``name`` stands for; an empty ``model`` takes the provider's default.

    ``base_url`` points a vendor's adapter at another server that speaks its protocol; with one, ``openai`` needs no
    key, as local servers ask for none. ``timeout_s`` bounds one call. ``extractive`` heeds none of these.

    Raises:
        ProviderError: there is no provider of that name, or its key is missing.
    """
    if name == "extractive":
        from agents.providers.extractive import ExtractiveModel

        return ExtractiveModel()
    if name not in PROVIDERS:
        raise ProviderError(f"there is no language model provider {name!r}; choose one of: {', '.join(PROVIDERS)}")
    if name == "openai" and base_url and not api_key:
        api_key = "none"
    if not api_key:
        raise ProviderError(
            f"the provider {name!r} needs an API key; set one, or choose 'extractive', which needs none"
        )
    if name == "openai":
        from agents.providers.openai import OpenAIModel

        return OpenAIModel(api_key=api_key, model=model, base_url=base_url, timeout_s=timeout_s)
    if name == "anthropic":
        from agents.providers.anthropic import AnthropicModel

        return AnthropicModel(api_key=api_key, model=model, base_url=base_url, timeout_s=timeout_s)
    from agents.providers.google import GoogleModel

    return GoogleModel(api_key=api_key, model=model, base_url=base_url, timeout_s=timeout_s)
