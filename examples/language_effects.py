"""Where the language policy keeps the way to go: the words after `go` and `never` change places, part by part.

    python examples/language_effects.py

The clean prompt says `go east ... never north`, the corrupt one `go north ... never east`. For each part of the policy
at each word it prints what its clean value restores in the corrupt run: of the logit of the clean answer, less that of
the other, by LRP between both runs for all parts at once, and by a forward pass for each. Needs the transformers
library.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook.attribution import Patching
from tdhook.evaluation import ApproximatedEffects, compare_effects

sys.path.insert(0, str(Path(__file__).parent / "agents"))  # where the policy's own script is

from common import CHECKPOINTS
from language import network, prompts, tokenizer

LAYERS = [f"model.model.layers.{i}" for i in range(2)]
KINDS = {
    "attention": [f"{layer}.self_attn.o_proj" for layer in LAYERS],
    "MLP": [f"{layer}.mlp" for layer in LAYERS],
    "residual stream": ["model.model.embed_tokens", *LAYERS],
}


class Difference(nn.Module):
    """The logit of one answer less that of another, after the last word of a prompt."""

    def __init__(self) -> None:
        super().__init__()
        self.model = network().eval().requires_grad_(False)

    def forward(self, words: Tensor, mask: Tensor, right: Tensor, wrong: Tensor) -> Tensor:
        logits = self.model(input_ids=words, attention_mask=mask, use_cache=False).logits[:, -1]
        return (logits.gather(1, right) - logits.gather(1, wrong))[:, 0]


def both(count: int, seed: int) -> TensorDict:
    """Clean and corrupt prompts, ``[count]``: what is the same in both lies at its own key."""
    words = tokenizer()
    texts, right, wrong = prompts(count, seed)
    swapped = [
        " ".join({go: never, never: go}.get(word, word) for word in text.split())
        for text, go, never in zip(texts, right, wrong, strict=True)
    ]
    td = TensorDict({}, [count])
    for side, some in (("clean", texts), ("corrupt", swapped)):
        read = words(some, padding=True, return_tensors="pt", return_token_type_ids=False)
        td[side, "words"], td["mask"] = read["input_ids"], read["attention_mask"]
    td["right"], td["wrong"] = (
        torch.tensor(words.convert_tokens_to_ids(answers)).unsqueeze(1) for answers in (right, wrong)
    )
    return td


def compare(td: TensorDict) -> ApproximatedEffects:
    """By token: RelP beside what is patched for real."""
    model = Difference()
    checkpoint = torch.load(CHECKPOINTS / "language.pt", map_location="cpu", weights_only=True)
    model.model.load_state_dict(checkpoint["weights"])
    at = [place for places in KINDS.values() for place in places]
    places = {"at": at, "axis": 1, "input_modules": ["model.model.embed_tokens"], "use_inputs": False}
    relp = Patching("by_share", **places)
    keys = ["words", "mask", "right", "wrong"]
    return compare_effects({"RelP": relp}, model, td, kinds=KINDS, in_keys=keys, out_keys=["value"])


def main() -> None:
    """Print, for each part, its mean effect at the two words that change places, at the last word, and elsewhere."""
    torch.set_num_threads(1)
    td = both(48, 777)
    found = compare(td)
    swapped = td["clean", "words"] != td["corrupt", "words"]
    last = torch.zeros_like(swapped)
    last[:, -1] = True
    where = {"the two words": swapped, "the last word": last, "elsewhere": ~(swapped | last)}
    print(f"{'':34}" + "".join(f"{name:>22}" for name in where))
    print(f"{'':34}" + f"{'RelP':>14}{'exact':>8}" * len(where))
    for place, exact in found.exact.items():
        cells = ""
        for chosen in where.values():
            sums = ((x * chosen).sum(1).mean() for x in (found.approximated["RelP"][place], exact))
            cells += "{:14.2f}{:8.2f}".format(*sums)
        print(f"{place:34}{cells}")
    for kind in KINDS:
        print(f"{kind}: Pearson {found.of('RelP', kind).pearson:.2f}")


if __name__ == "__main__":
    main()
