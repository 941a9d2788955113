"""Every JSON file that sdgraph writes states the number of its format, so that a later version can refuse it."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from sdgraph.errors import SavedError, TuningError
from sdgraph.plan_search.evaluator import Measurements
from sdgraph.runtime.digest import hash_files
from sdgraph.text import json_object

ROOT = Path(__file__).parents[2]
WRITING = (".write_text(", ".write_bytes(", "._write(")
# Functions that write JSON and name no format.
EXCEPTIONS = {
    "sdgraph/cli/arguments.py:write_json": "the format comes with the data, as in `SearchResult.as_dict`",
    "sdgraph/plan_search/switch_plan.py:save": "the format comes with the data, as in `SwitchPlan.as_dict`",
    "exporters/bundle/manifest_file.py:write_manifest": "the format is a field of the manifest",
    "exporters/bundle/pipeline_manifest.py:write_pipeline_manifest": "the format is a field of the manifest",
    "exporters/onnx/parts.py:write_part": "the configuration has the format of diffusers and transformers",
    "exporters/onnx/pipeline.py:_write_index": "model_index.json has the format of diffusers",
    "sdgraph/runtime/weight_files.py:write_weights": "the index of shards has the format of diffusers",
    "sdgraph/tuning/sources/dataset.py:unpacked": "metadata.jsonl has the format of datasets",
    "exporters/onnx/exporter.py:_write_config": "the configuration has the format of diffusers",
    "exporters/engines.py:run": "the file is the task of a process that this function starts",
    "exporters/engines.py:_measure": "the file is the answer of that process",
}


def writers() -> Iterator[tuple[str, bool]]:
    """Yield the functions that write JSON to a file, and whether each names a format."""
    for folder in ("sdgraph", "passes", "exporters"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for function in ast.walk(ast.parse(path.read_text())):
                if isinstance(function, ast.FunctionDef):
                    body = ast.unparse(function)
                    if "json.dumps(" in body and any(call in body for call in WRITING):
                        yield f"{path.relative_to(ROOT)}:{function.name}", "FORMAT" in body


@pytest.mark.law("A JSON file that sdgraph writes states the number of its format.")
def test_all_writers_of_json_name_a_format() -> None:
    found = dict(writers())
    assert {"sdgraph/runtime/serialization.py:save", "sdgraph/tuning/train_state.py:save"} < set(found)
    assert [name for name, named in found.items() if not named] == sorted(EXCEPTIONS, key=list(found).index)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"format": 2}, "it.json has format 2, and this sdgraph reads format 1"),
        ({"format": True}, "it.json states no format, and this sdgraph reads format 1"),
        ({}, "it.json states no format"),
    ],
)
def test_other_formats_are_refused(content: dict[str, int], words: str, tmp_path: Path) -> None:
    (tmp_path / "it.json").write_text(json.dumps(content))
    with pytest.raises(TuningError, match=words):
        json_object(tmp_path / "it.json", TuningError, hint="", format=1)
    assert json_object(tmp_path / "it.json", TuningError, hint="") == content


def test_measurements_of_another_format_are_refused(tmp_path: Path) -> None:
    def known() -> float:
        return float(Measurements(tmp_path, b"key").numbers("seconds", "all", lambda: np.array([2.0]))[0])

    assert known() == known() == 2
    (file,) = tmp_path.iterdir()
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 7}))
    with pytest.raises(SavedError, match="has format 7"):
        known()


def test_hashes_of_another_format_are_found_anew(tmp_path: Path) -> None:
    file, known = tmp_path / "data", tmp_path / "files.json"
    file.write_bytes(b"data")
    (right,) = hash_files([file])
    state = file.stat()
    wrong = [state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino, "wrong"]
    for number, expected in ((1, "wrong"), (2, right)):
        known.write_text(json.dumps({"format": number, "files": {str(file.absolute()): wrong}}))
        assert hash_files([file], known) == [expected]
