"""`magnatronic forget` on a whole system: no file of it says what was personal, and history still verifies."""

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Consumer, KafkaError, TopicPartition

from magnatronic.client import Client
from magnatronic.keys import FileKeys
from tests.integration.conftest import SystemForTests, UpProcess

PLAIN = ("Quorzapple", "Fnordbeck", "Xylograph")
"""Words that stand in what is about Ada, and nowhere else; her name in the application is one of them."""
NAME = "Quorzapple Fnordbeck"
BOBS = "Wumpelstein"


class Scene:
    """A system with tasks and documents about two people, and about nobody."""

    def __init__(self, running: SystemForTests, folder: Path) -> None:
        self.running = running
        self.data_dir = running.data_dir
        self.archive = folder / "archive"
        self.digest = ""
        self._folder = folder

    def fill(self) -> None:
        # What is about Bob first: a question finds whatever passages there are, and is about their people too.
        self.ingest("bob.md", f"# {BOBS}\n\n{BOBS} ordered three green umbrellas.\n", "bob")
        self.ask("t-bob", f"What did {BOBS} order?", "bob")
        self.ingest("ada.md", f"# {NAME}\n\n{NAME} of Xylograph Street ordered nine purple teapots.\n", NAME)
        self.ask("t-ada", f"What did {NAME} order?", NAME)

    def ingest(self, name: str, text: str, subject: str) -> None:
        path = self._folder / name
        path.write_text(text)
        done = self.running.run("ingest", "--data-subject", subject, str(path))
        assert done.returncode == 0, done.stderr

    def ask(self, task: str, question: str, subject: str) -> None:
        done = self.running.run("ask", "-q", "--task-id", task, "--data-subject", subject, question)
        assert done.returncode == 0, done.stderr

    def rows(self, sql: str) -> Any:
        done = self.running.run("query", "--json", sql)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def forget(self, *arguments: str) -> tuple[int, dict[str, Any]]:
        done = self.running.run("forget", "--yes", "--json", *arguments, NAME)
        return done.returncode, json.loads(done.stdout or "{}")

    def audit(self, task: str) -> tuple[int, dict[str, int], str]:
        """Its exit code, how many steps have each verdict, and the digest of what was recorded."""
        done = self.running.start("replay audit", "--task", task, "--json")
        said, errors = done.communicate(timeout=60)
        assert said, errors
        report = json.loads(said)
        return done.returncode, report["verdicts"], report["digest"]

    def files_with_plain_text(self) -> set[str]:
        """The first folders under the data folder, and ``archive``, in whose files a plain word stands."""
        command = ["grep", "-rlaE", "|".join(PLAIN), str(self.data_dir), str(self.archive)]
        found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
        return {Path(path).relative_to(self._folder).parts[1 if "data" in path else 0] for path in found}

    def log_bytes(self) -> bytes:
        """Every value, key and header of every topic, changelogs too, uncompressed."""
        servers = self.running.up.status()["bootstrap_servers"]
        consumer = Consumer(
            {"bootstrap.servers": servers, "group.id": "grep", "enable.partition.eof": True, "log_level": 0}
        )
        parts: list[bytes] = []
        try:
            topics = [
                each for each in consumer.list_topics(timeout=20).topics.values() if not each.topic.startswith("__")
            ]
            places = [TopicPartition(topic.topic, number, 0) for topic in topics for number in topic.partitions]
            consumer.assign(places)
            left = len(places)
            while left:
                message = consumer.poll(10)
                assert message is not None
                if (error := message.error()) is not None:
                    assert error.code() == KafkaError._PARTITION_EOF, error
                    left -= 1
                    continue
                parts += [message.key() or b"", message.value() or b""]
                parts += [text or b"" for _, text in message.headers() or ()]
        finally:
            consumer.close()
        return b"\n".join(parts)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("forget")
    up = UpProcess(folder / "data", {"MAGNATRONIC_MONITOR": "false"})
    try:
        up.start()
        made = Scene(SystemForTests(up, folder), folder)
        made.fill()
        yield made
        made.running.end()
    finally:
        up.close()


def test_before_forgetting_the_log_is_sealed_and_the_audit_clean(scene: Scene) -> None:
    assert not [word for word in PLAIN if word.encode() in scene.log_bytes()]
    done = scene.running.run("archive", "--to", str(scene.archive))
    assert done.returncode == 0, done.stderr
    # ClickHouse's files are compressed, so that grep sees nothing there; it is asked instead.
    assert scene.files_with_plain_text() == {"milvus.db"}
    assert scene.rows(f"SELECT count() AS n FROM events WHERE payload LIKE '%{PLAIN[1]}%'")[0]["n"] > 10
    code, verdicts, scene.digest = scene.audit("t-ada")
    assert (code, verdicts) == (0, {"same": 5})


def test_killed_amid_it_and_done_again_it_leaves_nothing(scene: Scene) -> None:
    keys = FileKeys(scene.data_dir / "keys")
    (key_id,) = keys.ids_of(NAME)
    killed = scene.running.start("forget", "--yes", NAME)
    while keys.data_key(key_id) is not None:
        assert killed.poll() is None
        time.sleep(0.001)
    killed.kill()
    killed.communicate()
    code, said = scene.forget()
    assert code == 0
    assert (said["key_ids"], said["destroyed"], said["done"]) == ([key_id], 0, True)
    assert said["projections"]["clickhouse"]["rows"] > 10
    assert said["projections"]["milvus"] == {"done": True, "rows": 1, "files": True}

    assert scene.files_with_plain_text() == set()
    assert not [word for word in PLAIN if word.encode() in scene.log_bytes()]
    columns = "concat(key, id, subject, payload, error, raw, task_id, step_id, toString(data_subjects))"
    assert scene.rows(f"SELECT count() AS n FROM event_log WHERE {columns} LIKE '%{PLAIN[1]}%'") == [{"n": 0}]
    # Done for good measure it says the same.
    assert scene.forget() == (0, said)
    assert scene.running.run("forget", "--yes", "who?").returncode == 2


def test_afterwards_history_verifies(scene: Scene) -> None:
    assert scene.audit("t-ada") == (0, {"erased": 5}, scene.digest)
    done = scene.running.run("archive verify", str(scene.archive))
    assert done.returncode == 0, done.stderr
    assert scene.audit("t-bob")[:2] == (0, {"same": 5})


def test_another_subject_is_untouched(scene: Scene) -> None:
    answer = scene.rows("SELECT answer FROM tasks WHERE task_id = 't-bob'")[0]["answer"]
    assert answer.startswith(f"{BOBS} ordered three green umbrellas")
    scene.ask("t-bob-2", f"What did {BOBS} order?", "bob")
    assert scene.rows("SELECT countIf(erased) AS n FROM events WHERE task_id IN ('t-bob', 't-bob-2')") == [{"n": 0}]


def test_who_comes_back_is_somebody_else(scene: Scene) -> None:
    scene.ask("t-ada-2", f"What did {BOBS} order, asks {NAME}?", NAME)
    (old, new) = FileKeys(scene.data_dir / "keys").ids_of(NAME)
    assert old != new
    with Client.connect(scene.data_dir) as client:
        assert client.key_ids(NAME) == (new,)
    # The old one's file may be ingested again, for somebody else too.
    scene.ingest("ada.md", "# Teapots\n\nNine purple teapots were ordered.\n", "bob")


@pytest.mark.parametrize("projection", ["clickhouse", "milvus"])
def test_what_a_rebuild_makes_is_the_same(scene: Scene, projection: str) -> None:
    done = scene.running.run("rebuild", "--json", projection)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["equal"]
