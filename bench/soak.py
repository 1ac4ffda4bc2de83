"""A server under steady load for a long time: does its memory grow, do its answers slow down? `python -m bench.soak`.

Starts `limner serve` on a free port, measures in a closed loop how much it can do, then sends a fraction of that in an
open loop for `--minutes`. Arrivals are random (exponential gaps, a fixed seed) and do not wait for answers; a latency
counts from the moment when its request was due, so a server that stalls cannot hide it. `--write FILE.md` writes the
page, and beside it FILE.png and FILE.csv with what was sampled. Clients and server share the machine. Needs /proc.
"""

import argparse
import csv
import http.client
import io
import os
import platform
import queue
import random
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from datetime import date
from pathlib import Path
from statistics import median

import matplotlib
import PIL.Image

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parents[1]
PHOTO = ROOT / "tests" / "pictures" / "astronaut.jpg"
# (width, height) of the photo's crop, and by how much it is then scaled.
SHAPES = (((512, 512), 1.0), ((512, 384), 1.25), ((384, 512), 1.25), ((512, 288), 1.5), ((256, 256), 1.0))
NUM_CALLERS = 64  # as many requests as the service admits by default
CALIBRATING_CALLERS = 8
SAMPLE_S = 5.0
PATIENCE_S = 60.0


@dataclass(frozen=True)
class Answered:
    due_s: float
    ended_s: float
    status: int  # 0: no answer

    @property
    def latency_ms(self) -> float:
        return (self.ended_s - self.due_s) * 1000


@dataclass(frozen=True)
class Sample:
    """The server at one moment, and the answers since the one before."""

    seconds: float
    rss_mb: float
    pss_mb: float | None
    threads: int
    files: int
    answers: int
    errors: int
    p50_ms: float | None
    p99_ms: float | None


def pictures() -> list[bytes]:
    with PIL.Image.open(PHOTO) as photo:
        return [_cut(photo, size, scale) for size, scale in SHAPES]


def _cut(photo: PIL.Image.Image, size: tuple[int, int], scale: float) -> bytes:
    left, top = ((whole - side) // 2 for whole, side in zip(photo.size, size, strict=True))
    cut = photo.crop((left, top, left + size[0], top + size[1]))
    stream = io.BytesIO()
    cut.resize((round(size[0] * scale), round(size[1] * scale))).save(stream, "JPEG", quality=90)
    return stream.getvalue()


@contextmanager
def server(bundles: Path, flags: Sequence[str]) -> Iterator[tuple[int, int]]:
    """The process's id and its port, once it is ready."""
    command = [sys.executable, str(ROOT / "limner.py"), "serve", "--port", "0", "--bundles", str(bundles), *flags]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    found: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    threading.Thread(target=_read_log, args=(process, found), daemon=True).start()
    try:
        if (port := found.get(timeout=PATIENCE_S)) is None:
            sys.exit("limner serve did not start: what it said is above")
        _wait_until_ready(port)
        yield process.pid, port
    finally:
        process.terminate()
        process.wait(PATIENCE_S)


def _read_log(process: "subprocess.Popen[str]", found: "queue.SimpleQueue[int | None]") -> None:
    """Reads all of it, so that the pipe never fills; shows only what is no request."""
    assert process.stderr is not None
    for line in process.stderr:
        if match := re.search(r"listens on http://[^:]+:(\d+)", line):
            found.put(int(match[1]))
        elif not re.search(r"\brequest\b.*route=", line):
            print(line, end="", file=sys.stderr)
    found.put(None)


def _wait_until_ready(port: int) -> None:
    end_s = time.monotonic() + 5 * PATIENCE_S
    while Caller(port).get("/readyz") != 200:
        if time.monotonic() > end_s:
            sys.exit("the service is not ready after five minutes: GET /models says why")
        time.sleep(0.2)


class Caller:
    """A client with a connection of its own for each request.

    A kept one would be idle longer than the server keeps it, and a request on it would be lost before the server saw
    it: then "no answer" would say nothing of the service.
    """

    def __init__(self, port: int) -> None:
        self._port = port

    def get(self, path: str) -> int:
        return self._ask("GET", path, None)

    def detect(self, picture: bytes) -> int:
        return self._ask("POST", "/detect", picture)

    def _ask(self, method: str, path: str, body: bytes | None) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=PATIENCE_S)
        try:
            connection.request(method, path, body, {"content-type": "image/jpeg"})
            answer = connection.getresponse()
            answer.read()
            return answer.status
        except (OSError, http.client.HTTPException):
            return 0
        finally:
            connection.close()


