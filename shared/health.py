"""`python -m shared.health ADDRESS`: exits with 0 if a service says that it is healthy, as containers are asked."""

from __future__ import annotations

import asyncio
from typing import Any

import click
import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from shared.channel import open_channel
from shared.config import ClientConfig, client_config, client_options


async def is_healthy(address: str, config: ClientConfig, name: str, timeout: float) -> bool:
    """Whether a service answers and serves.

    Args:
        address: host:port.
        name: health name asked for; empty for the service as a whole.
        timeout: seconds.
    """
    async with open_channel(address, config) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        try:
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=timeout)
        except grpc.aio.AioRpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


@click.command()
@click.argument("address")
@client_options()
@click.option("--service", "name", default="", help="Health name; by default the service as a whole.")
@click.option("--timeout", type=float, default=3.0, show_default=True, help="Seconds.")
def main(address: str, name: str, timeout: float, **options: Any) -> None:
    """Ask a service for its health over gRPC."""
    raise SystemExit(0 if asyncio.run(is_healthy(address, client_config(options), name, timeout)) else 1)


if __name__ == "__main__":
    main()
