"""The server's part of the command line; the client's ``ome-tensor`` finds it by entry point."""

from __future__ import annotations

import logging
import os
import resource
import signal
import socket
import sys
import threading
from contextlib import suppress
from typing import Annotated

import typer

from ome_tensor.errors import InvalidArgument
from ome_tensor_proto.memory import keep_blocks

from .app import TensorServer
from .certificate_cli import certificate
from .finding import SourceFile, find_sources
from .logs import Fields, configure
from .readers.detect import is_address
from .settings import Settings, split_address
from .stopping import StopRequests
from .token_cli import token_commands
from .tracing import export_traces
from .workers import Supervisor

__all__ = ["register", "serve"]

_log = logging.getLogger(__name__)

_MOST_FILES = 65_536


def register(app: typer.Typer) -> None:
    """Add the server's commands."""
    app.command()(serve)
    app.add_typer(token_commands, name="token")
    app.command()(certificate)


def serve(
    paths: Annotated[
        list[str] | None,
        # What cannot be read is this command's to say, in its own words.
        typer.Argument(
            metavar="PATH",
            help="Files of images (Parquet, Arrow, Vortex, OME-TIFF, npy), OME-Zarr folders or addresses, or folders of them.",
            show_default=False,
        ),
    ] = None,
    listen: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Port 0 takes a free one.", show_default="127.0.0.1:50051")
    ] = None,
    insecure: Annotated[bool | None, typer.Option("--insecure", help="Allow plain text beyond this host.")] = None,
    tls_cert: Annotated[str | None, typer.Option(metavar="FILE", help="Certificate chain of the server (PEM).")] = None,
    tls_key: Annotated[str | None, typer.Option(metavar="FILE", help="Its key (PEM).")] = None,
    tls_client_ca: Annotated[
        str | None, typer.Option(metavar="FILE", help="Let in clients whose certificates these authorities signed (PEM).")
    ] = None,
    certificate_scopes: Annotated[
        str | None, typer.Option(metavar="SCOPES", help="What a client certificate allows.", show_default="read:*")
    ] = None,
    tokens: Annotated[str | None, typer.Option(metavar="FILE", help="Let in bearers of tokens (see: ome-tensor token).")] = None,
    anonymous: Annotated[
        str | None, typer.Option(metavar="SCOPES", help="What callers may who do not say who they are.", show_default="nothing")
    ] = None,
    oidc_issuer: Annotated[str | None, typer.Option(metavar="URL", help="Let in bearers of this provider's tokens.")] = None,
    oidc_audience: Annotated[str | None, typer.Option(metavar="NAME", help="Whom they must be for.")] = None,
    oidc_jwks: Annotated[str | None, typer.Option(metavar="FILE|URL", help="The provider's public keys.")] = None,
    oidc_claim: Annotated[
        str | None, typer.Option(metavar="NAME", help="The claim that holds the scopes.", show_default="scope")
    ] = None,
    oidc_leeway_seconds: Annotated[
        float | None, typer.Option(help="How far the provider's clock may be off.", show_default="30")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that share the port and the pixels.", show_default="1")] = None,
    store: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER", help="Where datasets are kept as Arrow files, to be mapped; or none.", show_default="auto"
        ),
    ] = None,
    mapping: Annotated[
        str | None, typer.Option(help="Let clients on this host map datasets: auto, on or off.", show_default="auto")
    ] = None,
    memory_limit: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory for datasets, as 16G or 60%.", show_default="50%")
    ] = None,
    preload: Annotated[bool | None, typer.Option("--preload", help="Load datasets at the start, as far as they fit.")] = None,
    load_seconds: Annotated[
        float | None, typer.Option(help="How long a call waits for a dataset that is being loaded.", show_default="20")
    ] = None,
    watch_seconds: Annotated[
        float | None, typer.Option(help="How often to look for new and changed files in the folders; 0: never.", show_default="0")
    ] = None,
    roots: Annotated[
        str | None,
        typer.Option(metavar="FOLDER:...", help="Where datasets may be registered.", show_default="the folders served"),
    ] = None,
    admin: Annotated[
        str | None, typer.Option(help="Who may register, upload and remove datasets: auto, on or off.", show_default="auto")
    ] = None,
    uploads: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Where uploads are kept; none are taken without.", show_default="none")
    ] = None,
    max_upload_bytes: Annotated[int | None, typer.Option(help="Largest upload.", show_default="64 GiB")] = None,
    batch_bytes: Annotated[int | None, typer.Option(help="Aim of a message's size.", show_default="1 MiB")] = None,
    max_request_bytes: Annotated[int | None, typer.Option(help="Largest request.", show_default="4 MiB")] = None,
    max_tile_bytes: Annotated[int | None, typer.Option(help="Largest tile.", show_default="2 GiB")] = None,
    max_message_bytes: Annotated[int | None, typer.Option(help="Largest message.", show_default="32 MiB")] = None,
    max_chunk_bytes: Annotated[int | None, typer.Option(help="Largest chunk to decompress.", show_default="512 MiB")] = None,
    max_tiles: Annotated[int | None, typer.Option(help="Most tiles of one read.", show_default="2,000,000")] = None,
    max_indices: Annotated[int | None, typer.Option(help="Most indices listed for an axis.", show_default="65,536")] = None,
    max_concurrent_reads: Annotated[int | None, typer.Option(help="Streams served at once.", show_default="64")] = None,
    max_caller_reads: Annotated[
        int | None, typer.Option(help="Streams served at once for one caller.", show_default="3/4 of all, or all")
    ] = None,
    max_requests_per_second: Annotated[float | None, typer.Option(help="Calls a second.", show_default="no limit")] = None,
    max_caller_requests_per_second: Annotated[
        float | None, typer.Option(help="Calls a second of one caller.", show_default="no limit")
    ] = None,
    max_bytes_in_flight: Annotated[
        int | None, typer.Option(help="Messages that no client has taken yet.", show_default="512 MiB")
    ] = None,
    max_caller_bytes_in_flight: Annotated[
        int | None, typer.Option(help="The same of one caller.", show_default="half of it, or all")
    ] = None,
    decode_cache_bytes: Annotated[int | None, typer.Option(help="Decompressed chunks kept.", show_default="256 MiB")] = None,
    grace_seconds: Annotated[float | None, typer.Option(help="Time for running streams at SIGTERM.", show_default="30")] = None,
    stall_seconds: Annotated[
        float | None, typer.Option(help="Time to take a message before a stream is ended.", show_default="120")
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="HTTP port for /metrics, /livez and /readyz.", show_default="none"),
    ] = None,
    tracing: Annotated[bool | None, typer.Option("--tracing", help="Take part in OpenTelemetry traces.")] = None,
    log_format: Annotated[str | None, typer.Option(help="text or json.", show_default="text")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.", show_default="info")] = None,
) -> None:
    """Serve OME-Arrow images. Every option is also a variable, OME_TENSOR_LISTEN and so on; options win.

    SIGTERM drains: health turns to NOT_SERVING, new calls are refused, running streams finish within the grace period.
    """
    flags = {name: value for name, value in locals().items() if name != "paths"}
    settings = Settings.load(flags, os.environ)
    paths = paths or []
    if not paths and not settings.uploads:
        raise typer.BadParameter("name files or folders to serve, or a folder for uploads (--uploads)", param_hint="PATH")
    configure(settings.log_format, settings.log_level)
    export_traces(settings)
    sources = find_sources(paths)
    named = {source.location for source in sources if source.named}
    folders = [found for path in paths if not is_address(path) and (found := os.path.abspath(path)) not in named]
    if paths and not sources:
        _log.warning("nothing to serve in %s", ", ".join(map(str, paths)))
    keep_blocks()
    _open_many_files()
    _check_address(settings.listen)
    server = TensorServer(settings) if settings.workers == 1 else Supervisor(settings)
    # Before anything listens: whoever reads the address below may send a signal at once. Asked twice, whoever is still reading can resume elsewhere.
    stop = StopRequests(signal.SIGTERM, signal.SIGINT, hurry=lambda: server.stop(0)).asked
    # Scripts wait for this line; it comes once the port is bound. Readiness is health's to tell.
    print(f"listening on {server.start()}", flush=True)  # noqa: T201  the command's output
    try:
        if server.metrics_address is not None:
            address = f"http://{server.metrics_address}/metrics"
            _tell(settings, f"metrics on {address}", Fields("metrics", address=address))
        _load(server, sources, folders, stop)
        stop.wait()
    finally:
        server.stop()


