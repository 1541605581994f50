"""The page of `fastcls serve` in a browser, before a server that answers as the real one does and records requests."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

import pytest

import fastcls

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page
    from starlette.requests import Request
    from starlette.responses import Response

playwright = pytest.importorskip("playwright.sync_api", reason="the page is tested with playwright")
pytest.importorskip("starlette", reason="the page is served by starlette")
uvicorn = pytest.importorskip("uvicorn", reason="the page is served by uvicorn")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("the page is tested in Chromium, which is not installed", allow_module_level=True)

PAGE = Path(fastcls.__file__).parent / "serving" / "page.html"
expect = playwright.expect
# In CI a browser shares two cores.
expect.set_options(timeout=10_000)

# What the page shows for a number that it does not have.
NONE = "\u2013"
LABELS = [("neutral", 0.5), ("positive", 0.3), ("negative", 0.2)]
METRICS = """\
# HELP te_request_success Requests
# TYPE te_request_success counter
te_request_success{{method="single"}} {single}
te_request_success{{method="batch"}} {batch}
fastcls_texts {texts}
fastcls_computed_tokens {computed}
fastcls_padding_avoided_tokens {avoided}
te_queue_size 3.0
te_batch_next_tokens_bucket{{le="+Inf"}} {passes}
te_batch_next_tokens_sum {computed}
te_batch_next_tokens_count {passes}
"""
PER_SECOND = {"single": 12, "batch": 8, "texts": 1234, "computed": 3000, "avoided": 1000, "passes": 10}

KINDS = {
    "classifier": {"classifier": {"id2label": {"0": "negative", "1": "neutral", "2": "positive"}}},
    "reranker": {"reranker": {"id2label": {"0": "LABEL_0"}}},
    "embedding": {"embedding": {"pooling": "mean"}},
    "sparse": {"embedding": {"pooling": "splade"}},
}


class Stub:
    """What the server answers, which a test sets, and what it was asked."""

    def __init__(self) -> None:
        self.models = {"me/sst2": "classifier"}
        self.labels = LABELS
        self.key: str | None = None
        self.metrics: str | None = METRICS
        self.asked: list[tuple[str, str, Any]] = []
        self.may_answer = threading.Event()
        self.scrapes = 0

    def of(self, *ends: str) -> list[Any]:
        """The bodies of requests to routes with one of these ends."""
        return [body for _, path, body in self.asked if path.endswith(ends)]

    async def answer(self, request: Request) -> Response:
        from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse

        # A slash in a model's name is sent as it is, and all else that is no part of a path is quoted.
        path = unquote(request.scope["raw_path"].decode().replace("%2F", "%252F"))
        body = json.loads(await request.body() or "null")
        self.asked.append((request.method, path, body))
        if path == "/":
            return HTMLResponse(PAGE.read_text(encoding="utf-8"))
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            return JSONResponse({"error": "no such <key>", "error_type": "Unauthorized"}, 401)
        if path == "/metrics" and self.metrics is not None:
            self.scrapes += 1
            return PlainTextResponse(self.metrics.format(**{of: 7 + n * self.scrapes for of, n in PER_SECOND.items()}))
        if path == "/v1/models":
            data = [{"id": name, "object": "model", "kind": kind} for name, kind in self.models.items()]
            return JSONResponse({"object": "list", "data": data})
        name, _, route = path.removeprefix("/models/").rpartition("/")
        if name not in self.models:
            return JSONResponse({"error": f"no {path}", "error_type": "Validation"}, 404)
        if route == "info":
            info = {"model_id": name, "model_dtype": "float16", "max_input_length": 1024}
            return JSONResponse(info | {"model_type": KINDS.get(self.models[name], {})})
        headers = {"x-total-time": "12.25", "x-queue-time": "1", "x-inference-time": "10.5", "x-compute-tokens": "24"}
        return JSONResponse(*(await self.result(route, body)), headers=headers)

    async def result(self, route: str, body: Any) -> tuple[Any, int]:
        if route == "rerank":
            scores = [0.25, 0.75, 0.5, 0.125]
            ranks = [{"index": place, "score": scores[place]} for place in range(len(body["texts"]))]
            return sorted(ranks, key=lambda rank: -rank["score"]), 200
        if route == "similarity":
            return [0.25, -0.5, 0.75][: len(body["inputs"]["sentences"])], 200
        if route == "embed_sparse":
            return [[{"index": 100 + place, "value": place / 25} for place in range(60)]], 200
        if body["inputs"] == "slow":
            while not self.may_answer.is_set():
                await asyncio.sleep(0.01)
            return [{"label": "of the slow one", "score": 1.0}], 200
        if body["inputs"] == "full":
            return {"error": "Model is <b>overloaded</b>", "error_type": "Overloaded"}, 429
        return [{"label": label, "score": score} for label, score in self.labels], 200


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[str, list[Stub]]]:
    """The server's address, and a place for the stub that answers."""
    from starlette.applications import Starlette
    from starlette.routing import Route

    stubs: list[Stub] = []

    async def answer(request: Request) -> Response:
        return await stubs[-1].answer(request)

    app = Starlette(routes=[Route("/{path:path}", answer, methods=["GET", "POST"])])
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    config = uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}/", stubs
    server.should_exit = True
    thread.join(20)
    listening.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def stub(served: tuple[str, list[Stub]]) -> Iterator[Stub]:
    stub = Stub()
    served[1].append(stub)
    yield stub
    stub.may_answer.set()


