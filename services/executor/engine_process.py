"""The engine as a process of its own: it maps the weights, owns the KV blocks, and runs step after step.

It is started by `services.executor.engine_spawn` with its ends of two sockets, and told what to run by
`services.executor.engine_client`. It ends when the other ends are closed, so it never outlives its server.
"""

from __future__ import annotations

import gc
import logging
import os
import socket
import sys

from services.executor.backend import make_backend
from services.executor.engine import Engine
from services.executor.engine_spawn import DESCRIPTOR_SECONDS
from services.executor.messages import (
    AskStatus,
    Broken,
    Cancel,
    Command,
    EngineSocket,
    Events,
    Prepared,
    Ready,
    Setup,
    StatusAnswer,
    Submit,
)
from services.executor.request import RequestFailed
from services.executor.step import DeviceLostError
from shared.descriptors import close_all, receive_descriptors
from shared.errors import Reason, ServiceError
from shared.logs import set_up_logs

log = logging.getLogger(__name__)


def main(messages: int, descriptors: int, device: str) -> None:
    """Run the engine until the other ends of its two sockets are closed.

    Args:
        messages: descriptor of the socket for `services.executor.messages`.
        descriptors: of the one over which the weights' descriptors come.
        device: "cpu" or "cuda:N".
    """
    connection = EngineSocket(socket.socket(fileno=messages))
    try:
        engine = _start(connection, socket.socket(fileno=descriptors), device)
        if engine is not None:
            _run(connection, engine)
    except DeviceLostError:
        log.exception("the device is lost")
        os._exit(1)  # at once: its memory can't be freed in order
    except (EOFError, ConnectionError):
        return


def _start(connection: EngineSocket, weights: socket.socket, device: str) -> Engine | None:
    """The engine over the model that the server names; None where it can't be, as the server has been told."""
    try:
        backend = make_backend(device)
        connection.send(Prepared())
        setup = connection.receive()
        assert isinstance(setup, Setup)
        descriptors = _receive(weights, setup)
        try:
            runner = backend(setup.manifest, descriptors, setup.engine)
        finally:
            close_all(descriptors)  # mapped memory stays
        engine = Engine(runner, setup.engine)
    except ServiceError as error:
        connection.send(Broken(error))
        return None
    except MemoryError:
        connection.send(Broken(ServiceError(Reason.MEMORY_EXHAUSTED, "the KV blocks do not fit this host's memory")))
        return None
    gc.freeze()  # what lives as long as the process need not be walked again and again
    connection.send(Ready(engine.status()))
    return engine


def _receive(weights: socket.socket, setup: Setup) -> tuple[int, ...]:
    sizes = [allocation.num_bytes for allocation in setup.manifest.allocations]
    try:
        with weights:
            return receive_descriptors(weights, sizes, DESCRIPTOR_SECONDS)
    except OSError as error:
        raise ServiceError(Reason.INTERNAL, f"the weights' descriptors did not come: {error}") from error


def _run(connection: EngineSocket, engine: Engine) -> None:
    while True:
        while not engine.has_work or connection.has_command():
            _obey(connection, engine, connection.receive())
        events = engine.step()
        if events:
            connection.send(Events(events))
        if engine.is_broken:
            raise SystemExit(1)  # the server process ends too, and their supervisor starts both anew


def _obey(connection: EngineSocket, engine: Engine, command: Command) -> None:
    if isinstance(command, Submit):
        try:
            engine.submit(command.request)
        except ServiceError as error:
            connection.send(Events([RequestFailed(command.request.request_id, error)]))
    elif isinstance(command, Cancel):
        engine.cancel(command.request_id, command.index)
    elif isinstance(command, AskStatus):
        connection.send(StatusAnswer(engine.status()))
    else:
        raise AssertionError(f"unexpected command {command!r}")


if __name__ == "__main__":
    set_up_logs("engine", *sys.argv[4:])
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
