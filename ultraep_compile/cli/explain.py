"""`ultraep-compile explain`"""

from __future__ import annotations

from typing import Annotated

import typer

from ultraep_compile.errors import SiteCountError


def explain(
    target: Annotated[str, typer.Argument(help="package.module:factory or path/to/file.py:factory")],
    expect_moe_sites: Annotated[
        int | None, typer.Option(min=0, help="Fail (exit 1) unless so many layers are rewritten.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say which MoE layers of a model are found and rewritten, why not the others, and what each costs."""
    from ultraep_compile.cli.target import load_target, need_inputs
    from ultraep_compile.explanation import dumps
    from ultraep_compile.explanation import explain as run

    model, inputs = load_target(target)
    found = run(model, need_inputs(target, inputs))
    typer.echo(dumps(found) if json else str(found))
    if expect_moe_sites is not None and found.rewritten() != expect_moe_sites:
        raise SiteCountError(
            f"expected {expect_moe_sites} MoE layers, {found.rewritten()} are rewritten. The report above says why; "
            "mend the model or correct the number."
        )