Open = Callable[..., "Page"]


@pytest.fixture
def opened(served: tuple[str, list[Stub]], browser: Browser, stub: Stub) -> Iterator[Open]:
    """Opens the page in a window of its own; at the end no other host was asked, and no script has failed."""
    url = served[0]
    asked: list[str] = []
    failures: list[str] = []
    with contextlib.ExitStack() as stack:

        def open_page(models: dict[str, str] | None = None, is_paused: bool = False, **options: Any) -> Page:
            stub.models = models or stub.models
            context = browser.new_context(**options)
            stack.callback(context.close)
            page = context.new_page()
            page.on("request", lambda request: asked.append(request.url))
            page.on("pageerror", lambda error: failures.append(str(error)))
            page.on("console", lambda said: failures.append(said.text) if "Policy" in said.text else None)
            page.on("dialog", lambda dialog: failures.append(dialog.message))
            if is_paused:
                page.clock.install()
            page.goto(url)
            return page

        yield open_page
        hosts = {urlsplit(each).netloc for each in asked if not each.startswith("data:")}
        assert hosts == {urlsplit(url).netloc}
        assert failures == []


def box(page: Page, name: str = "Text") -> Locator:
    return page.get_by_role("textbox", name=name, exact=True)


def results(page: Page) -> Locator:
    return page.get_by_role("region", name="Results")


def rows(page: Page) -> list[tuple[str, str, float]]:
    """Of each result its label, its score as it is written, and the part of the bar that is filled, in percent."""
    expect(results(page)).to_be_visible()
    widths = "items => items.map(item => { const [full, part] = [item, item.firstChild].map(e => e.clientWidth);"
    filled = page.locator("#results .bar").evaluate_all(widths + "return 100 * part / full })")
    spans = page.locator("#results li span").all_text_contents()
    return [(spans[2 * place], spans[2 * place + 1], round(width, 0)) for place, width in enumerate(filled)]


def wait_until(is_so: Callable[[], bool], page: Page) -> None:
    end = time.monotonic() + 10
    while not is_so():
        assert time.monotonic() < end
        page.wait_for_timeout(20)


