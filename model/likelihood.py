"""How likely answers are that somebody else wrote: of choices, or of the right answer.

The prompts are read once; each of their answers then follows the same cached keys and values, all of its
tokens in one call.

Letters: B prompts, C tokens of the longest answer, L tokens of all answers, D model width.
"""

import torch
from torch import Tensor

from model.data.batch import pad_rows
from model.decode import Decoder, KVCache
from model.generate import read_prompts
from model.prompt import Prompt

FEW = 2048  # positions whose logits are held at a time: 50 MB at 6400 tokens


@torch.inference_mode()
def log_probabilities(
    decoder: Decoder,
    prompts: list[Prompt],
    answers: list[list[list[int]]],
    image_features: list[Tensor] | None = None,
) -> list[list[Tensor]]:
    """Log-probabilities of answers to a batch of prompts of any lengths.

    answers         per prompt, the ids of each answer; none is empty
    image_features  as for generate()
    returns         per prompt and answer, the log-probability of every id, (ids,) float32 on the CPU
    raises          ValueError as generate() does, and where a prompt and an answer do not fit the context
    """
    for prompt, given in zip(prompts, answers, strict=True):
        length = len(prompt.input_ids) + max(map(len, given), default=0)
        if length > decoder.config.max_seq_len:
            raise ValueError(
                f"the prompt and an answer have {length} tokens, but the model's context holds "
                f"{decoder.config.max_seq_len}"
            )
    _, _, logits, cache = read_prompts(decoder, prompts, 0, image_features)
    first = logits.float().log_softmax(-1).cpu()  # (B, V)
    found: list[list[Tensor]] = [[] for _ in prompts]
    # The n-th answers of all prompts together: the cache, which is large, is then never copied.
    for number in range(max(map(len, answers), default=0)):
        nth = [given[number] if number < len(given) else [0] for given in answers]
        after = follow(decoder, nth, cache)
        for row, (ids, rest) in enumerate(zip(nth, after, strict=True)):
            if number < len(answers[row]):
                found[row].append(torch.cat([first[row, ids[:1]], rest]))
    return found


def follow(decoder: Decoder, answers: list[list[int]], cache: KVCache) -> list[Tensor]:
    """Of one answer per row of the cache, the log-probability of every id but the first, (ids - 1,) each."""
    counts = [len(ids) - 1 for ids in answers]
    if not any(counts):
        return [torch.zeros(0)] * len(answers)
    # The last token is only predicted, never read.
    read = pad_rows([torch.tensor(ids[:-1] or [0]) for ids in answers], 0)  # (B, C)
    h = decoder.extend(read.to(decoder.device), cache)  # (B, C, D)
    h = torch.cat([row[:count] for row, count in zip(h, counts, strict=True)])  # (L, D)
    targets = torch.tensor([token for ids in answers for token in ids[1:]], device=h.device)  # (L,)
    parts = [
        decoder.output(part).float().log_softmax(-1).gather(1, wanted[:, None]).squeeze(1)
        for part, wanted in zip(h.split(FEW), targets.split(FEW), strict=True)
    ]
    return list(torch.cat(parts).cpu().split(counts))
