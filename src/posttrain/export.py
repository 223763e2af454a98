"""A trained model leaves: merged weights or adapters, a model card, and a report whether the exported model says what
the trained one says.

The exported directory is loaded with plain transformers and asked the same prompts, greedily. Rounding to 16 bits may
change a token where two were nearly equal; that is counted, and more than `MOST_DISAGREEMENT` of it is an error.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from posttrain.data.chat import encode_prompt
from posttrain.errors import TrainingError, UserError
from posttrain.io import bounded, read_json, read_text
from posttrain.models.adapter_files import ADAPTER, base_of, is_adapter, is_scorer
from posttrain.models.heads import load_reward_model
from posttrain.models.load import context_length, load_tokenizer, stop_token_ids
from posttrain.models.merge import load_merged, load_trainable, save_rounded
from posttrain.models.quantise import in_4bit
from posttrain.policy import Policy
from posttrain.secrets import redacted
from posttrain.trainers.core.checkpoints import whole
from posttrain.trainers.core.manifest import MANIFEST, check_model
from posttrain.types import Prompt

logger = logging.getLogger(__name__)

FORMATS = ("merged", "adapter")
# What belongs to adapters and their tokenizer. A checkpoint's other files (pending rollouts, settings, optimizer) are
# nobody else's business.
ADAPTER_FILES = (
    ADAPTER, "adapter_model.safetensors", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "chat_template*",
)  # fmt: skip
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
PROMPTS = ("The capital of France is", "1, 2, 3,", "Once upon a time", "Q: What is 12 + 30?\nA:")  # where the user gives none
MOST_DISAGREEMENT = 0.1  # of greedy tokens, each behind the same tokens before it
TEXTS = ("prompt", "answer", "completion", "chosen", "rejected", "label", "system", "columns")  # of a recipe: they are no paths


@dataclass(frozen=True)
class Parity:
    """The trained and the exported model, asked the same prompts greedily."""

    prompts: int
    identical: int  # completions with the same token ids
    tokens: int
    agreeing: float  # share of the trained model's tokens that the exported one would choose behind the same tokens
    mean_logprob_difference: float  # of those tokens, in nats
    max_logprob_difference: float

    def __str__(self) -> str:
        return (
            f"{self.identical} of {self.prompts} greedy completions identical, {self.agreeing:.1%} of {self.tokens} tokens agree, "
            f"log-probs differ by {self.mean_logprob_difference:.2g} on average and {self.max_logprob_difference:.2g} at most"
        )


def export_model(
    source: str,
    directory: str | Path,
    *,
    format: str = "merged",
    dtype: str = "bfloat16",
    load_in_4bit: bool = False,
    keep_in_16bit: int | Sequence[str] | None = None,
    base: str | None = None,
    prompts: Sequence[Prompt] | None = None,
    **loading: Any,
) -> Parity | None:
    """Write the model in `source` (weights or adapters) to `directory`, which appears when all of it is there.
    load_in_4bit: the adapters were trained beside 4-bit weights, except for those that keep_in_16bit (as in
    `load_policy`) names. `loading`: what else `load_model` takes.

    base: the name of the model that exported adapters belong to, where it is known elsewhere under another one than
    here. prompts: ask merged weights as `check_parity` does, before the directory appears. Raises UserError, and
    TrainingError where the models disagree.
    """
    out = Path(directory).resolve()
    if out == Path.cwd():
        raise UserError(f"{out} is where you are, so it cannot appear as a whole; name a directory in it")
    if os.path.ismount(out):
        raise UserError(f"{out} is where a disk is mounted, so it cannot appear as a whole; name a directory in it")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already and not empty; name another directory")
    if format not in FORMATS:
        raise UserError(f"format={format!r} is not known; use one of {', '.join(FORMATS)}")
    if format == "adapter" and not is_adapter(source):
        raise UserError(f"{source} holds no adapters, so format='adapter' has nothing to write; use format='merged'")
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r} is not known; use one of {', '.join(DTYPES)}")
    check_model(source)
    _refuse_scorers(source)
    parity = None
    with whole(out) as staging:
        if format == "adapter":
            _copy_adapter(source, staging, base)
        else:
            options = loading | _as_trained(source, load_in_4bit, keep_in_16bit)
            model = load_reward_model(source, **options) if is_scorer(source) else load_merged(source, **options)
            drift = save_rounded(model, _tokenizer(source, loading), staging, dtype=DTYPES[dtype])
            logger.info("rounded to %s: %s", dtype, drift)
            parity = None if prompts is None or is_scorer(source) else check_parity(source, staging, prompts, **options)
        if out.exists():
            out.rmdir()  # an error, should it no longer be empty
    return parity


def _tokenizer(source: str, loading: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    return load_tokenizer(source, trust_remote_code=loading.get("trust_remote_code", False))


def _as_trained(source: str, load_in_4bit: bool, keep_in_16bit: int | Sequence[str] | None) -> dict[str, Any]:
    """How to load what the adapters were trained beside."""
    if not load_in_4bit:
        return {}
    return in_4bit(base_of(source) if is_adapter(source) else source, has_adapters=is_adapter(source), keep_in_16bit=keep_in_16bit)


def _refuse_scorers(source: str) -> None:
    config = Path(source) / "config.json"
    if config.is_file() and any("SequenceClassification" in name for name in read_json(config).get("architectures") or ()):
        raise UserError(f"{source} holds a reward model, which is transformers' own classifier already; use or copy that directory as it is")


def _copy_adapter(source: str, out: Path, base: str | None) -> None:
    base = base or base_of(source)
    if _is_local(base):
        logger.warning("the adapters belong to %s, which is on this machine only; name the model as others find it (--base owner/name)", base)
    for path in Path(source).iterdir():
        if path.is_file() and any(path.match(pattern) for pattern in ADAPTER_FILES):
            shutil.copyfile(path, out / path.name)
    config = read_json(out / ADAPTER) | {"base_model_name_or_path": base}
    (out / ADAPTER).write_text(json.dumps(config, indent=2), encoding="utf-8")


def _is_local(name: str) -> bool:
    return Path(name).is_absolute() or Path(name).expanduser().exists()


def check_parity(
    source: str,
    directory: str | Path,
    prompts: Sequence[Prompt] = PROMPTS,
    *,
    max_new_tokens: int = 64,
    load_in_4bit: bool = False,
    keep_in_16bit: int | Sequence[str] | None = None,
    **loading: Any,
) -> Parity:
    """Ask both, on the CPU in float32 (the exported one in its own dtype where it is smaller). Loading is told what
    `export_model` was.

    Raises TrainingError where they disagree.
    """
    options = loading | _as_trained(source, load_in_4bit, keep_in_16bit)
    trained = Policy(load_trainable(source, **options).eval(), _tokenizer(source, loading))
    longest = max(len(encode_prompt(trained.tokenizer, prompt)) for prompt in prompts)
    max_new_tokens = max(1, min(max_new_tokens, (context_length(trained.model) or max_new_tokens + longest) - longest))
    groups = trained.sample(list(prompts), max_new_tokens=max_new_tokens, temperature=0.0, seed=0)
    plain, tokenizer = _plain(directory, trust_remote_code=loading.get("trust_remote_code", False))
    stops = list(stop_token_ids(plain, tokenizer))
    plain.generation_config = GenerationConfig()  # the model's own may have a repetition penalty, which counts in greedy decoding too
    identical, agreeing, tokens = 0, 0, 0
    differences: list[float] = []
    for group in groups:
        prompt_ids, ids = group.completions[0].prompt_ids, group.completions[0].token_ids
        answer = plain.generate(
            torch.tensor([prompt_ids]),
            attention_mask=torch.ones(1, len(prompt_ids), dtype=torch.long),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=stops,
            pad_token_id=tokenizer.pad_token_id,
        )
        identical += answer[0, len(prompt_ids) :].tolist() == ids
        ours, theirs = (_choices(model, prompt_ids, ids) for model in (trained.model, plain))
        agreeing += int((theirs.argmax(-1) == torch.tensor(ids)).sum())
        tokens += len(ids)
        chosen = torch.tensor(ids)[:, None]
        differences += (ours.gather(1, chosen) - theirs.gather(1, chosen)).abs().flatten().tolist()
    parity = Parity(len(groups), identical, tokens, agreeing / tokens, sum(differences) / tokens, max(differences))
    if 1 - parity.agreeing > MOST_DISAGREEMENT:
        raise TrainingError(f"the exported model says something else than the trained one: {parity}. Do not use it; try dtype float32")
    return parity


def _plain(directory: str | Path, *, trust_remote_code: bool) -> tuple[Any, Any]:
    """As somebody without this library would load it."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", trust_remote_code=trust_remote_code).eval()
    return model, AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)


