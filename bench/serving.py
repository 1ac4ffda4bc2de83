"""limner's server under HTTP load beside the usual ways to serve, on this machine: `python -m bench.serving`.

Server and client share the machine's cores, as everybody's do here, and the client's own CPU time is told. The ceiling
is the same decoding, engine and encoding in a plain loop, one picture at a time, without any server or client, in
whatever split of processes and threads is fastest; as a machine's speed drifts over minutes, it is measured before and
after limner's loads, and the mean counts. A lone request is held to the plain loop with which it takes turns, second
by second; as of two processes started alike one may be a few percent slower for good, both start three times.
Two models: the person model, and the same weights on a canvas so small that whatever surrounds the engine shows.
`--write FILE` writes the page, `--quick` tries the program.
"""

import argparse
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import date
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import PIL.Image

from bench.machine import processor
from bench.peers import Plain
from bench.results import publish

PICTURE = Path("tests/pictures/astronaut.jpg")
SMALL = {"short_side": 64, "long_side": 96}
CLIENTS = (1, 8, 32, 128)
CORES = os.cpu_count() or 1
STARTS, TURNS = 3, 6  # of a lone client and the plain loop
HAS_LITSERVE = find_spec("litserve") is not None
Row = dict[str, Any]
Start = Callable[[], AbstractContextManager[int]]


def light(person: Path, folder: Path) -> Path:
    """The bundle with another canvas rule: its graphs take any canvas."""
    bundle = folder / "light" / "1"
    shutil.copytree(person, bundle)
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest.update(name="light", version="1", canvas={**manifest["canvas"], **SMALL})
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    return bundle


def loop(bundle: Path, threads: int, lanes: int, seconds: float) -> None:
    """A process of the ceiling: answers in a loop, in `lanes` threads, for so many seconds at each line that comes in,
    and prints pictures/s and the median ms of one."""
    from service.detector import Detector
    from service.engines import open_engine
    from service.lanes import Plan, again

    plain, body = Plain(bundle, threads), picture().read_bytes()
    if lanes > 1:
        opened = open_engine(plain.detector.bundle, "auto", threads)
        split = again(opened, plain.detector.bundle, Plan(lanes, 1, {}))
        plains = [Plain.__new__(Plain) for _ in range(lanes)]
        for each, lane in zip(plains, split.each, strict=True):
            assert isinstance(lane, Detector)
            each.__dict__.update(plain.__dict__)
            each.detector = lane
    else:
        plains = [plain]
    for each in plains:
        each.answer(body)
    print("ready", flush=True)
    for _ in sys.stdin:
        taken: list[float] = []
        end_s = time.perf_counter() + seconds
        threads_ = [threading.Thread(target=repeat, args=(each, body, end_s, taken)) for each in plains]
        for thread in threads_:
            thread.start()
        for thread in threads_:
            thread.join()
        print(json.dumps({"per_second": len(taken) / seconds, "ms": median(taken) * 1000}), flush=True)


def repeat(plain: Plain, body: bytes, end_s: float, taken: list[float]) -> None:
    while (start_s := time.perf_counter()) < end_s:
        plain.answer(body)
        taken.append(time.perf_counter() - start_s)


def picture() -> Path:
    """640 x 480, quality 85: a usual upload. Written once beside the system's other temporary files."""
    path = Path(tempfile.gettempdir()) / "limner-bench-640x480.jpg"
    if not path.exists():
        image = PIL.Image.open(PICTURE).convert("RGB")
        height = image.width * 3 // 4
        image.crop((0, 0, image.width, height)).resize((640, 480)).save(path, quality=85)
    return path


def ceiling(bundle: Path, seconds: float) -> dict[str, float]:
    """Of every split of the cores the pictures/s of all together."""
    found = {}
    for processes, threads, lanes in ((1, CORES, 1), (1, CORES, CORES), (CORES, 1, 1)):
        told = looped(bundle, processes, threads, lanes, seconds)
        words = f"{processes} x {threads} threads" + (f" in {lanes} lanes" if lanes > 1 else "")
        found[words] = sum(each["per_second"] for each in told)
    return found


