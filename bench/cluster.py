"""What the way over Ray Serve costs, on one machine: `python -m bench.cluster`.

The bundled person model behind `limner serve`, and behind `service.cluster` with one ingress and one replica that has
the same threads, one after the other in one run. `--write FILE` writes the page, `--quick` tries the program.
"""

import argparse
import signal
import sys
from datetime import date
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench.machine import processor
from bench.results import publish
from bench.serving import CORES, Row, free_port, measure, serving

BUNDLES = Path("bundles").resolve()
CLIENTS = (1, 8)
# No reports to Ray's makers, and nothing that listens beyond this machine.
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "PYTHONPATH": str(Path.cwd())}


def serve_on_ray(port: int) -> None:
    """A cluster of one node, until SIGTERM. Cores are counted twice: the plain service's door shares its own, too."""
    from service.cluster import Arguments, app

    ray: Any = import_module("ray")
    serve: Any = import_module("ray.serve")
    ray.init("local", num_cpus=2 * CORES, include_dashboard=False, object_store_memory=200 * 2**20, log_to_driver=False)
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    arguments = {"bundles": BUNDLES, "cpus": CORES, "max_replicas": 1, "log_format": "json"}
    serve.run(app(Arguments.model_validate(arguments)), route_prefix="/")
    signal.sigwait({signal.SIGTERM})
    serve.shutdown()


def rows(command: list[str], port: int, seconds: float, environment: dict[str, str]) -> dict[int, Row]:
    with serving(command, port, "/readyz", environment) as pid:
        found = {clients: measure(port, pid, seconds, "--clients", str(clients)) for clients in CLIENTS}
    if wrong := [row["statuses"] for row in found.values() if set(row["statuses"]) != {"200"}]:
        raise SystemExit(f"{' '.join(command[1:4])} answered {wrong[0]}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the page there, too")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each load")
    parser.add_argument("--quick", action="store_true", help="two seconds each")
    parser.add_argument("--serve", type=int, metavar="PORT", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        return serve_on_ray(options.serve)
    seconds = 2.0 if options.quick else options.seconds
    port = free_port()
    command = [sys.executable, "limner.py", "serve", "--port", str(port), "--bundles", str(BUNDLES)]
    plain = rows([*command, "--log-format", "json"], port, seconds, {})
    port = free_port()
    over_ray = rows([sys.executable, "-m", "bench.cluster", "--serve", str(port)], port, seconds, QUIET)
    text = page(plain, over_ray, seconds)
    publish(text, options.write)


def page(plain: dict[int, Row], over_ray: dict[int, Row], seconds: float) -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in ("ray", "openvino", "fastapi"))
    lines = [
        "# What Ray Serve costs",
        "",
        f"`python -m bench.cluster`, {date.today()}: {processor()}, {CORES} cores, shared with the client; {packages}. "
        f"The person model, one replica; each load runs {seconds:g} s after 2 s of warming; a JPEG of 640 x 480, masks "
        "and keypoints in the answer.",
        "",
        "| server | clients | answers/s | p50 ms | p99 ms | CPU ms an answer |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for server, found in {"`limner serve`": plain, "over Ray Serve": over_ray}.items():
        for clients, row in found.items():
            lines.append(
                f"| {server} | {clients} | {row['per_second']:.1f} | {row['p50_ms']:.1f} | {row['p99_ms']:.1f} "
                f"| {row['cpu_ms']:.1f} |"
            )
    lone_ms = over_ray[1]["p50_ms"] - plain[1]["p50_ms"]
    share = over_ray[8]["per_second"] / plain[8]["per_second"]
    lines += [
        "",
        f"A lone request pays {lone_ms:.1f} ms for the way over Ray (median): the proxy, the ingress, and the canvas "
        f"through shared memory to another process. Under 8 clients one machine gives {share:.0%} of the answers.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