def test_labels_are_bars_with_the_best_first_and_the_servers_time(opened: Open, stub: Stub) -> None:
    stub.labels = LABELS[::-1]
    page = opened()
    box(page).fill("So so.")
    page.get_by_role("button", name="Classify").click()
    assert rows(page) == [("neutral", "0.5000", 50), ("positive", "0.3000", 30), ("negative", "0.2000", 20)]
    expect(results(page)).to_contain_text("On the server: 12.25 ms · queue 1 ms · model 10.5 ms · 24 tokens computed")
    assert stub.of("/models/me/sst2/predict") == [{"inputs": "So so."}]


def test_the_model_is_described(opened: Open) -> None:
    page = opened()
    told = page.get_by_role("region", name="Model")
    expect(told).to_contain_text("1,024 tokens")
    pairs = [line for line in told.inner_text().split("\n") if line]
    assert pairs[:6] == ["Name", "me/sst2", "Kind", "classifier", "Labels", "3"]
    assert pairs[6:] == ["Dtype", "float16", "Max length", "1,024 tokens"]
    expect(page).to_have_title("me/sst2 \u2013 fastcls")
    expect(page.get_by_label("Model", exact=True).locator("select")).to_be_hidden()


def test_the_keyboard_is_enough(opened: Open, stub: Stub) -> None:
    page = opened()
    expect(box(page)).to_be_visible()
    page.keyboard.press("Tab")
    expect(box(page)).to_be_focused()
    assert box(page).evaluate("e => getComputedStyle(e).outlineStyle + getComputedStyle(e).outlineWidth") == "solid3px"
    page.keyboard.type("One")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    assert stub.of("predict") == []
    page.keyboard.press("Enter")
    assert rows(page)[0][0] == "neutral"
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="Classify")).to_be_focused()
    page.keyboard.press("Space")
    wait_until(lambda: stub.of("predict") == [{"inputs": "One\ntwo"}] * 2, page)


def test_enter_that_ends_a_composition_sends_nothing(opened: Open, stub: Stub) -> None:
    page = opened()
    box(page).fill("にほん")
    enter = "isComposing => e => e.dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter', isComposing}))"
    box(page).evaluate(f"e => ({enter})(true)(e)")
    page.wait_for_timeout(200)
    assert stub.of("predict") == []
    box(page).evaluate(f"e => ({enter})(false)(e)")
    assert rows(page)[0][0] == "neutral"


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_it_whole_in_colours_that_are_read(kind: str, scheme: str, opened: Open, stub: Stub) -> None:
    name = "a-long-name-of-a-folder/" + "and_of_a_model" * 6
    stub.labels = [("a_label_without_an_end_" * 6, 0.9), ("b", 0.1)]
    viewport = {"width": 360, "height": 640}
    page = opened({name: kind, "b": kind}, viewport=viewport, has_touch=True, color_scheme=scheme)
    expect(page.locator("#ask")).to_be_visible()
    for each in page.locator("#ask :is(input, textarea)").all():
        if each.is_visible():
            each.fill("text\n" + "w" * 100)
    page.locator("#go").tap()
    expect(results(page)).to_be_visible()
    page.locator("#text").fill("")
    page.locator("#go").tap()
    page.evaluate("document.getElementById('key').hidden = false")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    small = "all => all.filter(e => e.offsetParent && Math.min(e.offsetHeight, e.offsetWidth) < 40).map(e => e.id)"
    assert page.locator("input, textarea, select, button").evaluate_all(small) == []
    assert page.evaluate(CONTRAST) == []


# Words whose contrast with the nearest background is below 4.5 (WCAG 2.2, 1.4.3).
CONTRAST = """() => {
  const parts = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = (colour) => parts(colour).slice(0, 3).map(v => v / 255)
    .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const behind = (e) => { while (e && parts(getComputedStyle(e).backgroundColor)[3] === 0) e = e.parentElement;
    return getComputedStyle(e).backgroundColor };
  return [...document.body.querySelectorAll("*")].filter(e => e.checkVisibility() && e.tagName !== "SCRIPT"
      && (e.value || [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()))).filter(e => {
    const [one, other] = [light(getComputedStyle(e).color), light(behind(e))].sort((a, b) => b - a);
    return (one + .05) / (other + .05) < 4.5 }).map(e => e.outerHTML) }"""