class Loop:
    """A process of the ceiling that waits for its turns."""

    def __init__(self, bundle: Path, threads: int, lanes: int, seconds: float) -> None:
        command = [sys.executable, "-m", "bench.serving", "--loop", str(bundle), str(threads), str(lanes), str(seconds)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def wait(self) -> None:
        assert self._process.stdout
        assert "ready" in self._process.stdout.readline()

    def start(self) -> None:
        assert self._process.stdin
        self._process.stdin.write("go\n")
        self._process.stdin.flush()

    def told(self) -> dict[str, float]:
        assert self._process.stdout
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate()


def looped(bundle: Path, processes: int, threads: int, lanes: int, seconds: float) -> list[dict[str, float]]:
    """What each of so many processes of the ceiling told, all at once."""
    loops = [Loop(bundle, threads, lanes, seconds) for _ in range(processes)]
    for each in loops:
        each.wait()
    for each in loops:
        each.start()
    told = [each.told() for each in loops]
    for each in loops:
        each.close()
    return told


def steadied(before: dict[str, float], after: dict[str, float]) -> Row:
    rates = {words: (before[words] + after[words]) / 2 for words in before}
    best = max(rates, key=lambda words: rates[words])
    return {"per_second": rates[best], "all": rates, "each": (before[best], after[best])}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def serving(command: list[str], port: int, path: str, environment: dict[str, str]) -> Iterator[int]:
    """The server's process id, once `path` answers."""
    server = subprocess.Popen(
        command,
        env={**os.environ, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_for(f"http://127.0.0.1:{port}{path}", server)
        yield server.pid
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def wait_for(url: str, server: subprocess.Popen[bytes], seconds: float = 120) -> None:
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s:
        if server.poll() is not None:
            raise SystemExit(f"{server.args!r} ended with {server.returncode}")
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except OSError:
            time.sleep(0.2)
    raise SystemExit(f"{url} did not answer within {seconds:g} s")


def cpu_seconds(root: int) -> float:
    """User and system time of a process and all that descend from it."""
    parents, used = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(stat.parent.name)] = int(fields[1])
        used[int(stat.parent.name)] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    family = {root}
    while more := {child for child, parent in parents.items() if parent in family} - family:
        family |= more
    return sum(used.get(each, 0.0) for each in family)


def measure(port: int, pid: int, seconds: float, *load: str) -> Row:
    before = cpu_seconds(pid)
    command = [sys.executable, "-m", "bench.load", "--port", str(port), "--picture", str(picture())]
    told = subprocess.run(
        [*command, "--seconds", str(seconds), *load], check=True, capture_output=True, text=True
    ).stdout
    row = json.loads(told)
    total = sum(count for status, count in row["statuses"].items() if status == "200")
    row["cpu_ms"] = (cpu_seconds(pid) - before) * 1000 / max(1, total)
    row["client_cpu_ms"] = row["client_cpu_s"] * 1000 / max(1, total)
    return row


def in_turns(bundle: Path, start: Start, port: int, *load: str) -> dict[str, float]:
    """The plain loop and a lone client, a second each: medians of the loop's time and of the client's beyond it."""
    alone, extra = [], []
    for _ in range(STARTS):
        plain = Loop(bundle, CORES, 1, 1.0)
        plain.wait()
        with start() as pid:
            plain.start()
            before = plain.told()["ms"]
            for _ in range(TURNS):
                row = measure(port, pid, 1.0, "--clients", "1", "--warm-seconds", "0.3", *load)
                plain.start()
                after = plain.told()["ms"]
                alone.append(after)
                extra.append(row["p50_ms"] - (before + after) / 2)
                before = after
        plain.close()
    return {"alone_ms": median(alone), "extra_ms": median(extra)}


def batch_size(port: int) -> tuple[float, float]:
    """Sum and count of the batches' sizes so far."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        lines = answer.read().decode().splitlines()

    def total(name: str) -> float:
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    return total("limner_batch_size_sum"), total("limner_batch_size_count")


def plan(port: int, model: str) -> str:
    """What the service measured when it loaded the model, and chose."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/models/{model}") as answer:
        engine = json.load(answer)["engine"]
    kind = "processes" if engine["processes"] else "lanes"
    tried = "; ".join(f"{words} {rate:.1f}/s" for words, rate in engine["rates"].items())
    return f"{engine['num_lanes']} {kind}, batches of at most {engine['max_batch']} (tried at the start: {tried})"


def ours(bundle: Path, seconds: float, capacity: float) -> dict[str, Row]:
    """Closed loops; open ones as the service comes; and with a wait of half and of all of a lone request's time."""
    port = free_port()
    command = [sys.executable, "limner.py", "serve", "--port", str(port), "--bundles", str(bundle.parent.parent)]
    command += ["--default-model", bundle.parent.name, "--log-format", "json"]
    rows: dict[str, Row] = {}
    start = partial(serving, [*command, "--max-requests", "256"], port, "/readyz", {})
    with start() as pid:
        chosen = plan(port, bundle.parent.name)
        for clients in CLIENTS:
            before = batch_size(port)
            rows[f"{clients} clients"] = measure(port, pid, seconds, "--clients", str(clients))
            after = batch_size(port)
            rows[f"{clients} clients"]["batch"] = (after[0] - before[0]) / max(1.0, after[1] - before[1])
            rows[f"{clients} clients"]["plan"] = chosen
    rows["1 clients"].update(in_turns(bundle, start, port))
    with serving(command, port, "/readyz", {}) as pid:
        for share in (0.8, 2.0):
            rows[open_words(share)] = measure(port, pid, seconds, "--rate", str(share * capacity))
    alone_ms = rows["1 clients"]["p50_ms"]
    for most_ms in (round(alone_ms / 2), round(alone_ms)):
        with serving([*command, "--max-wait-ms", str(most_ms)], port, "/readyz", {}) as pid:
            measure(port, pid, 1.0, "--clients", "4")  # a picture's time is known once there were some
            rows[open_words(2.0, most_ms)] = measure(port, pid, seconds, "--rate", str(2.0 * capacity))
    return rows


def open_words(share: float, most_ms: int | None = None) -> str:
    bound = f", LIMNER_MAX_WAIT_MS={most_ms}" if most_ms is not None else ""
    return f"open, {share:.0%} of the ceiling{bound}"


def peers(bundle: Path, seconds: float) -> dict[str, dict[str, Row]]:
    """The closed loops; a server that is not installed has no rows."""
    rows: dict[str, dict[str, Row]] = {}
    for workers in (1, CORES):
        port = free_port()
        command = [sys.executable, "-m", "uvicorn", "--factory", "bench.peers:plain_fastapi", "--port", str(port)]
        command += ["--workers", str(workers), "--log-level", "warning"]
        environment = {"BENCH_BUNDLE": str(bundle), "BENCH_THREADS": str(CORES // workers)}
        start = partial(serving, command, port, "/openapi.json", environment)
        rows[f"FastAPI, {workers} uvicorn worker{'s' * (workers > 1)}"] = closed_loops(bundle, start, port, seconds)
    if HAS_LITSERVE:
        port = free_port()
        command = [sys.executable, "-m", "bench.peer_litserve", str(bundle), str(port)]
        start = partial(serving, command, port, "/health", {})
        rows[f"LitServe, {CORES} workers"] = closed_loops(bundle, start, port, seconds, "--form")
    return rows


def closed_loops(bundle: Path, start: Start, port: int, seconds: float, *load: str) -> dict[str, Row]:
    with start() as pid:
        rows = {f"{n} clients": measure(port, pid, seconds, "--clients", str(n), *load) for n in CLIENTS}
    rows["1 clients"].update(in_turns(bundle, start, port, *load))
    return rows


def section(name: str, top: Row, mine: dict[str, Row], others: dict[str, dict[str, Row]]) -> list[str]:
    splits = "; ".join(f"{words} {rate:.1f}/s" for words, rate in top["all"].items())
    before, after = top["each"]
    lines = [
        f"## {name}",
        "",
        f"Ceiling: {top['per_second']:.1f} pictures/s, {before:.1f} before and {after:.1f} after ({splits}); one "
        f"picture alone on all cores {mine['1 clients']['alone_ms']:.1f} ms.",
        "",
        "| server | load | answers/s | of ceiling | p50 ms | p99 ms | batch | CPU ms an answer | client's | refused |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for server, rows in {"limner": mine, **others}.items():
        for load, row in rows.items():
            batch = f"{row['batch']:.1f}" if "batch" in row else ""
            share = row["per_second"] / top["per_second"]
            lines.append(
                f"| {server} | {load} | {row['per_second']:.1f} | {share:.0%} | {row['p50_ms']:.1f} "
                f"| {row['p99_ms']:.1f} | {batch} | {row['cpu_ms']:.1f} | {row['client_cpu_ms']:.2f} "
                f"| {row['refused']} |"
            )
    return [*lines, "", *summary(top, mine, others), ""]


def summary(top: Row, mine: dict[str, Row], others: dict[str, dict[str, Row]]) -> list[str]:
    """What the table says of the questions that it is for."""
    told = [f"limner chose for load {mine['1 clients']['plan']}"]
    for server, rows in {"limner": mine, **others}.items():
        shares = [rows[f"{clients} clients"]["per_second"] / top["per_second"] for clients in CLIENTS if clients > 1]
        extra_ms = rows["1 clients"]["extra_ms"]
        told.append(
            f"{server}: {min(shares):.0%} to {max(shares):.0%} of the ceiling with {CLIENTS[1]} clients and more; a "
            f"lone request takes {extra_ms:+.1f} ms beside the plain loop on all cores (median)"
        )
    alone_ms = mine["1 clients"]["p50_ms"]
    for words, row in mine.items():
        if row["refused"]:
            told.append(
                f"limner, {words}: {row['answered']} answered, p99 {row['p99_ms']:.0f} ms, which is "
                f"{row['p99_ms'] / alone_ms:.1f} times a lone request's median; {row['refused']} refused with 429, p99 "
                f"{row['refused_p99_ms']:.1f} ms"
            )
    return [f"- {each}." for each in told]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the page there, too")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each load")
    parser.add_argument("--quick", action="store_true", help="two seconds each, without the peers")
    parser.add_argument("--only", choices=("light", "person"))
    parser.add_argument("--loop", nargs=4, metavar=("BUNDLE", "THREADS", "LANES", "SECONDS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.loop:
        bundle, threads, lanes, seconds = options.loop
        return loop(Path(bundle), int(threads), int(lanes), float(seconds))
    seconds = 2.0 if options.quick else options.seconds
    packages = ", ".join(
        f"{name} {version(name)}" for name in ("openvino", "fastapi", "uvicorn", "litserve") if find_spec(name)
    )
    missing = [] if HAS_LITSERVE else ["LitServe is not installed here and has no rows: pip install litserve.", ""]
    lines = [
        "# Serving on a CPU",
        "",
        f"`python -m bench.serving`, {date.today()}: {processor()}, {CORES} cores; Python {platform.python_version()}, "
        f"{packages}.",
        "",
        *(__doc__ or "").split("\n\n")[1].split("`--write")[0].strip().splitlines(),
        f"Each load runs {seconds:g} s after 2 s of warming; a JPEG of 640 x 480, masks and keypoints in the answer.",
        "Differences of a few percent are noise.",
        "",
        *missing,
    ]
    with tempfile.TemporaryDirectory() as folder:
        bundles = {"light": light(Path("bundles/person/1"), Path(folder)), "person": Path("bundles/person/1").resolve()}
        for name, bundle in bundles.items():
            if options.only in (None, name):
                before = ceiling(bundle, seconds)
                mine = ours(bundle, seconds, max(before.values()))
                top = steadied(before, ceiling(bundle, seconds))
                lines += section(f"The {name} model", top, mine, {} if options.quick else peers(bundle, seconds))
    text = "\n".join(lines)
    publish(text, options.write)


if __name__ == "__main__":
    main()
