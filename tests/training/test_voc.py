"""Pascal VOC's files and its AP: cases worked by hand, and a computation by COCO's code where the two agree."""

import contextlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from training import voc
from training.data import DataError, Source, read_annotations, read_source

OBJECT = """<object><name>{name}</name>{difficult}<bndbox>
<xmin>{0}</xmin><ymin>{1}</ymin><xmax>{2}</xmax><ymax>{3}</ymax></bndbox></object>"""
DIFFICULT = "<difficult>1</difficult>"


def write(folder: Path, name: str, *objects: tuple[str, bool, tuple[float, ...]]) -> None:
    (folder / "Annotations").mkdir(parents=True, exist_ok=True)
    inside = "".join(
        OBJECT.format(*box, name=kind, difficult=DIFFICULT if difficult else "") for kind, difficult, box in objects
    )
    size = "<size><width>60</width><height>40</height><depth>3</depth></size>"
    text = f"<annotation><filename>{name}.jpg</filename>{size}{inside}</annotation>"
    (folder / "Annotations" / f"{name}.xml").write_text(text)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path, "000001", ("dog", False, (1, 1, 60, 40)), ("cat", True, (11, 6, 30, 25)))
    write(tmp_path, "000002", ("cat", False, (2, 3, 4, 5)))
    write(tmp_path, "000003")
    (tmp_path / "JPEGImages").mkdir()
    for number in (1, 2, 3):
        (tmp_path / "JPEGImages" / f"00000{number}.jpg").touch()
    (tmp_path / "ImageSets" / "Main").mkdir(parents=True)
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_text("000001\n000003 -1\n")
    return tmp_path


def test_corners_count_from_one_and_belong_to_the_box(folder: Path) -> None:
    content = read_annotations(folder / "Annotations")
    assert [image["file_name"] for image in content["images"]] == ["000001.jpg", "000002.jpg", "000003.jpg"]
    assert [each["bbox"] for each in content["annotations"]] == [[0, 0, 60, 40], [10, 5, 20, 20], [1, 2, 3, 3]]
    assert [each["name"] for each in content["categories"]] == list(voc.CLASSES)


def test_difficult_objects_are_ignore_regions_in_training(folder: Path) -> None:
    source = Source("voc", folder / "JPEGImages", folder / "ImageSets" / "Main" / "train.txt")
    first, last = read_source(source, ("cat", "dog"), None)
    np.testing.assert_array_equal(first.boxes, [[0, 0, 60, 40]])
    assert first.labels.tolist() == [1]
    np.testing.assert_array_equal(first.ignore, [[10, 5, 30, 25]])
    assert len(last.boxes) == len(last.ignore) == 0


def test_other_classes_than_the_twenty(tmp_path: Path) -> None:
    write(tmp_path, "a", ("nucleus", False, (1, 1, 5, 5)), ("cell", False, (1, 1, 5, 5)))
    assert [each["name"] for each in voc.read(tmp_path / "Annotations")["categories"]] == ["cell", "nucleus"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("<annotation>", "not XML"),
        ("<annotation><filename>a.jpg</filename></annotation>", "lacks <size><width>"),
        ("<annotation><size><width>x</width></size></annotation>", "is 'x', a number is expected"),
        ("<annotation><object></object></annotation>", "lacks <name>"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "broken.xml").write_text(text)
    with pytest.raises(DataError, match="broken.xml") as caught:
        voc.read(tmp_path)
    assert told in str(caught.value)


def test_missing_files_are_named(folder: Path) -> None:
    lists = folder / "ImageSets" / "Main"
    (lists / "none.txt").write_text("\n")
    (lists / "gone.txt").write_text("000009\n")
    for name, told in (("none", "no annotations"), ("gone", "000009.xml"), ("never", "never.txt: no such")):
        with pytest.raises(DataError, match=told):
            voc.read(lists / f"{name}.txt")


def truth(*boxes: tuple[float, ...], ignored: tuple[int, ...] = ()) -> dict[str, Any]:
    """One picture, one class."""
    annotations = [
        {"id": i, "image_id": 1, "category_id": 1, "bbox": list(box), "ignore": int(i in ignored)}
        for i, box in enumerate(boxes, start=1)
    ]
    return {"images": [{"id": 1}], "categories": [{"id": 1, "name": "cat"}], "annotations": annotations}


def found(*rows: tuple[float, tuple[float, ...]]) -> list[dict[str, Any]]:
    return [{"image_id": 1, "category_id": 1, "bbox": list(box), "score": score} for score, box in rows]


A, B, FAR = (0, 0, 10, 10), (20, 0, 10, 10), (50, 50, 5, 5)


def test_worked_by_hand() -> None:
    # True, false, true of two objects: precision 1 at recall 1/2, 2/3 at 1.
    results = found((0.9, A), (0.8, FAR), (0.7, B))
    aps = voc.average_precisions(results, truth(A, B))
    assert aps["area"][1] == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert aps["eleven"][1] == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)


