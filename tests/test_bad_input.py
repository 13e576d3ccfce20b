"""Bad input of every kind: one clear sentence, exit code 2 or an error of ours; never a traceback, never silence."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import ultraep_compile
from tests import zoo
from ultraep_compile.cli import main
from ultraep_compile.cli.output import file_names
from ultraep_compile.errors import ArgumentError, ForwardError, OptionError, UltraEPError

ROOT = Path(__file__).parent.parent
TARGETS = """
import sys
import torch
from torch import nn
from tests import zoo

class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.l = nn.Linear(4, 4)
    def forward(self, x):
        if x.numel() == 3:
            raise RuntimeError("inner trouble")
        return self.l(x)

def wrong_shape(): return Dense(), (torch.randn(2, 5),)
def wrong_key(): return Dense(), {"y": torch.randn(2, 4)}
def wrong_dtype(): return Dense(), (torch.ones(2, 4, dtype=torch.int32),)
def too_many(): return Dense(), (torch.randn(2, 4), 1, 2)
def raises(): return Dense(), (torch.randn(3),)
def exits(): sys.exit(7)
def meta(): return Dense(), (torch.randn(2, 4, device="meta"), )
def slash():
    net = nn.Sequential()
    net.add_module("a/b", zoo.HandMoE())
    net.add_module("a b", zoo.HandMoE())
    return net, (torch.randn(2, 8, zoo.WIDTH),)
"""


class End:
    """How a command ended: exit code, what it printed, and whether an exception came out of it."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


def command(*arguments: object) -> End:
    """Run the command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _argv_and_path():
        try:
            main([str(a) for a in arguments])
        except SystemExit as end:
            code = int(end.code or 0)
    return End(code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def _argv_and_path() -> Iterator[None]:
    kept = list(sys.path)
    try:
        yield
    finally:
        sys.path[:] = kept


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working folder with targets, a folder, an empty file, loads and rubbish."""
    made = tmp_path_factory.mktemp("bad")
    (made / "targets.py").write_text(TARGETS)
    (made / "json.py").write_text(
        "from torch import nn\ndef dense(): return nn.Identity(), (__import__('torch').ones(2),)\n"
    )
    (made / "exits.py").write_text("import sys\nsys.exit(3)\n")
    (made / "a_folder").mkdir()
    (made / "a_file").touch()
    (made / "rubbish.npz").write_bytes(b"PK\x03\x04 rubbish")
    np.savez(made / "loads.npz", a=np.arange(32).reshape(4, 8))
    np.savez(made / "wrong.npz", a=np.ones((4, 8)) * 0.5)
    before = os.getcwd()
    os.chdir(made)
    yield made
    os.chdir(before)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("explain targets.py:wrong_shape", "own forward raised RuntimeError"),
        ("explain targets.py:wrong_key", "own forward raised TypeError"),
        ("explain targets.py:wrong_dtype", "own forward raised RuntimeError"),
        ("explain targets.py:too_many", "own forward raised TypeError"),
        ("explain targets.py:raises", "inner trouble"),
        ("explain targets.py:exits", "raised SystemExit: 7"),
        ("explain exits.py:f", "does not import: SystemExit"),
        ("explain targets.py:raises --expect-moe-sites -1", "greater than or equal to 0"),
        ("dump targets.py:raises --out a_folder", "own forward raised"),
        ("dump targets.py:slash --out a_file", "a_file cannot be written: File exists. Choose another --out"),
        ("dump targets.py:slash --out a_folder --stages -1", "greater than or equal to 0"),
        ("view rubbish.npz", "rubbish.npz"),
        ("replay zipf --seed -1", "greater than or equal to 0"),
        ("replay zipf --html a_folder --microbatches 9 --ranks 2 --experts 4 --top-k 1", "a_folder cannot be written"),
        ("schedule --stages 4 --microbatches 4 --png x.xyz", "unknown kind"),
        ("schedule --stages 4 --microbatches 4 --json a_folder", "a_folder cannot be written: Is a directory"),
        ("schedule --stages 4 --microbatches 4 --auto --base gpipe", "--auto chooses the base schedule"),
        ("schedule --stages 4 --microbatches 4 --auto --virtual 2", "--auto chooses virtual stages"),
        ("demo --device tpu9 --steps 1", "torch does not know"),
        ("demo --device meta --steps 1", "runs on cpu or cuda"),
        ("demo --device cuda:99 --steps 1", "CUDA device(s) here"),
        ("demo --inner gcc --steps 1", "--inner is 'gcc'"),
        ("demo --out a_file --steps 1", "a_file cannot be written"),
    ],
)
def test_commands_refuse(folder: Path, arguments: str, told: str) -> None:
    end = command(*arguments.split())
    assert end.code == 2, end.err
    assert told in " ".join(end.err.replace("│", " ").split()) and "Traceback" not in end.err


