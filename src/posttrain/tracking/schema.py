"""The tables of `run.sqlite`, and nothing else: who writes them is `events.py`, who reads them `reader.py`."""

FILE_NAME = "run.sqlite"
LOCK_NAME = "run.sqlite-lock"  # beside it, held by its writer; see `lock.py`
SUMMARY_NAME = "summary.json"  # beside it, once training has ended
VERSION = 3  # of this schema, kept in the file as PRAGMA user_version

# Blobs live in tables of their own, so that lists are read without them. Rows are written in the order of the steps:
# each index is also local.
SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE steps (step INTEGER PRIMARY KEY, at REAL NOT NULL, seconds REAL NOT NULL, token_bytes INTEGER NOT NULL);
CREATE TABLE scalars (name TEXT, step INTEGER, value REAL, flag TEXT, PRIMARY KEY (name, step)) WITHOUT ROWID;
CREATE TABLE notes (id INTEGER PRIMARY KEY, step INTEGER NOT NULL, at REAL NOT NULL, kind TEXT NOT NULL, text TEXT NOT NULL);
CREATE TABLE groups (
    step INTEGER, grp INTEGER, task_id INTEGER, prompt TEXT, size INTEGER, mean REAL, std REAL, PRIMARY KEY (step, grp)) WITHOUT ROWID;
CREATE TABLE rollouts (
    step INTEGER, grp INTEGER, idx INTEGER, reward REAL, advantage REAL, stop TEXT, policy_version INTEGER, length INTEGER, scores TEXT, text TEXT,
    PRIMARY KEY (step, grp, idx));
CREATE TABLE episodes (step INTEGER, grp INTEGER, idx INTEGER, turns INTEGER, info TEXT, messages TEXT, runs TEXT, PRIMARY KEY (step, grp, idx));
CREATE TABLE rollout_tokens (step INTEGER, grp INTEGER, idx INTEGER, token_ids BLOB, logprobs BLOB, PRIMARY KEY (step, grp, idx));
CREATE TABLE token_details (
    step INTEGER, grp INTEGER, idx INTEGER, updated_at INTEGER, logps BLOB, ratio BLOB, entropy BLOB, kl BLOB, advantage BLOB,
    PRIMARY KEY (step, grp, idx, updated_at));
CREATE TABLE vocabulary (id INTEGER PRIMARY KEY, text TEXT NOT NULL);
"""
# version -> what lifts a store of that version to the next one. A writer does so when an old run is resumed; readers
# read every version.
UPGRADES = {
    1: ["CREATE TABLE episodes (step INTEGER, grp INTEGER, idx INTEGER, turns INTEGER, info TEXT, messages TEXT, PRIMARY KEY (step, grp, idx))"],
    2: [
        "ALTER TABLE episodes ADD COLUMN runs TEXT",
        "ALTER TABLE token_details ADD COLUMN advantage BLOB",
        "CREATE TABLE vocabulary (id INTEGER PRIMARY KEY, text TEXT NOT NULL)",
    ],
}
# version -> tables and columns that came with it
ADDED = {2: ("episodes",), 3: ("episodes.runs", "token_details.advantage", "vocabulary")}
# table -> the column that says which optimizer step a row belongs to
STEP_COLUMN = {
    "steps": "step",
    "scalars": "step",
    "notes": "step",
    "groups": "step",
    "rollouts": "step",
    "episodes": "step",
    "rollout_tokens": "step",
    "token_details": "updated_at",
}
