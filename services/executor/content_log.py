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
        self._outputs: defaultdict[int, tuple[list[str], list[int]]] = defaultdict(lambda: ([], []))  # by index
        kind = request.WhichOneof("input")
        prompt = request.text if kind == "text" else str(getattr(request, kind)) if kind else ""
        prompt_ids = list(generation.request.prompt_token_ids)
        log.info("request %r of %r: prompt %r, ids %s", self._request_id, generation.caller, prompt, prompt_ids)

    def add(self, response: Any) -> None:
        """Take what was sent."""
        if response.HasField("delta"):
            texts, ids = self._outputs[response.delta.index]
            texts.append(response.delta.text)
            ids.extend(response.delta.token_ids)

    def close(self) -> None:
        """Write what was sent in all."""
        for index, (texts, ids) in sorted(self._outputs.items()):
            log.info("request %r: output %d %r, ids %s", self._request_id, index, "".join(texts), ids)