def test_an_error_is_shown_as_it_is_and_goes_with_the_next_answer(opened: Open) -> None:
    page = opened()
    box(page).fill("So so.")
    box(page).press("Enter")
    assert rows(page)
    box(page).fill("full")
    box(page).press("Enter")
    alert = page.get_by_role("alert")
    expect(alert).to_have_text("Overloaded: Model is <b>overloaded</b>")
    # No answer stands beside a text that it is not of.
    expect(results(page)).to_be_hidden()
    box(page).fill("So so.")
    box(page).press("Enter")
    assert rows(page)
    expect(alert).to_be_empty()
    expect(page.get_by_label("API key")).to_be_hidden()


def test_a_server_that_does_not_answer_is_said_and_found_again(opened: Open) -> None:
    page = opened()
    expect(box(page)).to_be_visible()
    page.context.set_offline(True)
    box(page).fill("So so.")
    box(page).press("Enter")
    expect(page.get_by_role("alert")).to_have_text("The server does not answer.")
    expect(page.get_by_role("button", name="Classify")).to_have_text("Classify")
    page.context.set_offline(False)
    box(page).press("Enter")
    assert rows(page)


def test_models_are_asked_for_again_until_the_server_has_them(opened: Open) -> None:
    page = opened(is_paused=True)
    page.route("**/v1/models", lambda route: route.abort())
    page.reload()
    expect(page.get_by_role("alert")).to_have_text("The server does not answer.")
    page.unroute("**/v1/models")
    expect(page.locator("#now")).to_contain_text("Texts/s")
    page.clock.run_for(6000)
    expect(box(page)).to_be_visible()
    expect(page.get_by_role("alert")).to_be_empty()


def test_an_answer_of_a_proxy_is_shown(opened: Open) -> None:
    page = opened()
    page.route("**/predict", lambda route: route.fulfill(status=502, body="<html>Bad gateway"))
    box(page).fill("So so.")
    box(page).press("Enter")
    expect(page.get_by_role("alert")).to_have_text("HTTP 502: <html>Bad gateway")
    page.unroute("**/predict")
    page.route("**/predict", lambda route: route.fulfill(status=200, body="<html>"))
    box(page).press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("The answer was not understood")


def test_a_key_is_asked_for_once_the_server_wants_one(opened: Open, stub: Stub) -> None:
    stub.key = "secret"
    page = opened()
    key = page.get_by_label("API key")
    expect(key).to_be_focused()
    expect(page.get_by_role("alert")).to_have_text("Unauthorized: no such <key>")
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    wait_until(lambda: len(stub.of("/v1/models")) == 2, page)
    expect(key).to_be_visible()
    key.fill("secret")
    page.keyboard.press("Enter")
    expect(box(page)).to_be_focused()
    expect(key).to_be_hidden()
    expect(page.get_by_role("alert")).to_be_empty()
    # As long as the tab.
    page.reload()
    expect(box(page)).to_be_visible()
    expect(key).to_be_hidden()
    assert page.evaluate("[Object.keys(localStorage).length, document.cookie]") == [0, ""]


def test_a_key_that_ends_is_asked_for_and_the_text_is_sent_again(opened: Open, stub: Stub) -> None:
    page = opened({"a": "classifier", "b": "classifier"})
    page.get_by_role("combobox", name="Model").select_option("b")
    box(page).fill("So so.")
    stub.key = "new"
    box(page).press("Enter")
    key = page.get_by_label("API key")
    expect(key).to_be_focused()
    key.fill("new")
    key.press("Enter")
    assert rows(page)[0][0] == "neutral"
    expect(key).to_be_hidden()
    assert len(stub.of("/models/b/predict")) == 2


