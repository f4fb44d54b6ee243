"""The command line ``ome-tensor``: its commands and how they fail.

Whatever goes wrong for a user is one line on stderr, ``error: ...``, and exit status 1; a command line that cannot be understood is
the parser's own message and 2; Ctrl-C is 130. A traceback means a bug. Commands of other packages come by the entry point group
``ome_tensor.commands``: each names a function that gets a ``typer.Typer`` to add to. They are loaded only when needed, since ``serve``
brings the server with it.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points, version
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from ome_tensor.errors import MissingDependency, NotAllowed, NotAuthenticated, OmeTensorError, ServerError

from . import cli_connect
from .cli_admin import add_commands
from .cli_arguments import Dataset, Json, Key, Level, Seconds, Target, Where
from .cli_connect import reach
from .cli_get import get
from .cli_tables import parse_where, table
from .cli_top import top

__all__ = ["app", "main"]

#: Errors that the server's operator can do something about.
_OPERATORS = (NotAllowed, NotAuthenticated, ServerError)

_GROUP = "ome_tensor.commands"

#: Commands that users of the base installation will look for, and the extra that brings each.
_EXTRAS = {"serve": "server", "token": "server", "certificate": "server"}


class _Commands(TyperGroup):
    """The commands of this package, and others' when first asked for; errors as the module says."""

    # Typer's context is click's in older versions and its own in newer ones; it is only passed on here.
    _loaded = False

    def list_commands(self, ctx: Any) -> list[str]:
        """Names in the order of the help."""
        self._load()
        own = super().list_commands(ctx)
        return sorted(own, key=lambda name: name not in _EXTRAS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """A command by name, others' packages imported only where it is none of ours."""
        if cmd_name not in self.commands:
            self._load()
        return super().get_command(ctx, cmd_name)

    def invoke(self, ctx: Any) -> Any:
        """Run, and turn what a user can do wrong into one line and a status."""
        with _errors_in_one_line():
            result = super().invoke(ctx)
            # Here and not at exit, where a closed pipe could only be complained about. (Python has no stdout where it was started without one.)
            if sys.stdout is not None:
                sys.stdout.flush()
            return result

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True
        for point in entry_points(group=_GROUP):
            extra = typer.Typer()
            # A second entry keeps a lone command from becoming the program itself.
            extra.callback()(lambda: None)
            try:
                point.load()(extra)
            except ImportError as error:
                _add_missing(extra, point.name, error)
            self.commands.update(typer.main.get_group(extra).commands)
        for name in _EXTRAS.keys() - self.commands.keys():
            extra = typer.Typer()
            extra.callback()(lambda: None)
            _add_missing(extra, name, None)
            self.commands.update(typer.main.get_group(extra).commands)


def _add_missing(to: typer.Typer, name: str, why: ImportError | None) -> None:
    """A command that says how to install it."""
    extra = _EXTRAS.get(name, name)

    # Whatever follows the name, the answer is the same.
    @to.command(
        name,
        help=f"(Not installed: pip install 'ome-tensor[{extra}]'.)",
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
        add_help_option=False,
    )
    def missing() -> None:
        reason = f"{why.name} is missing" if why is not None and why.name else "it is not installed"
        raise MissingDependency(f"ome-tensor {name}: {reason}; install it with: pip install 'ome-tensor[{extra}]'")


@contextlib.contextmanager
def _errors_in_one_line() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError as error:
        if isinstance(error, OmeTensorError):
            _fail(error)
        # Whoever read our output has seen enough (`| head`). Nothing more can be written, and nothing needs to be said.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from None
    except OmeTensorError as error:
        _fail(error)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except MemoryError as error:
        _fail(f"not enough memory: {error}")
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}{error.strerror or error}")


def _fail(error: object, status: int = 1) -> NoReturn:
    from .cli_text import printable

    # Where only the server's operator can help, what to look for in its log.
    request = f" (request {error.request_id})" if isinstance(error, _OPERATORS) and error.request_id else ""
    typer.echo(f"error: {printable(' '.join(str(error).split()))}{request}", err=True)
    raise typer.Exit(status) from None


app = typer.Typer(
    name="ome-tensor",
    cls=_Commands,
    help="OME-Arrow images as tensors: serve them, look at what a server holds, read from it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(get)
app.command()(table)
app.command()(top)
add_commands(app)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"ome-tensor {version('ome-tensor')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    tls: cli_connect.Tls = False,
    ca: cli_connect.Ca = "",
    cert: cli_connect.Cert = "",
    key: cli_connect.Key = "",
    server_name: cli_connect.ServerName = "",
    token_file: cli_connect.TokenFile = "",
    insecure: cli_connect.Insecure = False,
) -> None:
    cli_connect.set_security(cli_connect.Security(tls, ca, cert, key, server_name, token_file, insecure))


@app.command("ls")
def list_(
    target: Target,
    dataset: Dataset = None,
    json: Json = False,
    limit: Annotated[
        int | None, typer.Option(min=1, help="List so many images at most.", show_default="all; 1000 on a terminal")
    ] = None,
    column: Annotated[str | None, typer.Option(metavar="NAME", help="Only images of this column.", show_default="all")] = None,
    where: Where = None,
    timeout: Seconds = 60,
) -> None:
    """List a server's datasets, or the images of one."""
    from .cli_output import print_datasets, print_images

    filters = parse_where(where)
    if dataset is None and (filters or column):
        raise typer.BadParameter("name the dataset whose images are to be listed", param_hint="DATASET")
    with reach(target, timeout=timeout) as client:
        if dataset is None:
            print_datasets(client.datasets(), as_json=json)
        else:
            print_images(client.images(dataset, column, filters=filters), limit, as_json=json)


@app.command()
def info(target: Target, key: Key, json: Json = False, level: Level = 0, timeout: Seconds = 60) -> None:
    """Describe one image. Reads no pixels."""
    from .cli_output import print_image

    with reach(target, timeout=timeout) as client:
        print_image(client.image(key, level=level), as_json=json)


@app.command()
def health(target: Target, timeout: Seconds = 3) -> None:
    """Ask whether a server is ready. Exit status 0 only if it is."""
    from ome_tensor.errors import Unavailable

    from .cli_text import say
    from .health import check_health
    from .options import Options

    status = check_health(target, timeout=timeout, **Options(**cli_connect.security()).about_tls)
    if status != "SERVING":
        raise Unavailable(f"{target}: {status}", field="target", value=target)
    say(status)


@app.command()
def demo(
    data: Annotated[
        str | None, typer.Option(metavar="FILE", help="An OME-Arrow Parquet file.", show_default="the example image")
    ] = None,
    output: Annotated[str, typer.Option("--output", "-o", metavar="FILE.png", help="Where the picture goes.")] = "demo.png",
) -> None:
    """Serve an example image, stream it back as tensors, check every pixel against the file, and write a picture of it."""
    from .demo import run_demo

    run_demo(data, output)


def main() -> None:
    """The console script."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # A name that this terminal's encoding lacks is shown as well as it can be.
            stream.reconfigure(errors="backslashreplace")
    app()


if __name__ == "__main__":
    main()