def test_view_into_a_folder(folder: Path) -> None:
    from ultraep_compile.telemetry.trace_file import Trace

    assert Trace  # the trace itself is lawful here: only the place of the report is wrong
    model = zoo.HandMoE()
    model.compile(backend="ultraep", options={"ranks": 4, "inner": "eager", "trace": "recorded.npz"})
    model(torch.randn(2, 8, zoo.WIDTH))
    ultraep_compile.telemetry.get_recorder("recorded.npz").close()
    end = command("view", "recorded.npz", "--out", "a_folder")
    assert end.code == 2 and "a_folder cannot be written" in end.err


def test_module_names_that_are_no_file_names(folder: Path) -> None:
    end = command("dump", "targets.py:slash", "--out", "dumped")
    assert end.code == 0, end.err
    programs = sorted(p.name for p in Path("dumped").glob("row_program_*"))
    assert programs == ["row_program_a_b.py", "row_program_a_b_2.py"]


@given(st.lists(st.text(max_size=8), unique=True, max_size=6))
def test_file_names_are_lawful_and_differ(names: list[str]) -> None:
    made = file_names(names)
    assert len(set(made.values())) == len(names)
    assert all(part and not set(part) & set("/\\:\0. ") for part in made.values())


def test_a_target_named_as_a_standard_module(folder: Path) -> None:
    import json

    assert command("explain", "json.py:dense").code == 0
    assert sys.modules["json"] is json and json.dumps([1]) == "[1]"


def test_the_environment_of_another_checkout_stays_its(tmp_path: Path) -> None:
    other = tmp_path / "other"
    (other / ".venv").mkdir(parents=True)
    (other / "run").touch()
    (other / ".venv" / ".prepared").write_text(f"1 2 {other}\n")
    env = {**os.environ, "VENV": str(other / ".venv")}
    end = subprocess.run(["bash", str(ROOT / "run"), "setup"], env=env, capture_output=True, text=True, timeout=60)
    assert end.returncode == 2 and str(other) in end.stderr and "VENV=" in end.stderr
    assert (other / ".venv" / ".prepared").read_text() == f"1 2 {other}\n"


# ---- Python


class Fails(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise KeyError("no such thing")


def compiled(*, mode: Any = None, **options: Any) -> Any:
    model = zoo.HandMoE()
    extra = {} if mode is None else {"mode": mode}
    compiled = torch.compile(model, backend=lambda gm, x: ultraep_compile.ultraep(gm, x, options=options, **extra))
    return compiled(torch.randn(2, 8, zoo.WIDTH))


X = torch.randn(2, 4)
CALLS: dict[str, tuple[Callable[[], Any], type[UltraEPError], str]] = {
    "prepare(None)": (lambda: ultraep_compile.prepare(None), ArgumentError, "torch.nn.Module"),  # pyright: ignore
    "prepare(class)": (lambda: ultraep_compile.prepare(nn.Linear, (X,)), ArgumentError, "the class Linear"),  # pyright: ignore
    "prepare(tensor)": (lambda: ultraep_compile.prepare(nn.Linear(4, 4), X), ArgumentError, "a tuple"),  # pyright: ignore
    "prepare(raises)": (lambda: ultraep_compile.prepare(Fails(), (X,)), ForwardError, "KeyError"),
    "explain(None)": (lambda: ultraep_compile.explain(None, (X,)), ArgumentError, "torch.nn.Module"),  # pyright: ignore
    "explain(inputs)": (lambda: ultraep_compile.explain(nn.Linear(4, 4), None), ArgumentError, "dict"),  # pyright: ignore
    "explain(shape)": (lambda: ultraep_compile.explain(nn.Linear(4, 4), (torch.ones(3),)), ForwardError, "mend"),
    "explain(count)": (
        lambda: ultraep_compile.explain(nn.Linear(4, 4), (X,), expect_moe_sites=-1),
        OptionError,
        "0 or more",
    ),
    "shard(None)": (lambda: ultraep_compile.shard_experts(None, None), ArgumentError, "torch.nn.Module"),  # pyright: ignore
    "shard(mesh)": (lambda: ultraep_compile.shard_experts(zoo.HandMoE(), "ep"), ArgumentError, "mesh"),  # pyright: ignore
    "pipeline(mesh)": (lambda: ultraep_compile.pipeline(zoo.HandMoE(), None, 2, {"x": X}), ArgumentError, "mesh"),  # pyright: ignore
    "pipeline(None)": (lambda: ultraep_compile.pipeline(None, None, 2), ArgumentError, "torch.nn.Module"),  # pyright: ignore
    "clip(model)": (lambda: ultraep_compile.clip_grad_norm_(zoo.HandMoE(), 1.0), ArgumentError, "parameters()"),  # pyright: ignore
    "balance(3)": (lambda: ultraep_compile.balance(3), OptionError, "subclasses"),  # pyright: ignore
    "trace": (lambda: compiled(ranks=4, trace=5), OptionError, "trace"),
    "inner": (lambda: compiled(ranks=4, inner=lambda gm, x: gm), OptionError, "inner"),
    "planner": (lambda: compiled(ranks=4, planner=None), OptionError, "planner"),
    "group": (lambda: compiled(group="ep"), OptionError, "process group"),
    "mode": (lambda: compiled(ranks=4, mode="fast"), OptionError, "mode="),
    "transport": (lambda: compiled(ranks=4, transport="symmetric"), OptionError, "no process group"),
}


def refusal_of(call: Callable[[], Any]) -> UltraEPError:
    """The error of ours that a call ends in, also where Dynamo has wrapped it."""
    with pytest.raises(Exception) as caught:
        call()
    chain: BaseException | None = caught.value
    while chain is not None and not isinstance(chain, UltraEPError):
        chain = chain.__cause__
    assert chain is not None, f"{type(caught.value).__name__}: {caught.value}"
    return chain


@pytest.mark.parametrize("name", CALLS)
def test_functions_refuse(name: str) -> None:
    call, kind, told = CALLS[name]
    error = refusal_of(call)
    assert type(error) is kind and told in str(error)


def test_a_mode_that_is_ignored_is_said_once() -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        compiled(ranks=4, inner="eager", mode="max-autotune")
    assert sum("it is ignored" in str(w.message) for w in seen) == 1


def test_balance_without_parentheses_and_the_models_own_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ULTRAEP_COMPILE_INNER", "eager")

    @ultraep_compile.balance
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bad = True

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.bad:
                raise KeyError("not ready")
            return x + 1

    model = Model()
    with pytest.raises(KeyError, match="not ready"):  # what the model raises stays what it is
        model(X)
    model.bad = False
    assert torch.equal(model(X), X + 1)


RUBBISH = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.floats(), st.text(max_size=5), st.just(object()), st.just([]),
    st.just({}), st.just(nn.Linear), st.just(b"x"), st.just(("a",)), st.just({"a": 1}),
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(st.sampled_from([f.name for f in ultraep_compile.Options.__dataclass_fields__.values()]), RUBBISH)
)
def test_options_are_right_or_refused(values: dict[str, Any]) -> None:
    with contextlib.suppress(UltraEPError):
        ultraep_compile.Options.of(values)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_public_functions_take_no_rubbish(data: st.DataObject) -> None:
    functions = (
        ultraep_compile.prepare,
        ultraep_compile.explain,
        ultraep_compile.shard_experts,
        ultraep_compile.pipeline,
    )
    function: Callable[..., Any] = data.draw(st.sampled_from(functions))
    count = {"pipeline": 3, "prepare": 2}.get(function.__name__, 2)
    with pytest.raises(UltraEPError):
        function(*(data.draw(RUBBISH) for _ in range(count)))


