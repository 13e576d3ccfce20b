"""The public surface: names that users write down. A change of one belongs here and in CHANGELOG.md, too."""

from __future__ import annotations

import dataclasses
import doctest
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

import ultraep_compile
from ultraep_compile import errors
from ultraep_compile.cli import COMMANDS
from ultraep_compile.config import INNER_BACKENDS, Options
from ultraep_compile.explanation import Explanation, SiteReport
from ultraep_compile.planner import PLANNERS

ROOT = Path(__file__).parent.parent


def test_public_names() -> None:
    assert ultraep_compile.__all__ == [
        "Options",
        "UltraEPError",
        "balance",
        "clip_grad_norm_",
        "explain",
        "pipeline",
        "prepare",
        "real_tokens",
        "shard_experts",
        "ultraep",
    ]
    assert all(callable(getattr(ultraep_compile, name)) for name in ultraep_compile.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'balanced'"):
        _ = ultraep_compile.balanced


def test_options_and_their_defaults() -> None:
    assert {f.name: f.default for f in dataclasses.fields(Options)} == {
        "ranks": None,
        "group": None,
        "redundant_experts": 2,
        "planner": "quota",
        "balance_from": 0,
        "inner": "inductor",
        "transport": "auto",
        "deadline_s": 300,
        "expect_moe_sites": None,
        "verify": 0,
        "watch": False,
        "trace": None,
    }
    assert INNER_BACKENDS == ("inductor", "aot_eager", "eager")
    assert {"quota", "greedy", "eplb", "lplb", "none"} <= set(PLANNERS)


def test_commands() -> None:
    assert set(COMMANDS) == {"doctor", "demo", "explain", "dump", "plan", "replay", "view", "schedule"}


def test_errors() -> None:
    """One `except UltraEPError` catches all; one `except ValueError` catches what a wrong value caused."""
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.UltraEPError)]
    known = {c.__name__ for c in classes}
    assert known == {
        "UltraEPError",
        "OptionError",
        "ArgumentError",
        "ForwardError",
        "TopologyError",
        "RoutingError",
        "DerivativeError",
        "LoadsError",
        "SiteCountError",
        "TargetError",
        "TraceError",
        "ScheduleError",
        "PartsError",
        "PipelineError",
        "ShardingError",
        "VerificationError",
        "PoolError",
        "PeerTimeoutError",
    }
    not_of_values = {n for n in known if not issubclass(getattr(errors, n), ValueError)}
    of_other_kinds = {"ArgumentError", "ForwardError", "SiteCountError", "DerivativeError", "VerificationError"}
    assert not_of_values == {"UltraEPError", "PeerTimeoutError", *of_other_kinds}


def test_json_of_explain() -> None:
    site = SiteReport("layers.0.mlp", "rewritten", 8, 2, "softmax-topk", "proven")
    report = Explanation([site], 100, 100, [], 1).to_json()
    assert set(report) >= {"moe_sites", "coverage", "roles", "graph_breaks"}
    assert set(report["moe_sites"][0]) >= {"name", "status", "experts", "top_k", "gating", "reason"}
    assert set(report["coverage"]) == {"expert_parameters", "rewritten"}
    assert set(report["roles"]) == {"encoders", "projectors", "llm", "generators"}


def test_ops() -> None:
    """A checkpointing policy may name them (`op.namespace == "ultraep"`)."""
    for module in ("backend", "sharding"):
        importlib.import_module(f"ultraep_compile.{module}")
    names = "expert_load plan reroute experts replicate grad_reduce grouped_gemm unshard"
    assert [n for n in names.split() if not hasattr(torch.ops.ultraep, n)] == []


# ---- documents that say what the code says


def _script(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_is_up_to_date() -> None:
    fresh = _script(ROOT / "docs" / "generate_reference.py").render()
    assert (ROOT / "docs" / "reference.md").read_text() == fresh, "run: python docs/generate_reference.py"


def test_every_error_and_warning_has_a_cure() -> None:
    """docs/troubleshooting.md has a part for every error class, and quotes messages that still exist."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    generator = _script(ROOT / "docs" / "generate_reference.py")
    for error in generator.error_classes()[1:]:
        assert re.search(rf"^## {error.__name__}$", text, re.M), error
    code = "\n".join(p.read_text() for s in generator.SOURCES for p in (ROOT / s).rglob("*.py"))
    code = " ".join(re.sub(r'"\s*\n\s*f?"', "", code).split())  # joins texts that were broken over lines
    quotes = re.findall(r"^\| `([^`]+)` \|", text, re.M)
    assert len(quotes) > 40
    gone = [q for q in quotes if not all(piece.strip() in code for piece in q.split("…"))]
    assert not gone, "no source says this any more"


PAGES = ["README.md", "CHANGELOG.md", *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md")))]


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    page = ROOT / name
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        target, _, part = link.partition("#")
        if "://" in target:
            continue
        there = (page.parent / target).resolve() if target else page
        assert there.exists(), f"{name} links to {link}"
        if part:
            heads = re.findall(r"^#+ (.+)$", there.read_text(), re.M)
            assert part in {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in heads}, link


def test_the_tests_that_numerics_names_exist() -> None:
    text = (ROOT / "docs" / "numerics.md").read_text()
    named = re.findall(r"(tests/[\w/]+\.py)::(\w+)", text)
    assert len(named) >= 10
    gone = [f"{file}::{test}" for file, test in named if f"def {test}(" not in (ROOT / file).read_text()]
    assert not gone


@pytest.mark.parametrize("name", ["concepts.md", "planning.md"])
def test_the_examples_in_documents_are_true(name: str) -> None:
    failed, tried = doctest.testfile(str(ROOT / "docs" / name), module_relative=False)
    assert tried and not failed
