"""Runs a suite: checks every provider, times those that pass, and keeps each complete case."""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch

from . import first_call, machine, sentences, timing
from .kernels import KERNELS, Inputs, Kernel, KernelProvider, Prepared, compiled
from .peers import ONNXRUNTIME, ONNXRUNTIME_RESTING, OPENVINO, OPENVINO_DEFAULT, OPENVINO_INT8
from .provider import Forward, Loaded, Model, Provider
from .providers import AUTOTUNED, COMPILED, EAGER, PACKED_COMPILED, baseline_of
from .results import Case, Report, Row
from .suites import KernelPlan, ModelPlan, Suite
from .verify import Judge, Kept, Reference
from .work import ModelShape, product_shapes, useful_flops, weight_bytes
from .workloads import MODELS, Batch, ModelInputs, build_model, class_of, config_of, padded_tokens, real_tokens

# Different batches that calls take in turn; if a batch takes longer than LONG_SECONDS, only those that are checked.
NUM_BATCHES = 8
NUM_LATENCY_BATCHES = 20
LONG_SECONDS = 0.25
# Batches on which a provider's logits are checked; for batches of one text, the number of texts.
NUM_CHECKED = 2
NUM_CHECKED_TEXTS = 5
# How often each batch runs before anything is timed: on a GPU a CUDA graph is warmed up, then recorded.
WARM_UP_CALLS = {"cpu": 1, "cuda": 3}
# A kernel's sets of inputs hold more than any cache together, so that each call finds its own in main memory.
INPUT_BYTES = 256 * 2**20
MAX_INPUT_SETS = 64
# A captured CUDA graph makes at least this many calls of a kernel, so that replaying it costs little beside them.
GRAPH_CALLS = 100


class Listener(Protocol):
    """Follows the progress of a run."""

    def doing(self, what: str) -> None:
        """``what`` is happening now."""

    def done(self, what: str, seconds: float) -> None:
        """A plan that was expected to take ``seconds`` has ended."""

    def keep(self, report: Report) -> None:
        """The report holds another complete case."""


# About how long preparing a provider takes on two CPU cores, in seconds per six layers; the others take less than a
# second. On a GPU, with more cores beside it, about half.
_PREPARING = {COMPILED: 25.0, PACKED_COMPILED: 25.0, AUTOTUNED: 60.0, ONNXRUNTIME: 7.0, OPENVINO: 4.0}
_PREPARING |= {ONNXRUNTIME_RESTING: 7.0, OPENVINO_DEFAULT: 4.0, OPENVINO_INT8: 12.0}
# Fitting a head, and comparing labels once for each provider and number of threads.
_FITTING, _JUDGING = 8.0, 4.0
_PREPARING_KERNEL = 5.0
# Building a model with random weights, in seconds per six layers.
_BUILDING = 1.0


def planned_seconds(suite: Suite, device: torch.device) -> list[float]:
    """About how long each of the plans takes, in the order in which `Listener.done` is called for them."""
    factor = 0.5 if device.type == "cuda" else 1.0
    dtypes = {plan.dtype for plan in suite.models} | {plan.dtype for plan in suite.kernels}
    machine_seconds = suite.machine_seconds * len(dtypes)
    expected = [machine_seconds]
    prepared: set[tuple[object, ...]] = set()
    built = None
    for plan in suite.models:
        size = config_of(plan.model).num_hidden_layers / 6
        seconds = plan.seconds + 0.5 * len(plan.providers) * size
        if built != (plan.model, plan.dtype):
            built, seconds = (plan.model, plan.dtype), seconds + factor * _BUILDING * size
            seconds += _FITTING if MODELS[plan.model].fitted else 0.0
        for provider in plan.providers:
            # Compilers treat a batch of one as a separate case.
            key = (plan.model, plan.dtype, provider.name, plan.workload.batch_size == 1)
            if key not in prepared and provider.missing(class_of(plan.model), device, plan.dtype) is None:
                seconds += factor * _PREPARING.get(provider, 0.0) * size
            judged = (plan.model, plan.threads, provider.name)
            if judged not in prepared and MODELS[plan.model].fitted:
                seconds += _JUDGING
            prepared |= {key, judged}
        expected.append(seconds)
    expected.append(machine_seconds)
    expected += [factor * _PREPARING_KERNEL + plan.seconds for plan in suite.kernels]
    return expected + [plan.seconds for plan in suite.first_calls]


