"""Stores that no posttrain wrote: each a run of four steps to which one thing was done. As a program: reads every one of them and says how it went."""

import json
import os
import sqlite3
import struct
import sys
import time
import traceback
from pathlib import Path

from recorded import write_run

ENDLESS = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT"
DEEP = "[" * 100_000 + "]" * 100_000
MANY = "[" + "{}," * 1_500_000 + "{}]"
ROWS = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c LIMIT {}) "
BIG = 120 * 2**20


def loosely(*tables):
    """Without the types and constraints of the schema: any value fits."""
    keys = {
        "meta": "key",
        "steps": "step",
        "groups": "step, grp",
        "rollouts": "step, grp, idx",
        "notes": "id",
        "scalars": "name, step",
        "rollout_tokens": "step, grp, idx",
        "episodes": "step, grp, idx",
    }

    def done(db):
        for table in tables:
            columns = [row[1] for row in db.execute(f"PRAGMA table_info({table})")]
            db.execute(f"ALTER TABLE {table} RENAME TO old")
            db.execute(f"CREATE TABLE {table} ({', '.join(columns)}, PRIMARY KEY ({keys[table]}))")
            db.execute(f"INSERT INTO {table} SELECT * FROM old")
            db.execute("DROP TABLE old")

    return done


def sql(*statements, loose=()):
    def done(db):
        loosely(*loose)(db)
        for statement in statements:
            db.execute(*statement) if isinstance(statement, tuple) else db.execute(statement)

    return done


EPISODE = "INSERT INTO episodes VALUES (4, 0, 0, 2, ?, ?, ?)"
STORES = {
    "a view that never ends, for steps": sql(
        "DROP TABLE steps", f"CREATE VIEW steps AS {ENDLESS} x AS step, 1.0 AS at, 1.0 AS seconds, 0 AS token_bytes FROM c"
    ),
    "a view that never ends, for scalars": sql(
        "DROP TABLE scalars", f"CREATE VIEW scalars AS {ENDLESS} 'n' || x AS name, x AS step, 1.0 AS value, NULL AS flag FROM c"
    ),
    "a view beside the tables": sql(f"CREATE VIEW more AS {ENDLESS} x FROM c"),
    "a virtual table": sql("DROP TABLE notes", "CREATE VIRTUAL TABLE notes USING rtree(id, a, b)"),
    "a trigger": sql("CREATE TRIGGER t AFTER INSERT ON steps BEGIN DELETE FROM notes; END"),
    "a computed column": sql("ALTER TABLE groups ADD COLUMN more AS (hex(zeroblob(500000000)))"),
    "a table without its key": sql("ALTER TABLE groups RENAME TO old", "CREATE TABLE groups AS SELECT * FROM old", "DROP TABLE old"),
    "missing tables": sql("DROP TABLE rollouts", "DROP TABLE token_details"),
    "a missing column": sql("ALTER TABLE rollouts DROP COLUMN scores"),
    "text for numbers": sql("UPDATE groups SET mean = 'high'", "UPDATE steps SET at = 'noon'", loose=("groups", "steps")),
    "nulls": sql("UPDATE rollouts SET advantage = NULL, text = NULL", "UPDATE meta SET value = NULL", loose=("rollouts", "meta")),
    "blobs for text": sql("UPDATE rollouts SET text = x'ff00'", loose=("rollouts",)),
    "text that is no UTF-8": sql("UPDATE groups SET prompt = CAST(x'c328' AS TEXT)"),
    "surrogates in JSON": sql(("UPDATE meta SET value = ? WHERE key = 'config'", ('{"run_name": "\\ud83d", "max_steps": 4}',))),
    "deep JSON": sql(("UPDATE rollouts SET scores = ?", (DEEP,)), ("UPDATE meta SET value = ?", (DEEP,))),
    "very much JSON": sql((EPISODE, ("{}", MANY, "[1]")), ("INSERT INTO meta VALUES ('more', ?)", (MANY,))),
    "numbers without end": sql(("UPDATE meta SET value = ?", ('{"max_steps": ' + "9" * 5000 + "}",))),
    "infinity": sql("UPDATE groups SET mean = 9e999", "UPDATE rollouts SET reward = -9e999"),
    "numbers at the edge": sql("UPDATE rollouts SET reward = 1.7e308 * (1 - 2 * (idx % 2)), advantage = 1e308", "UPDATE groups SET mean = 0, std = 1.7e308"),
    "settings of other kinds": sql(
        ("UPDATE meta SET value = ? WHERE key = 'config'", ('{"temperature": "hot", "epsilon": [1], "cliprange": {}, "record_tokens_of": null}',)),
        ("UPDATE meta SET value = ? WHERE key = 'max_steps'", ('"many"',)),
        ("UPDATE meta SET value = ? WHERE key = 'method'", ('["GRPO"]',)),
    ),
    "metadata of another kind": sql("UPDATE meta SET value = '[1, 2]'"),
    "a huge blob": sql(f"UPDATE rollout_tokens SET token_ids = zeroblob({BIG}), logprobs = zeroblob({BIG}) WHERE step = 4 AND grp = 0 AND idx = 0"),
    "many large blobs": sql(f"UPDATE rollout_tokens SET token_ids = zeroblob({2**23}), logprobs = zeroblob({2**23}) WHERE step = 4 AND grp = 0", "DELETE FROM token_details"),
    "blobs of other lengths": sql("UPDATE token_details SET ratio = x'0000'", "UPDATE rollout_tokens SET token_ids = x'01'"),
    "a huge prompt": sql(f"UPDATE groups SET prompt = hex(zeroblob({BIG // 4})) WHERE grp = 0 AND step = 4"),
    "many long texts": sql(f"UPDATE rollouts SET text = char(128512) || hex(zeroblob({2**22})) WHERE step = 4 AND grp < 2"),
    "runs of tokens without end": sql((EPISODE, ("{}", "null", f"[{10**15}, 1]"))),
    "many groups": sql(ROWS.format(110_000) + "INSERT INTO groups SELECT 4, x + 10, 0, 'p', 4, 0.0, 9.0 FROM c"),
    "many completions": sql(ROWS.format(110_000) + "INSERT INTO rollouts SELECT 4, 0, x + 10, 0.0, 0.0, 'stop', 0, 1, '{}', 'x' FROM c"),
    "many notes": sql(ROWS.format(110_000) + "INSERT INTO notes SELECT x + 10, 1, 1.0, 'warning', 'text' FROM c"),
    "many names": sql(ROWS.format(100_000) + "INSERT INTO scalars SELECT 'n' || x, 1, 1.0, NULL FROM c"),
    "a name without end": sql("INSERT INTO scalars VALUES (hex(zeroblob(2000000)), 1, 1.0, NULL)"),
}  # fmt: skip


