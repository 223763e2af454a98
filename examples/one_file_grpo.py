"""GRPO on one page: plain torch, no model download, under a minute on a laptop CPU.   python examples/one_file_grpo.py

A tiny transformer imitates a careless teacher: it answers "3+4=" with a number and a full stop, but the number is right one time in five.
GRPO then makes it right from rewards alone. It sees all hundred sums, so this shows learning, not generalising; the exam of `make demo` does.
"""

import copy
import random

import torch
from torch import nn

SYMBOLS = "0123456789+=."  # "." ends a completion
END = SYMBOLS.index(".")
PROMPT, ANSWER = 4, 3  # tokens: "3+4=", and at most two digits and the end
SUMS = [(a, b) for a in range(10) for b in range(10)]


def encode(text):
    return [SYMBOLS.index(symbol) for symbol in text]


class TinyTransformer(nn.Module):
    def __init__(self, width=64, layers=1):
        super().__init__()
        self.token, self.place = nn.Embedding(len(SYMBOLS), width), nn.Embedding(PROMPT + ANSWER, width)
        block = nn.TransformerEncoderLayer(width, nhead=4, dim_feedforward=4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks, self.head = nn.TransformerEncoder(block, layers, enable_nested_tensor=False), nn.Linear(width, len(SYMBOLS))

    def forward(self, ids):  # (B, T) -> logits (B, T, V)
        T = ids.shape[1]
        causal = nn.Transformer.generate_square_subsequent_mask(T)
        return self.head(self.blocks(self.token(ids) + self.place(torch.arange(T)), mask=causal, is_causal=True))


def logprobs(model, ids):
    """(B, PROMPT + ANSWER) -> (B, ANSWER): the log-prob of every token after the prompt."""
    logits = model(ids[:, :-1])[:, PROMPT - 1 :]  # the logits before a token predict it
    return logits.log_softmax(-1).gather(-1, ids[:, PROMPT:, None])[..., 0]


def mask_of(answers):
    """(B, ANSWER): True up to the first end, which is trained too. What comes after it is padding."""
    return (answers == END).int().cumsum(1) - (answers == END).int() == 0


@torch.no_grad()
def sample(model, prompts, greedy=False):
    """(B, PROMPT) -> (B, PROMPT + ANSWER)."""
    ids = prompts
    for _ in range(ANSWER):
        logits = model(ids)[:, -1]
        token = logits.argmax(-1, keepdim=True) if greedy else torch.multinomial(logits.softmax(-1), 1)
        ids = torch.cat([ids, token], dim=1)
    return ids


def reward(a, b, answer):
    """The rubric of "What is 2 + 2?": a number is +1 (none -1), the right number +3 (a wrong one -3)."""
    text = "".join(SYMBOLS[i] for i in answer).partition(".")[0]
    return (1.0 if text.isdigit() else -1.0) + (3.0 if text == str(a + b) else -3.0)


def prompts_of(pairs):
    return torch.tensor([encode(f"{a}+{b}=") for a, b in pairs])


def careless_model(steps=300):
    """Imitates a careless teacher, whose answers are off by up to two: the form is right, the number is right one time in five."""
    model = TinyTransformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        lines = [f"{a}+{b}={max(0, a + b + random.randint(-2, 2))}.." for a, b in random.choices(SUMS, k=64)]
        ids = torch.tensor([encode(line[: PROMPT + ANSWER]) for line in lines])
        loss = -(logprobs(model, ids) * mask_of(ids[:, PROMPT:])).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def grpo(model, steps=150, prompts=16, G=16, lr=1.5e-3, updates=2, epsilon=0.2, beta=0.01):
    reference = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        # 1. Rollout: G completions of each prompt.
        pairs = [pair for pair in random.sample(SUMS, prompts) for _ in range(G)]
        ids = sample(model, prompts_of(pairs))  # (prompts * G, PROMPT + ANSWER)
        mask = mask_of(ids[:, PROMPT:])
        # 2. Reward, and the advantage: how much better than its siblings. The group is the baseline; there is no value model.
        rewards = torch.tensor([reward(a, b, answer) for (a, b), answer in zip(pairs, ids[:, PROMPT:].tolist(), strict=True)])
        groups = rewards.view(prompts, G)
        advantages = ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).view(-1, 1)
        # 3. Updates: raise what was better. The first has ratio 1; later ones are clipped, for the rollout is no longer the policy's own.
        with torch.no_grad():
            old, ref = logprobs(model, ids), logprobs(reference, ids)
        for _ in range(updates):
            new = logprobs(model, ids)
            ratio = (new - old).exp()
            policy = -torch.minimum(ratio * advantages, ratio.clamp(1 - epsilon, 1 + epsilon) * advantages)
            kl = (ref - new).exp() - (ref - new) - 1  # k3: never negative, 0 where policy and reference agree
            loss = ((policy + beta * kl) * mask).sum() / mask.sum()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        if step % 10 == 9:
            signal = (groups.std(1) > 0).float().mean()
            print(f"step {step + 1:3d}  reward {rewards.mean():+.2f}  groups with signal {signal:.0%}  kl {(kl * mask).sum() / mask.sum():.3f}")
    return model


def accuracy(model):
    """Greedy, over all sums."""
    answers = sample(model, prompts_of(SUMS), greedy=True)[:, PROMPT:].tolist()
    return sum(reward(a, b, answer) == 4.0 for (a, b), answer in zip(SUMS, answers, strict=True)) / len(SUMS)


def main(seed=0, **settings):  # settings of grpo()
    random.seed(seed)
    torch.manual_seed(seed)
    model = careless_model()
    before = accuracy(model)
    after = accuracy(grpo(model, **settings))
    print(f"right: {before:.0%} before, {after:.0%} after")
    return before, after


if __name__ == "__main__":
    torch.set_num_threads(1)  # these tensors are too small to share
    main()
