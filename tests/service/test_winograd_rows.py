import numpy as np
import pytest

openvino = pytest.importorskip("openvino")
rows = pytest.importorskip("service.engines.winograd_rows")

from service.engines import rounding  # noqa: E402
from tests.service.test_rounding import needs_bfloat16  # noqa: E402
from tests.service.test_winograd import CORE, assert_same, graph  # noqa: E402


@pytest.mark.parametrize("shape", [(1, 8, 12), (2, 4, 5), (3, 20, 8), (1, 12, 1)])
@pytest.mark.parametrize("level", ["p2", "p3"])
def test_equals_the_direct_sum(shape, level):
    images, height, width = shape
    maps = np.random.default_rng(1).standard_normal((images, 128, height, width), dtype=np.float32)
    rewritten = graph(128, 192, level)
    assert rows.rewrite(rewritten, multiple=32) == 2
    assert_same(rewritten, graph(128, 192, level), maps)


@pytest.mark.parametrize(
    ("channels", "level", "multiple", "replaced"),
    [(128, "p2", 16, 2), (128, "p3", 16, 0), (512, "p3", 64, 2), (128, "p4", 64, 0), (64, "p2", 32, 0)],
)
def test_takes_levels_of_whole_tiles_that_it_makes_faster(channels, level, multiple, replaced):
    assert rows.rewrite(graph(channels, channels, level), multiple) == replaced


@needs_bfloat16
def test_in_bfloat16_the_error_stays_small():
    """And the sums of products that leave the graph are exact."""
    maps = np.random.default_rng(1).standard_normal((2, 256, 16, 12), dtype=np.float32)
    answers = []
    for hint, rewritten in (("f32", False), ("bf16", False), ("bf16", True)):
        model = graph(256, 256)
        if rewritten:
            rows.rewrite(model, multiple=32)
        rounding.prepare(model)
        compiled = CORE.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": 1})
        if hint == "bf16":
            assert rounding.rounded(compiled) == []
        answers.append({port.any_name: value for port, value in compiled(maps).items()})
    exact, direct, found = answers
    for name, value in exact.items():
        errors = [float(np.sqrt(np.square(each[name] - value).mean())) for each in (direct, found)]
        assert 0 < errors[1] < 2.8 * errors[0] < 0.016 * value.std(), name