def counted(port: int) -> Counter[int]:
    """The service's own count of its answers of /detect, by status."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=PATIENCE_S) as answer:
        text = answer.read().decode()
    name = r'limner_request_duration_seconds_count\{code="(\d+)",route="/detect"\} (\S+)'
    return Counter({int(code): int(float(number)) for code, number in re.findall(name, text)})


def capacity(port: int, photos: Sequence[bytes], seconds: float) -> float:
    """Answers a second when several clients ask again as soon as they are answered; the first third warms up."""
    start_s = time.monotonic()
    ended: list[float] = []

    def ask(first: int) -> None:
        caller, index = Caller(port), first
        while time.monotonic() < start_s + seconds:
            if caller.detect(photos[index % len(photos)]) == 200:
                ended.append(time.monotonic() - start_s)
            index += 1

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(CALIBRATING_CALLERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counted = [moment for moment in ended if seconds / 3 <= moment < seconds]
    if not counted:
        sys.exit("the service answered nothing while its capacity was measured: try --calibrate with more seconds")
    return len(counted) / (seconds * 2 / 3)


def soak(
    pid: int, port: int, photos: Sequence[bytes], rate: float, seconds: float
) -> tuple[list[Sample], list[Answered]]:
    """An open loop of `rate` requests a second, and what was seen of it."""
    due: queue.SimpleQueue[tuple[float, bytes] | None] = queue.SimpleQueue()
    answered: list[Answered] = []

    def work() -> None:
        caller = Caller(port)
        while (job := due.get()) is not None:
            status = caller.detect(job[1])
            answered.append(Answered(job[0], time.monotonic(), status))

    callers = [threading.Thread(target=work) for _ in range(NUM_CALLERS)]
    samples: list[Sample] = []
    start_s = time.monotonic()
    sampler = threading.Thread(target=_sample_all, args=(pid, start_s, seconds, answered, samples))
    for thread in (*callers, sampler):
        thread.start()
    rng, moment_s = random.Random(0), start_s
    while (moment_s := moment_s + rng.expovariate(rate)) < start_s + seconds:
        time.sleep(max(0.0, moment_s - time.monotonic()))
        due.put((moment_s, rng.choice(photos)))
    for _ in callers:
        due.put(None)
    for thread in (*callers, sampler):
        thread.join()
    return samples, answered


def _sample_all(pid: int, start_s: float, seconds: float, answered: list[Answered], samples: list[Sample]) -> None:
    seen, number = 0, 0
    while (number := number + 1) * SAMPLE_S <= seconds:
        time.sleep(max(0.0, start_s + number * SAMPLE_S - time.monotonic()))
        new, seen = answered[seen:], len(answered)
        samples.append(_sample(pid, time.monotonic() - start_s, new))


def _sample(pid: int, seconds: float, new: Sequence[Answered]) -> Sample:
    """Memory and threads of the service and of its workers, files of its own."""
    processes = _with_workers(pid)
    statuses = [(process / "status").read_text() for process in processes]
    shares = [share for process in processes if (share := _pss_mb(process)) is not None]
    served = [each.latency_ms for each in new if each.status == 200]
    return Sample(
        round(seconds, 1),
        round(sum(_kb(status, "VmRSS") for status in statuses) / 1024, 1),
        round(sum(shares), 1) if len(shares) == len(processes) else None,
        sum(_kb(status, "Threads") for status in statuses),
        len(os.listdir(processes[0] / "fd")),
        len(served),
        len(new) - len(served),
        round(quantile(served, 0.5), 1) if served else None,
        round(quantile(served, 0.99), 1) if served else None,
    )


def _with_workers(pid: int) -> list[Path]:
    """The process, and those that it started (`service.worker`)."""
    found = [Path(f"/proc/{pid}")]
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it ended just now
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(stat.parent)
    return found


def _kb(text: str, name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+)", text, re.MULTILINE)
    assert found, name
    return int(found[1])


def _pss_mb(process: Path) -> float | None:
    """Its share of what processes have in common; None where the kernel does not tell."""
    try:
        return round(_kb((process / "smaps_rollup").read_text(), "Pss") / 1024, 1)
    except OSError:
        return None


def quantile(values: Sequence[float], fraction: float) -> float:
    """The smallest value that this fraction of all does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-int(fraction * 1000) * len(ordered) // 1000) - 1)]


def drift_percent(samples: Sequence[Sample]) -> float:
    """Of the resident memory: the median of the last quarter of the time against that of the second."""
    end_s = samples[-1].seconds
    second = [each.rss_mb for each in samples if end_s / 4 <= each.seconds < end_s / 2]
    last = [each.rss_mb for each in samples if each.seconds >= end_s * 3 / 4]
    return (median(last) / median(second) - 1) * 100


def listed(statuses: Counter[int]) -> str:
    rows = sorted(statuses.items())
    return ", ".join(f"{number} x {status or 'no answer'}" for status, number in rows) or "none"


