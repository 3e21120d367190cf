"""`mixdpo ...`: the command line; every command is one call of the runner."""

from __future__ import annotations

import importlib.metadata
import sys
import traceback
from pathlib import Path
from typing import Annotated

try:
    import typer

    from . import store
    from .runner import ending, execute, parameters
    from .runner import grid as side_by_side
    from .runner import reproduce as reproduction
    from .store import MixDPOError
    from .study.readme import with_quoted, with_results
except ModuleNotFoundError:
    sys.exit(
        "mixdpo: error: the command line needs more than the method alone: pip install 'mixdpo[study,runner]'"
    )
except KeyboardInterrupt:  # while all this is read, a second or so
    print("mixdpo: error: interrupted", file=sys.stderr, flush=True)
    sys.exit(130)

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Mix-DPO and MoE-DPO: notebooks, executed and recorded.",
)
_Profile = Annotated[
    str, typer.Option(help="smoke, default or full: a file of notebooks/profiles.")
]


def _show_version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"mixdpo {importlib.metadata.version('mixdpo')}")
        raise typer.Exit
    return wanted


@app.callback()
def _options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the whole traceback of an error.")
    ] = False,
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", is_eager=True, callback=_show_version),
    ] = False,
) -> None:
    """Mix-DPO and MoE-DPO: notebooks, executed and recorded."""


@app.command()
def run(
    notebook: Annotated[str, typer.Argument(help="For example 04_mix_dpo.")],
    parameter: Annotated[
        list[str] | None,
        typer.Option(
            "-p",
            "--parameter",
            metavar="NAME=VALUE",
            help=(
                "A parameter that differs from the profile's, or common.NAME, a shared one; the "
                "result then goes to runs/custom."
            ),
        ),
    ] = None,
    profile: _Profile = "default",
    output: Annotated[Path | None, typer.Option(help="Folder of the result.")] = None,
    cell_timeout: Annotated[
        int | None, typer.Option(help="Seconds that one cell may take.")
    ] = None,
) -> None:
    """Execute one notebook with checked parameters and record its result."""
    execute.run_notebook(
        notebook,
        parameters.parse_overrides(parameter or []),
        profile=profile,
        output=output,
        cell_timeout=cell_timeout,
    )


@app.command()
def reproduce(
    snakemake: Annotated[
        list[str] | None, typer.Argument(help="After `--`: passed to Snakemake.")
    ] = None,
    profile: _Profile = "default",
    cores: Annotated[int, typer.Option(help="Processor cores; each notebook takes two.")] = 2,
    everything: Annotated[
        bool, typer.Option("--all", help="Also the ablations and further studies.")
    ] = False,
) -> None:
    """Execute the notebooks of the main study that are not up to date."""
    reproduction.reproduce(profile, cores, snakemake or [], everything)


@app.command()
def grid(
    snakemake: Annotated[
        list[str] | None,
        typer.Argument(help="After `--`: passed to Snakemake; -n says what would run."),
    ] = None,
    profile: _Profile = "default",
    cores: Annotated[int, typer.Option(help="Processor cores; each piece takes two.")] = 2,
) -> None:
    """Make every method and seed of 12_baselines side by side, here or on a cluster."""
    side_by_side.run_grid(profile, cores, snakemake or [])


@app.command()
def reference(profile: _Profile = "default") -> None:
    """Copy a finished profile's figures, tables and values to figures/reference."""
    pages = {
        "README.md": with_results,
        "docs/results.md": with_results,
        "docs/claims.md": with_quoted,
    }
    typer.echo(reproduction.update_reference(profile, pages))


@app.command()
def figures(
    size: Annotated[str, typer.Option(help="column, page or slide.")] = "column",
    run: Annotated[str, typer.Option(help="reference, or a profile of runs/.")] = "reference",
    output: Annotated[Path | None, typer.Option(help="Default: figures/paper/<run>.")] = None,
) -> None:
    """Draw a run's figures anew at one width of print: PDF, captions, tables in LaTeX."""
    from .runner.results import Finished
    from .study import paper

    if run != "reference" and "/" not in run:
        parameters.profile_values(run, "")  # refused, with the profiles that there are
    folder = output or store.project_root() / "figures" / "paper" / run / size
    typer.echo(paper.write(Finished(run), size, folder))


@app.command(name="list")
def list_runs() -> None:
    """Show every run: its state, and where its results lie."""
    from .runner import listing, record

    runs = listing.found_runs(record.library_hash)
    typer.echo(listing.listing(runs))
    typer.echo(f"in {store.project_root() / 'runs'}")
    if missing := listing.never_run(runs):
        typer.echo(f"without a finished run: {', '.join(missing)}")


@app.command(name="open")
def open_notebook(
    what: Annotated[str, typer.Argument(help="A notebook, or a run as `mixdpo list` names it.")],
    browser: Annotated[bool, typer.Option(help="Open a browser.")] = True,
) -> None:
    """Open an executed notebook in JupyterLab, as a copy: the record stays as it is."""
    from .runner import listing, record

    copy = listing.opened_copy(what, listing.found_runs(record.library_hash))
    typer.echo(f"a copy of its own: {copy}")
    raise typer.Exit(listing.show(copy, browser))


@app.command(name="doctor")
def examine() -> None:
    """Say what is missing on this machine, and how to mend it."""
    from .runner import doctor

    findings = doctor.examine()
    typer.echo(doctor.told(findings))
    raise typer.Exit(any(one.state == "missing" for one in findings))


@app.command()
def clean(
    everything: Annotated[bool, typer.Option("--all", help="Also what was downloaded.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Remove runs/ and computed files; asks first, since hours may lie in them."""
    if not yes:
        places = f"{store.project_root() / 'runs'} and {store.cache_folder()}"
        if not sys.stdin.isatty():
            raise MixDPOError(f"clean removes {places}; nobody is there to ask: give --yes")
        typer.confirm(f"Remove {places}{', and downloads' if everything else ''}?", abort=True)
    for path in reproduction.clean(everything):
        typer.echo(f"removed {path}")


def main(arguments: list[str] | None = None) -> None:
    """Entry point; every error is one line on stderr and a non-zero exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in given  # anywhere in the line
    arguments = [argument for argument in given if argument != "--debug"] or ["--help"]
    try:
        with ending.interruptible():
            status = typer.main.get_command(app).main(
                arguments, prog_name="mixdpo", standalone_mode=False
            )
        if status == 130:
            print("mixdpo: error: interrupted", file=sys.stderr, flush=True)
            status = ending.exit_code()
        sys.exit(status if isinstance(status, int) else 0)
    except KeyboardInterrupt:
        print("mixdpo: error: interrupted", file=sys.stderr, flush=True)
        sys.exit(ending.exit_code())
    except Exception as error:
        if debug:
            traceback.print_exc()
        known = isinstance(error, (MixDPOError, ValueError)) or hasattr(error, "format_message")
        text = str(getattr(error, "format_message", error.__str__)())
        line = " ".join(text.split())
        if not known:
            line = f"{type(error).__name__}: {line}; see `mixdpo --debug ...`"
        print(f"mixdpo: error: {line}", file=sys.stderr, flush=True)
        sys.exit(getattr(error, "exit_code", 1))


if __name__ == "__main__":
    main()
