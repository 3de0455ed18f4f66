"""One service as a child process: started, read, stopped."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

TETHER = Path(__file__).with_name("tether.py")
_LISTENING = re.compile(r"\w+ (listening|metrics) on (\S+)$")
_MAX_LINE_BYTES = 1 << 20


class Child:
    """A service that runs as ``python -m services.NAME``, in a session of its own so that Ctrl-C is not its to hear.

    Args:
        name: of the service: "loader", "tokenizer" or "executor".
        label: what its lines are marked with.
        listen: address to listen on; once the service has said which port it got, a restart keeps to it.
        options: further command line options.
        on_line: called with each line that it writes, without its end.
    """

    def __init__(
        self, name: str, label: str, listen: str, options: Sequence[str], on_line: Callable[[str, str], None]
    ) -> None:
        self.name = name
        self.label = label
        self._listen = listen
        self._options = list(options)
        self._on_line = on_line
        self.metrics = ""  # where they are served, once it has said so
        self._process: asyncio.subprocess.Process | None = None
        self._reading: asyncio.Task[None] | None = None
        self._address: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    @property
    def process_id(self) -> int:
        """Of the process that runs now, or ran last."""
        assert self._process is not None
        return self._process.pid

    async def start(self) -> None:
        """Start it, or start it again."""
        interpreter = [sys.executable, "-I", "-S", str(TETHER), str(os.getpid())]
        command = [sys.executable, "-m", f"services.{self.name}", "--listen", self._listen, *self._options]
        self._process = await asyncio.create_subprocess_exec(
            *interpreter,
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
            limit=_MAX_LINE_BYTES,
        )
        self._reading = asyncio.create_task(self._read(self._process))

    async def address(self) -> str:
        """Where it listens, as soon as it does; waits for ever if it never will (see `wait`)."""
        return await asyncio.shield(self._address)

    async def wait(self) -> str:
        """Wait until it has ended and all that it wrote was read; returns how it ended, for a person."""
        assert self._process is not None
        assert self._reading is not None
        code = await self._process.wait()
        with contextlib.suppress(asyncio.TimeoutError):
            # A grandchild may hold the pipe open.
            await asyncio.wait_for(asyncio.shield(self._reading), 1.0)
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"

    async def stop(self, seconds: float) -> bool:
        """Ask it to end, and make it after so many seconds; whether it ended by itself."""
        if self._process is None or self._process.returncode is not None:
            return True
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        try:
            await asyncio.wait_for(self.wait(), seconds)
        except TimeoutError:
            self.kill()
            await self.wait()
            return False
        return True

    def kill(self) -> None:
        """End it, and whatever it has started, at once."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        async for line_bytes in process.stdout:
            line = line_bytes.decode(errors="replace").rstrip()
            found = _LISTENING.match(line)
            if found is not None and found[1] == "metrics":
                self.metrics = found[2]
            elif found is not None:
                self._listen = found[2]
                if not self._address.done():
                    self._address.set_result(found[2])
            else:
                self._on_line(self.label, line)
