"""Is this installation sound, and what will a run use here? Versions, device, precision, kernels, the sandbox, and what
is not installed.

Everything is asked of the installation itself: ranges from posttrain's own metadata, paths by trying them. Nothing is
changed, nothing is sent anywhere.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

OK, NOTE, BROKEN = "ok", "note", "broken"

# The newest version that the tests pass with; the oldest is the lower end of the range in posttrain's metadata.
TESTED = {"torch": "2.13", "transformers": "5.24"}

# Versions that must not be used, whatever asks for them: package -> (the first version without the fault, the fault).
KNOWN_BAD = {
    "torch": ("2.6", "torch.load runs code from a file even with weights_only (CVE-2025-32434)"),
    "transformers": ("5.3", "a model's config.json can run code from the hub (CVE-2026-4372)"),
    "vllm": ("0.11.1", "prompt embeddings from a request corrupt memory (CVE-2025-62164)"),
    "ray": ("2.52", "a web page can start jobs on a local cluster (CVE-2025-62593)"),
}
USES = {
    "gpu": "load_in_4bit (QLoRA)",
    "watch": "posttrain watch",
    "math": "the reward math_answer",
    "json": "the reward json_schema",
    "envs": "reasoning-gym's tasks, Gymnasium's environments",
    "judge": "rewards by a language model over HTTP",
    "bench": "benchmarks",
    "docs": "the documentation site (make docs)",
}
NOT_FOR_USERS = {"dev"}


@dataclass(frozen=True)
class Finding:
    """One line of the report. state: ok, note (works, but worth knowing) or broken (a run will fail, or must not
    start)."""

    topic: str
    name: str
    state: str
    says: str
    fix: str | None = None  # the command or step that mends it


def examine() -> list[Finding]:
    """Every finding, by topic."""
    return [finding for topic in (versions, device, kernels, sandbox, extras) for finding in topic()]


def is_sound(findings: list[Finding]) -> bool:
    return all(finding.state != BROKEN for finding in findings)


def versions() -> Iterator[Finding]:
    """Python, what posttrain requires, versions with known faults, and installed packages that contradict each
    other."""
    try:
        ours = metadata.metadata("posttrain")
    except metadata.PackageNotFoundError:
        yield Finding(
            "versions", "posttrain", BROKEN, "it runs from a directory and is not installed, so its requirements are not known", "pip install -e ."
        )
        return
    python = platform.python_version()
    fits = Version(python) in SpecifierSet(ours["Requires-Python"] or "")
    yield Finding("versions", "python", OK if fits else BROKEN, python + ("" if fits else f", but posttrain needs {ours['Requires-Python']}"))
    required = _requirements("posttrain")
    for requirement in required:
        yield version_of(requirement, installed(requirement.name))
    for name, (floor, fault) in KNOWN_BAD.items():
        here = installed(name)
        if here is not None and Version(here) < Version(floor):
            yield Finding("versions", name, BROKEN, f"{here}: {fault}", f"pip install '{name}>={floor}'")
    yield from _contradictions({requirement.name for requirement in required})


def version_of(requirement: Requirement, here: str | None) -> Finding:
    """Whether the installed version (None: none is) is in the range, and whether it is newer than any that was
    tested."""
    name, command = requirement.name, f"pip install '{_plain(requirement)}'"
    if here is None:
        return Finding("versions", name, BROKEN, "is not installed", command)
    if not requirement.specifier.contains(here, prereleases=True):
        return Finding("versions", name, BROKEN, f"{here} is outside of {requirement.specifier}", command)
    newest = TESTED.get(name)
    if newest is not None and Version(here).release[:2] > Version(newest).release:
        return Finding("versions", name, NOTE, f"{here} is newer than {newest}, the newest that was tested")
    return Finding("versions", name, OK, here + (f" (tested up to {newest})" if newest is not None else ""))


def _contradictions(core: set[str]) -> Iterator[Finding]:
    """Requirements of installed packages, ours and optional ones, that the installed versions do not fulfil."""
    names = {*core, *(requirement.name for requirement in _requirements("posttrain", any_extra=True))}
    for name in sorted(names):
        if installed(name) is None:
            continue
        for requirement in _requirements(name):
            here = installed(requirement.name)
            if here is not None and not requirement.specifier.contains(here, prereleases=True):
                state = BROKEN if name in core else NOTE
                said = f"{installed(name)} needs {_plain(requirement)}, and {here} is installed"
                yield Finding("versions", name, state, said, f"pip install -U {name} '{_plain(requirement)}'")


def installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _requirements(package: str, *, extra: str = "", any_extra: bool = False) -> list[Requirement]:
    """What a package needs on this system; with an extra, what that adds."""
    found = [Requirement(text) for text in metadata.requires(package) or ()]
    if any_extra:
        return found
    return [one for one in found if _holds(one, extra) and not (extra and _holds(one, ""))]


def _holds(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _plain(requirement: Requirement) -> str:
    return f"{requirement.name}{requirement.specifier}"


def device() -> Iterator[Finding]:
    """Where a run computes, and in what."""
    try:
        import torch

        from posttrain.ops.precision import multiplies_natively
    except ImportError as error:
        yield Finding("device", "torch", BROKEN, f"cannot be imported: {error}", "pip install --force-reinstall torch")
        return
    native = multiplies_natively(torch.bfloat16, "cpu")
    said = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, {_memory():.0f} GiB"
    yield Finding("device", "cpu", OK, said)
    yield waiting(os.environ)
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = (bytes_ / 2**30 for bytes_ in torch.cuda.mem_get_info(index))
            major, minor = torch.cuda.get_device_capability(index)
            yield Finding(
                "device", f"cuda:{index}", OK, f"{torch.cuda.get_device_name(index)}, {free:.0f} of {total:.0f} GiB free, capability {major}.{minor}"
            )
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        yield Finding(
            "device", "precision", OK, "weights as loaded, bf16 autocast" if bf16 else "float32: this GPU has no bf16 (fp16=True is an option)"
        )
        return
    if torch.backends.mps.is_available():
        yield Finding("device", "mps", NOTE, "an Apple GPU is there; runs on it are not tested, use_cpu=True is")
    yield Finding("device", "precision", OK, "float32; bf16=True computes in bf16" if native else "float32: this processor only emulates bf16")


def waiting(environ: Mapping[str, str]) -> Finding:
    """How OpenMP's threads wait for each other: the command line lets them sleep, a Python program gets the library's
    default, which spins."""
    said = ", ".join(f"{name}={environ[name]}" for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME") if name in environ)
    if said:
        return Finding("device", "threads", OK, f"wait for each other as set: {said}")
    return Finding("device", "threads", NOTE, "spin while they wait, which is slow beside other programs", "export OMP_WAIT_POLICY=passive")


def _memory() -> float:
    if os.name == "posix":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    import psutil  # comes with accelerate

    return float(psutil.virtual_memory().total / 2**30)


def kernels() -> Iterator[Finding]:
    """Which paths attention, log-probs and sampling take here, each tried on a tiny model."""
    try:
        import torch

        where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        path = "flash kernel for CPUs, shared prefix" if where.type == "cpu" else "chunks of queries under masks, shared prefix"
        for name, trial, said in (
            ("attention", _stream_trial, path),
            ("sampling", _engine_trial, "the local engine"),
        ):
            yield _tried(name, trial, where, said)
    except ImportError as error:
        yield Finding("kernels", "transformers", BROKEN, f"cannot be imported: {error}", "pip install --force-reinstall transformers")


def _tried(name: str, trial: Callable[[Any], str | None], where: Any, said: str) -> Finding:
    try:
        why = trial(where)
    except Exception as error:  # whatever a trial stumbles over is what the report is for
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return (
        Finding("kernels", name, OK, said)
        if why is None
        else Finding("kernels", name, BROKEN, why, "see the versions above; report it if they are fine")
    )


def tiny_model(where: Any) -> Any:
    """A few thousand random weights: enough to walk every path."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from posttrain.models.load import prepare_model

    config = Qwen3Config(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        max_position_embeddings=64, bos_token_id=None, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = Qwen3ForCausalLM(config).to(where)
    prepare_model(model)
    return model


def _stream_trial(where: Any) -> str | None:
    """Why a stream of prompts and completions does not give the log-probs of plain rows; None: it does."""
    from posttrain.models.support import stream_support

    return stream_support(tiny_model(where))


def _engine_trial(where: Any) -> str | None:
    """Why the engine's greedy tokens are not those of transformers' `generate`; None: they are."""
    import torch

    from posttrain.rollout.play import generate
    from posttrain.types import Sampling

    model, prompt = tiny_model(where), [1, 2, 3]
    ours = generate(model, None, [prompt], Sampling(max_new_tokens=8, temperature=0.0))[0][0].token_ids
    ids = torch.tensor([prompt], device=where)
    theirs = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, eos_token_id=None)[0, len(prompt) :].tolist()
    return None if ours == theirs else f"greedy tokens differ from transformers' generate: {ours} and {theirs}"


