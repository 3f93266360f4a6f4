"""Archives topics in a process that can be killed: ``-m tests.support.archiving_worker SERVERS FOLDER TOPIC...``.

It says ``ready`` when it begins and ``done`` when it is through. Small segments and row groups, so that a kill can come
at every point.
"""

import sys
from pathlib import Path

from replay.archive import Archiver, Header, Limits
from replay.kafka_log import KafkaLog
from schemas.codec import Codec

LIMITS = Limits(segment_records=3000, group_records=500)


def archive(servers: str, folder: Path, topics: tuple[str, ...]) -> None:
    with (
        KafkaLog({"bootstrap.servers": servers}) as log,
        Archiver(folder, Header("main", "cluster", topics), log, Codec(), limits=LIMITS) as archiver,
    ):
        archiver.run()


if __name__ == "__main__":
    print("ready", flush=True)
    archive(sys.argv[1], Path(sys.argv[2]), tuple(sys.argv[3:]))
    print("done", flush=True)
