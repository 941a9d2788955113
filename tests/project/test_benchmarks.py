"""The benchmarks run, and the figures in documents are their results."""

from __future__ import annotations

import ast
import importlib
import json
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ..documents import ROOT, prose

PYTHON = (sys.executable, "-m")
CLONE = shutil.which("git") is not None and (ROOT / ".git").exists()
FIGURE = re.compile(r"\d+(?:\.\d+)? ?(?:%|dB|[MG]B|ms|GMACs)|\d+(?:\.\d+)? s\b|\d\.\d+ times")
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))  # as `python -m` does
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")  # the demo sets it: let go of it afterwards


def module(name: str) -> ModuleType:
    return importlib.import_module(f"benchmarks.{name}")


def results() -> dict[str, dict[str, Any]]:
    files = sorted((ROOT / "benchmarks" / "results").rglob("*.json"))
    return {
        file.relative_to(ROOT / "benchmarks" / "results").as_posix(): json.loads(file.read_text()) for file in files
    }


def git(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)


# -- results and documents --------------------------------------------------------------------------------------------


def test_the_figures_in_documents_are_the_results() -> None:
    """If this fails: `python -m benchmarks.report`, and read what changed."""
    documents = module("report").documents()
    assert {
        ROOT / "README.md",
        ROOT / "docs" / "measurements.md",
        ROOT / "benchmarks" / "README.md",
    } <= documents.keys()
    for file, text in documents.items():
        assert file.read_text() == text, file


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_every_measured_figure_has_a_marker(document: Path) -> None:
    text = module("measuring.documents").without_figures(prose(document))
    assert not FIGURE.findall(text)
    assert not re.findall(r"^\s*<!-- cell", document.read_text(), re.MULTILINE), "it would begin a block of HTML"


def test_the_page_of_measurements_is_short() -> None:
    assert (ROOT / "docs" / "measurements.md").read_text().count("\n") <= 200


def test_every_result_supports_a_claim() -> None:
    claims = module("measuring.claims")
    assert {f"{claim['result']}.json" for claim in claims.claims()} == set(results())
    page = claims.page()
    assert "d65a34f+ (dirty tree: to be measured again)" in page or "d65a34f+" not in page


def test_results_that_record_their_command_have_a_clean_commit() -> None:
    """Those without one are older, and benchmarks/README.md says that they must be measured again."""
    for name, result in results().items():
        assert not result.get("draft"), name
        for part in (result, *result.get("methods", {}).values()):
            if part.get("command", "").startswith(("python -m", "MALLOC_")):
                assert re.fullmatch("[0-9a-f]{7,40}", part["commit"]), name


@pytest.mark.skipif(not CLONE, reason="not a git checkout")
def test_the_commits_of_results_are_in_the_history() -> None:
    """An object of an abandoned branch does not count: a clone lacks it."""
    if git("rev-parse", "--is-shallow-repository").stdout.strip() == "true":
        pytest.skip("a shallow clone lacks the history")
    commits = module("measuring.record").commits
    found = {(commit.removesuffix("+"), name) for name, result in results().items() for commit in commits(result)}
    assert [pair for pair in sorted(found) if git("merge-base", "--is-ancestor", pair[0], "HEAD").returncode] == []


def test_cells_are_found_formatted_and_subtracted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = module("measuring.documents")
    table = "| way | time | PSNR |\n|---|---|---|\n| a | 0.643 (0.6 to 0.7) | 31.5 dB |\n| b | 0.5 | 30 dB |\n"
    (tmp_path / "card.md").write_text(table)
    monkeypatch.setattr(documents, "ROOT", tmp_path)
    assert documents.cell("card.md", "b & 0.5", "PSNR") == "30 dB"
    assert documents.cell("card.md", "a", "time", ".2f") == "0.64"
    assert documents.cell("card.md", "a", "time", ".0%") == "64 %"
    assert documents.cell("card.md", "a minus b", "PSNR", ".1f") == "1.5"
    text = "It takes <!-- cell: card.md | a | time | .1f -->9<!-- end --> of it."
    assert documents.filled(text) == text.replace("9", "0.6")
    with pytest.raises(SystemExit, match="0 rows of"):
        documents.cell("card.md", "c", "PSNR")


