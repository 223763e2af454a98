"""The reward of the stored runs."""


def ones(completions, **columns):
    return [text.count("1") / 4 + len(text) / 100 for text in completions]
