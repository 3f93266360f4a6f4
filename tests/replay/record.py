"""Makes the golden histories of tests/replay/histories anew, by really running the system.

    python -m tests.replay.record              all of them, in about two minutes
    python -m tests.replay.record extractive   one system's courses: extractive, scripted or racing
    python -m tests.replay.record scripted revised expired     some of one system's courses

In: nothing but the code and documents of the repository. Out: a file a course. Each course is a task or a document
that goes through an embedded system in a temporary folder: with the ``extractive`` model, with a model server that
fails and dawdles to order, and with an agent whose calls race each other. Ids and times are new in each recording.
"""

import asyncio
import contextlib
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

from confluent_kafka import Producer

from agents.agent import Agent
from agents.context import LlmRequest, LlmResponse, Ports
from agents.errors import EffectFailedError
from magnatronic.broker import EmbeddedBroker, ensure_topics
from magnatronic.client import Client
from magnatronic.dlq import DeadLetters
from magnatronic.letters import Filter, LetterReader
from magnatronic.settings import Settings
from replay.decide import Station
from replay.golden import CLEAN, SUFFIX, dump, pin
from replay.history import read_history
from replay.kafka_log import KafkaLog
from schemas.codec import Codec
from schemas.events import DocumentRemoved, DocumentSubmitted, StepAssigned
from schemas.record import Record
from streams.binding import Binding
from streams.runner import Runner
from tests.replay.model_server import Answer, ModelServer, grounded
from tests.replay.racing import FirstRacer, Racer, SecondRacer
from tests.replay.stations import RACER_TOPICS, system_stations

HISTORIES: Final = Path(__file__).parent / "histories"
REPOSITORY: Final = Path(__file__).parents[2]
MOST_BYTES: Final = 200_000

Courses = dict[str, tuple[str, str]]
"""By name: the id of the task or document, and what its history shows."""


def documents() -> list[DocumentSubmitted]:
    """The repository's own decisions: small, and about one thing each."""
    return [_document(path) for path in sorted((REPOSITORY / "docs" / "decisions").glob("0*.md"))[:6]]


def _document(path: Path) -> DocumentSubmitted:
    name, text = path.relative_to(REPOSITORY).as_posix(), path.read_text(encoding="utf-8")
    return DocumentSubmitted(
        document_id=name,
        title=text.partition("\n")[0].removeprefix("# "),
        text=text,
        media_type="text/markdown",
        source=name,
    )


wanted: set[str] = set()
"""The histories to write; all where it is empty."""


class Scene:
    """A running system, and what is asked of it."""

    def __init__(self, kafka: Mapping[str, Any], client: Client, stations: Sequence[Station]) -> None:
        self.kafka = dict(kafka)
        self.client = client
        self._stations = stations
        self.courses: Courses = {}

    def submit(self, name: str, about: str, objective: str, **options: Any) -> str:
        """Submit a task that makes the history ``name``."""
        task_id = self.client.submit(objective, **options)
        self.courses[name] = task_id, about
        return task_id

    def outcome(self, *task_ids: str) -> None:
        for task_id in task_ids:
            print(f"  {type(self.client.outcome(task_id).event).__name__} of {task_id}", flush=True)

    def until(self, done: Callable[[Sequence[Record]], bool], key: str) -> None:
        """Wait until the records of a task or document are as they should be."""
        deadline = time.monotonic() + 60
        while not done(self.records(key)):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{key}: {[dict(each.headers).get('ce_type') for each in self.records(key)]}")
            time.sleep(0.3)

    def records(self, key: str) -> Sequence[Record]:
        with KafkaLog(self.kafka) as log:
            return [entry.record for entry in read_history(log, key, self.client.codec).entries]

    def write(self) -> None:
        """Write every course's history into its file."""
        time.sleep(2)  # what an outcome sets off has ended by then: cancellations, late assessments
        with KafkaLog(self.kafka) as log:
            for name, (key, about) in self.courses.items():
                if wanted and name not in wanted:
                    continue
                history = read_history(log, key, self.client.codec)
                pinned, decided = asyncio.run(
                    pin(history, name=name, about=about, stations=self._stations, codec=self.client.codec)
                )
                wrong = [str(finding) for finding in decided.findings]
                wrong += [f"{step.agent}: {step.verdict}" for step in decided.steps if step.verdict not in CLEAN]
                if wrong:
                    raise SystemExit("\n".join([f"{name} does not audit clean:", *wrong]))
                text = dump(pinned, self.client.codec)
                if len(text) > MOST_BYTES:
                    raise SystemExit(f"{name} has {len(text)} bytes, over {MOST_BYTES}")
                (HISTORIES / f"{name}{SUFFIX}").write_text(text, encoding="utf-8")
                print(
                    f"{name}: {len(pinned.records)} records, {len(pinned.steps)} steps, {len(text)} bytes", flush=True
                )


