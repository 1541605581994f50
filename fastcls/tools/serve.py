"""``fastcls serve``: models behind HTTP."""

from __future__ import annotations

import signal
from importlib.util import find_spec
from typing import Annotated

import typer

from .options import Device, DType, Quantize, Threads
from .terminal import expected_errors, set_threads, stderr

LIBRARIES = ("starlette", "uvicorn", "httptools", "pydantic", "orjson", "prometheus_client")
_MODEL, _LIMITS, _LISTEN = "Models", "Limits", "Listening"


@expected_errors
def serve(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="A folder with a checkpoint each, or a name on the hub.")
    ],
    host: Annotated[
        str, typer.Option("--host", "--hostname", help="The address to listen on.", rich_help_panel=_LISTEN)
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", "-p", min=0, max=65535, help="0 is any free one.", rich_help_panel=_LISTEN)
    ] = 3000,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar=["FASTCLS_API_KEY", "API_KEY"],
            help="What clients must send, as Authorization: Bearer KEY.",
            rich_help_panel=_LISTEN,
        ),
    ] = None,
    cors_allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            help="Pages of this origin may ask. Can be given several times. Default: any.", rich_help_panel=_LISTEN
        ),
    ] = None,
    no_ui: Annotated[
        bool, typer.Option("--no-ui", help="No page to look at under /.", rich_help_panel=_LISTEN)
    ] = False,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(help="What clients call a model, once for each in their order.", rich_help_panel=_MODEL),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="The commit, branch or tag of a name on the hub.", rich_help_panel=_MODEL)
    ] = None,
    pooling: Annotated[
        str | None,
        typer.Option(help="cls, mean or splade. Default: what the checkpoint says.", rich_help_panel=_MODEL),
    ] = None,
    default_prompt_name: Annotated[
        str | None,
        typer.Option(help="The prompt of the checkpoint before each text to embed.", rich_help_panel=_MODEL),
    ] = None,
    default_prompt: Annotated[
        str | None, typer.Option(help="What stands before each text to embed, itself.", rich_help_panel=_MODEL)
    ] = None,
    one_encoder: Annotated[
        bool,
        typer.Option(
            "--one-encoder",
            help="The models are heads that were trained on one frozen encoder: compute it once for all.",
            rich_help_panel=_MODEL,
        ),
    ] = False,
    device: Device = None,
    dtype: DType = None,
    quantize: Quantize = None,
    batch_invariant: Annotated[
        bool,
        typer.Option(
            "--batch-invariant", help="Scores that no other text in a pass moves by a bit.", rich_help_panel=_MODEL
        ),
    ] = False,
    threads: Threads = None,
    max_concurrent_requests: Annotated[
        int, typer.Option(min=1, help="Answered at once; a further one gets status 429.", rich_help_panel=_LIMITS)
    ] = 512,
    max_batch_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens in a pass. Default: 1024 on a CPU, 16384 on a GPU.", rich_help_panel=_LIMITS),
    ] = None,
    max_batch_requests: Annotated[
        int | None, typer.Option(min=1, help="Texts in a pass. Default: any number.", rich_help_panel=_LIMITS)
    ] = None,
    max_client_batch_size: Annotated[
        int, typer.Option(min=1, help="Texts in a request.", rich_help_panel=_LIMITS)
    ] = 32,
    max_input_length: Annotated[
        int | None,
        typer.Option(
            min=1, help="Tokens of a text. Default: the tokenizer's and the model's.", rich_help_panel=_LIMITS
        ),
    ] = None,
    auto_truncate: Annotated[
        bool,
        typer.Option(help="Whether longer texts are cut where a request does not say.", rich_help_panel=_LIMITS),
    ] = True,
    payload_limit: Annotated[int, typer.Option(min=1, help="Bytes of a request.", rich_help_panel=_LIMITS)] = 2_000_000,
    deadline: Annotated[
        float,
        typer.Option(
            min=0, help="Seconds until a request is answered, half of them to wait; else 429.", rich_help_panel=_LIMITS
        ),
    ] = 10.0,
    json_output: Annotated[bool, typer.Option("--json-output", help="Log a JSON object a line.")] = False,
    log_level: Annotated[str, typer.Option(help="debug, info (a line for each request), warning or error.")] = "info",
) -> None:
    """Serve classifiers, rerankers and embedding models over HTTP.

    The routes are those of text-embeddings-inference (/predict, /rerank, /embed,
    /embed_all, /embed_sparse, /similarity, /tokenize, /info, /health, /metrics),
    of OpenAI (/v1/embeddings) and of Cohere and Jina (/v1/rerank): a client
    changes its URL and nothing else. http://localhost:3000 is a page to try a
    sentence, /openapi.json describes the routes.

    Of several models a request means the first one that gives what it asks for,
    or the one in its path: /models/NAME/predict. SIGTERM and Ctrl-C end the
    server once all that it had taken is answered, SIGTERM with status 0.
    """
    _check_installed()
    from ..loading import parse_quantize
    from ..serving import app, loaded, logs, run
    from ..serving.options import LoadOptions, ServeOptions

    if log_level not in ("debug", "info", "warning", "error"):
        raise ValueError(f"--log-level must be debug, info, warning or error, got {log_level}")
    load_options = LoadOptions(
        device=device,
        dtype=dtype,
        quantize=parse_quantize(quantize),
        batch_invariant=batch_invariant,
        pooling=pooling,  # type: ignore[arg-type]
        default_prompt_name=default_prompt_name,
        default_prompt=default_prompt,
        max_input_length=max_input_length,
        one_encoder=one_encoder,
        revision=revision,
    )
    serve_options = ServeOptions(
        max_concurrent_requests=max_concurrent_requests,
        max_batch_tokens=max_batch_tokens,
        max_batch_requests=max_batch_requests,
        max_client_batch_size=max_client_batch_size,
        payload_limit=payload_limit,
        auto_truncate=auto_truncate,
        deadline=deadline,
        api_key=api_key,
        cors_allow_origin=tuple(cors_allow_origin or ("*",)),
        ui=not no_ui,
    )
    # Before a model is loaded, which takes a while. Process 1 of a container ignores signals that it does not handle.
    signal.signal(signal.SIGTERM, _stop)
    at = run.bound(host, port)
    set_threads(threads)
    with stderr.status("Loading", spinner="dots"):
        served = loaded.load_all(models, load_options, served_model_name or ())
    logs.set_up(log_level, as_json=json_output)

    def ready(url: str) -> None:
        if json_output:
            logs.say("ready", url=url)
        else:
            names = ", ".join(f"{each.name} ({each.kind})" for each in served)
            stderr.print(f"Serving {names} at {url}", highlight=False, soft_wrap=True, markup=False)

    run.serve(app.create_app(lambda: served, serve_options), at, ready)


def _stop(*_: object) -> None:
    raise SystemExit(0)


def _check_installed() -> None:
    """Refuses to go on without the libraries of the extra ``serve``.

    Raises:
        ImportError: one is missing; the message says how to install them.
    """
    missing = [name for name in LIBRARIES if find_spec(name) is None]
    if missing:
        raise ImportError(f'{", ".join(missing)} must be installed: pip install "fastcls[serve]"')