def test_a_result_of_a_changed_tree_is_refused_unless_it_is_a_draft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = module("measuring.record")
    monkeypatch.setattr(sys, "argv", ["overhead.py", "forward/sd15/64", "--draft"])
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "0")
    for commit, reason in (("0123abc+", "files differ"), ("", "no git checkout")):
        monkeypatch.setattr(record, "commit", lambda commit=commit: commit)
        with pytest.raises(SystemExit, match=reason):
            record.begin("overhead", "cpu", draft=False)
        result = record.begin("overhead", "cpu", draft=True)
        assert (result["commit"], result["draft"]) == (commit, True)
    assert result["command"] == "MALLOC_MMAP_MAX_=0 python -m benchmarks.overhead forward/sd15/64 --draft"
    assert record.place(Namespace(out=None, quick=False, draft=True), "a.json") == ROOT / "out" / "bench" / "a.json"
    record.record(tmp_path / "new" / "a.json", result)
    assert json.loads((tmp_path / "new" / "a.json").read_text()) == result


@pytest.mark.skipif(not CLONE, reason="not a git checkout")
def test_results_do_not_count_as_changes_of_the_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = module("measuring.record")
    monkeypatch.setattr(record, "ROOT", tmp_path)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "one"]):
        subprocess.run([*git, *words], check=True)
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "benchmarks" / "results" / "a.json").write_text("{}")
    assert re.fullmatch("[0-9a-f]{10}", record.commit())
    (tmp_path / "benchmarks" / "b.py").write_text("")
    assert record.commit().endswith("+")


def test_entry_points_are_commands_and_shared_modules_are_not() -> None:
    for file in (ROOT / "benchmarks").rglob("*.py"):
        text = file.read_text()
        assert "sys.path" not in text or file.name == "drop_in.py", file
        if file.name != "__init__.py":
            assert ('if __name__ == "__main__":' in text) == (file.parent.name == "benchmarks"), file


# -- the benchmarks run -----------------------------------------------------------------------------------------------