def test_markup_stays_text(opened: Open, stub: Stub) -> None:
    markup = "<img src=x onerror=alert(1)><script>alert(2)</script><b>bold</b>"
    stub.labels = [(markup, 0.9), ("b", 0.1)]
    page = opened({"a/<i>x": "classifier", markup.replace("/", "|"): "classifier"})
    box(page).fill(markup)
    box(page).press("Enter")
    assert rows(page)[0][0] == markup
    assert page.locator("option").all_text_contents()[0] == "a/<i>x"
    assert page.locator("img, b, i:not(.bar i), script:not(body > script)").count() == 0


def test_a_second_submit_supersedes_a_slow_first(opened: Open, stub: Stub) -> None:
    page = opened()
    ended: list[str] = []
    page.on("requestfailed", lambda request: ended.append(request.post_data or ""))
    box(page).fill("slow")
    box(page).press("Enter")
    expect(page.get_by_role("button", name="Classifying…")).to_be_visible()
    wait_until(lambda: stub.of("predict") == [{"inputs": "slow"}], page)
    box(page).fill("quick")
    page.get_by_role("button", name="Classifying…").click()
    assert rows(page)[0][0] == "neutral"
    assert ended == ['{"inputs":"slow"}']
    stub.may_answer.set()
    page.wait_for_timeout(300)
    assert rows(page)[0][0] == "neutral"
    expect(page.get_by_role("alert")).to_be_empty()
    expect(page.get_by_role("button", name="Classify", exact=True)).to_be_visible()


def test_nothing_is_sent_by_typing_nor_from_an_empty_box(opened: Open, stub: Stub) -> None:
    page = opened()
    box(page).press_sequentially("   ")
    page.get_by_role("button", name="Classify").click()
    expect(page.get_by_role("alert")).to_have_text("The box “Text” is empty.")
    expect(box(page)).to_be_focused()
    expect(box(page)).to_have_attribute("aria-invalid", "true")
    box(page).press_sequentially("abc")
    page.wait_for_timeout(300)
    assert stub.of("predict") == []
    box(page).press("Enter")
    assert rows(page)
    expect(box(page)).to_have_attribute("aria-invalid", "false")


def test_a_reranker_orders_texts(opened: Open, stub: Stub) -> None:
    page = opened({"rank": "reranker"})
    box(page, "Query").fill("What?")
    box(page, "Query").press("Enter")
    expect(page.get_by_role("alert")).to_have_text("The box “Texts, one a line” is empty.")
    texts = box(page, "Texts, one a line")
    texts.press_sequentially("first\nsecond\n\nthird")
    assert stub.of("rerank") == []
    texts.press("Control+Enter")
    assert rows(page) == [("second", "0.7500", 75), ("third", "0.5000", 50), ("first", "0.2500", 25)]
    body = {"query": "What?", "texts": ["first", "second", "third"], "return_text": False}
    assert stub.of("/models/rank/rerank") == [body]


def test_an_embedding_model_compares_sentences(opened: Open, stub: Stub) -> None:
    page = opened({"embed": "embedding"})
    expect(page.get_by_role("region", name="Model")).to_contain_text("Pooling\nmean", use_inner_text=True)
    box(page, "Sentence").fill("A")
    box(page, "Others, one a line").fill("B\nC\nD\n")
    page.get_by_role("button", name="Compare").click()
    assert rows(page) == [("D", "0.7500", 75), ("B", "0.2500", 25), ("C", "-0.5000", 50)]
    colours = "all => all.map(e => getComputedStyle(e).backgroundColor)"
    positive, _, negative = page.locator("#results .bar i").evaluate_all(colours)
    assert positive != negative
    inputs = {"source_sentence": "A", "sentences": ["B", "C", "D"]}
    assert stub.of("/models/embed/similarity") == [{"inputs": inputs}]


