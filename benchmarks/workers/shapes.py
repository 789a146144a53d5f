"""The models that are measured, and how much arithmetic they are."""

from __future__ import annotations

from dataclasses import dataclass

#: what a LoRA step trains, in every tool
RANK = 8


@dataclass(frozen=True)
class Shape:
    """A Llama, and the rows that it is trained on.

    Attributes:
        name: what the shape is called.
        width: D.
        layers: L.
        heads: H, of D / H each unless ``head_width`` says otherwise.
        kv_heads: K.
        mlp: F.
        vocabulary: V.
        tied: whether the embedding is the output head too.
        head_width: E; 0 is D / H.
        row_tokens: tokens a row that are predicted.
        needs_gpu: whether it is measured on a GPU only.
    """

    name: str
    width: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    vocabulary: int
    tied: bool = False
    head_width: int = 0
    row_tokens: int = 256
    needs_gpu: bool = False

    @property
    def head(self) -> int:
        """E."""
        return self.head_width or self.width // self.heads

    @property
    def layer_parameters(self) -> int:
        """Parameters of the linears of all layers: q, k, v, o and the three of the mlp."""
        attention = 2 * self.width * self.head * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.width * self.mlp)

    @property
    def head_parameters(self) -> int:
        """Parameters of the output head."""
        return self.vocabulary * self.width

    @property
    def matmul_parameters(self) -> int:
        """P: all that multiply; a tied embedding counts as the head that it is."""
        return self.layer_parameters + self.head_parameters


SHAPES = (
    Shape("90m", 768, layers=12, heads=12, kv_heads=6, mlp=2048, vocabulary=8192),
    Shape("embedded", 256, layers=6, heads=4, kv_heads=2, mlp=640, vocabulary=4096, tied=True, head_width=64),
    Shape(
        "1b",
        2048,
        layers=16,
        heads=32,
        kv_heads=8,
        mlp=8192,
        vocabulary=32000,
        row_tokens=512,
        needs_gpu=True,
    ),
    Shape(
        "7b",
        4096,
        layers=32,
        heads=32,
        kv_heads=32,
        mlp=11008,
        vocabulary=32000,
        row_tokens=512,
        needs_gpu=True,
    ),
)


def train_flop(shape: Shape, tokens: int) -> int:
    """Operations of a LoRA step on ``tokens`` tokens: 4 P each.

    2 P for the forward pass and 2 P for the gradient with respect to inputs;
    the base has no weight gradient. The adapter (under 1 %), the scores of the
    attention and everything that is done again are left out: what is counted
    is what the model asks for and not what a tool does.
    """
    return 4 * shape.matmul_parameters * tokens


def decode_flop(shape: Shape, tokens: int) -> int:
    """Operations of generating ``tokens`` tokens one by one: 2 P each."""
    return 2 * shape.matmul_parameters * tokens


def prefill_flop(shape: Shape, tokens: int) -> int:
    """Operations of reading a prompt: 2 for each parameter of the layers and token, and one head."""
    return 2 * (shape.layer_parameters * tokens + shape.head_parameters)
