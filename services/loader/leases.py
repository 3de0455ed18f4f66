"""Who holds which model: memory is never freed under a lease, and a lease is an open `Attach` stream."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from services.loader.loaded_model import LoadedModel
from shared.errors import Reason, ServiceError


class Leases:
    """The leases held now, each by the id that its executor gave."""

    def __init__(self) -> None:
        self._holders: dict[LoadedModel, list[str]] = {}

    def __len__(self) -> int:
        return sum(len(holders) for holders in self._holders.values())

    @contextlib.contextmanager
    def hold(self, model: LoadedModel, executor_id: str) -> Iterator[None]:
        """A lease, for as long as the context is open."""
        holders = self._holders.setdefault(model, [])
        holders.append(executor_id)
        try:
            yield
        finally:
            holders.remove(executor_id)
            if not holders:
                self._holders.pop(model, None)

    def holders(self, model: LoadedModel) -> tuple[str, ...]:
        return tuple(self._holders.get(model, ()))

    def require_none(self, model: LoadedModel) -> None:
        """Refuse to touch a model that is held.

        Raises:
            ServiceError: MODEL_IN_USE, naming the holders.
        """
        holders = self.holders(model)
        if holders:
            names = ", ".join(holders)
            why = f"model {model.manifest.model!r} is leased by {names}; stop them first."
            raise ServiceError(Reason.MODEL_IN_USE, why, metadata={"holders": names})
