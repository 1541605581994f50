"""Other servers of a classifier, as their documentation has them, each with transformers' pipeline in batches of 32.

python benchmarks/serving_peers.py litserve MODEL PORT WAIT THREADS    # or ray, or fastapi

All take {"inputs": text} at /predict, and wait at most WAIT seconds for more texts of a batch. The model runs on a CPU
with so many threads, in one worker.
"""

# Annotations are what they say: FastAPI reads those of functions that Ray sends to another process.
import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import torch
from pydantic import BaseModel

try:
    from litserve import LitAPI
except ImportError:
    # The others run without it.
    LitAPI = object

HOST = "127.0.0.1"
BATCH_SIZE = 32
# What may wait in a server: more than any number of clients here.
_MOST_REQUESTS = 1024


class Asked(BaseModel):
    """A request."""

    inputs: str


def pipeline(model: str, threads: int) -> Any:
    """transformers' own, on so many threads."""
    import transformers

    torch.set_num_threads(threads)
    return transformers.pipeline("text-classification", model=model, device="cpu")


def batch_of(pipe: Any, texts: list[str]) -> list[dict[str, Any]]:
    """A label and a score for each text. Called in one thread alone: torch keeps threads of its own for each caller."""
    return list(pipe(texts, batch_size=BATCH_SIZE, truncation=True))


class Api(LitAPI):  # type: ignore[misc]
    """LitServe's side: of the module, because its worker is another process."""

    def __init__(self, model: str, threads: int, wait: float) -> None:
        super().__init__(max_batch_size=BATCH_SIZE, batch_timeout=wait)
        self._model, self._threads = model, threads

    def setup(self, device: str) -> None:  # noqa: ARG002 - LitServe's signature
        self._pipe = pipeline(self._model, self._threads)

    def decode_request(self, request: dict[str, str]) -> str:
        return request["inputs"]

    def predict(self, x: list[str]) -> list[dict[str, Any]]:
        return batch_of(self._pipe, x)

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        return output


def by_litserve(model: str, port: int, wait: float, threads: int) -> None:
    import litserve

    server = litserve.LitServer(Api(model, threads, wait), accelerator="cpu", workers_per_device=1)
    server.run(host=HOST, port=port, generate_client_file=False, log_level="warning", access_log=False)


def by_ray(model: str, port: int, wait: float, threads: int) -> None:
    import ray
    from fastapi import FastAPI
    from ray import serve

    app = FastAPI()

    @serve.ingress(app)
    class Replica:
        def __init__(self) -> None:
            self._pipe, self._thread = pipeline(model, threads), ThreadPoolExecutor(1)

        @serve.batch(max_batch_size=BATCH_SIZE, batch_wait_timeout_s=wait)
        async def batched(self, texts: list[str]) -> list[dict[str, Any]]:
            return await asyncio.get_running_loop().run_in_executor(self._thread, batch_of, self._pipe, texts)

        @app.post("/predict")
        async def predict(self, asked: Asked) -> Any:
            return await self.batched(asked.inputs)

    # The actor has all cores; the processes beside it want none of Ray's.
    deployed: Any = serve.deployment(
        Replica,
        max_ongoing_requests=_MOST_REQUESTS,
        ray_actor_options={"num_cpus": threads},
        logging_config={"enable_access_log": False, "log_level": "WARNING"},
    )
    ray.init(address="local", num_cpus=threads, include_dashboard=False, log_to_driver=True)
    try:
        serve.start(http_options={"host": HOST, "port": port})
        serve.run(deployed.bind(), blocking=True)
    finally:
        ray.shutdown()


def by_fastapi(model: str, port: int, wait: float, threads: int) -> None:
    import uvicorn
    from fastapi import FastAPI

    waiting: asyncio.Queue[tuple[str, asyncio.Future[Any]]] = asyncio.Queue()
    pipe, thread = pipeline(model, threads), ThreadPoolExecutor(1)

    async def batch() -> list[tuple[str, asyncio.Future[Any]]]:
        found, loop = [await waiting.get()], asyncio.get_running_loop()
        end = loop.time() + wait
        while len(found) < BATCH_SIZE:
            if not waiting.empty():
                found.append(waiting.get_nowait())
                continue
            try:
                found.append(await asyncio.wait_for(waiting.get(), end - loop.time()))
            except asyncio.TimeoutError:
                break
        return found

    async def work() -> None:
        while True:
            texts, futures = zip(*await batch(), strict=True)
            answers = await asyncio.get_running_loop().run_in_executor(thread, batch_of, pipe, list(texts))
            for future, answer in zip(futures, answers, strict=True):
                if not future.done():
                    future.set_result(answer)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(work())
        yield
        task.cancel()

    app = FastAPI(lifespan=lifespan)

    @app.post("/predict")
    async def predict(asked: Asked) -> Any:
        future = asyncio.get_running_loop().create_future()
        waiting.put_nowait((asked.inputs, future))
        return await future

    uvicorn.run(app, host=HOST, port=port, log_level="warning", access_log=False)


def main(name: str, model: str, port: str, wait: str, threads: str) -> None:
    # Ray ends what it started where its driver ends as after Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    {"litserve": by_litserve, "ray": by_ray, "fastapi": by_fastapi}[name](model, int(port), float(wait), int(threads))


if __name__ == "__main__":
    main(*sys.argv[1:])