WORDS = [
    "loads.npz",
    "wrong.npz",
    "rubbish.npz",
    "a_folder",
    "a_file",
    "absent",
    "zipf",
    "targets.py:raises",
    "x/y.py:f",
    "",
]
NUMBERS = ["-1", "0", "1", "3", "8", "nan", "inf", "1e3", "x", "1,2", "1,,2", "-1,2"]
OPTIONS = {
    "plan": ["--redundant-experts", "--domain", "--planner", "--out"],
    "replay": ["--planners", "--slots", "--domain", "--phase", "--rates", "--microbatches", "--ranks", "--experts", "--top-k",
               "--tokens", "--seed", "--width", "--ffn", "--rehome", "--html"],
    "schedule": ["--stages", "--microbatches", "--virtual", "--llm-cost", "--encoder-cost", "--generator-cost", "--costs",
                 "--encoder-memory", "--method", "--latency", "--base", "--generator-group", "--llm-memory", "--noise",
                 "--json", "--png", "--html", "--trace"],
    "view": ["--out"],
    "explain": ["--expect-moe-sites"],
}  # fmt: skip
VALUES = st.sampled_from([*NUMBERS, *WORDS, "quota", "eplb@2", "nested", "gpipe"])


@st.composite
def lines(draw: st.DrawFn) -> list[str]:
    """A command with some of its options, each with some value, right or wrong."""
    name = draw(st.sampled_from(sorted(OPTIONS)))
    chosen = draw(st.lists(st.sampled_from(OPTIONS[name]), max_size=4, unique=True))
    rest = list(itertools.chain.from_iterable((option, draw(VALUES)) for option in chosen))
    if name == "schedule":
        for option in ("--stages", "--microbatches"):
            rest += [option, draw(st.sampled_from(["2", "3", "-1", "0", "x"]))] if option not in rest else []
        return [name, *rest]
    small = "--microbatches 9 --tokens 64 --ranks 2 --experts 4 --top-k 1".split() if name == "replay" else []
    return [name, draw(VALUES), *small, *rest]  # of an option that is given twice the last value counts


@pytest.mark.parametrize("examples", [40, pytest.param(600, marks=pytest.mark.slow)])
def test_any_command_line_ends_well(folder: Path, examples: int) -> None:
    settings(max_examples=examples, deadline=None, database=None)(given(lines())(_ends_well))()


def _ends_well(arguments: list[str]) -> None:
    end = command(*arguments)
    assert end.code in (0, 1, 2), end.err
    assert "Traceback" not in end.err
    assert end.code == 0 or end.err.strip()
