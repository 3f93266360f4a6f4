"""The codec's cost: microseconds to encode and decode an event, beside its two ingredients on the same data.

In: nothing but the codec. Out: figures for a small, a medium and an embedding event: the codec (Avro, validation,
CloudEvents headers, the guards against hostile bytes), fastavro alone (dict to bytes and back, neither validated nor
framed, no headers) and pydantic alone (validate a dict, dump a model). The ratio is codec / (fastavro + pydantic): what
the usual pairing of the two costs to do part of the same work.
"""

import gc
import io
import time
from collections.abc import Callable

import fastavro

from bench.figures import Figure, ratio
from bench.samples import chunk, metadata_for, record_of, step_completed, submission
from schemas.avro_generation import avro_schema
from schemas.codec import Codec
from schemas.events import Event

__all__ = ["measure"]

PART = "codec"


def measure(*, quick: bool = False) -> list[Figure]:
    """Figures for three event types. Quick: fewer repeats, so the spread is wide."""
    rounds, budget_s = (3, 0.01) if quick else (9, 0.12)
    figures: list[Figure] = []
    for event in (submission(1), step_completed(1), chunk(1)):
        figures += _of_event(type(event).__name__, event, rounds, budget_s)
    return figures


def _of_event(label: str, event: Event, rounds: int, budget_s: float) -> list[Figure]:
    codec = Codec()
    metadata = metadata_for(event)
    record = record_of(codec, event, 0)
    size = f"{len(record.value or b'')} bytes"
    schema = fastavro.parse_schema(avro_schema(type(event)))
    model = type(event)
    fields = event.model_dump()
    buffer = io.BytesIO()
    fastavro.schemaless_writer(buffer, schema, fields)
    raw = buffer.getvalue()

    def write_raw() -> None:
        out = io.BytesIO()
        fastavro.schemaless_writer(out, schema, fields)
        out.getvalue()

    calls: dict[str, Callable[[], object]] = {
        "encode": lambda: codec.encode(event, metadata),
        "fastavro write": write_raw,
        "pydantic dump": event.model_dump,
        "decode": lambda: codec.decode(record),
        "fastavro read": lambda: fastavro.schemaless_reader(io.BytesIO(raw), schema, None),
        "pydantic validate": lambda: model.model_validate(fields),
    }
    if codec.decode(record).event != event:
        raise AssertionError(f"{model.__name__} does not survive a round trip")
    samples = _microseconds(calls, rounds, budget_s)
    figures = [
        Figure(PART, f"{label} {name}", "µs", tuple(samples[name]), size if name == "encode" else "") for name in calls
    ]
    for name, avro, rules in (
        ("encode", "fastavro write", "pydantic dump"),
        ("decode", "fastavro read", "pydantic validate"),
    ):
        both = [first + second for first, second in zip(samples[avro], samples[rules], strict=True)]
        figures.append(ratio(PART, f"{label} {name} / (fastavro + pydantic)", samples[name], both, "less is better"))
    return figures


def _microseconds(calls: dict[str, Callable[[], object]], rounds: int, budget_s: float) -> dict[str, list[float]]:
    """Microseconds a call, one sample a round; the calls take turns so that a busy moment hits all alike."""
    repeats = {name: _repeats(call, budget_s) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, call in calls.items():
                count = repeats[name]
                start = time.perf_counter()
                for _ in range(count):
                    call()
                samples[name].append((time.perf_counter() - start) / count * 1e6)
    finally:
        gc.enable()
    return samples


def _repeats(call: Callable[[], object], budget_s: float) -> int:
    """How many calls take about ``budget_s`` seconds."""
    count = 1
    while True:
        start = time.perf_counter()
        for _ in range(count):
            call()
        took = time.perf_counter() - start
        if took > budget_s / 10:
            return max(1, int(count * budget_s / took))
        count *= 2