def types_of(records: Sequence[Record]) -> list[str]:
    return [(dict(record.headers).get("ce_type") or b"").decode().rpartition(".")[2] for record in records]


def has(*kinds: str) -> Callable[[Sequence[Record]], bool]:
    return lambda records: all(types_of(records).count(kind) >= kinds.count(kind) for kind in kinds)


@contextlib.contextmanager
def system(**settings: Any) -> Iterator[Scene]:
    # Instances are named after the machine when this is imported, and the agent directory tells of them.
    from magnatronic.system import RunningSystem

    with tempfile.TemporaryDirectory() as folder:
        chosen = Settings.load(data_dir=Path(folder), monitor=False, metrics_port="off", partitions=2, **settings)
        with RunningSystem(chosen) as running, Client(running.kafka, name="recorder") as client:
            scene = Scene(running.kafka, client, system_stations())
            yield scene
            scene.write()


def ingest(scene: Scene) -> None:
    scene.client.publish(documents())
    for document in documents():
        scene.until(has("DocumentIndexed"), document.document_id)
    time.sleep(3)  # the index is behind the log by less


def extractive() -> None:
    """The courses of a system whose language model quotes the corpus."""
    with system() as scene:
        empty = scene.submit(
            "no-evidence", "a step that finds an empty corpus, and the task's failure", "What is Kafka?"
        )
        scene.outcome(empty)
        ingest(scene)
        chosen = documents()[0]
        scene.courses["document"] = "notes/racing", "a document submitted, again, changed and removed"
        for event in (
            chosen.model_copy(update={"document_id": "notes/racing", "text": "# Racing\n\nThe first answer wins.\n"}),
            chosen.model_copy(update={"document_id": "notes/racing", "text": "# Racing\n\nThe first answer wins.\n"}),
            chosen.model_copy(
                update={"document_id": "notes/racing", "text": "# Racing\n\nThe first wins.\n\n# Pace\n\nSlow.\n"}
            ),
            DocumentRemoved(document_id="notes/racing", reason="no longer true"),
        ):
            scene.client.publish([event])
        scene.until(has(*["DocumentIndexed"] * 4), "notes/racing")
        scene.courses["decision"] = documents()[0].document_id, "a document of the repository, embedded"
        answered = scene.submit("answer", "one question, retrieved, assessed, answered", "When is a handler run again?")
        compared = scene.submit(
            "compare",
            "a plan of several steps: two are retrieved, one researches what they found",
            "Compare retries of a handler and dead letters.",
        )
        high = scene.submit(
            "priority-high", "a task of high priority", "What do producers partition by?", priority="high"
        )
        low = scene.submit("priority-low", "a task of low priority", "Why are embeddings effects?", priority="low")
        leaves = '{"steps":[{"id":"a","capability":"research","objective":"Why are embeddings effects?"},' + (
            '{"id":"b","capability":"retrieve","objective":"What do producers partition by?"}],"rationale":"two"}'
        )
        both = scene.submit(
            "synthesis", "two steps side by side, put into one answer", "Tell me both.", parameters={"plan": leaves}
        )
        plan = '{"steps":[{"id":"a","capability":"retrieve","objective":"x","depends_on":["a"]}],"rationale":""}'
        rejected = scene.submit(
            "rejected-plan",
            "a plan of the user's own that can't be carried out",
            "Go round.",
            parameters={"plan": plan},
        )
        scene.outcome(answered, compared, high, low, both, rejected)
        scene.client.submit("When is a handler run again?", task_id=answered)
        scene.courses["repeated"] = answered, "a task that was submitted twice, and cancelled when it was done"
        del scene.courses["answer"]
        scene.client.cancel(answered, reason="too late")
        once = scene.submit("answer", "one question, retrieved, assessed, answered", "When is a handler run again?")
        scene.outcome(once)
        unreadable = "unreadable-task"
        producer = Producer({**scene.kafka, "partitioner": "murmur2_random"})
        producer.produce("tasks.normal", b"\x00poison\xff", unreadable.encode(), headers={"x": b"\xfe"})
        producer.flush(20)
        scene.courses["unreadable"] = unreadable, "bytes that are no event, dead-lettered"
        scene.until(lambda records: len(records) == 2, unreadable)


