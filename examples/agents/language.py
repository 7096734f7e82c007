"""A language policy, torchrl's wrapper around a tiny Llama: which words of the prompt spoke for the word it says?

Each prompt tells where to go and where never to go, in either order, among words that tell nothing:

    robot please never north now go east slowly where ? east

So the word after `go` speaks for the answer, and the word after `never` against it. Needs the transformers library.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from common import Shown, gap, main
from tensordict import TensorDict, TensorDictBase
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torchrl.modules.llm import TransformersWrapper
from torchrl.modules.llm.policies import Text
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tdhook import LRP, preset
from tdhook.plots import relevance_of_tokens
from tdhook.rules import LayerNormRule
from tdhook.selectors import Type

TargetFn: TypeAlias = Callable[[TensorDictBase, TensorDictBase], TensorDictBase]

DIRECTIONS = ("north", "south", "east", "west")
FILLERS = ("robot", "please", "now", "then", "slowly", "today", "friend", "and")
WORDS = ("<pad>", "<unk>", "<end>", "go", "never", "where", "?", *DIRECTIONS, *FILLERS)
EMBEDDING, HEAD = "model.model.embed_tokens", "model.lm_head"  # inside the wrapper


def prompts(count: int, seed: int) -> tuple[list[str], list[str], list[str]]:
    """Random prompts, and for each the direction to go and the one never to go."""
    draw, texts, right, wrong = random.Random(seed), [], [], []
    for _ in range(count):
        go, never = draw.sample(DIRECTIONS, 2)
        clauses = [f"go {go}", f"never {never}"]
        draw.shuffle(clauses)
        between = [" ".join(draw.choices(FILLERS, k=draw.randint(0, 3))) for _ in range(3)]
        texts.append(
            " ".join(f"{between[0]} {clauses[0]} {between[1]} {clauses[1]} {between[2]} where ?".split())
        )
        right.append(go)
        wrong.append(never)
    return texts, right, wrong


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word; prompts are padded on the left."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<end>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, padding_side="left", **special)


def network() -> LlamaForCausalLM:
    """Untrained."""
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {"vocab_size": len(WORDS), "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 2}
    return LlamaForCausalLM(LlamaConfig(**size, **tokens, max_position_embeddings=32))


def policies(model: LlamaForCausalLM) -> tuple[TransformersWrapper, TransformersWrapper]:
    """One that answers prompts, and one that goes through prompt and answer, which is what is explained."""
    common = {"tokenizer": tokenizer(), "pad_output": True}
    one_word = {"max_new_tokens": 1, "do_sample": False}
    answers = TransformersWrapper(model, input_mode="text", generate=True, generate_kwargs=one_word, **common)
    reads = TransformersWrapper(model, input_mode="tokens", generate=False, **common)
    return answers, reads


def train(seed: int, updates: int = 700) -> dict[str, Any]:
    """Imitation of the right answers."""
    model, words = network(), tokenizer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    for number in range(updates):
        texts, right, _ = prompts(64, seed + number)
        batch = words(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
        logits = model(**batch).logits[:, -1]
        loss = nn.functional.cross_entropy(logits, torch.tensor(words.convert_tokens_to_ids(right)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    facts = {"seed": seed, "prompts": 64 * updates, "parameters": sum(p.numel() for p in model.parameters())}
    return {"weights": model.state_dict(), "facts": facts}


def say(answers: TransformersWrapper, texts: list[str]) -> tuple[Tensor, list[str]]:
    """Prompts with the word that the policy says, ``[prompts, words + 1]``, padded on the left; and that word."""
    batch = [len(texts)]
    with torch.no_grad():
        answered = answers(TensorDict(text=Text(prompt=texts, batch_size=batch), batch_size=batch))
    return answered["tokens"].full, list(answered["text"].response)


def why_not(tokens: Tensor, never: Tensor) -> TargetFn:
    """The logit of the word that was said, less that of another, ``[prompts]``, before the last word."""

    def difference(outputs: TensorDictBase, inputs: TensorDictBase) -> TensorDictBase:
        logits = outputs[HEAD]
        relevance, each = torch.zeros_like(logits), torch.arange(len(logits))
        relevance[each, -2, tokens[:, -1]] = logits[each, -2, tokens[:, -1]]
        relevance[each, -2, never] -= logits[each, -2, never]
        return TensorDict({HEAD: relevance}, batch_size=outputs.batch_size)

    return difference


def explain(checkpoint: dict[str, Any], seed: int) -> Shown:
    """Why the direction that it names, and not the one that it was told never to take?"""
    model = network().eval()
    model.load_state_dict(checkpoint["weights"])
    answers, reads = policies(model)
    texts, right, wrong = prompts(128, 10_000 + seed)
    tokens, said = say(answers, texts)
    never = torch.tensor(tokenizer().convert_tokens_to_ids(wrong))

    lrp = LRP(
        [(Type("*RMSNorm"), LayerNormRule()), *preset("attn_lrp")],
        target=why_not(tokens, never),
        use_inputs=False,
        input_modules=[EMBEDDING],
        target_modules=[HEAD],
        ledger=True,
    )
    with lrp.prepare(reads) as explained:
        explained = explained(TensorDict({("tokens", "full"): tokens}, batch_size=[len(texts)]))
    relevance = explained["attr", EMBEDDING].sum(-1)  # [prompts, words + 1]

    found, shown = 0, []
    for text, amounts, answer in zip(texts, relevance, right, strict=True):
        words = text.split()
        amounts = amounts[-1 - len(words) : -1]
        found += words[int(amounts.argmax())] == answer
        shown.append((words, amounts))
    correct = sum(map(str.__eq__, said, right))
    lines = [
        f"right answers: {correct} of {len(texts)}",
        f"the word of most relevance is the one that tells the answer: {found} of {len(texts)} prompts",
    ]
    some = shown[:8]
    figure = relevance_of_tokens(
        [words for words, _ in some],
        [amounts for _, amounts in some],
        labels=said[:8],
        title="Which words spoke for the answer (left), and not for the direction never to take",
    )
    return Shown(figure, gap(explained), lines)


if __name__ == "__main__":
    main("language", train, explain)
