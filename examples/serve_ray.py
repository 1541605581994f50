"""A classifier behind HTTP with Ray Serve, whose requests share passes of a bounded number of tokens.

    pip install fastcls "ray[serve]"
    python examples/serve_ray.py your/bert-classifier
    curl localhost:8000/classify --json '{"texts": ["a visually stunning rumination on love", "dull"]}'

answers ``[{"label": "positive", "score": 0.99}, {"label": "negative", "score": 0.98}]``. With other settings, which
`Settings` names, in this file's folder:

    serve run serve_ray:app model=your/bert-classifier max_replicas=16 quantize=int8
    serve run serve_ray:app model=your/bert-classifier num_gpus=1 tokens_per_pass=65536 max_ongoing_requests=512

A pass starts as soon as the model is free, with the texts that wait by then: no text waits for others to come, and the
busier a replica is, the fuller are its passes. http://localhost:8000/docs describes the routes.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Literal, NamedTuple

import typer
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field, PositiveFloat, PositiveInt, StringConstraints
from ray import serve
from ray.serve import Application
from transformers import AutoTokenizer

from fastcls.engine.spec import Quantize
from fastcls.flow import LongTexts
from fastcls.predicting.loaded import load_shared
from fastcls.predicting.options import PredictOptions
from fastcls.predicting.predictor import set_threads
from fastcls.texts import Item


# Annotations are objects here, not strings: FastAPI reads them again in a replica, where a script's names are missing.
class Settings(BaseModel, extra="forbid"):
    """What ``serve run serve_ray:app name=value ...`` sets."""

    model: str  # a checkpoint's folder, which every node sees, or its name on the hub
    quantize: Quantize | None = None
    long_texts: LongTexts = "truncate"  # "error" refuses what would be cut
    tokens_per_pass: PositiveInt = 2048  # more keep a GPU busy, fewer answer sooner
    num_cpus: PositiveInt = 1  # cores of a replica, and its threads
    num_gpus: Literal[0, 1] = 0
    min_replicas: PositiveInt = 1
    max_replicas: PositiveInt = 4
    target_ongoing_requests: PositiveFloat = 16  # with more a replica, Serve starts another one
    max_ongoing_requests: PositiveInt = 64  # with a replica at once: what its passes are made of
    max_queued_requests: PositiveInt = 256  # wait for a replica; what comes then is answered by 503


class Texts(BaseModel):
    # What a request may hold, so that none fills the memory, or has the others wait for minutes.
    texts: list[Annotated[str, StringConstraints(max_length=100_000)]] = Field(min_length=1, max_length=1024)


class Label(BaseModel):
    label: str | None
    score: float | None


# A string says why a text cannot be classified.
Answer = Label | str


class Waiting(NamedTuple):
    """A text that is to be computed."""

    text: str
    tokens: int
    answer: asyncio.Future[Answer]


class Passes:
    """Texts of all requests to answers, first come, first served, a bounded number of tokens at once.

    Args:
        compute: a pass over some texts, to an answer for each.
        count: the tokens of each text.
        tokens_per_pass: the text that reaches it is the last one of a pass.

    Attributes:
        requests, texts, passes: how many are done.
        failure: the last pass's error, or None.
    """

    def __init__(
        self,
        compute: Callable[[list[str]], list[Answer]],
        count: Callable[[list[str]], list[int]],
        tokens_per_pass: int,
    ) -> None:
        self._compute, self._count, self._tokens_per_pass = compute, count, tokens_per_pass
        self._queue: asyncio.Queue[Waiting] = asyncio.Queue()
        # One thread each: every thread that computes starts threads of its own, and a tokenizer keeps a state.
        self._model, self._tokenizer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self.requests = self.texts = self.passes = 0
        self.failure: Exception | None = None
        self.worker = asyncio.create_task(self._work())

    def statistics(self) -> dict[str, int]:
        """What is done, and how many texts wait, those of callers that have left included."""
        waiting = self._queue.qsize()
        return {"requests": self.requests, "texts": self.texts, "passes": self.passes, "waiting": waiting}

    async def answers(self, texts: list[str]) -> list[Answer]:
        """The answers to one request. If it is cancelled, those of its texts that still wait are never computed."""
        loop = asyncio.get_running_loop()
        counts = await loop.run_in_executor(self._tokenizer, self._count, texts)
        mine = [Waiting(text, tokens, loop.create_future()) for text, tokens in zip(texts, counts, strict=True)]
        try:
            for each in mine:
                self._queue.put_nowait(each)
            answers = await asyncio.gather(*(each.answer for each in mine))
        finally:
            for each in mine:
                each.answer.cancel()
        self.requests += 1
        return answers

    async def _next(self) -> list[Waiting]:
        """The texts of a pass: what is there, as soon as anything is."""
        taken: list[Waiting] = []
        tokens = 0
        while tokens < self._tokens_per_pass and not (taken and self._queue.empty()):
            each = await self._queue.get()
            if not each.answer.cancelled():
                taken.append(each)
                tokens += each.tokens
        return taken

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            taken = await self._next()
            try:
                answers = await loop.run_in_executor(self._model, self._compute, [each.text for each in taken])
            except Exception as error:
                self.failure = error
                for each in taken:
                    if not each.answer.done():
                        each.answer.set_exception(error)
                continue
            self.failure = None
            self.passes += 1
            self.texts += len(taken)
            for each, answer in zip(taken, answers, strict=True):
                if not each.answer.done():
                    each.answer.set_result(answer)


api = FastAPI(title="fastcls")


@api.exception_handler(RequestValidationError)
async def refuse(_: Request, error: RequestValidationError) -> JSONResponse:
    """Says what is wrong without sending the texts back, which may not even be valid Unicode."""
    kept = [{name: each[name] for name in ("type", "loc", "msg")} for each in error.errors()]
    return JSONResponse({"detail": kept}, 422)


@serve.ingress(api)
class Replica:
    """A model in a process of its own; on a CPU the replicas of a node share one copy of its weights."""

    def __init__(self, settings: Settings) -> None:
        set_threads(settings.num_cpus)
        device = "cuda" if settings.num_gpus else "cpu"
        options = PredictOptions(device=device, quantize=settings.quantize, long_texts=settings.long_texts)
        self._loaded = load_shared(settings.model, options)
        self._tokenizer = AutoTokenizer.from_pretrained(settings.model)
        self._passes = Passes(self._computed, self._counted, settings.tokens_per_pass)

    @api.post("/classify")
    async def classify(self, body: Texts) -> list[Label]:
        """The best label of each text, in their order; 422 names each text that cannot be classified."""
        answers = await self._passes.answers(body.texts)
        bad = [(index, answer) for index, answer in enumerate(answers) if isinstance(answer, str)]
        if bad:
            raise HTTPException(422, [{"type": "text", "loc": ["body", "texts", at], "msg": why} for at, why in bad])
        return [answer for answer in answers if isinstance(answer, Label)]

    @api.get("/statistics")
    async def statistics(self) -> dict[str, int]:
        """Of the replica that answers."""
        return self._passes.statistics()

    async def check_health(self) -> None:
        """Serve asks, and replaces a replica that raises three times in a row."""
        if self._passes.worker.done() or self._passes.failure is not None:
            raise RuntimeError("the model computes no more") from self._passes.failure

    def _computed(self, texts: list[str]) -> list[Answer]:
        ((scored, _),) = self._loaded.flow.run([([Item(text, None) for text in texts], None)])
        rows = self._loaded.answers.columns_of(scored).to_pylist()
        return [scored.problems.get(index) or Label(**row) for index, row in enumerate(rows)]

    def _counted(self, texts: list[str]) -> list[int]:
        return [len(ids) for ids in self._tokenizer(texts, truncation=True)["input_ids"]]


def app(settings: Settings) -> Application:
    """What ``serve run`` builds, of the settings on its command line."""
    deployment = serve.deployment(
        ray_actor_options={"num_cpus": settings.num_cpus, "num_gpus": settings.num_gpus},
        autoscaling_config=settings.model_dump(include={"min_replicas", "max_replicas", "target_ongoing_requests"}),
        max_ongoing_requests=settings.max_ongoing_requests,
        max_queued_requests=settings.max_queued_requests,
        health_check_period_s=10,
        graceful_shutdown_timeout_s=60,
    )
    return deployment(Replica).bind(settings)


def main(model: Annotated[str, typer.Argument(help="A checkpoint's folder, or its name on the hub.")]) -> None:
    """Serves a classifier on this machine until Ctrl-C."""
    serve.run(app(Settings(model=model)), blocking=True)


if __name__ == "__main__":
    typer.run(main)