def page(samples: Sequence[Sample], answered: Sequence[Answered], told: dict[str, str], plot: str | None) -> str:
    served = [each.latency_ms for each in answered if each.status == 200]
    errors = Counter(each.status for each in answered if each.status != 200)
    first, last = samples[0], samples[-1]
    rows = {
        **told,
        "answers as the clients counted them": f"{len(served)} x 200",
        "errors": listed(errors),
        "latency p50 / p99 / longest": " / ".join(f"{quantile(served, each):.0f} ms" for each in (0.5, 0.99, 1)),
        "resident memory at first / last / most": f"{first.rss_mb:.0f} / {last.rss_mb:.0f} / "
        f"{max(each.rss_mb for each in samples):.0f} MiB",
        "memory drift (last quarter against the second)": f"{drift_percent(samples):+.2f} %",
        "threads at first / last": f"{first.threads} / {last.threads}",
        "open files at first / last / most": f"{first.files} / {last.files} / {max(each.files for each in samples)}",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    shown = f"\n![memory and latency over the time]({plot})\n" if plot else ""
    return (
        "# A long run under load\n\nMade by `python -m bench.soak`. Arrivals are random and do not wait for answers; a "
        "latency counts from when its\nrequest was due. The clients share the machine with the server.\n\n"
        f"| | |\n|---|---|\n{table}\n{shown}"
    )


def write_csv(path: Path, samples: Sequence[Sample]) -> None:
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, [field.name for field in fields(Sample)])
        writer.writeheader()
        writer.writerows(asdict(each) for each in samples)


def draw(path: Path, samples: Sequence[Sample]) -> None:
    minutes = [each.seconds / 60 for each in samples]
    figure, (memory, latency) = plt.subplots(2, 1, sharex=True, figsize=(8, 5.5), layout="constrained")
    memory.plot(minutes, [each.rss_mb for each in samples], label="resident")
    if all(each.pss_mb is not None for each in samples):
        memory.plot(minutes, [each.pss_mb for each in samples], label="proportional share")
    memory.set(
        ylabel="MiB",
        ylim=(0, 1.2 * max(each.rss_mb for each in samples)),
        title=f"memory, drift {drift_percent(samples):+.2f} %",
    )
    memory.legend()
    for name in ("p50_ms", "p99_ms"):
        latency.plot(minutes, [getattr(each, name) or float("nan") for each in samples], label=name[:3])
    latency.set(ylabel="ms", ylim=(0, None), xlabel="minutes", title=f"latency, in windows of {SAMPLE_S:g} s")
    latency.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser("bench.soak", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--bundles", type=Path, default=ROOT / "bundles", help="as limner serve has it")
    parser.add_argument("--model", default="person", help="the model to ask")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--fraction", type=float, default=0.8, help="of the measured capacity")
    parser.add_argument("--calibrate", type=float, default=30, metavar="SECONDS", help="to measure it")
    parser.add_argument(
        "--write", type=Path, metavar="FILE.md", help="write the page there, a plot and a CSV beside it"
    )
    parser.add_argument("flags", nargs="*", metavar="-- FLAG", help="further flags of limner serve")
    options = parser.parse_args()
    if options.minutes * 60 < 8 * SAMPLE_S:
        parser.error(f"--minutes must be at least {8 * SAMPLE_S / 60:.2f}, or there is nothing to compare")
    photos = pictures()
    with server(options.bundles, ["--default-model", options.model, *options.flags]) as (pid, port):
        most = capacity(port, photos, options.calibrate)
        rate = most * options.fraction
        print(f"capacity {most:.1f} requests/s; now {rate:.1f} for {options.minutes:g} minutes", file=sys.stderr)
        before = counted(port)
        samples, answered = soak(pid, port, photos, rate, options.minutes * 60)
        own = counted(port) - before
    told = {
        "date, machine": f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores",
        "Python": platform.python_version(),
        "model, flags": " ".join([options.model, *options.flags]),
        "capacity, closed loop": f"{most:.1f} requests/s with {CALIBRATING_CALLERS} clients",
        "load, open loop": f"{rate:.1f} requests/s, {options.fraction:.0%} of it, for {options.minutes:g} minutes",
        "answers as the service counted them": listed(own),
    }
    plot = options.write.with_suffix(".png") if options.write else None
    text = page(samples, answered, told, plot.name if plot else None)
    print(text)
    if options.write and plot:
        options.write.parent.mkdir(parents=True, exist_ok=True)
        draw(plot, samples)
        write_csv(options.write.with_suffix(".csv"), samples)
        options.write.write_text(text)


if __name__ == "__main__":
    main()