ONE_STEP: Final = {"plan": '{"steps":[{"id":"a","capability":"retrieve","objective":"QUESTION"}],"rationale":"given"}'}


def one_step(question: str) -> dict[str, str]:
    return {"plan": ONE_STEP["plan"].replace("QUESTION", question)}


def scripted() -> None:
    """The courses of a system whose language model fails, dawdles or makes things up."""
    plan = one_step("How are plans mended?")["plan"]

    def revised(asked: int, prompt: str, planning: bool) -> Answer:
        made_up = "Retries were invented by Ada Lamp in the year 1901 [1]."
        return Answer(made_up if asked == 0 else grounded(prompt))

    def stubborn(asked: int, prompt: str, planning: bool) -> Answer:
        return Answer("Dead letters were invented by Ada Lamp in the year 1901 [1].")

    def paraphrased(asked: int, prompt: str, planning: bool) -> Answer:
        passages = prompt.partition("[1] ")[2].split("\n\n[")
        cited = next(number for number, text in enumerate(passages, 1) if "`retryable=True`" in text)
        return Answer(f"When its handler raised EffectFailedError, the processor tries the event again [{cited}].")

    def failing(times: int, status: int) -> Callable[[int, str, bool], Answer]:
        return lambda asked, prompt, planning: Answer(grounded(prompt), status if asked < times else 200)

    def slow(asked: int, prompt: str, planning: bool) -> Answer:
        return Answer(grounded(prompt), delay_s=60)

    def mended(asked: int, prompt: str, planning: bool) -> Answer:
        if planning:
            return Answer("I would rather not plan." if asked == 0 else plan)
        return Answer(grounded(prompt))

    def hopeless(asked: int, prompt: str, planning: bool) -> Answer:
        return Answer('{"steps":[],"rationale":"nothing to do"}')

    scripts = {
        "When is a handler run again?": revised,
        "What becomes of dead letters?": stubborn,
        "What do producers partition by?": failing(1, 503),
        "Why are embeddings effects?": failing(4, 503),
        "How is Avro compiled?": slow,
        "What is payload as text?": slow,
        "What is fenced before coming back?": failing(1, 401),
        "How are plans mended?": mended,
        "How can nothing be done?": hopeless,
        "What does EffectFailedError mean for an event?": paraphrased,
    }
    with ModelServer(scripts) as server:
        settings = {"llm_provider": "openai", "openai_base_url": server.url, "llm_model": "scripted-1"}
        with system(**settings) as scene:
            ingest(scene)

            def ask(name: str, about: str, question: str, **options: Any) -> str:
                return scene.submit(name, about, question, parameters=one_step(question), **options)

            late = datetime.now(UTC) + timedelta(seconds=5)
            expired = ask(
                "expired",
                "a deadline that passes while a step runs: the timer, the step stopped",
                "How is Avro compiled?",
                deadline=late,
            )
            cancelled = ask("cancelled", "a task cancelled while its step runs", "What is payload as text?")
            dead = ask(
                "redriven",
                "a step dead-lettered for a wrong key, and sent again when the task had failed",
                "What is fenced before coming back?",
            )
            others = [
                ask(
                    "revised", "a claim that nothing supports, and the step's revision", "When is a handler run again?"
                ),
                ask(
                    "paraphrase",
                    "a claim in other words than its evidence, which embeddings decide on",
                    "What does EffectFailedError mean for an event?",
                ),
                ask("rejected-answer", "an answer that stays ungrounded", "What becomes of dead letters?"),
                ask("effect-error", "a call that fails once, and is tried again", "What do producers partition by?"),
                ask(
                    "failed-step",
                    "a step that fails, and succeeds when it is assigned again",
                    "Why are embeddings effects?",
                ),
                scene.submit("mended-plan", "a plan that is no JSON at first", "How are plans mended?"),
                scene.submit("hopeless-plan", "a plan without steps, twice", "How can nothing be done?"),
            ]
            scene.until(has("MemoryRecalled"), cancelled)
            scene.client.cancel(cancelled, reason="nobody asks any more")
            scene.outcome(*others, dead, cancelled, expired)
            letters = LetterReader(scene.kafka, scene.client.codec)
            found = [
                entry for entry in filter(Filter(agent="retriever"), letters.entries()) if entry.correlation_id == dead
            ]
            DeadLetters(scene.kafka, scene.client.codec, by="recorder").redrive(found, reason="the key was mended")
            scene.until(has("StepAssessed"), dead)
            scene.until(has("StepCancelled"), cancelled)
            scene.until(has("StepCancelled"), expired)


