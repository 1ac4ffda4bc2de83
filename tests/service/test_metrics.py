"""The metrics, read as Prometheus reads them."""

import threading

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from service import metrics, triton
from service.admission import Admission
from service.images import Canvas
from tests.service.toy import encoded, picture, wait_until

WHO = {"model": "toy", "version": "1"}
ENGINE = {**WHO, "engine": "toy", "precision": "float32"}


def scrape(client):
    """(name, labels) -> value, of every sample."""
    return samples(client.get("/metrics").text)


def samples(text):
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            # Triton's counters have no _total; this parser gives them one.
            name = sample.name.removesuffix("_total") if sample.name.startswith("nv_") else sample.name
            found[name, frozenset(sample.labels.items())] = sample.value
    return found


def value(found, name, **labels):
    return found.get((name, frozenset(labels.items())))


def detect(client, image=None, **params):
    return client.post("/detect", content=encoded(picture() if image is None else image), params=params)


def stages(found, suffix="count"):
    return {
        dict(labels)["stage"]: number
        for (name, labels), number in found.items()
        if name == f"limner_stage_duration_seconds_{suffix}"
    }


def test_every_stage_that_ran_is_timed_with_its_engine(client):
    assert detect(client).status_code == 200
    found = scrape(client)
    expected = dict.fromkeys(("decode", "fit", "queue", "detect", "masks", "keypoints", "encode"), 1.0)
    assert stages(found) == expected
    for stage in expected:
        assert value(found, "limner_stage_duration_seconds_sum", **ENGINE, stage=stage) > 0


def test_heads_that_had_nothing_to_do_are_not_timed(client):
    detect(client, masks="none", keypoints="false")
    detect(client, picture(red=0))
    detect(client, masks="probability", keypoints="false")
    assert stages(scrape(client)) == {
        **dict.fromkeys(("decode", "fit", "queue", "detect", "encode"), 3.0),
        "masks": 1.0,
    }


def test_batches_are_counted_with_size_padding_reason_and_time(client, engine):
    """Three of one shape wait while a fourth runs, so that they make one batch; 64 x 90 of the 64 x 96 are picture."""
    engine.free.clear()
    threads = [threading.Thread(target=detect, args=(client, picture(64, 90)))]
    threads[0].start()
    assert engine.entered.wait(10)
    threads += [threading.Thread(target=detect, args=(client, picture(64, 90, seed=n))) for n in range(3)]
    for thread in threads[1:]:
        thread.start()
    wait_until(lambda: value(scrape(client), "limner_queue_depth", **WHO) == 3)
    waiting = scrape(client)
    assert value(waiting, "nv_inference_pending_request_count", **WHO) == 3
    assert value(waiting, "limner_permits_held") == 4
    assert value(waiting, "limner_permits_limit") == 64
    engine.free.set()
    for thread in threads:
        thread.join()
    found = scrape(client)
    assert value(found, "limner_batch_size_count", **ENGINE) == 2
    assert value(found, "limner_batch_size_sum", **ENGINE) == 4
    assert value(found, "limner_batch_duration_seconds_count", **ENGINE) == 2
    assert value(found, "limner_batch_close_total", **WHO, reason="drained") == 2
    assert value(found, "limner_batch_padding_ratio_sum", **WHO) == pytest.approx(2 * 6 / 96)
    assert value(found, "limner_queue_depth", **WHO) == 0
    assert value(found, "limner_permits_held") == 0
    assert value(found, "nv_inference_count", **WHO) == 4
    assert value(found, "nv_inference_exec_count", **WHO) == 2
    assert value(found, "nv_inference_request_success", **WHO) == 4


def test_detections_by_class(client):
    detect(client)
    detect(client, confidence=0.7)
    found = scrape(client)
    assert value(found, "limner_detections_total", **WHO, label="cat") == 3
    assert value(found, "limner_detections_total", **WHO, label="dog") == 2


