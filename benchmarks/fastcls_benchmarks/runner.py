"""Runs a suite: checks every provider, times those that pass, and keeps each complete case."""

from __future__ import annotations

import contextlib
import functools
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, cast

import torch

from . import first_call, roofline, sentences, texts, timing, training
from .kernels import KERNELS, Inputs, KernelProvider, Prepared, compiled
from .provider import Forward, Loaded, Model, Provider, not_installed, reason_of
from .providers import EAGER, baseline_of
from .results import Case, Report, Row
from .roofline import ModelShape
from .suites import Plan, Suite
from .verify import Judge, Kept, Reference
from .workloads import MODELS, ModelInputs, Workload, build_model, class_of, config_of, padded_tokens, real_tokens

# Different batches that calls take in turn, and those of them on which a provider's logits are checked; the same for
# batches of one text. If a batch takes longer than LONG_SECONDS, only those that are checked are timed.
NUM_BATCHES, NUM_CHECKED = 8, 2
NUM_LATENCY_BATCHES, NUM_CHECKED_TEXTS = 20, 5
LONG_SECONDS = 0.25
# The same of training, whose gradients are checked on the first of them.
NUM_STEPS = 2
# How often each batch runs before anything is timed: on a GPU a CUDA graph is warmed up, then recorded.
WARM_UP_CALLS = {"cpu": 1, "cuda": 3}
# About how long fitting a head takes, and comparing labels once for each provider and number of threads; preparing a
# kernel; building a model with random weights, in seconds per six layers. On a GPU, with more cores, about half.
_FITTING, _JUDGING, _PREPARING_KERNEL, _BUILDING, _PREPARING_TEXT = 8.0, 4.0, 3.0, 1.0, 3.0

# A provider's row, and its function if it may be timed.
Ready = tuple[Row, timing.Function | None]
Doing = Callable[[str], None]
Check = Callable[[Inputs, torch.Tensor], float]


class Listener(Protocol):
    """Follows a run: what happens now, a plan that has ended, with the seconds expected, and each complete case."""

    def doing(self, what: str) -> None: ...
    def done(self, what: str, seconds: float) -> None: ...
    def keep(self, report: Report) -> None: ...


def planned_seconds(suite: Suite, device: torch.device) -> list[float]:
    """About how long each of the plans takes, in the order in which `Listener.done` is called for them."""
    factor = 0.5 if device.type == "cuda" else 1.0
    machine_seconds = suite.machine_seconds * len({plan.dtype for plan in suite.plans})
    expected, prepared = [machine_seconds], set[tuple[object, ...]]()
    for plan in suite.plans:
        if plan.kind == "kernel":
            expected.append(factor * _PREPARING_KERNEL + plan.seconds)
            continue
        if plan.kind == "train":
            # A step costs as much when it is checked as when it is timed; two graphs are compiled, each both ways.
            model_class, size = class_of(plan.subject), config_of(plan.subject).num_hidden_layers / 6
            able = [each for each in plan.providers if each.missing(model_class, device, plan.dtype) is None]
            building = factor * size * sum(2 * _BUILDING + 3 * each.preparing for each in able)
            expected.append(1.5 * plan.seconds + building)
            continue
        fitted, size = MODELS[plan.subject].fitted, config_of(plan.subject).num_hidden_layers / 6
        each = _PREPARING_TEXT * factor if plan.kind == "text" else 0.4
        seconds = plan.seconds + each * len(plan.providers) * size
        if (plan.kind, plan.subject, plan.dtype) not in prepared:
            seconds += factor * _BUILDING * size + (_FITTING if fitted else 0.0)
        for provider in plan.providers:
            # Compilers treat a batch of one as a separate case.
            key = (plan.subject, plan.dtype, provider.name, plan.workload.batch_size == 1)
            if key not in prepared and provider.missing(class_of(plan.subject), device, plan.dtype) is None:
                seconds += factor * provider.preparing * size
            judged = (plan.subject, plan.threads, provider.name)
            seconds += _JUDGING if fitted and plan.kind == "model" and judged not in prepared else 0.0
            prepared |= {key, judged}
        prepared.add((plan.kind, plan.subject, plan.dtype))
        expected.append(seconds)
    return [*expected, machine_seconds, *(plan.seconds for plan in suite.first_calls)]