@torch.no_grad()
def _choices(model: Any, prompt_ids: list[int], ids: list[int]) -> torch.Tensor:
    """(R, V) log-probs at each place of a completion, behind the same tokens."""
    device = next(model.parameters()).device
    logits = model(input_ids=torch.tensor([[*prompt_ids, *ids]], device=device), use_cache=False).logits[0]
    return logits[len(prompt_ids) - 1 : -1].float().log_softmax(-1).cpu()


def write_card(directory: str | Path, *, source: str, run: Path | None, parity: Parity | None) -> None:
    """README.md with what is known: the model it began as, what it was trained with, how its last step looked, and the
    parity report. Settings that hold secrets are blank, and of a path on this machine its last part stays."""
    from posttrain import __version__

    lines = ["---", "library_name: transformers" if not is_adapter(directory) else "library_name: peft"]
    base = base_of(directory) if is_adapter(directory) else base_of(source) if is_adapter(source) else None
    lines += [f"base_model: {base}"] if base is not None and not _is_local(base) else []  # a path here means nothing elsewhere
    lines += ["tags: [posttrain]", "---", "", f"# {Path(directory).resolve().name}", "", f"Trained with posttrain {__version__}."]
    if run is not None and (run / "recipe.yaml").is_file():
        recipe = _recipe_of(run / "recipe.yaml")
        lines += ["", "## Recipe", "", "```yaml", yaml.safe_dump(_public(recipe), sort_keys=False, allow_unicode=True).strip(), "```"]
    if run is not None and (summary := _last_step(run, Path(source))) is not None:
        lines += ["", "## Last step", "", "```json", json.dumps(_public(summary), indent=1), "```"]
    if parity is not None:
        lines += ["", "## Is it the model that was trained?", "", f"Asked greedily: {parity}."]
        (Path(directory) / "parity.json").write_text(json.dumps(asdict(parity), indent=1), encoding="utf-8")
    (Path(directory) / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _recipe_of(path: Path) -> dict[str, Any]:
    try:
        recipe = yaml.safe_load(read_text(path))
        bounded(recipe)
    except UserError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(recipe, dict):
        raise UserError(f"{path} is no recipe: it holds no sections")
    return recipe


def _last_step(run: Path, source: Path) -> dict[str, Any] | None:
    """The run's summary, unless it speaks of another step than the checkpoint that is exported."""
    path, manifest = run / "summary.json", source / MANIFEST
    if not path.is_file():
        return None
    summary = read_json(path)
    if manifest.is_file() and read_json(manifest).get("step") != summary.get("steps"):
        return None
    return {name: value for name, value in summary.items() if name != "best_checkpoint"}


def _public(sections: dict[str, Any]) -> dict[str, Any]:
    """A recipe or a summary as others may read it, without sections in which nothing is said."""
    shown = {}
    for name, section in sections.items():
        said = section.values() if isinstance(section, dict) else [section]
        if any(value not in (None, [], {}) for value in said):
            shown[name] = _impersonal(redacted(section))
    return shown


def _impersonal(value: Any) -> Any:
    """Of an absolute path its last part ("my_rewards.py:is_right")."""
    if isinstance(value, dict):
        return {name: inner if name in TEXTS else _impersonal(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_impersonal(inner) for inner in value]
    return Path(value).name or value if isinstance(value, str) and (Path(value).is_absolute() or value.startswith("~/")) else value


def push_to_hub(directory: str | Path, repository: str, *, private: bool = True) -> str:
    """Upload an exported directory; returns its address. The token is the hub client's own. Raises UserError with what
    the hub said."""
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(folder_path=str(directory), repo_id=repository)
    except Exception as error:  # the client raises a dozen kinds; all mean the same to the user
        raise UserError(f"could not push to {repository}: {type(error).__name__}: {' '.join(str(error).split())[:200]}") from error
    return str(address)
