"""The types of tensors in GGUF files: which are read, how large their blocks are, what is made of them."""

from __future__ import annotations

from dataclasses import dataclass

GROUP = 32  # weights of a group in MLX that share a scale and a bias


@dataclass(frozen=True)
class BlockType:
    """A type of tensor.

    Attributes:
        name: in llama.cpp.
        weights: in a block.
        size: of a block, in bytes.
        bits: of a weight, where blocks become groups that share a scale and a bias; else 0.
        dense: the type of the dense tensor.
        super_blocks: whether scales are integers of 6 bits that a block of 256 scales once more.
    """

    name: str
    weights: int
    size: int
    bits: int = 0
    dense: str = "float32"
    super_blocks: bool = False


#: number in the file -> type
TYPES = {
    0: BlockType("F32", 1, 4),
    1: BlockType("F16", 1, 2, dense="float16"),
    2: BlockType("Q4_0", 32, 18, bits=4),
    3: BlockType("Q4_1", 32, 20, bits=4),
    6: BlockType("Q5_0", 32, 22, bits=5),
    7: BlockType("Q5_1", 32, 24, bits=5),
    8: BlockType("Q8_0", 32, 34, bits=8),
    12: BlockType("Q4_K", 256, 144, bits=4, super_blocks=True),
    13: BlockType("Q5_K", 256, 176, bits=5, super_blocks=True),
    14: BlockType("Q6_K", 256, 210),
    30: BlockType("BF16", 1, 2, dense="bfloat16"),
}

#: name of a type -> its number
NUMBERS = {kind.name: number for number, kind in TYPES.items()}

#: number in the file -> name of the types that are refused
REFUSED = {
    4: "Q4_2",
    5: "Q4_3",
    9: "Q8_1",
    10: "Q2_K",
    11: "Q3_K",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
    40: "NVFP4",
    41: "Q1_0",
    42: "Q2_0",
}
