"""Serves a policy to robots over a websocket, in openpi-client's format.

    python -m experiments.serve --checkpoint=checkpoints/pi0_aloha_mini/300
    python -m experiments.serve --checkpoint=gs://openpi-assets/checkpoints/pi05_droid --robot=droid \\
        --model.action_horizon=15 --port=8001

Ctrl-C or SIGTERM answers the requests under way and ends. docs/deploy.md tells the rest.
"""

from __future__ import annotations

import asyncio
import os
import signal

from absl import flags as absl_flags

from experiments import flags, policy_flags
from openpi_port.serving.server import Options, Server, require_port

HOST = absl_flags.DEFINE_string("host", "0.0.0.0", "address to listen on; 127.0.0.1 for this machine alone")
PORT = absl_flags.DEFINE_integer("port", 8000, "port; 0 takes a free one", 0, 65535)
MAX_BATCH = absl_flags.DEFINE_integer("max_batch", 8, "requests in one pass of the model", 1)
WAIT_MS = absl_flags.DEFINE_float("wait_ms", 2.0, "how long a request may wait for other clients'", 0)
MAX_MESSAGE_MB = absl_flags.DEFINE_integer("max_message_mb", 32, "largest request", 1)
MAX_CLIENTS = absl_flags.DEFINE_integer("max_clients", 64, "connections at once", 1)
TIMEOUT_S = absl_flags.DEFINE_float("timeout_s", 30.0, "for one answer", 0.001)
METADATA = absl_flags.DEFINE_string("metadata", None, "JSON to tell clients beside what the policy says of itself")
REALTIME = absl_flags.DEFINE_bool("realtime", False, "warm up for robots that send the previous chunk along, too")

API_KEY = "OPENPI_PORT_API_KEY"  # in the environment: a command line can be read by everybody


def main() -> None:
    """Opens, warms up, serves."""
    policy_flags.checkpoint()
    more = policy_flags.json_object(METADATA) or {}
    require_port(HOST.value, PORT.value)  # now, not when the model is ready
    policy = policy_flags.policy()
    policy.metadata.update(more)
    options = Options(
        host=HOST.value,
        port=PORT.value,
        api_key=os.environ.get(API_KEY) or None,
        max_message=MAX_MESSAGE_MB.value * 2**20,
        max_clients=MAX_CLIENTS.value,
        max_batch=MAX_BATCH.value,
        wait_s=WAIT_MS.value / 1e3,
        timeout_s=TIMEOUT_S.value,
    )
    sizes = [n for n in (1, 2, 4, 8, 16, 32, 64) if n < 2 * MAX_BATCH.value]
    print(f"warming up for {', '.join(map(str, sizes))} requests at once", flush=True)
    policy.warmup(sizes, realtime=REALTIME.value)
    asyncio.run(serve(Server(policy, options), options))


async def serve(server: Server, options: Options) -> None:
    """Runs until a signal asks to stop."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    port = await server.start()
    guarded = f"with the API key of ${API_KEY}" if options.api_key else f"open to everybody (${API_KEY} is not set)"
    print(f"serving on ws://{options.host}:{port}, {guarded}; /healthz and /metrics answer HTTP", flush=True)
    await stop.wait()
    print("stopping", flush=True)
    await server.stop()


if __name__ == "__main__":
    flags.run(main)