def test_a_sparse_model_shows_its_strongest_tokens(opened: Open, stub: Stub) -> None:
    page = opened({"splade": "sparse"})
    box(page).fill("hello")
    box(page).press("Enter")
    shown = rows(page)
    assert (shown[0], len(shown)) == (("Token 159", "2.3600", 100), 50)
    expect(results(page)).to_contain_text("The first 50 of 60")
    assert stub.of("/models/splade/embed_sparse") == [{"inputs": "hello"}]


def test_a_kind_without_a_form_is_said(opened: Open) -> None:
    page = opened({"a": "constructor"})
    expect(page.get_by_role("alert")).to_have_text("This page has no form for a model of kind constructor.")
    expect(page.locator("#ask")).to_be_hidden()


def test_another_model_takes_the_place_of_the_first(opened: Open, stub: Stub) -> None:
    page = opened({"a": "classifier", "b/c": "reranker"})
    choice = page.get_by_role("combobox", name="Model")
    assert choice.locator("option").all_text_contents() == ["a", "b/c"]
    box(page).fill("slow")
    box(page).press("Enter")
    wait_until(lambda: bool(stub.of("predict")), page)
    choice.select_option("b/c")
    expect(box(page, "Query")).to_be_visible()
    expect(page.get_by_role("button", name="Rank")).to_be_visible()
    # The answer of the model that was chosen before is nobody's.
    stub.may_answer.set()
    page.wait_for_timeout(300)
    expect(results(page)).to_be_hidden()
    box(page, "Query").fill("q")
    box(page, "Texts, one a line").press("Control+Enter")
    assert rows(page)[0][0] == "slow"
    assert len(stub.of("/models/b/c/rerank")) == 1


def numbers(page: Page) -> list[str]:
    return page.locator("#now dd, #minute dd").all_text_contents()


def scrape(page: Page, stub: Stub, seconds: int) -> None:
    """Lets seconds pass on the page's clock, each with its measurement."""
    for _ in range(seconds):
        before = len(stub.of("/metrics"))
        end = time.monotonic() + 10
        # The page sets its clock only once it has read the last answer.
        while len(stub.of("/metrics")) == before:
            assert time.monotonic() < end
            page.clock.run_for(250)
            page.wait_for_timeout(50)


def test_throughput_is_measured_each_second(opened: Open, stub: Stub) -> None:
    page = opened(is_paused=True)
    wait_until(lambda: numbers(page) == [NONE, NONE, "3", NONE, NONE], page)
    page.clock.pause_at(page.evaluate("Date.now() / 1000") + 0.1)
    scrape(page, stub, 3)
    texts, requests, queue, tokens, padding = numbers(page)
    assert (tokens, padding, queue) == ("300", "25%", "3")
    assert float(texts.replace(",", "")) / float(requests) == pytest.approx(1234 / 20, rel=0.05)
    assert 0 < float(requests) <= 20
    assert len(re.findall(r"[\d.]+,[\d.]+", page.locator("#line").get_attribute("points") or "")) >= 3
    expect(page.locator("#peak")).to_contain_text("at most")


def test_a_missing_sample_leaves_the_others(opened: Open, stub: Stub) -> None:
    stub.metrics = "fastcls_texts {texts}\nte_queue_size NaN\nte_request_success{{\nnonsense"
    page = opened(is_paused=True)
    wait_until(lambda: len(numbers(page)) == 5, page)
    scrape(page, stub, 2)
    assert numbers(page)[0] != NONE
    assert numbers(page)[1:] == [NONE] * 4
    # A counter that has its first sample with its first request.
    stub.metrics = METRICS
    scrape(page, stub, 1)
    assert NONE not in numbers(page)


def test_a_server_that_starts_again_is_not_measured_backwards(opened: Open, stub: Stub) -> None:
    page = opened(is_paused=True)
    wait_until(lambda: len(numbers(page)) == 5, page)
    scrape(page, stub, 3)
    stub.scrapes = 0
    scrape(page, stub, 1)
    assert numbers(page) == [NONE, NONE, "3", NONE, NONE]