def test_outcomes_and_tritons_reasons(serve, engine):
    with serve(max_requests=1) as client:
        detect(client)
        client.post("/detect", content=b"no picture")
        detect(client, max_detections=9)
        engine.fail = True
        assert detect(client).status_code == 500
        engine.fail = False
        client.app.state.service.admission.close()
        assert detect(client).status_code == 503
        found = scrape(client)
        assert value(found, "limner_batch_failures_total", **ENGINE) == 1
        nobody = {"model": "", "version": ""}
        counted = {
            ("success", "toy"): 1,
            ("refused", "toy"): 2,  # both knew their model when they were refused
            ("failed", "toy"): 1,
            ("rejected", ""): 1,
        }
        for (outcome, model), number in counted.items():
            who = WHO if model else nobody
            assert value(found, "limner_inference_duration_seconds_count", **who, outcome=outcome) == number, outcome
        failures = {reason: value(found, triton.FAILURE, **WHO, reason=reason) for reason in triton.REASONS}
        assert failures == {"REJECTED": 0, "CANCELED": 0, "BACKEND": 1, "OTHER": 2}
        assert value(found, triton.FAILURE, **nobody, reason="REJECTED") == 1
        assert value(found, "nv_inference_request_success", **WHO) == 1


@pytest.mark.parametrize(
    ("code", "outcome"),
    [(200, "success"), (401, "refused"), (413, "refused"), (429, "rejected"), (499, "cancelled"), (500, "failed"),
     (503, "rejected"), (504, "rejected"), (0, "failed")],
)  # fmt: skip
def test_outcome_of_a_status(code, outcome):
    assert metrics._outcome(code) == outcome


def test_tritons_names_and_types_are_tritons(client):
    """Counters without _total, times in microseconds that agree with ours."""
    detect(client)
    text = client.get("/metrics").text
    for name in [alias.name for alias in triton.ALIASES] + [triton.FAILURE]:
        kind = "gauge" if "pending" in name else "counter"
        assert f"# TYPE {name} {kind}\n" in text
        assert f"\n{name}{{" in text
    found = samples(text)
    spent = stages(found, "sum")
    infer = sum(spent[stage] for stage in ("detect", "masks", "keypoints"))
    assert value(found, "nv_inference_compute_infer_duration_us", **WHO) == pytest.approx(1e6 * infer)
    inputs = spent["decode"] + spent["fit"]
    assert value(found, "nv_inference_compute_input_duration_us", **WHO) == pytest.approx(1e6 * inputs)
    assert value(found, "nv_inference_queue_duration_us", **WHO) == pytest.approx(1e6 * spent["queue"])
    assert value(found, "nv_inference_compute_output_duration_us", **WHO) == pytest.approx(1e6 * spent["encode"])
    whole = value(found, "nv_inference_request_duration_us", **WHO)
    assert 1e6 * sum(spent.values()) < whole < 10e6


def test_awkward_names_stay_readable():
    counted = metrics.Metrics()
    name = 'a"b\\c\nd'
    counted.inference(200, 0.5, counted.of(name, "1", "onnx", "float32"))
    found = samples(counted.render().decode())
    assert value(found, "nv_inference_request_success", model=name, version="1") == 1
    assert value(found, "nv_inference_request_duration_us", model=name, version="1") == 500_000


def test_labels_are_bounded(client):
    """Nothing that a client chooses becomes a label."""
    before = None
    for index in range(4):
        client.get(f"/nothing/{index}")
        detect(client, model=f"nobody{index}")
        client.get(f"/models/nobody{index}", headers={"x-request-id": f"id{index}", "user-agent": f"agent{index}"})
        client.request(f"VERB{index}", "/detect")
        series = {key for key in scrape(client) if key[0].startswith(("limner_", "nv_"))}
        assert before is None or series == before
        before = series if index >= 1 else None  # the first round adds the routes and codes


def canvas(size, shape):
    return Canvas(np.zeros((*shape, 3), np.uint8), size, size)


def test_padding_fraction():
    assert metrics.padding_fraction([canvas((64, 96), (64, 96))]) == 0
    assert metrics.padding_fraction([canvas((32, 96), (64, 96)), canvas((64, 96), (64, 96))]) == 0.25
    # Of several shapes each is padded to the largest of the batch.
    assert metrics.padding_fraction([canvas((64, 64), (64, 64)), canvas((64, 128), (64, 128))]) == 0.25


def test_permits_are_read_at_the_scrape():
    counted, admission = metrics.Metrics(), Admission(7)
    counted.permits(admission, 7)
    with admission.permit():
        found = samples(counted.render().decode())
    assert value(found, "limner_permits_held") == 1
    assert value(found, "limner_permits_limit") == 7
    assert value(samples(counted.render().decode()), "limner_permits_held") == 0


def test_the_table_names_every_family():
    text = metrics.table()
    counted = metrics.Metrics()
    names = {family.name for family in counted.registry.collect() if family.name.startswith("limner_")}
    assert len(names) >= 12
    for name in names | {alias.name for alias in triton.ALIASES} | {triton.FAILURE}:
        assert f"`{name}" in text, name
