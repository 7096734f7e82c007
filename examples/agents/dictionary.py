"""A sparse dictionary of what the language policy holds in mind: which of its features carried the decision?

A TopK autoencoder (Gao et al. 2024) is trained on the stream between the two layers of the policy of `language.py`, and
spliced in there. The policy says what it said; relevance goes through the features. Each is named by the words on which
it is active, and the word that it had most relevance for.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from common import CHECKPOINTS, Shown, gap, main
from language import DIRECTIONS, HEAD, WORDS, network, policies, prompts, say, tokenizer, why_not
from tensordict import TensorDict
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from tdhook import LRP, preset
from tdhook.concepts import Spliced, SplicedModel
from tdhook.plots import relevance_matrix
from tdhook.rules import LayerNormRule
from tdhook.selectors import Type

LAYER = "model.model.layers.0"
FEATURES = f"{LAYER}.features"
WIDTH, COUNT, ACTIVE = 32, 96, 6


class Autoencoder(nn.Module):
    """The largest of so many features are kept at each position."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(WIDTH, COUNT), nn.Linear(COUNT, WIDTH)

    def encode(self, h: Tensor) -> Tensor:
        """``[..., width] -> [..., features]``."""
        z = torch.relu(self.encoder(h - self.decoder.bias))
        values, index = z.topk(ACTIVE, -1)
        return torch.zeros_like(z).scatter(-1, index, values)

    def decode(self, features: Tensor) -> Tensor:
        """``[..., features] -> [..., width]``."""
        made: Tensor = self.decoder(features)
        return made


def policy() -> LlamaForCausalLM:
    """The one that `language.py` trained."""
    model = network().eval()
    stored = torch.load(CHECKPOINTS / "language.pt", map_location="cpu", weights_only=True)
    model.load_state_dict(stored["weights"])
    return model