def test_measurements_that_fail_are_said_and_asked_for_less(opened: Open, stub: Stub) -> None:
    page = opened(is_paused=True)
    wait_until(lambda: len(numbers(page)) == 5, page)
    scrape(page, stub, 2)
    stub.metrics = None
    expect(page.locator("#unmeasured")).to_have_text("No measurements. Validation: no /metrics")
    expect(page.get_by_role("alert")).to_be_empty()
    # Old numbers are none of now.
    assert numbers(page) == [NONE] * 5
    before = len(stub.of("/metrics"))
    page.clock.pause_at(page.evaluate("Date.now() / 1000") + 0.1)
    page.clock.run_for(3000)
    page.wait_for_timeout(200)
    assert len(stub.of("/metrics")) == before
    stub.metrics = METRICS
    scrape(page, stub, 1)
    expect(page.locator("#unmeasured")).to_be_empty()
    # All that was counted before is no rate of now.
    assert numbers(page)[0] == NONE


def test_a_hidden_page_asks_for_nothing(opened: Open, stub: Stub) -> None:
    page = opened(is_paused=True)
    wait_until(lambda: len(numbers(page)) == 5, page)
    turn = """state => { Object.defineProperty(document, "visibilityState", {value: state, configurable: true});
      document.dispatchEvent(new Event("visibilitychange")) }"""
    page.evaluate(turn, "hidden")
    page.clock.run_for(2000)
    page.wait_for_timeout(200)
    before = len(stub.of("/metrics"))
    page.clock.run_for(10_000)
    page.wait_for_timeout(200)
    assert len(stub.of("/metrics")) == before
    page.evaluate(turn, "visible")
    wait_until(lambda: len(stub.of("/metrics")) == before + 1, page)
    # The rate over the gap is none of a second.
    wait_until(lambda: numbers(page)[0] == NONE, page)


def test_what_a_reader_of_screens_needs_is_there(opened: Open) -> None:
    page = opened({"a": "classifier", "b": "reranker"})
    expect(page.locator("html")).to_have_attribute("lang", "en")
    expect(page).to_have_title("a \u2013 fastcls")
    labels = "all => all.map(e => [...e.labels].map(label => label.textContent).join())"
    # The box for a query is hidden.
    own = ["Model", "", "Text", "API key (kept until this tab is closed)"]
    assert page.locator("input, textarea, select").evaluate_all(labels) == own
    page.get_by_role("combobox", name="Model").select_option("b")
    assert page.locator("#ask input, #ask textarea").evaluate_all(labels) == ["Query", "Texts, one a line"]
    expect(page.locator("#results")).to_have_attribute("aria-live", "polite")
    names = "all => all.map(e => e.id).filter(id => id)"
    ids = page.locator("[id]").evaluate_all(names)
    assert len(ids) == len(set(ids))
    assert [each.text_content() for each in page.get_by_role("heading").all()] == ["fastcls", "Throughput"]
    expect(page.get_by_role("img")).to_have_count(1)


def test_a_server_s_own_answers_are_shown(browser: Browser, checkpoints: Callable[[str], Path]) -> None:
    """With nothing in place of the server."""
    from serving_support import post_of, serving

    with serving(checkpoints("classifier"), checkpoints("embedding")) as url, browser.new_context() as context:
        page = context.new_page()
        page.goto(url)
        page.locator("#text").fill("good and warm")
        page.keyboard.press("Enter")
        expected = post_of(url, "/predict", {"inputs": "good and warm"})
        page.locator("#results").get_by_text(expected[0]["label"], exact=True).wait_for()
        assert f"{expected[0]['score']:.4f}" in page.locator("#results").inner_text()
        page.locator("#model").select_option(checkpoints("embedding").name)
        page.locator("#first").fill("good and warm")
        page.locator("#text").fill("good and warm\nfine")
        page.keyboard.press("Control+Enter")
        page.locator("#results").get_by_text("1.0000").wait_for()
        expect(page.locator("#minute dd").first).not_to_have_text(NONE, timeout=20_000)