def run(suite: Suite, report: Report, device: torch.device, listener: Listener) -> None:
    """Fills ``report``, which holds only complete cases whatever ends the run."""
    began, expected = time.perf_counter(), iter(planned_seconds(suite, device))
    if device.type == "cuda":
        # Streams and CUDA graphs are made on the current device.
        torch.cuda.set_device(device)

    def finished(what: str) -> None:
        report.seconds = time.perf_counter() - began
        listener.keep(report)
        listener.done(what, next(expected))

    def measure_machine() -> None:
        listener.doing("the machine's own rates")
        for dtype in dict.fromkeys(plan.dtype for plan in suite.plans):
            models = dict.fromkeys(p.subject for p in suite.plans if p.dtype == dtype and p.kind == "model")
            shapes = [shape for name in models for shape in roofline.product_shapes(ModelShape.named(name))]
            report.rates += roofline.measured_rates(device, dtype, shapes, suite.machine_seconds)
        finished("the machine's own rates")

    measure_machine()
    session: Session | None = None
    for plan in suite.plans:
        with _case_of(plan, report) as case:
            if plan.kind == "kernel":
                session = None
                measure_kernel(case, plan, device, listener.doing)
            elif plan.kind == "train":
                session = None
                _free_memory(device)
                measure_training(case, plan, device, listener.doing)
            else:
                if session is None or session.of != (plan.kind, plan.subject, plan.dtype):
                    # The former model is freed first: two large ones may not fit.
                    session = None
                    _free_memory(device)
                    listener.doing(f"building {plan.subject}")
                    session = Session(plan, device)
                session.measure(case, plan, listener.doing)
        finished(case.name)
    session = None
    _free_memory(device)
    # Measured again, since a machine's speed varies: the best of both counts.
    measure_machine()
    for first in suite.first_calls:
        what = f"{first.model}, {first.workload.name}: first call of {first.provider.name}"
        listener.doing(what)
        report.first_calls.append(first_call.measure(first, str(device), torch.get_num_threads()))
        finished(what)
    report.partial = False


@contextlib.contextmanager
def _case_of(plan: Plan, report: Report) -> Iterator[Case]:
    """The plan's case, which goes into the report whatever ends it; an error ends only the case, not the run.

    Meanwhile torch, and the peers that are loaded, have the plan's number of threads.
    """
    case, before = new_case(plan), torch.get_num_threads()
    torch.set_num_threads(plan.threads or before)
    try:
        # A compiler that gives up and runs eager must not be timed under its own name.
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
            yield case
    except Exception as error:
        case.rows.append(Row(case.baseline, "failed", detail=reason_of(error)))
    finally:
        torch.set_num_threads(before)
        if case.rows:
            report.cases.append(case)


def _free_memory(device: torch.device) -> None:
    # Forgets compiled code, with its CUDA graphs and the count of its shapes.
    torch.compiler.reset()
    compiled.cache_clear()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def new_case(plan: Plan, model: Model | None = None) -> Case:
    """A case without measurements."""
    dtype = str(plan.dtype).removeprefix("torch.")
    if plan.kind == "kernel":
        return Case("kernel", plan.subject, plan.workload.name, dtype, KERNELS[plan.subject].providers[0].name)
    of_model = baseline_of(class_of(plan.subject) if model is None else type(model))
    baseline = texts.PIPELINE if plan.kind == "text" else of_model
    case = Case(plan.kind, plan.subject, plan.workload.name, dtype, baseline.name, plan.workload.batch_size)
    case.threads, case.published = plan.threads, plan.published
    return case


