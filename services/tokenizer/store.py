"""The tokenizers that this process serves: that of one file, or those of a loader's models, kept by digest."""

from __future__ import annotations

import asyncio
import logging
import os
from collections import OrderedDict
from pathlib import Path
from threading import Event
from typing import Any, Protocol

import grpc

from mxgpt.v1 import loader_pb2, loader_pb2_grpc
from services.tokenizer.backends import Tokenizer, make_tokenizer
from shared.calls import Calls
from shared.channel import Channel
from shared.digest import digest_of
from shared.errors import Reason, ServiceError
from shared.gguf import read_gguf
from shared.pins import Pins
from shared.rpc_errors import from_peer_error
from shared.tokenizer_data import read_tokenizer_json, tokenizer_data_from_gguf
from shared.tokenizer_data_proto import from_pieces

log = logging.getLogger(__name__)

MAX_TOKENIZERS = 4  # kept; one of 200,000 tokens takes about 150 MB
LIST_SECONDS = 2.0  # deadlines of calls to the loader
FETCH_SECONDS = 60.0


class TokenizerStore(Protocol):
    """Finds tokenizers by the model's name, alias or digest."""

    @property
    def tokenizers(self) -> list[Tokenizer]:
        """Those at hand."""
        ...

    async def find(self, model: str) -> Tokenizer:
        """The tokenizer of a model; of the only one, where the name is empty.

        Raises:
            ServiceError: MODEL_NOT_FOUND, LOADER_UNAVAILABLE, TOKENIZER_UNSUPPORTED, MODEL_INVALID.
        """
        ...


class FileStore:
    """The tokenizer of one GGUF file, and of a tokenizer.json if one is named or lies beside it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    @classmethod
    def read(cls, path: Path, tokenizer_json: Path | None = None, pins: Pins | None = None) -> FileStore:
        """Read the files; a model is hashed in full for its digest.

        Raises:
            ServiceError: as `read_gguf` and `make_tokenizer`; MODEL_CHANGED for a file that is not as pinned.
        """
        gguf = read_gguf(path)
        file_pins = pins.of(gguf.paths) if pins else ()
        beside = path.with_name("tokenizer.json")
        named = tokenizer_json or (beside if beside.is_file() else None)
        contents = read_tokenizer_json(named) if named else b""
        if named and pins:
            pins.check(named, contents)
        data = tokenizer_data_from_gguf(
            gguf,
            model=path.stem,
            digest=digest_of(gguf, pins=file_pins, num_threads=os.cpu_count() or 1, stop=Event()),
            tokenizer_json=contents,
        )
        return cls(make_tokenizer(data))

    @property
    def tokenizers(self) -> list[Tokenizer]:
        return [self._tokenizer]

    async def find(self, model: str) -> Tokenizer:
        data = self._tokenizer.data
        if model not in ("", data.model, data.digest):
            raise _not_found(model, [data.model])
        return self._tokenizer


class LoaderStore:
    """The tokenizers of a loader's models. What was fetched once is served on while the loader is away."""

    def __init__(self, channel: Channel, calls: Calls) -> None:
        self._calls = calls
        self.is_loader_there = False  # at the last refresh
        self._stub: Any = loader_pb2_grpc.LoaderServiceStub(channel)
        self._models: dict[str, str] = {}  # name -> digest
        self._digests: dict[str, str] = {}  # name, alias or digest -> digest
        self._tokenizers: OrderedDict[str, Tokenizer] = OrderedDict()  # by digest, the least used first
        self._fetches: dict[str, asyncio.Task[Tokenizer]] = {}

    @property
    def tokenizers(self) -> list[Tokenizer]:
        return list(self._tokenizers.values())

    @property
    def is_ready(self) -> bool:
        """At least one tokenizer can be served."""
        return bool(self._tokenizers)

    async def find(self, model: str) -> Tokenizer:
        digest = self._resolve(model)
        if digest is None:
            await self.refresh()
            digest = self._resolve(model)
        if digest is None:
            raise _not_found(model, sorted(self._models))
        return await self._tokenizer(digest)

    async def refresh(self) -> None:
        """Ask the loader for its models: names may be new, and a name may stand for other files now.

        Raises:
            ServiceError: LOADER_UNAVAILABLE; what was known stays known.
        """
        request = loader_pb2.ListModelsRequest()
        with self._calls.peer("LoaderService", "ListModels") as peer:
            try:
                call = self._stub.ListModels(request, timeout=LIST_SECONDS, metadata=peer.metadata)
                models = (await call).models
            except grpc.aio.AioRpcError as error:
                self.is_loader_there = False
                raise _loader_error(error) from None
        self.is_loader_there = True
        self._models = {model.name: model.digest for model in models}
        self._digests = {name: model.digest for model in models for name in (model.digest, *model.aliases)}
        self._digests |= self._models

    async def prefetch(self) -> None:
        """Fetch the tokenizers of all models listed, as many as are kept.

        Raises:
            ServiceError: as `find`, of the first that fails.
        """
        for digest in [*self._models.values()][:MAX_TOKENIZERS]:
            await self._tokenizer(digest)

    def _resolve(self, model: str) -> str | None:
        if model in self._tokenizers:
            return model
        if not model and len(self._models) == 1:
            return next(iter(self._models.values()))
        return self._digests.get(model)

    async def _tokenizer(self, digest: str) -> Tokenizer:
        if digest in self._tokenizers:
            self._tokenizers.move_to_end(digest)
            return self._tokenizers[digest]
        fetch = self._fetches.get(digest)
        if fetch is None:
            fetch = self._fetches[digest] = asyncio.create_task(self._fetch(digest))
            fetch.add_done_callback(lambda _: self._fetches.pop(digest))
        return await asyncio.shield(fetch)  # others may wait for it too

    async def _fetch(self, digest: str) -> Tokenizer:
        request = loader_pb2.GetTokenizerDataRequest(model=digest)
        with self._calls.peer("LoaderService", "GetTokenizerData") as peer:
            try:
                call = self._stub.GetTokenizerData(request, timeout=FETCH_SECONDS, metadata=peer.metadata)
                pieces = [piece async for piece in call]
            except grpc.aio.AioRpcError as error:
                raise _loader_error(error) from None
        tokenizer = await asyncio.to_thread(lambda: make_tokenizer(from_pieces(pieces)))
        self._tokenizers[digest] = tokenizer
        if len(self._tokenizers) > MAX_TOKENIZERS:
            self._tokenizers.popitem(last=False)
        log.info("serving the %s tokenizer of %s (%s)", tokenizer.backend, tokenizer.data.model, digest)
        return tokenizer


def _loader_error(error: grpc.aio.AioRpcError) -> ServiceError:
    found = from_peer_error(error, Reason.LOADER_UNAVAILABLE)
    if found.reason in (Reason.DEADLINE, Reason.DRAINING):
        return ServiceError(Reason.LOADER_UNAVAILABLE, f"{Reason.LOADER_UNAVAILABLE.meaning} ({found.message})")
    return found


def _not_found(model: str, known: list[str]) -> ServiceError:
    which = f"No model {model!r:.100} is known here" if model else "The request names no model"
    return ServiceError(Reason.MODEL_NOT_FOUND, f"{which}; known are: {', '.join(known) or 'none'}.")