def _at_the_file(change):
    def done(path):
        path.write_bytes(change(path.read_bytes()))

    return done


def _circle(content):
    """The root of an interior page leads to itself."""
    size = struct.unpack(">H", content[16:18])[0]
    pages = bytearray(content)
    for number in range(1, len(content) // size):
        start = number * size
        if pages[start] in (2, 5):
            pages[start + 8 : start + 12] = struct.pack(">I", number + 1)
            cell = struct.unpack(">H", pages[start + 12 : start + 14])[0]
            pages[start + cell : start + cell + 4] = struct.pack(">I", number + 1)
    return bytes(pages)


def _scattered(content):
    pages = bytearray(content)
    for place in range(4096, len(pages), 97):
        pages[place] ^= 0xA5
    return bytes(pages)


FILES = {
    "garbage": _at_the_file(lambda content: os.urandom(100_000)),
    "garbage behind a header": _at_the_file(lambda content: content[:100] + os.urandom(100_000)),
    "a truncated file": _at_the_file(lambda content: content[: len(content) // 2]),
    "an empty file": _at_the_file(lambda content: b""),
    "pages that lead to themselves": _at_the_file(_circle),
    "flipped bytes": _at_the_file(_scattered),
}


def build(folder, name):
    directory = folder / name.replace(" ", "_").replace(",", "")
    directory.mkdir()
    write_run(directory, 4).close()
    path = directory / "run.sqlite"
    with sqlite3.connect(path, isolation_level=None) as db:
        db.execute("PRAGMA journal_mode = DELETE")
        if name in STORES:
            db.execute("PRAGMA foreign_keys = OFF")
            STORES[name](db)
        if "themselves" in name:  # enough rows for a page above the leaves
            db.execute(ROWS.format(20_000) + "INSERT INTO steps SELECT x + 10, 1.0, 1.0, 0 FROM c")
    db.close()
    if name in FILES:
        FILES[name](path)
    return directory


def read_all(directory):
    """Whatever a reader offers."""
    from posttrain.tracking.browse import CLIPPED, FILTERS, Browser, Wanted

    reader = Browser(directory)
    try:
        reader.meta(), reader.notes(), reader.newest(), reader.steps()
        for name in reader.scalar_names():
            reader.series(name), reader.since(name, 0)
        ends = reader.first_and_last()
        for step in range(ends[0], min(ends[1], ends[0] + 5) + 1) if ends else ():
            reader.marks(step), reader.nearest(step)
            for row in reader.groups(step):
                for one in reader.completions(step, row.group):
                    reader.episode(one.key), reader.tokens(one.key)
        reader.search(Wanted(frozenset({*FILTERS, CLIPPED}), "x"), 0, 1)
    finally:
        reader.close()


def one(command, directory):
    """How it went: "read", the sentence, or a traceback; and its seconds."""
    from typer.testing import CliRunner

    from posttrain.cli import runs
    from posttrain.cli.main import app
    from posttrain.errors import UserError
    from posttrain.watch.curves import WatchedRun
    from posttrain.watch.figures import figures, status
    from posttrain.watch.page import Watched

    started, said = time.monotonic(), "read"
    try:
        if command == "report":
            result = CliRunner().invoke(app, ["report", str(directory), "-o", str(directory / "report.html")])
            if result.exception is not None and not isinstance(result.exception, SystemExit):
                raise result.exception
            said = "read" if result.exit_code == 0 else result.output.strip()
        elif command == "watch":
            watched = Watched([WatchedRun("r", directory)])
            watched.refresh(), watched.refresh()
            said = status(watched.runs[0])
            figures(watched.runs[0])
        elif command == "method":
            runs.method_of(str(directory))
        else:
            read_all(directory)
    except UserError as error:
        said = f"error: {error}"
    except BaseException:
        said = f"TRACEBACK {traceback.format_exc()}"
    return {"said": said, "seconds": time.monotonic() - started}


if __name__ == "__main__":
    import re

    for line in sys.stdin:
        found = {command: one(command, Path(line.strip())) for command in ("report", "watch", "method", "reader")}
        print(json.dumps(found | {"peak_mb": int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024}), flush=True)