def _time(case: Case, plan: Plan, ways: Mapping[str, Callable[[], Ready]], device: torch.device, doing: Doing) -> None:
    """Prepares and checks every provider, then times those that passed; one that breaks is a row of the table."""
    timed: dict[str, timing.Function] = {}
    for name, prepare in ways.items():
        doing(f"{case.name}: preparing and checking {name}")
        try:
            row, function = prepare()
        except Exception as error:  # whatever breaks in a provider is not the end of the run
            row, function = Row(name, "failed", detail=reason_of(error)), None
        case.rows.append(row)
        if function is not None:
            timed[name] = function
    if case.kind == "kernel" and timed and case.baseline not in timed:
        case.baseline = next(iter(timed))
    spinning = [each.name for each in plan.providers if each.spins]
    timing.time_rounds(case, timed, plan.effort, device, doing, spinning)


class Session:
    """A model and its prepared providers, for one plan after the other."""

    def __init__(self, plan: Plan, device: torch.device, model: Model | None = None) -> None:
        self.of, self.device = (plan.kind, plan.subject, plan.dtype), device
        fitted = sentences.fitted_model(plan.subject, device, plan.dtype) if model is None else None
        self.fitted = fitted is not None
        # Of texts, the tokenizer decides what padding is.
        padding = {"pad_token_id": texts.tokenizer_of().pad_token_id} if plan.kind == "text" else {}
        self.model = model or fitted or build_model(plan.subject, device, plan.dtype, **padding)
        self.inputs = ModelInputs.of(type(self.model), self.model.config)
        self.judge: Judge | None = None
        # By name and number of threads.
        self.loaded: dict[tuple[str, int], Loaded | Exception] = {}
        self.judged: dict[tuple[str, int], Kept] = {}

    def measure(self, case: Case, plan: Plan, doing: Doing = lambda _: None) -> None:
        doing(f"{case.name}: the reference")
        inputs: list[Any]
        checked: list[Any]
        way: list[Callable[[Provider], Provider]] = []
        if plan.kind == "text":
            given = texts.corpus(plan.workload.lengths, plan.workload.batch_size, self.fitted)
            checked, way, inputs = [given], [texts.loop], [given]
            case.batch_size, case.about = len(given.items), given.about
        else:
            latency = plan.workload.batch_size == 1
            inputs = plan.workload.batches(NUM_LATENCY_BATCHES if latency else NUM_BATCHES, self.inputs)
            checked = inputs[: NUM_CHECKED_TEXTS if latency else NUM_CHECKED]
        start = time.perf_counter()
        reference = Reference(self.model, checked, *way)
        if (time.perf_counter() - start) / len(checked) > LONG_SECONDS:
            inputs = checked
        if plan.kind == "model":
            shape = ModelShape.of(type(self.model), self.model.config)
            case.real_tokens = statistics.fmean(map(real_tokens, inputs))
            case.padded_tokens = statistics.fmean(map(padded_tokens, inputs))
            case.flops = statistics.fmean(roofline.useful_flops(shape, batch) for batch in inputs)
            case.num_bytes = roofline.weight_bytes(shape, self.model.dtype.itemsize)
        judge = self._judge(plan, reference)
        if judge:
            lacking = not self.fitted and plan.subject in MODELS and MODELS[plan.subject].fitted
            case.judged_on = judge.about + (f" ({sentences.missing()})" if lacking else "")
        prepare = functools.partial(self._prepare, plan=plan, inputs=inputs, reference=reference, judge=judge)
        ways = {each.name: functools.partial(prepare, each) for each in plan.providers}
        _time(case, plan, ways, self.device, doing)

    def _judge(self, plan: Plan, reference: Reference) -> Judge | None:
        """Made only if a provider of reduced precision can run; of texts, on the case's own."""
        asked = [each for each in plan.providers if each.reduced]
        if all(each.missing(type(self.model), self.device, plan.dtype) for each in asked):
            return None
        weights = "real weights, fitted head" if self.fitted else "random weights, whose labels mean nothing"
        if plan.kind == "text":
            answers = iter(reference.answers)
            return Judge(lambda _: next(answers), reference.inputs, self.fitted, f"texts, {weights}")
        if self.judge is None:
            batches = sentences.judged() if self.fitted else Workload(32, "sst2").batches(2, self.inputs)
            of = f"sentences of SST-2 in batches of {sentences.BATCH_SIZE}" if self.fitted else "random texts"
            exact = baseline_of(type(self.model)).load(self.model).forward
            self.judge = Judge(exact, batches, self.fitted, f"{of}, {weights}")
        return self.judge

    def _prepare(
        self, provider: Provider, plan: Plan, inputs: list[Any], reference: Reference, judge: Judge | None
    ) -> Ready:
        missing = provider.missing(type(self.model), self.device, plan.dtype)
        if missing:
            return Row(provider.name, "unavailable", detail=missing), None
        key, convert_seconds = (provider.name, torch.get_num_threads()), None
        if key not in self.loaded:
            start = time.perf_counter()
            try:
                self.loaded[key] = provider.load(self.model)
            except Exception as error:  # it breaks in each of the model's cases
                self.loaded[key] = error
            convert_seconds = time.perf_counter() - start
        loaded = self.loaded[key]
        if isinstance(loaded, Exception):
            raise loaded
        forward = _resident(loaded, inputs, self.device) if plan.resident else loaded.forward
        start = time.perf_counter()
        # A copy: the next replay of a CUDA graph writes over it.
        first = forward(reference.inputs[0]).clone()
        timing.wait_for(self.device)
        first_seconds = time.perf_counter() - start
        # A shape's first run may be slow; the one of texts has just run. The check comes later, because later runs are
        # what is timed: compiled, or replayed from a CUDA graph.
        for each in inputs if plan.kind == "model" else ():
            for _ in range(WARM_UP_CALLS[self.device.type]):
                forward(each)
        verdict = reference.check(provider, forward if plan.kind == "model" else lambda _: first)
        row = Row(provider.name, "timed", verdict.difference, loaded.detail, convert_seconds, first_seconds)
        why = verdict.reason
        if judge is not None and verdict.passed:
            kept = self.judged.get(key)
            if plan.kind == "text":
                kept = judge.judge(lambda _: first)
            elif kept is None:
                kept = self.judged[key] = judge.judge(loaded.forward)
            row.agreement, row.mean_error, why = kept
            if provider.reduced and kept.mean_error < EAGER.bound:
                row.detail = f"nothing is reduced here, these are float32's logits. {row.detail}".strip()
        if why:
            row.status, row.detail = "failed", why
            return row, None
        return row, lambda index: forward(inputs[index % len(inputs)])


