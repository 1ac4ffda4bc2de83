"""Thousands of hostile bodies through the whole application: no crash, no hang, no 5xx, and the memory stays bounded.

LIMNER_PILLOW_IMAGES names a folder of further pictures to damage, such as Tests/images of Pillow's source distribution.
"""

import gc
import os
import re
import time
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from tests.service import hostile
from tests.service.hostile import Sent

FOLDER = os.environ.get("LIMNER_PILLOW_IMAGES")
LIMITS = {"max_pixels": 4_000_000, "max_body_bytes": 4 * 2**20}
MAX_GROWTH_MB = 200
MAX_SECONDS = 30  # for one request: far more than any takes, even where the machine does other things besides


def memory_mb(name: str) -> float:
    """VmRSS is what is resident now, VmHWM the most since `forget_peak`."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) / 1024


def forget_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("the peak of the resident memory cannot be reset here")


def survive(client: TestClient, sent: Iterable[Sent]) -> str:
    """Sends them all; returns what to tell of it."""
    statuses: Counter[int] = Counter()
    slowest, slowest_told = 0.0, ""
    gc.collect()
    before_mb = memory_mb("VmRSS")  # first: what a thread of another test gives back meanwhile is no growth
    forget_peak()
    for index, each in enumerate(sent):
        started = time.perf_counter()
        answer = client.post(each.path, content=each.content, headers=each.headers)
        seconds = time.perf_counter() - started
        assert answer.status_code == 200 or 400 <= answer.status_code < 500, (index, each.told, answer.text[:500])
        assert seconds < MAX_SECONDS, (index, each.told)
        if answer.status_code != 200:
            is_v2 = each.path.startswith("/v2")
            assert answer.headers["content-type"] == ("application/json" if is_v2 else "application/problem+json")
            assert len(answer.json()["error" if is_v2 else "detail"]) < 2000
        grown_mb = memory_mb("VmHWM") - before_mb
        assert grown_mb < MAX_GROWTH_MB, (index, each.told)
        statuses[answer.status_code] += 1
        if seconds > slowest:
            slowest, slowest_told = seconds, each.told
    assert statuses[200] > 0, "the damage is so great that nothing was ever decoded"
    after_mb, most_mb = memory_mb("VmRSS"), memory_mb("VmHWM")
    memory = f"{before_mb:.0f} MB before, {most_mb:.0f} MB at most, {after_mb:.0f} MB after"
    return f"{dict(sorted(statuses.items()))}, slowest {slowest * 1000:.0f} ms ({slowest_told}), resident {memory}"


def run(serve, number: int, pictures: list[bytes], seed: int) -> None:
    with warnings.catch_warnings(), serve(**LIMITS) as client:
        warnings.simplefilter("ignore")  # Pillow warns of much that is wrong with them
        requests = hostile.requests(number, pictures, seed)
        for each in hostile.seeds():
            client.post("/detect", content=each)  # so that every decoder has its tables
        told = survive(client, requests)
        assert client.get("/readyz").status_code == 200
        assert client.app.state.service.admission.num_held == 0
    print(f"{number} hostile bodies: {told}")


needs_proc = pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="resident memory is read from /proc")


@needs_proc
def test_a_thousand_hostile_bodies(serve):
    run(serve, 1_000, hostile.seeds(), seed=1)


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("seed", [2])
def test_ten_thousand_hostile_bodies(serve, seed):
    run(serve, 10_000, hostile.seeds(), seed)


@needs_proc
@pytest.mark.slow
@pytest.mark.skipif(FOLDER is None, reason="LIMNER_PILLOW_IMAGES names no folder of pictures")
def test_ten_thousand_damaged_pictures_of_a_folder(serve):
    assert FOLDER is not None
    pictures = hostile.of_folder(Path(FOLDER))
    assert pictures, f"no pictures in {FOLDER}"
    run(serve, 10_000, pictures, seed=3)


def test_the_pictures_are_of_many_kinds():
    found = hostile.seeds()
    assert len(found) > 40
    assert all(data.startswith(found[0][:4]) for data in found[:3])
    assert len({data[:4] for data in found}) > 12
