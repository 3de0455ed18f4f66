"""A channel with TLS that follows its certificate files: services run longer than the certificates that they show."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

from shared.watched import Watched


class FollowingChannel:
    """Opens a new channel for the first call after a file has changed; to stubs it is a channel of the same kind.

    Calls that run stay on the channel that they began on, which ends with the last of them.

    Args:
        paths: the files.
        open_channel: opens a channel, of grpc or grpc.aio, with what is in them now.

    Raises:
        OSError: what `open_channel` raises the first time.
    """

    def __init__(self, paths: Sequence[Path], open_channel: Callable[[], Any]) -> None:
        self._channel = Watched(paths, open_channel)

    def unary_unary(self, *method: Any, **options: Any) -> Callable[..., Any]:
        return self._caller("unary_unary", method, options)

    def unary_stream(self, *method: Any, **options: Any) -> Callable[..., Any]:
        return self._caller("unary_stream", method, options)

    def stream_unary(self, *method: Any, **options: Any) -> Callable[..., Any]:
        return self._caller("stream_unary", method, options)

    def stream_stream(self, *method: Any, **options: Any) -> Callable[..., Any]:
        return self._caller("stream_stream", method, options)

    def get_state(self, try_to_connect: bool = False) -> Any:
        """The connectivity of the channel that a call would take."""
        return self._channel.get().get_state(try_to_connect=try_to_connect)

    async def wait_for_state_change(self, last_state: Any) -> None:
        """Wait until the channel that was current has another connectivity; for a channel of grpc.aio."""
        await self._channel.last.wait_for_state_change(last_state)

    def close(self) -> Any:
        """Close the channel that is current; its calls are cancelled. To be awaited for a channel of grpc.aio."""
        return self._channel.last.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _caller(self, kind: str, method: tuple[Any, ...], options: dict[str, Any]) -> Callable[..., Any]:
        """What a stub keeps for one of its methods and calls with a request; the channel is picked at each call."""

        def call(*arguments: Any, **settings: Any) -> Any:
            return getattr(self._channel.get(), kind)(*method, **options)(*arguments, **settings)

        return call