@torch.inference_mode()
def _resident(loaded: Loaded, batches: Sequence[Any], device: torch.device) -> Forward:
    """The provider over inputs that are on the device already, by batch."""

    def moved(batch: dict[str, torch.Tensor]) -> Callable[[], torch.Tensor]:
        return functools.partial(loaded.forward, {name: tensor.to(device) for name, tensor in batch.items()})

    calls = {id(batch): (loaded.resident or moved)(batch) for batch in batches}
    return torch.inference_mode()(lambda batch: calls[id(batch)]())


def measure_case(model: Model, plan: Plan, device: torch.device) -> Case:
    """Measures one plan by itself, on the given model."""
    case = new_case(plan, model)
    Session(plan, device, model).measure(case, plan)
    return case


@torch.inference_mode()
def measure_kernel(case: Case, plan: Plan, device: torch.device, doing: Doing) -> None:
    """Measures a kernel's providers. On a GPU a CUDA graph replays their calls, so that launches do not count."""
    kernel = KERNELS[plan.subject]
    doing(f"{case.name}: making inputs")
    arguments = kernel.inputs(plan.workload, device, plan.dtype, 1)[0].arguments
    size = sum(each.nbytes for each in arguments if isinstance(each, torch.Tensor))
    del arguments
    count = min(max(math.ceil(timing.INPUT_BYTES / size), 2), timing.MAX_INPUT_SETS)
    sets = kernel.inputs(plan.workload, device, plan.dtype, count)
    least = [kernel.least(inputs, plan.dtype.itemsize) for inputs in sets]
    case.flops, case.num_bytes = (statistics.fmean(each) for each in zip(*least, strict=True))
    case.real_tokens = case.padded_tokens = statistics.fmean(inputs.tokens for inputs in sets)
    repeats = math.ceil(timing.GRAPH_CALLS / len(sets)) if device.type == "cuda" else 0

    def prepare(provider: KernelProvider) -> Ready:
        row, prepared = prepare_kernel(provider, kernel.check, sets, device, plan.dtype)
        functions = [each.run for each in prepared]
        if not functions:
            return row, None
        return row, timing.captured(functions, repeats) if repeats else timing.in_turn(functions)

    try:
        _time(case, plan, {each.name: functools.partial(prepare, each) for each in kernel.providers}, device, doing)
    finally:
        calls = repeats * len(sets) or 1
        for name, rounds in case.seconds.items():
            case.seconds[name] = [[seconds / calls for seconds in each] for each in rounds]


