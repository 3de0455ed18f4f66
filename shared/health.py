"""`python -m shared.health ADDRESS`: exits with 0 if a service says that it is healthy, as containers are asked.

Otherwise it exits with 1 and says on stderr why, in one line.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import click
import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from shared.channel import open_channel
from shared.config import ClientConfig, client_config, client_options


async def is_healthy(address: str, config: ClientConfig, name: str, timeout: float) -> bool:
    """Whether a service answers and serves; see `fault`."""
    return await fault(address, config, name, timeout) is None


async def fault(address: str, config: ClientConfig, name: str, timeout: float) -> str | None:
    """Why a service is not healthy; None if it answers and serves.

    Args:
        address: host:port.
        name: health name asked for; empty for the service as a whole.
        timeout: seconds.

    Raises:
        OSError, ValueError: when a file of `config` can't be read or holds what it should not.
    """
    async with open_channel(address, config) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        try:
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=timeout)
        except grpc.aio.AioRpcError as error:
            return ": ".join(part for part in (error.code().name, error.details()) if part)
    if answer.status == health_pb2.HealthCheckResponse.SERVING:
        return None
    return f"it answers {health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)}"


@click.command()
@click.argument("address")
@client_options()
@click.option("--service", "name", default="", help="Health name; by default the service as a whole.")
@click.option("--timeout", type=float, default=3.0, show_default=True, help="Seconds.")
def main(address: str, name: str, timeout: float, **options: Any) -> None:
    """Ask a service for its health over gRPC."""
    config = client_config(options)
    try:
        why = asyncio.run(fault(address, config, name, timeout))
    except (OSError, ValueError) as error:
        why = str(error)
    if why is not None:
        print(f"{address}: {' '.join(why.split())}", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main()