def test_a_second_detection_of_the_same_object_is_false() -> None:
    aps = voc.average_precisions(found((0.9, A), (0.8, A), (0.7, B)), truth(A, B))
    assert aps["area"][1] == pytest.approx(0.5 + 0.5 * 2 / 3)


def test_a_detection_is_held_to_the_object_it_overlaps_most() -> None:
    """COCO would give the second one the neighbour, of which it has an IoU of 2/3; VOC calls it false."""
    near = (2, 0, 10, 10)
    aps = voc.average_precisions(found((0.9, A), (0.8, A)), truth(A, near))
    assert aps["area"][1] == pytest.approx(0.5)


def test_difficult_objects_count_neither_way() -> None:
    aps = voc.average_precisions(found((0.9, B), (0.8, B), (0.7, A)), truth(A, B, ignored=(2,)))
    assert aps["area"][1] == aps["eleven"][1] == 1
    assert voc.average_precisions(found((0.9, B)), truth(B, ignored=(1,))) == {"area": {}, "eleven": {}}


def test_nothing_found_is_zero_and_touching_half_counts() -> None:
    assert voc.average_precisions([], truth(A))["area"][1] == 0
    half = (0, 0, 10, 5)
    assert voc.average_precisions(found((0.9, half)), truth(A))["area"][1] == 1
    assert voc.average_precisions(found((0.9, half)), truth(A), iou=0.51)["area"][1] == 0


def test_agrees_with_coco_s_code_where_objects_lie_apart() -> None:
    """Then every detection overlaps one object at most, and the protocols differ in the recall levels alone."""
    rng = np.random.default_rng(4)
    content: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": c, "name": str(c)} for c in (1, 2)],
    }
    results = []
    for image in range(1, 13):
        content["images"].append({"id": image, "width": 400, "height": 100})
        for cell in range(4):
            box = [100 * cell + 20, 20, 50.0, 50.0]
            number = len(content["annotations"]) + 1
            content["annotations"].append(
                {
                    "id": number,
                    "image_id": image,
                    "category_id": 1 + cell % 2,
                    "bbox": box,
                    "area": 2500.0,
                    "iscrowd": 0,
                }
            )
            for _ in range(int(rng.integers(0, 3))):
                moved = [box[0] + rng.uniform(-15, 15), box[1] + rng.uniform(-15, 15), 50.0, 50.0]
                results.append(
                    {
                        "image_id": image,
                        "category_id": 1 + int(cell % 2 == (rng.random() < 0.8)),
                        "bbox": moved,
                        "score": rng.random(),
                    }
                )
    ours = voc.average_precisions(results, content)
    coco: Any = COCO()
    coco.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
        run: Any = COCOeval(coco, coco.loadRes(results), "bbox")
        run.params.iouThrs, run.params.recThrs = np.array([0.5]), np.arange(11) / 10
        run.evaluate()
        run.accumulate()
    theirs = run.eval["precision"][0, :, :, 0, 2].mean(0)
    assert 0.2 < theirs.min() < theirs.max() < 0.9
    np.testing.assert_allclose([ours["eleven"][1], ours["eleven"][2]], theirs, atol=1e-9)
