"""`posttrain doctor`: is this installation sound? Exit code 0 when it is, 1 when something required is broken."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from posttrain.cli.options import say, sentences

if TYPE_CHECKING:
    from posttrain.doctor import Finding

_MARKS = {"ok": "ok    ", "note": "note  ", "broken": "BROKEN"}


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False) -> None:
    """Versions, device, kernels, sandbox and extras of this installation, with the command that mends what is not
    right."""
    with sentences():
        from posttrain.doctor import examine, is_sound

        findings = examine()
        sound = is_sound(findings)
        if as_json:
            say(json.dumps({"sound": sound, "findings": [asdict(finding) for finding in findings]}))
        else:
            say("\n".join(report(findings)))
            say("\nready to train" if sound else "\nnot ready: mend what is marked BROKEN")
        raise typer.Exit(0 if sound else 1)


def report(findings: list[Finding]) -> list[str]:
    """A line a finding under its topic's name; what mends it stands below."""
    width = max(len(finding.name) for finding in findings)
    lines, topic = [], None
    for finding in findings:
        if finding.topic != topic:
            lines.append(f"{finding.topic}")
            topic = finding.topic
        lines.append(f"  {_MARKS[finding.state]}  {finding.name:<{width}}  {finding.says}")
        if finding.fix is not None:
            lines.append(f"  {'':6}  {'':<{width}}  -> {finding.fix}")
    return lines