@pytest.mark.long
def test_the_benchmark_runs(tmp_path: Path) -> None:
    """As users run it: the case in a separate process, figures and samples in a file, its table printed."""
    out = tmp_path / "result.json"
    run = subprocess.run(
        [*PYTHON, "benchmarks.overhead", "--quick", "--seconds", "0.1", "--out", str(out), "apply/tiny"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    result = json.loads(out.read_text())
    (apply,) = result["cases"]
    assert apply["not_shared_bytes"] == 0
    assert result["command"] == f"python -m benchmarks.overhead --quick --seconds 0.1 --out {out} apply/tiny"
    assert result["draft"]
    assert module("measuring.documents").report(result) in run.stdout
    assert "smoke test" in run.stdout


def test_cases_that_are_finished_are_kept_after_an_error(tmp_path: Path) -> None:
    overhead = module("overhead")
    settings, finished = overhead.Settings(seconds=0.1, at_least=3, quick=True), tmp_path / "cases.json"
    kept = {"commit": "a", "settings": asdict(settings), "cases": [{"case": "unknown/1"}]}
    finished.write_text(json.dumps(kept))
    assert overhead.run_all(["unknown/1"], settings, finished, "a") == [{"case": "unknown/1"}]
    with pytest.raises(KeyError, match="unknown"):
        overhead.run_all(["unknown/1"], settings, finished, "another commit")
    assert json.loads(finished.read_text()) == kept


@pytest.mark.parametrize("folder", ["benchmarks", "examples", "docs"])
def test_scripts_read_only_what_our_modules_have(folder: str) -> None:
    """A smoke test does not reach every line of a measurement that takes hours."""
    missing = []
    for file in sorted((ROOT / folder).rglob("*.py")):
        tree = ast.parse(file.read_text())
        ours: dict[str, ModuleType] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = [alias.asname or alias.name for alias in node.names if alias.name.split(".")[0] == "sdgraph"]
                ours |= {name: importlib.import_module("sdgraph") for name in names if name == "sdgraph"}
            elif isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").startswith("sdgraph"):
                for alias in node.names:
                    found = getattr(importlib.import_module(node.module or ""), alias.name, None)  # or a submodule
                    if isinstance(found, ModuleType):
                        ours[alias.asname or alias.name] = found
        missing += [
            f"{file.relative_to(ROOT)}:{node.lineno}: {node.value.id}.{node.attr}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ours
            if not hasattr(ours[node.value.id], node.attr)
        ]
    assert missing == []


@pytest.mark.long
def test_the_cases_are_measured() -> None:
    overhead, report = module("overhead"), module("measuring.documents").report
    settings = overhead.Settings(seconds=0.1, at_least=3, quick=True)
    kinds = ("forward", "prune", "inherit", "experts", "attention", "memory")
    cases = [overhead.cases.run(f"{kind}/tiny/16", settings) for kind in kinds]
    forward, prune, inherit, experts, attention, memory = cases
    assert forward["largest_difference"] == 0
    assert len(forward["samples"]["eager"]) == len(forward["samples"]["traced"]) >= 3
    macs = [prune["sizes"][name]["macs"] for name in ("traced", "bk-sdm-base", "bk-sdm-small", "bk-sdm-tiny")]
    assert macs == sorted(macs, reverse=True)
    assert set(inherit["largest_difference"].values()) == {0}
    assert all(inherit["kept_bytes"][name] > 0 for name in inherit["timetables"])
    assert experts["sizes"]["timestep"]["parameters"] > experts["sizes"]["plain"]["parameters"]
    assert set(attention["alone"]) == set(attention["samples"]) == {"full", "window 8, pool 4"}
    assert {"torch", "ONNX Runtime", "no arena"} <= memory["runners"].keys()
    figures = {**overhead.begin("overhead", "cpu", True), "settings": asdict(settings), "cases": cases}
    text = report(figures)
    assert all(
        word in text for word in ("traced, no passes", "MACs/whole", "DeepCache", "MECondConv", "window 8, pool 4")
    )


@pytest.mark.long
def test_the_providers_are_measured(tmp_path: Path) -> None:
    """The row of an engine that is not available has the reason."""
    command, out = [*PYTHON, "benchmarks.providers", "--quick"], tmp_path / "result.json"
    run = subprocess.run([*command, "--out", str(out)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    rows = {row["engine"]: row for row in json.loads(out.read_text())["rows"]}
    assert set(rows) == {"PyTorch bfloat16", "ONNX Runtime float32", "OpenVINO float32", "OpenVINO bfloat16"}
    assert rows["PyTorch bfloat16"]["psnr"] < 80 < rows["ONNX Runtime float32"]["psnr"]
    for row in rows.values():
        assert row.get("failed") or all(len(samples) >= 3 for samples in row["samples"].values())


@pytest.mark.long
def test_images_are_measured(tmp_path: Path) -> None:
    command, out = [*PYTHON, "benchmarks.images", "--quick"], tmp_path / "result.json"
    run = subprocess.run([*command, "--out", str(out)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    rows = json.loads(out.read_text())["rows"]
    assert {(row["engine"], row["dtype"], bool(row["passes"])) for row in rows if row["steps"] is None} == {
        ("PyTorch", dtype, passes) for dtype in ("float32", "bfloat16") for passes in (False, True)
    }
    assert "| PyTorch bfloat16, channels last | with passes |" in run.stdout


@pytest.mark.full
def test_the_gpu_benchmark_runs_on_a_cpu(tmp_path: Path) -> None:
    """So that nothing is found broken on the day that there is a GPU."""
    out = tmp_path / "result.json"
    run = subprocess.run(
        [*PYTHON, "benchmarks.gpu", "--device", "cpu", "--quick", "--out", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    (case,) = json.loads(out.read_text())["cases"]
    assert not {name: method["failed"] for name, method in case["methods"].items() if "failed" in method}
    inheriting = [
        method["difference"]["4"]
        for name, method in case["methods"].items()
        if "inherit" in name or "DeepCache" in name
    ]
    whole = [
        method["difference"]["4"]
        for name, method in case["methods"].items()
        if not ("inherit" in name or "DeepCache" in name)
    ]
    assert max(whole) < 1e-3 < min(inheriting)
    assert "no CUDA graphs" in run.stderr  # it says why


@pytest.mark.long
def test_channels_are_compared_at_one_budget(tmp_path: Path) -> None:
    pytest.importorskip("torch_pruning")
    command, out = [*PYTHON, "benchmarks.channels", "--quick"], tmp_path / "result.json"
    run = subprocess.run([*command, "--out", str(out)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    whole, *rows = json.loads(out.read_text())["rows"]
    assert sum("predicted" in row for row in rows) == 4
    assert not [row for row in rows if row["name"].startswith("PruneChannels") and "failure" in row]
    for row in rows:
        if "failure" not in row:
            assert row["error"] > 0
            assert row["of"] == "time" or row[row["of"].lower()] <= 0.9 * whole[row["of"].lower()], row["name"]
            assert sum(row["macs by part"].values()) == row["macs"]
    assert "| Torch-Pruning, inside blocks" in run.stdout


@pytest.mark.long
def test_mixes_of_unets_are_measured_beside_their_parts(tmp_path: Path) -> None:
    """The same command goes on: the second time it only measures the times."""
    command, out = [*PYTHON, "benchmarks.switching", "--quick", "--folder", str(tmp_path)], tmp_path / "result.json"
    for _ in range(2):
        run = subprocess.run([*command, "--out", str(out)], cwd=ROOT, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
    assert "of the captions" not in run.stdout
    result = json.loads(out.read_text())
    methods = result["methods"]
    assert {method["kind"] for method in methods.values()} == {"teacher", "student", "inheriting", "masked", "mix"}
    assert methods["teacher, 4 steps of DDIM"]["time"] == 4
    expected = 2 + 2 * result["calls"]["student"]
    assert methods["2 teacher, 2 student, 4 steps of DDIM"]["time"] == pytest.approx(expected)
    assert methods["DeepCache, 4 steps of DDIM"]["time"] < 4
    assert out.with_suffix(".svg").exists()


def test_a_mix_is_compared_with_what_all_parts_reach_in_its_time() -> None:
    mixes = module("measuring.mixes")

    def method(kind: str, what: str, time: float, psnr: float) -> dict[str, Any]:
        figures = {"psnr": psnr, "shape and colour": psnr / 100}
        return {"kind": kind, "what": what, "solver": "DDIM", "time": time, "converged": figures}

    methods = {
        "large, 4": method("teacher", "large", 4, 30),
        "large, 6": method("teacher", "large", 6, 34),
        "small, 4": method("student", "small", 2, 25),
        "small, 6": method("student", "small", 3, 31),
        "good": method("mix", "both", 5, 33),
        "equal": method("mix", "both", 3, 31),
        "early": method("mix", "both", 1, 40),
    }
    assert mixes.affordable(methods.values(), 5, "psnr") == 32  # between 4 and 6 steps of the large one
    assert mixes.affordable(methods.values(), 4, "psnr") == 31  # the small one, for less
    assert mixes.affordable(methods.values(), 2.5, "psnr") == 28
    assert mixes.margin(methods, "good", "psnr") == 1
    assert mixes.margin(methods, "equal", "psnr") == 0
    assert mixes.margin(methods, "early", "psnr") is None  # nothing else is as fast
    assert mixes.margin(methods, "large, 4", "psnr") is None
    del methods["early"]
    assert mixes.front(methods, "psnr") == ["small, 4", "small, 6", "good", "large, 6"]
    assert mixes.winners(methods, "psnr") == ["good"]
    del methods["good"]
    assert mixes.winners(methods, "psnr") == []
