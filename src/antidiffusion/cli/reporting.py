"""`antidiffusion report`: a benchmark's rows as tables, plots and pictures."""

from pathlib import Path
from typing import Annotated

import typer

from antidiffusion.cli.shared import app, usage


@app.command()
def report(
    rows: Annotated[
        Path, typer.Argument(metavar="ROWS", help="rows.jsonl of a benchmark run; its pictures beside it.")
    ],
    outputs: Annotated[
        list[Path],
        typer.Option("--output", "-o", help="File to write: .html, .csv (every row) or .md (tables). May be repeated."),
    ],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing outputs.")] = False,
) -> None:
    """Turn a benchmark's rows into one page with tables, plots and pictures, into Markdown, or into CSV."""
    with usage():
        from antidiffusion.bench.report import expect_suffix, read_rows, render, write
        from antidiffusion.folders import make_writable
        from antidiffusion.pictures.files import expect_new

        for output in outputs:
            expect_suffix(output)
            if output.resolve() == rows.resolve():
                raise ValueError(f"expected an output that is no input, got {output}; choose another name")
            expect_new(output, overwrite=overwrite)
        found = read_rows(rows)
        texts = [render(found, rows.parent, output) for output in outputs]
        for output, text in zip(outputs, texts, strict=True):
            make_writable(output.parent)
            write(text, output)
            print(output)