def run(suite: Suite, report: Report, device: torch.device, listener: Listener) -> None:
    """Fills ``report``, which holds only complete cases whatever ends the run."""
    if device.type == "cuda":
        # Streams and CUDA graphs are made on the current device.
        torch.cuda.set_device(device)
    # A compiler that gives up and runs eager must not be timed under its own name.
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        _run(suite, report, device, listener)


def _run(suite: Suite, report: Report, device: torch.device, listener: Listener) -> None:
    began = time.perf_counter()
    expected = iter(planned_seconds(suite, device))

    def finished(what: str) -> None:
        report.seconds = time.perf_counter() - began
        listener.keep(report)
        listener.done(what, next(expected))

    def measure_machine() -> None:
        listener.doing("the machine's own rates")
        dtypes = [*(plan.dtype for plan in suite.models), *(plan.dtype for plan in suite.kernels)]
        for dtype in dict.fromkeys(dtypes):
            models = dict.fromkeys(plan.model for plan in suite.models if plan.dtype == dtype)
            shapes = [shape for name in models for shape in product_shapes(ModelShape.named(name))]
            report.rates += machine.measure(device, dtype, shapes, suite.machine_seconds)
        finished("the machine's own rates")

    measure_machine()
    session: _Session | None = None
    for plan in suite.models:
        if session is None or (session.name, session.dtype) != (plan.model, plan.dtype):
            # The former model is freed first: two large ones may not fit.
            session = None
            _free_memory(device)
            listener.doing(f"building {plan.model}")
            session = _Session(plan.model, plan.dtype, device)
        case = session.new_case(plan)
        with _kept(case, report), _threads(plan.threads):
            session.measure(case, plan, listener.doing)
        finished(case.name)
    session = None
    _free_memory(device)
    # Measured again, since a machine's speed varies: the best of both counts.
    measure_machine()
    for kernel_plan in suite.kernels:
        case = new_kernel_case(kernel_plan)
        with _kept(case, report):
            measure_kernel(case, kernel_plan, device, listener.doing)
        finished(case.name)
    for first_plan in suite.first_calls:
        what = f"{first_plan.model}, {first_plan.workload.name}: first call of {first_plan.provider.name}"
        listener.doing(what)
        report.first_calls.append(first_call.measure(first_plan, str(device), torch.get_num_threads()))
        finished(what)
    report.partial = False


@contextlib.contextmanager
def _kept(case: Case, report: Report) -> Iterator[None]:
    """Puts the case into the report whatever ends it; an error ends only the case, not the run."""
    try:
        yield
    except Exception as error:
        case.rows.append(Row(case.baseline, "failed", detail=reason_of(error)))
    finally:
        if case.rows:
            report.cases.append(case)


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Sets torch's number of threads, which peers are loaded with, for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _free_memory(device: torch.device) -> None:
    # Forgets compiled code, with its CUDA graphs and the count of its shapes.
    torch.compiler.reset()
    compiled.cache_clear()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