def _tell(settings: Settings, text: str, fields: Fields) -> None:
    """A word for whoever started it; among lines for a program it is one of those."""
    if settings.log_format == "json":
        _log.info(fields)
    else:
        print(text, file=sys.stderr, flush=True)  # noqa: T201  the command's output


def _open_many_files() -> None:
    """A mapped dataset holds two files open, and the usual limit of 1,024 is one that every process may raise for itself."""
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_FILES if most == resource.RLIM_INFINITY else min(most, _MOST_FILES)
    if now != resource.RLIM_INFINITY and now < wanted:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def _load(server: TensorServer | Supervisor, sources: list[SourceFile], folders: list[str], stop: threading.Event) -> None:
    """Load on a thread of its own, so that a signal is heeded meanwhile; raises what the loading raised."""
    done = threading.Event()
    failures: list[Exception] = []

    def load() -> None:
        try:
            count = len(server.load(sources, folders))
            if not stop.is_set():
                _tell(server.settings, f"serving {count} dataset{'s' * (count != 1)}", Fields("serving", datasets=count))
        except Exception as error:
            failures.append(error)
        finally:
            done.set()

    threading.Thread(target=load, name="ome-tensor-load", daemon=True).start()
    while not done.wait(0.1) and not stop.is_set():
        pass
    if failures:
        raise failures[0]


def _check_address(listen: str) -> None:
    """Bind once for a try: gRPC would not say what is wrong with an address, and logs a line of its own beside the error's."""
    host, port = split_address(listen)
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with socket.socket(family, kind, protocol) as probe:
            # As gRPC does: connections of a server that has just ended do not count.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise InvalidArgument(f"cannot listen on {listen}: {error.strerror}", field="listen", value=listen) from None
