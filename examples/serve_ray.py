"""``fastcls serve`` as a deployment of Ray Serve: replicas that come and go with the load.

    pip install "fastcls[serve]" "ray[serve]"
    python examples/serve_ray.py your/bert-classifier
    curl localhost:8000/predict --json '{"inputs": "a visually stunning rumination on love"}'

With other settings, which `Settings` names, and with several models, in this file's folder:

    serve run serve_ray:app model=your/bert-classifier,your/reranker max_replicas=16 quantize=int8
    serve run serve_ray:app model=your/bert-classifier num_gpus=1 max_ongoing_requests=512
"""

from dataclasses import fields
from typing import Annotated, Literal

import typer
from pydantic import BaseModel, PositiveFloat, PositiveInt
from ray import serve
from ray.serve import Application
from starlette.applications import Starlette

from fastcls.engine.spec import Quantize
from fastcls.predicting.predictor import set_threads
from fastcls.serving.app import create_app
from fastcls.serving.loaded import load_all
from fastcls.serving.options import LoadOptions, PoolingName, ServeOptions


class Settings(BaseModel, extra="forbid"):
    """What ``serve run serve_ray:app name=value ...`` sets; without a comment an option of ``fastcls serve``."""

    model: str  # a checkpoint's folder, which every node sees, or its name on the hub; several with commas between
    quantize: Quantize | None = None
    pooling: PoolingName | None = None
    max_input_length: PositiveInt | None = None
    auto_truncate: bool = True
    max_batch_tokens: PositiveInt | None = None
    max_client_batch_size: PositiveInt = 32
    deadline: PositiveFloat = 10
    api_key: str | None = None
    num_cpus: PositiveInt = 1  # cores of a replica, and its threads
    num_gpus: Literal[0, 1] = 0
    min_replicas: PositiveInt = 1
    max_replicas: PositiveInt = 4
    target_ongoing_requests: PositiveFloat = 16  # with more a replica, Serve starts another one
    max_ongoing_requests: PositiveInt = 64  # with a replica at once: what its passes are made of
    max_queued_requests: PositiveInt = 256  # wait for a replica; what comes then is answered by 503


class Replica:
    """A server in a process of its own."""

    app: Starlette  # which Serve sets

    async def check_health(self) -> None:
        """Serve asks, and replaces a replica that raises three times in a row."""
        if not await self.app.state.server.computes():
            raise RuntimeError("the model computes no more")


def app(settings: Settings) -> Application:
    """What ``serve run`` builds, of the settings on its command line."""
    given = settings.model_dump() | {
        "device": "cuda" if settings.num_gpus else "cpu",
        # Serve itself keeps further requests away.
        "max_concurrent_requests": settings.max_ongoing_requests,
    }
    of_models, of_server = (
        {each.name: given[each.name] for each in fields(kind) if each.name in given}
        for kind in (LoadOptions, ServeOptions)
    )
    checkpoints, threads = settings.model.split(","), settings.num_cpus
    load_options, serve_options = LoadOptions(**of_models), ServeOptions(**of_server)

    def build() -> Starlette:
        """In a replica: a model that cannot be loaded is in the status of the application."""
        set_threads(threads)
        models = load_all(checkpoints, load_options)
        return create_app(lambda: models, serve_options)

    deployment = serve.deployment(
        ray_actor_options={"num_cpus": settings.num_cpus, "num_gpus": settings.num_gpus},
        autoscaling_config=settings.model_dump(include={"min_replicas", "max_replicas", "target_ongoing_requests"}),
        max_ongoing_requests=settings.max_ongoing_requests,
        max_queued_requests=settings.max_queued_requests,
        health_check_period_s=10,
        graceful_shutdown_timeout_s=60,
    )
    return deployment(serve.ingress(build)(Replica)).bind()


def main(model: Annotated[str, typer.Argument(help="A checkpoint's folder, or its name on the hub.")]) -> None:
    """Serves a model on this machine until Ctrl-C."""
    serve.run(app(Settings(model=model)), blocking=True)


if __name__ == "__main__":
    typer.run(main)
