"""Runs programs that a model wrote in isolation, and judges them in another process. Standard library only. See
docs/sandbox.md."""

from posttrain.sandbox.job import Asserts, Call, InputOutput, Job, Result, Runner, Test, Verdict
from posttrain.sandbox.judge import Sandbox
from posttrain.sandbox.levels import LEVELS, Isolation, require, strongest
from posttrain.sandbox.limits import Limits
from posttrain.sandbox.pool import Pool
from posttrain.sandbox.remote import CommandRunner
from posttrain.sandbox.run import Outcome, SandboxError

__all__ = [
    "LEVELS",
    "Asserts",
    "Call",
    "CommandRunner",
    "InputOutput",
    "Isolation",
    "Job",
    "Limits",
    "Outcome",
    "Pool",
    "Result",
    "Runner",
    "Sandbox",
    "SandboxError",
    "Test",
    "Verdict",
    "require",
    "strongest",
]