def stream(model: LlamaForCausalLM, count: int, seed: int) -> Tensor:
    """What is between the layers at each word of some prompts, ``[words, width]``."""
    texts, _, _ = prompts(count, seed)
    batch = tokenizer()(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        hidden = model(**batch, output_hidden_states=True).hidden_states[1]
    rows: Tensor = hidden[batch["attention_mask"].bool()]
    return rows


def train(seed: int, updates: int = 4000) -> dict[str, Any]:
    """By the error of the reconstruction; features that are never active begin anew at what is reconstructed worst."""
    torch.manual_seed(seed)
    rows = stream(policy(), 4000, 20_000 + seed)
    model = Autoencoder()
    with torch.no_grad():
        model.decoder.bias.copy_(rows.mean(0))
        model.encoder.weight.copy_(nn.functional.normalize(model.decoder.weight, dim=0).T)
        model.encoder.bias.zero_()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    seen = torch.zeros(COUNT)
    for number in range(updates):
        batch = rows[torch.randint(len(rows), (512,))]
        features = model.encode(batch)
        errors = (model.decode(features) - batch).square().sum(-1)
        optimizer.zero_grad()
        errors.mean().backward()
        optimizer.step()
        with torch.no_grad():
            seen += (features > 0).sum(0)
            model.decoder.weight.copy_(nn.functional.normalize(model.decoder.weight, dim=0))
            if number % 400 == 399 and number < updates * 0.75:
                dead = (seen == 0).nonzero().squeeze(1)
                worst = (batch - model.decode(features))[errors.topk(len(dead)).indices]
                model.decoder.weight[:, dead] = nn.functional.normalize(worst, dim=1).T
                model.encoder.weight[dead] = model.decoder.weight[:, dead].T
                model.encoder.bias[dead] = 0.0
                seen.zero_()
    test = stream(policy(), 500, 30_000 + seed)
    with torch.no_grad():
        left = (model.decode(model.encode(test)) - test).square().sum() / (test - rows.mean(0)).square().sum()
    facts = {"seed": seed, "features": COUNT, "active": ACTIVE, "unexplained_variance": round(left.item(), 4)}
    return {"weights": model.state_dict(), "facts": facts}


def explain(checkpoint: dict[str, Any], seed: int) -> Shown:
    """Which features carried the direction that it names, and not the one that it was told never to take?"""
    dictionary = Autoencoder().eval()
    dictionary.load_state_dict(checkpoint["weights"])
    answers, reads = policies(policy())
    texts, _, wrong = prompts(256, 10_000 + seed)
    tokens, said = say(answers, texts)
    never = torch.tensor(tokenizer().convert_tokens_to_ids(wrong))

    lrp = LRP(
        [(Type("*RMSNorm"), LayerNormRule()), *preset("cp_lrp")],
        target=why_not(tokens, never),
        use_inputs=False,
        input_modules=[FEATURES],
        target_modules=[HEAD],
        values=True,
        ledger=True,
    )
    spliced = Spliced({LAYER: dictionary}, axis=-1, element=0).on(reads)
    wrapped = lrp.wrap(spliced)
    explained = wrapped(TensorDict({("tokens", "full"): tokens}, batch_size=[len(texts)]))
    relevance, values = (
        explained["attr", FEATURES],
        explained["value", FEATURES],
    )  # [prompts, words, features]
    kept = sum(entry.of("reconstruction") for entry in wrapped.ledger.entries)
    target = explained["ledger", "target"]

    each = relevance.sum(1)  # [prompts, features]
    by_word = torch.stack([each[[word == way for word in said]].mean(0) for way in DIRECTIONS])
    top = by_word.amax(0).topk(8).indices
    top = top[by_word[:, top].argmax(0).sort(stable=True).indices]  # by direction
    named = [f"{i}: {name_of(values[:, :-1, i], tokens)}" for i in top.tolist()]
    share = (each.topk(3, dim=1).values.sum(1) / target).mean().item()
    lines = [
        f"the three features of most relevance carry {share:.0%} of what is explained, of {COUNT}",
        f"the reconstruction error keeps {(kept.abs().sum() / target.abs().sum()).item():.1%}",
    ]
    for how, amounts in (("relevance", each), ("activation", values[:, :-1].sum(1))):
        changed = []
        for count in (1, 3, 5):
            without = answers_without(amounts.topk(count, dim=1).indices, spliced, tokens)
            changed.append(f"{(without != tokens[:, -1]).float().mean().item():.0%}")
        lines.append(
            f"answers that change without the one, three and five of most {how}: {', '.join(changed)}"
        )
    figure = relevance_matrix(
        by_word[:, top],
        [f"said {way}" for way in DIRECTIONS],
        named,
        "Which features of the dictionary spoke for the answer",
    )
    return Shown(figure, gap(explained), lines)


def name_of(values: Tensor, tokens: Tensor) -> str:
    """The word at which a feature, ``[prompts, words]``, is most active, and behind which word."""
    sums: Counter[tuple[str, str]] = Counter()
    for prompt, position in (values > 0).nonzero().tolist():
        before = WORDS[tokens[prompt, position - 1]] if position else ""
        sums[before, WORDS[tokens[prompt, position]]] += values[prompt, position].item()
    (before, word), most = sums.most_common(1)[0]
    alone = most > 0.9 * sum(sums.values())
    return f"{before} {word}" if alone else word


def answers_without(features: Tensor, spliced: SplicedModel, tokens: Tensor) -> Tensor:
    """What the policy would say if some features, ``[prompts, some]``, were zero."""
    gone = torch.zeros(len(tokens), COUNT).scatter(1, features, 1.0).bool().unsqueeze(1)

    def remove(module: nn.Module, args: object, found: Tensor) -> Tensor:
        return found.masked_fill(gone, 0.0)

    logits: list[Tensor] = []
    head = dict(spliced.named_modules())[HEAD]
    hooks = [
        spliced.feature_modules[LAYER].register_forward_hook(remove),
        head.register_forward_hook(lambda module, args, found: logits.append(found)),
    ]
    with torch.no_grad():
        spliced(TensorDict({("tokens", "full"): tokens}, batch_size=[len(tokens)]))
    for hook in hooks:
        hook.remove()
    return logits[0][:, -2].argmax(-1)


if __name__ == "__main__":
    main("dictionary", train, explain)