def measure_training(case: Case, plan: Plan, device: torch.device, doing: Doing) -> None:
    """Measures steps of training; each provider has weights of its own, the same ones at first."""
    doing(f"{case.name}: gradients in float64")
    batches = training.batches(plan.subject, plan.workload, NUM_STEPS)
    case.real_tokens = statistics.fmean(map(real_tokens, batches))
    case.padded_tokens = statistics.fmean(map(padded_tokens, batches))
    lacking = not_installed("peft") if MODELS[plan.subject].adapters else None
    exact = None if lacking else training.Exact(plan.subject, plan.dtype, batches[0])

    def prepare(provider: Provider) -> Ready:
        missing = lacking or provider.missing(class_of(plan.subject), device, plan.dtype)
        if missing:
            return Row(provider.name, "unavailable", detail=missing), None
        assert exact is not None
        no_dropout = training.without_dropout(plan.subject)
        quiet = provider.load(build_model(plan.subject, device, plan.dtype, **no_dropout)).forward
        verdict = exact.check(provider, cast(training.Way, quiet))
        del quiet
        if not verdict.passed:
            return Row(provider.name, "failed", verdict.difference, verdict.reason), None
        model = build_model(plan.subject, device, plan.dtype)
        start = time.perf_counter()
        step = cast(training.Way, provider.load(model).forward)
        row = Row(provider.name, "timed", verdict.difference, convert_seconds=time.perf_counter() - start)
        row.first_seconds = timing.seconds_of(lambda: step(batches[0]), device)
        for each in batches * WARM_UP_CALLS[device.type]:
            step(each)
        row.step_bytes = step.step_bytes(batches[0])
        return row, lambda index: step(batches[index % NUM_STEPS])

    _time(case, plan, {each.name: functools.partial(prepare, each) for each in plan.providers}, device, doing)


def prepare_kernel(
    provider: KernelProvider, check: Check, sets: Sequence[Inputs], device: torch.device, dtype: torch.dtype
) -> tuple[Row, list[Prepared]]:
    """The provider's row, and its functions, one for each set, if they may be timed."""
    missing = provider.available(device, dtype)
    if missing:
        return Row(provider.name, "unavailable", detail=missing), []
    start = time.perf_counter()
    try:
        prepared = [provider.prepare(inputs) for inputs in sets]
        out = prepared[0].run()
        timing.wait_for(device)
        first_seconds = time.perf_counter() - start
        result = prepared[0].result
        difference = None if result is None else check(sets[0], result(out))
    except Exception as error:  # whatever breaks in a provider is a row of the table
        return Row(provider.name, "failed", detail=reason_of(error)), []
    return Row(provider.name, "timed", difference, first_seconds=first_seconds), prepared
