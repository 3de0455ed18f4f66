"""What clients ask and what they are answered, in the log of an operator who wants that (--log-content)."""

from __future__ import annotations

import logging
from collections import defaultdict
from typing import Any

from services.executor.generation import Generation

log = logging.getLogger(__name__)


class ContentLog:
    """Writes one line for a request, and at its end one for each of its outputs."""

    def __init__(self, generation: Generation, request: Any) -> None:
        self._request_id = generation.request_id
        self._texts: defaultdict[int, list[str]] = defaultdict(list)  # by output index
        kind = request.WhichOneof("input")
        prompt = request.text if kind == "text" else str(getattr(request, kind)) if kind else ""
        prompt_ids = list(generation.request.prompt_token_ids)
        log.info("request %r of %r: prompt %r, ids %s", self._request_id, generation.caller, prompt, prompt_ids)

    def add(self, response: Any) -> None:
        """Take what was sent."""
        if response.HasField("delta"):
            delta = response.delta
            self._texts[delta.index].append(delta.text or " ".join(map(str, delta.token_ids)) + " ")

    def close(self) -> None:
        """Write what was sent in all."""
        for index, texts in sorted(self._texts.items()):
            log.info("request %r: output %d %r", self._request_id, index, "".join(texts))