class Paced:
    """A model that takes its time: ``slow`` a second, ``never`` a minute; ``failing`` fails at first. With ``stuck`` it
    has no answer to why it said so.
    """

    name = "paced"

    def __init__(self, *, stuck: bool = False) -> None:
        self._stuck = stuck
        self._failed = False

    async def complete(self, request: LlmRequest, *, idempotency_key: str) -> LlmResponse:
        text = request.messages[-1].content
        endless = "never" in text or (self._stuck and text == "why <stuck>")
        await asyncio.sleep(60 if endless else 1 if "slow" in text else 0)
        if "failing" in text and not self._failed:
            self._failed = True
            raise EffectFailedError("Overloaded", "later", retryable=True)
        return LlmResponse(text=f"<{text}>", provider=self.name, model="paced-1")


def racing() -> None:
    """The courses of an agent whose calls race each other, through its versions."""
    with tempfile.TemporaryDirectory() as folder:
        broker = EmbeddedBroker(Path(folder) / "kafka")
        kafka = {"bootstrap.servers": broker.start().bootstrap_servers}
        try:
            ensure_topics(kafka, partitions=2, replication_factor=1)
            with Client(kafka, name="recorder") as client:
                scene = Scene(kafka, client, [Station(Racer(), frozenset(RACER_TOPICS))])
                asyncio.run(_race(scene))
                scene.write()
        finally:
            broker.stop()


async def _race(scene: Scene) -> None:
    scene.courses["race"] = "race", "concurrent calls of which some are late, fail, or end in another order"
    scene.courses["versions"] = "versions", "an agent in three stages: version 1, version 2, and a change within it"
    async with _running(scene, FirstRacer()):
        await _step(scene, "race", 1, "quick,slow,never")
        await _step(scene, "race", 2, "slow,quick", within="5")
        await _step(scene, "race", 3, "quick,failing,slow")
        await _step(scene, "versions", 1, "quick,slow", within="5")
    async with _running(scene, SecondRacer(), stuck=True):
        await _step(scene, "versions", 2, "slow,quick")
        # The race of this one ends, but not the question why, for as long as this version runs.
        scene.client.publish([_assigned("versions", 3, "stuck,slow")])
        await asyncio.to_thread(scene.until, has(*["LlmCalled"] * 7), "versions")
    async with _running(scene, Racer()):
        await asyncio.to_thread(scene.until, has(*["StepCompleted"] * 3), "versions")
        await _step(scene, "versions", 4, "slow,quick")


def _assigned(task_id: str, number: int, ask: str, within: str = "0.5") -> StepAssigned:
    return StepAssigned(
        task_id=task_id,
        step_id=f"{task_id}/{number}",
        attempt=1,
        capability="research",
        objective=ask,
        parameters={"ask": ask, "within": within},
    )


async def _step(scene: Scene, task_id: str, number: int, ask: str, within: str = "0.5") -> None:
    """Have the task's ``number``-th step answered."""
    scene.client.publish([_assigned(task_id, number, ask, within)])
    await asyncio.to_thread(scene.until, has(*["StepCompleted"] * number), task_id)


@contextlib.asynccontextmanager
async def _running(scene: Scene, agent: Agent[Any], *, stuck: bool = False) -> AsyncIterator[None]:
    runner = Runner(
        [Binding(agent, RACER_TOPICS)],
        codec=Codec(),
        kafka=scene.kafka,
        ports=Ports(llm=Paced(stuck=stuck)),
        drain_timeout_s=0.2,
        telemetry=False,
    )
    task = asyncio.create_task(runner.run())
    try:
        yield
    finally:
        runner.stop()
        await task


SYSTEMS: Final = {"extractive": extractive, "scripted": scripted, "racing": racing}


def main(names: Sequence[str]) -> None:
    HISTORIES.mkdir(exist_ok=True)
    socket.gethostname = lambda: "recorder"  # what is committed names no machine
    wanted.update(name for name in names if name not in SYSTEMS)
    for name in [name for name in SYSTEMS if name in names or not names]:
        print(f"the courses of the {name} system", flush=True)
        SYSTEMS[name]()


if __name__ == "__main__":
    main(sys.argv[1:])