def sandbox() -> Iterator[Finding]:
    """How far a program that a model wrote is kept away from this machine (for rewards that run code)."""
    from posttrain.sandbox.isolation import Level
    from posttrain.sandbox.levels import HOW_TO, strongest
    from posttrain.sandbox.run import SandboxError

    try:
        here = strongest()
    except SandboxError as error:
        yield Finding("sandbox", "level", NOTE, f"rewards that run programs will refuse to: {error}", HOW_TO[Level.LIMITS])
        return
    if here.level >= Level.NAMESPACES:
        yield Finding("sandbox", "level", OK, str(here))
    else:
        why = "; ".join(f"{name}: {reason}" for name, reason in here.refused.items())
        yield Finding("sandbox", "level", NOTE, f"{here}; rewards that run programs ask for 'namespaces' ({why})", HOW_TO[Level.NAMESPACES])


def extras() -> Iterator[Finding]:
    """Optional packages, and the command that brings what is missing."""
    if installed("posttrain") is None:
        return
    for extra in sorted(set(metadata.metadata("posttrain").get_all("Provides-Extra") or ()) - NOT_FOR_USERS):
        wanted = _requirements("posttrain", extra=extra)
        use = f" (for {USES[extra]})" if extra in USES else ""
        missing = [one for one in wanted if (here := installed(one.name)) is None or not one.specifier.contains(here, prereleases=True)]
        if missing:
            listed = " ".join(f"'{_plain(one)}'" for one in missing)
            yield Finding("extras", extra, NOTE, f"{', '.join(one.name for one in missing)} not installed{use}", f"pip install {listed}")
        elif wanted:
            yield Finding("extras", extra, OK, ", ".join(f"{one.name} {installed(one.name)}" for one in wanted) + use)
