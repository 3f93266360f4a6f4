"""What a what-if changes, and which recorded answers a change leaves standing.

In: other prompts, another provider, temperature, tools, code. Out: :class:`Changes`, the same for every process that
works on the what-if.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import orjson

from schemas.events import Effect, LlmCalled, ToolCalled

__all__ = ["Changes"]

_NO_SUCH_TOOL = "UnknownTool"


@dataclass(frozen=True, slots=True)
class Changes:
    """``prompts`` are texts by name (:class:`agents.prompts.Prompts`). ``provider`` is to answer every call of a
    language model; ``ask`` answers those that nobody answered before, empty for nobody. ``model`` and ``base_url`` are
    theirs. ``without_tools`` are taken away, ``with_tools`` added. ``code`` is the commit whose code decides, empty for
    this one. ``recall`` says whether memory is asked as it is now.
    """

    prompts: Mapping[str, str] = field(default_factory=dict)
    provider: str = ""
    ask: str = ""
    model: str = ""
    base_url: str = ""
    temperature: float | None = None
    without_tools: tuple[str, ...] = ()
    with_tools: tuple[str, ...] = ()
    code: str = ""
    recall: bool = False

    def as_dict(self) -> dict[str, Any]:
        """All of them as JSON can hold them."""
        return asdict(self)

    def told(self) -> list[str]:
        """Each change in a few words."""
        said = [f"prompt {name}" for name in sorted(self.prompts)]
        if self.provider:
            said.append(f"provider {self.provider}{f', model {self.model}' if self.model else ''}")
        if self.temperature is not None:
            said.append(f"temperature {self.temperature:g}")
        said += [f"without tool {name}" for name in self.without_tools]
        said += [f"with tool {name}" for name in self.with_tools]
        if self.code:
            said.append(f"code of {self.code[:12]}")
        return said

    @property
    def rewrite(self) -> dict[str, Any]:
        """Fields of language model requests that have other values."""
        return {} if self.temperature is None else {"temperature": self.temperature}

    def stands(self, effect: Effect) -> bool:
        """Whether a recorded answer still is one, where its request is unchanged."""
        if isinstance(effect, LlmCalled) and self.provider:
            return effect.provider == self.provider and self.model in ("", effect.model)
        if isinstance(effect, ToolCalled):
            if effect.tool in self.without_tools:
                return False
            return not (effect.tool in self.with_tools and effect.error and self.refused(effect.error))
        return True

    @staticmethod
    def refused(error: str) -> bool:
        """Whether a recorded failure says that there is no such tool."""
        return bool(orjson.loads(error)["type"] == _NO_SUCH_TOOL)

    def gone(self, kind: str, request: str) -> bool:
        """Whether the request is for a tool that was taken away."""
        return kind == "ToolCalled" and orjson.loads(request)["tool"] in self.without_tools
