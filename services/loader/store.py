"""The models that are loaded, by name, alias and digest."""

from __future__ import annotations

from collections.abc import Sequence

from services.loader.loaded_model import LoadedModel
from shared.errors import Reason, ServiceError


class ModelStore:
    """Loaded models; each name and alias stands for one of them."""

    def __init__(self) -> None:
        self._by_name: dict[str, LoadedModel] = {}  # names and aliases

    @property
    def models(self) -> list[LoadedModel]:
        """All of them, by name."""
        unique = {model.manifest.model: model for model in self._by_name.values()}
        return [unique[name] for name in sorted(unique)]

    @property
    def resident_bytes(self) -> int:
        return sum(model.resident_bytes for model in self.models)

    def get(self, name: str) -> LoadedModel | None:
        """The model of a name or alias."""
        return self._by_name.get(name)

    def find(self, key: str) -> LoadedModel:
        """The model of a name, alias or digest; with an empty key, the only one.

        Raises:
            ServiceError: MODEL_NOT_FOUND, with the names that there are.
        """
        models = self.models
        if key in self._by_name:
            return self._by_name[key]
        for model in models:
            if key in ("", model.manifest.digest) and (key or len(models) == 1):
                return model
        names = ", ".join(model.manifest.model for model in models) or "none"
        what = f"no model {key!r} is loaded" if key else "name a model: there is not exactly one"
        raise ServiceError(Reason.MODEL_NOT_FOUND, f"{what}; loaded: {names}.")

    def require_free(self, names: Sequence[str], instead_of: LoadedModel | None = None) -> None:
        """Refuse names of which one stands for another model than `instead_of`.

        Raises:
            ServiceError: MODEL_NAME_IN_USE.
        """
        for name in names:
            other = self._by_name.get(name)
            if other is not None and other is not instead_of:
                raise name_in_use(name, f"model {other.manifest.model!r}, digest {other.manifest.digest}")

    def add(self, model: LoadedModel) -> None:
        self.require_free(model.names)
        self._by_name.update(dict.fromkeys(model.names, model))

    def remove(self, model: LoadedModel) -> None:
        self._by_name = {name: other for name, other in self._by_name.items() if other is not model}


def name_in_use(name: str, holder: str) -> ServiceError:
    """The error (to be raised) for a name that stands for something else."""
    return ServiceError(
        Reason.MODEL_NAME_IN_USE, f"the name {name!r} is in use by {holder}; unload it or take another."
    )