class _Session:
    """A model and its prepared providers, for one workload after the other."""

    def __init__(self, name: str, dtype: torch.dtype, device: torch.device, model: Model | None = None) -> None:
        self.name = name
        self.dtype = dtype
        self.device = device
        fitted = sentences.fitted_model(name, device, dtype) if model is None else None
        self.fitted = fitted is not None
        self.model = model or fitted or build_model(name, device, dtype)
        self.judge: Judge | None = None
        # By name and number of threads.
        self.loaded: dict[tuple[str, int], Loaded | Exception] = {}
        self.judged: dict[tuple[str, int], Kept] = {}

    def new_case(self, plan: ModelPlan) -> Case:
        dtype = str(plan.dtype).removeprefix("torch.")
        baseline = baseline_of(type(self.model)).name
        batch_size = plan.workload.batch_size
        return Case("model", plan.model, plan.workload.name, dtype, baseline, batch_size, threads=plan.threads)

    def measure(self, case: Case, plan: ModelPlan, doing: Callable[[str], None]) -> None:
        latency = plan.workload.batch_size == 1
        inputs = ModelInputs.of(type(self.model), self.model.config)
        batches = plan.workload.batches(NUM_LATENCY_BATCHES if latency else NUM_BATCHES, inputs)
        self.describe(case, batches)
        checked = batches[: NUM_CHECKED_TEXTS if latency else NUM_CHECKED]
        doing(f"{case.name}: the reference")
        start = time.perf_counter()
        reference = Reference(self.model, checked)
        if (time.perf_counter() - start) / len(checked) > LONG_SECONDS:
            batches = checked
        judge = self._judge(plan)
        case.judged_on = judge.about if judge else ""
        if judge and not self.fitted and plan.model in MODELS and MODELS[plan.model].fitted:
            case.judged_on += f" ({sentences.missing()})"
        timed: dict[str, timing.Function] = {}
        for provider in plan.providers:
            doing(f"{case.name}: preparing and checking {provider.name}")
            row, forward = self._prepare(provider, reference, judge)
            case.rows.append(row)
            if forward is not None and self._warm_up(row, forward, batches):
                timed[provider.name] = _taking_turns(forward, batches)
        spinning = [provider.name for provider in plan.providers if provider.spins]
        timing.time_rounds(case, timed, plan.effort, self.device, doing, spinning)

    def _warm_up(self, row: Row, forward: Forward, batches: Sequence[Batch]) -> bool:
        """Runs every batch, since a shape's first run may be slow; returns whether all succeeded."""
        try:
            for batch in batches:
                for _ in range(WARM_UP_CALLS[self.device.type]):
                    forward(batch)
            machine.wait_for(self.device)
        except Exception as error:  # a provider that breaks is a row of the table, not the end of the run
            row.status, row.detail = "failed", reason_of(error)
            return False
        return True

    def describe(self, case: Case, batches: Sequence[Batch]) -> None:
        """Fills in the case's tokens, operations and bytes."""
        shape = ModelShape.of(type(self.model), self.model.config)
        case.real_tokens = statistics.fmean(map(real_tokens, batches))
        case.padded_tokens = statistics.fmean(map(padded_tokens, batches))
        case.flops = statistics.fmean(useful_flops(shape, batch) for batch in batches)
        case.num_bytes = weight_bytes(shape, self.dtype.itemsize)

    def _judge(self, plan: ModelPlan) -> Judge | None:
        """Made only if a provider of reduced precision can run."""
        asked = [each for each in plan.providers if each.reduced]
        if all(each.missing(type(self.model), self.device, self.dtype) for each in asked):
            return None
        self.judge = self.judge or Judge(self.model, self.fitted)
        return self.judge

    def _prepare(self, provider: Provider, reference: Reference, judge: Judge | None) -> tuple[Row, Forward | None]:
        """The provider's row, and its function if it may be timed."""
        missing = provider.missing(type(self.model), self.device, self.dtype)
        if missing:
            return Row(provider.name, "unavailable", detail=missing), None
        convert_seconds = None
        key = (provider.name, torch.get_num_threads())
        if key not in self.loaded:
            start = time.perf_counter()
            try:
                self.loaded[key] = provider.load(self.model)
            except Exception as error:  # a provider that breaks is a row of the table, not the end of the run
                self.loaded[key] = error
            convert_seconds = time.perf_counter() - start
        loaded = self.loaded[key]
        if isinstance(loaded, Exception):
            return Row(provider.name, "failed", detail=reason_of(loaded)), None
        try:
            start = time.perf_counter()
            # A copy: the next replay of a CUDA graph writes over it.
            first = loaded.forward(reference.batches[0]).clone()
            machine.wait_for(self.device)
            first_seconds = time.perf_counter() - start
            verdict = reference.check(
                provider, lambda batch: first if batch is reference.batches[0] else loaded.forward(batch)
            )
            if judge is not None and verdict.passed and key not in self.judged:
                self.judged[key] = judge.judge(loaded.forward)
        except Exception as error:  # likewise
            return Row(provider.name, "failed", None, reason_of(error), convert_seconds), None
        row = Row(provider.name, "timed", verdict.difference, loaded.detail, convert_seconds, first_seconds)
        why = verdict.reason
        if judge is not None and verdict.passed:
            row.agreement, row.mean_error, why = self.judged[key]
            if provider.reduced and row.mean_error < EAGER.bound:
                row.detail = f"nothing is reduced here, these are float32's logits. {row.detail}".strip()
        if why:
            row.status, row.detail = "failed", why
        return row, None if why else loaded.forward


def reason_of(error: Exception) -> str:
    """An error's first line: a compiler's message may be pages long."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def _taking_turns(forward: Forward, batches: Sequence[Batch]) -> timing.Function:
    return lambda index: forward(batches[index % len(batches)])


def measure_case(
    model: Model, plan: ModelPlan, device: torch.device, doing: Callable[[str], None] = lambda _: None
) -> Case:
    """Measures one model plan by itself, on the given model."""
    session = _Session(plan.model, model.dtype, device, model)
    case = session.new_case(plan)
    session.measure(case, plan, doing)
    return case


def new_kernel_case(plan: KernelPlan) -> Case:
    """A case without measurements."""
    dtype = str(plan.dtype).removeprefix("torch.")
    return Case("kernel", plan.kernel, plan.workload.name, dtype, KERNELS[plan.kernel].providers[0].name)


def measure_kernel(
    case: Case, plan: KernelPlan, device: torch.device, doing: Callable[[str], None] = lambda _: None
) -> None:
    """Measures a kernel's providers. On a GPU a CUDA graph replays their calls, so that launches do not count."""
    kernel = KERNELS[plan.kernel]
    doing(f"{case.name}: making inputs")
    with torch.inference_mode():
        sets = _input_sets(kernel, plan, device)
        least = [kernel.least(inputs, plan.dtype.itemsize) for inputs in sets]
        case.flops, case.num_bytes = (statistics.fmean(each) for each in zip(*least, strict=True))
        case.real_tokens = case.padded_tokens = statistics.fmean(inputs.tokens for inputs in sets)
        timed: dict[str, timing.Function] = {}
        repeats = math.ceil(GRAPH_CALLS / len(sets)) if device.type == "cuda" else 0
        for provider in kernel.providers:
            doing(f"{case.name}: preparing and checking {provider.name}")
            row, prepared = prepare_kernel(provider, kernel.check, sets, device, plan.dtype)
            case.rows.append(row)
            functions = [each.run for each in prepared]
            if functions and repeats:
                try:
                    timed[provider.name] = captured(functions, repeats)
                except RuntimeError as error:
                    row.status, row.detail = "failed", f"cannot be captured in a CUDA graph: {reason_of(error)}"
            elif functions:
                timed[provider.name] = in_turn(functions)
    if timed and case.baseline not in timed:
        case.baseline = next(iter(timed))
    try:
        timing.time_rounds(case, timed, plan.effort, device, doing)
    finally:
        calls = repeats * len(sets) or 1
        case.seconds = {
            name: [[seconds / calls for seconds in each] for each in rounds] for name, rounds in case.seconds.items()
        }


def _input_sets(kernel: Kernel, plan: KernelPlan, device: torch.device) -> list[Inputs]:
    (first,) = kernel.inputs(plan.workload, device, plan.dtype, 1)
    size = sum(each.nbytes for each in first.arguments if isinstance(each, torch.Tensor))
    count = min(max(math.ceil(INPUT_BYTES / size), 2), MAX_INPUT_SETS)
    return kernel.inputs(plan.workload, device, plan.dtype, count)


def prepare_kernel(
    provider: KernelProvider,
    check: Callable[[Inputs, torch.Tensor], float],
    sets: Sequence[Inputs],
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Row, list[Prepared]]:
    """The provider's row, and its functions, one for each set, if they may be timed."""
    missing = provider.available(device, dtype)
    if missing:
        return Row(provider.name, "unavailable", detail=missing), []
    start = time.perf_counter()
    try:
        prepared = [provider.prepare(inputs) for inputs in sets]
        out = prepared[0].run()
        machine.wait_for(device)
        first_seconds = time.perf_counter() - start
        result = prepared[0].result
        difference = None if result is None else check(sets[0], result(out))
    except Exception as error:  # a provider that breaks is a row of the table, not the end of the run
        return Row(provider.name, "failed", detail=reason_of(error)), []
    return Row(provider.name, "timed", difference, first_seconds=first_seconds), prepared


def in_turn(functions: Sequence[Callable[[], object]]) -> timing.Function:
    return lambda index: functions[index % len(functions)]()


def captured(functions: Sequence[Callable[[], object]], repeats: int) -> timing.Function:
    """All functions, several times, as one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for function in functions:
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            for function in functions:
                function()

    def replay(_: int, kept: object = functions) -> None:
        # The CUDA graph reads inputs that only the functions keep alive.
        del kept
        graph.replay()

    return replay
